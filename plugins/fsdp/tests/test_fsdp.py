"""Two ranks over gloo that share a model, against loops written by hand and against one rank."""

import contextlib
import functools
import itertools
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from hookline import CallbackInterface, Stage, hookimpl, set_seed
from hookline.counters import Cursor
from hookline.data import mix, sampler_class
from hookline.testing import (
    PlainModule,
    TinyModule,
    assert_one_model,
    check_plugin,
    digest,
    on_ranks,
    run_ranks,
    tiny_trainer,
    train_tiny,
)
from hookline_fsdp import Fsdp, whole
from hookline_fsdp.meta import give_values

pytestmark = pytest.mark.xdist_group("ranks")


def share_of(trainer):
    """Return how much of the model is here."""
    parameters = list(trainer.module.parameters())
    here = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters)
    return here / sum(p.numel() for p in parameters)


def look(trainer):
    return trainer.module.seen, share_of(trainer)


def train(plugin, states=(), window=1, dropout=0.0, others=None, module=PlainModule, **options):
    plugins = {"fsdp": Fsdp(**plugin), **({"accumulate": {"steps": window}} if window > 1 else {}), **(others or {})}
    options |= {"keep": True, "begin": states, "look": look, "train_batch_size": 12 * window}
    return train_tiny(plugins, functools.partial(module, dropout), **options)


def on_two(*arguments, **keywords):
    return on_ranks(train, 2, *arguments, **keywords)


class Apart(PlainModule):
    """Begins with other weights on each rank."""

    def __init__(self, dropout=0.0):
        super().__init__(dropout)
        with torch.no_grad():
            self.net[0].weight.add_(float(os.environ.get("RANK", "0")))


def without_clock(state):
    trainer = {**state["trainer"], "counters": {**state["trainer"]["counters"], "seconds": 0}}
    return digest({**state, "trainer": trainer})


@pytest.mark.plugins
def test_contract():
    check_plugin(Fsdp)


@pytest.mark.plugins
@pytest.mark.parametrize(("plugin", "window"), [({"wrap": ["Linear"]}, 1), ({"reshard_after_forward": False}, 2)])
def test_two_ranks_are_one_within_rounding(plugin, window):
    one, other = on_two(plugin, window=window, module=Apart)
    alone = train({}, window=window)
    assert_one_model([one, other], alone)
    assert one.metrics == one.again
    assert 0.4 < one.looked[1] < 0.6
    steps = 4 if window == 1 else 2
    assert {*one.states} == {*alone.states} == {*range(1, 2 * steps + 1)}
    epoch = [index for rank in (one, other) for batch in rank.looked[0][:4] for index in batch]
    assert sorted(epoch) == list(range(48))


class Normed(TinyModule):
    """Trains with what it keeps in buffers: running statistics of batch norm, and a mean of its inputs of its own."""

    def __init__(self, dropout=0.0):
        super().__init__(samples=48, dropout=dropout)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def train_step(self, global_step, batch, device):
        inputs, targets, ids = batch
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.3 * inputs.mean(0))
        self.count += len(inputs)
        return super().train_step(global_step, (inputs - self.mean, targets, ids), device)


@pytest.mark.plugins
def test_all_ranks_have_the_buffers_of_rank_0_and_a_validation_changes_nothing():
    by_hand, _ = on_ranks(loop_by_hand, 2, Normed, 0.0, 2)
    runs = [on_two({"wrap": ["Linear"]}, None, 2, module=Normed, evaluate_every=every) for every in (None, "1 steps")]
    for ranks in runs:
        for step, state in ranks[0].states.items():
            assert digest(state["module"]) == digest(ranks[1].states[step]["module"])
        assert {digest(rank.weights) for rank in ranks} == {digest(by_hand)}
        assert int(ranks[0].weights["count"]) == 8 * 6  # each of its own batches once
    states = [rank.states for rank in runs[0]]
    resumed = on_two({"wrap": ["Linear"]}, [rank[1] for rank in states], 2, module=Normed, evaluate_every=None)
    for rank, again in zip(states, resumed, strict=True):
        assert without_clock(again.states[4]) == without_clock(rank[4])


@pytest.mark.plugins
def test_ranks_may_have_buffers_of_their_own():
    one, other = on_two({"broadcast_buffers": False}, module=Normed, evaluate_every="1 steps")
    assert not torch.equal(one.weights["mean"], other.weights["mean"])
    assert torch.equal(one.weights["net.0.weight"], other.weights["net.0.weight"])


class Some(PlainModule):
    """Is evaluated on as many samples as one asks for, and counts them."""

    def __init__(self, samples):
        super().__init__()
        self.samples, self.shared = samples, []

    def get_val_dataloaders(self, sampler, batch_size):
        dataset = TensorDataset(*(tensor[: self.samples] for tensor in (self.inputs, self.targets, torch.arange(48))))
        return DataLoader(dataset, batch_size=batch_size, sampler=sampler(dataset))

    get_predict_dataloaders = get_val_dataloaders

    def val_step(self, global_step, batch, device):
        outputs = super().val_step(global_step, batch, device)
        self.log(samples=float(len(batch[0])), over="epoch", reduce="sum", sync=True)
        return outputs

    @hookimpl
    def on_end_val_step(self):
        self.shared.append(share_of(self.trainer))

    @hookimpl
    def on_end_predict_step(self, batch):
        self.seen.append(batch[2].tolist())


def evaluate_some(samples, plugin=None):
    torch.set_num_threads(1)
    trainer = tiny_trainer({"fsdp": Fsdp(**(plugin or {}))}, Some(samples), train_batch_size=12, val_batch_size=4)
    metrics = trainer.validate()
    trainer.predict()
    return metrics, sorted(itertools.chain(*trainer.module.seen)), trainer.module.shared


@pytest.mark.plugins
@pytest.mark.parametrize("samples", [1, 5, 16, 33])
@pytest.mark.parametrize("reshard", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ranks_with_other_numbers_of_batches_evaluate_each_sample_once(samples, reshard):
    plugin = {"wrap": ["Linear"], "reshard_after_forward": reshard}
    (metrics, seen, shared), (metrics_of_other, seen_by_other, _) = on_ranks(evaluate_some, 2, samples, plugin)
    expected, _, _ = evaluate_some(samples)
    assert metrics == metrics_of_other == pytest.approx(expected)
    assert metrics["samples"] == samples
    assert sorted(seen + seen_by_other) == list(range(samples))
    if reshard and samples > 1:  # else the whole model is there, since one rank has nothing to do
        assert all(0.4 < share < 0.6 for share in shared)


class Counting(Some):
    """Counts samples in every way one may, in 9 of which one rank has a batch more than the other."""

    def __init__(self):
        from torchmetrics import CatMetric, MeanMetric, MetricCollection, SumMetric

        super().__init__(9)
        self.metrics = MetricCollection({"mean": MeanMetric(), "again": MeanMetric(), "sum": SumMetric()})
        self.values = CatMetric()
        self.norm = torch.nn.BatchNorm1d(8, affine=False)
        self.register_buffer("counted", torch.zeros((), dtype=torch.int64))
        self.register_buffer("replaced", torch.zeros(()))
        self.total, self.ids, self.by_loader = 0, [], {"default": []}
        self.in_place = torch.zeros(())

    def val_step(self, global_step, batch, device):
        inputs, _, ids = batch
        self.norm.train()(inputs[:, :, None].expand(-1, -1, 2))  # batch norm refuses a batch of one
        loss, *others = super().val_step(global_step, batch, device)
        self.metrics.update(inputs[:, 0])
        self.values.update(inputs[:, 0])
        self.counted += len(ids)
        self.replaced = self.replaced + len(ids)
        self.total += len(ids)
        self.ids += ids.tolist()
        self.by_loader["default"].append(ids)
        self.by_loader.setdefault("other", []).append(ids)
        self.in_place += len(ids)
        return loss, *others

    def on_end_val_epoch(self, global_step, *outputs):
        self.log(**{name: value for name, value in self.metrics.compute().items() if name != "sum"})


def count_in_evaluation(plugins):
    torch.set_num_threads(1)
    module = Counting()
    metrics = tiny_trainer(plugins, module, val_batch_size=4, train_batch_size=12).validate()
    nested = [ids for kept in module.by_loader.values() for batch in kept for ids in batch.tolist()]
    counts = (int(module.counted), int(module.replaced), module.total, len(module.ids), len(nested) / 2)
    values = module.values.value  # of this rank
    return metrics, counts, torch.cat(values).tolist(), float(module.in_place), int(module.norm.num_batches_tracked)


@pytest.mark.plugins
def test_a_batch_that_only_keeps_ranks_in_step_counts_nowhere_in_the_module():
    outcomes = run_ranks(count_in_evaluation, 2, {"fsdp": Fsdp(wrap=["Linear"])})
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].output + outcomes[1].output
    one, other = (outcome.value for outcome in outcomes)
    alone = count_in_evaluation({})
    assert one[0] == other[0] == pytest.approx(alone[0])
    assert (one[1], other[1], alone[1]) == ((5,) * 5, (4,) * 5, (9,) * 5)
    assert sorted(one[2] + other[2]) == sorted(alone[2])
    assert (one[4], other[4]) == (2, 1)
    assert (one[3], other[3]) == (5, 8)  # what cannot be put back is said
    assert "has changed the tensor in_place of the module in place, so it counts there: make it" in outcomes[1].output
    assert "in_place" not in outcomes[0].output


def loop_by_hand(kind, dropout=0.0, window=1):
    """Train as one would with `fully_shard`, with the buffers of rank 0 in each forward."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    store = dist.TCPStore("localhost", int(os.environ["MASTER_PORT"]), 2, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    module = kind(dropout)
    set_seed(mix(0, rank))
    for layer in [layer for layer in module.net if isinstance(layer, torch.nn.Linear)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    (optimizer,), (scheduler,) = module.get_optimizers_schedulers(4 // window, 2)
    cursor = Cursor(seed=0)
    sampler = sampler_class(cursor, shuffle=True, share=rank, shares=2)
    for epoch in range(2):
        cursor.begin_epoch(epoch)
        loader = module.get_train_dataloader(sampler, 6)
        loader.generator = torch.Generator()
        for number, batch in enumerate(loader, 1):
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)
            loss, _ = module(stage=Stage.TRAIN, global_step=1, batch=batch, device="cpu")
            module.set_requires_gradient_sync(number % window == 0)
            (loss / window).backward()
            if number % window == 0:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    for buffer in module.buffers():
        dist.broadcast(buffer, src=0)
    return whole(module.state_dict())


@pytest.mark.plugins
def test_the_same_bits_as_a_loop_written_by_hand():
    by_hand, _ = on_ranks(loop_by_hand, 2, PlainModule, 0.3)
    one, _ = on_two({"wrap": ["Linear"]}, dropout=0.3)
    assert digest(one.weights) == digest(by_hand)


@pytest.mark.plugins
def test_a_resume_has_the_same_bits_and_other_numbers_of_ranks_go_on():
    whole = on_two({"wrap": ["Linear"]}, dropout=0.3)
    states = [rank.states for rank in whole]
    resumed = on_two({"wrap": ["Linear"]}, [rank[3] for rank in states], dropout=0.3)
    for rank, again in zip(states, resumed, strict=True):
        assert without_clock(again.states[8]) == without_clock(rank[8])
    assert digest(states[0][8]["module"]) == digest(states[1][8]["module"])

    two = on_two({})
    alone = train({})
    torch.testing.assert_close(train({}, [two[0].states[3]]).weights, alone.weights)  # 2 -> 1
    torch.testing.assert_close(on_two({}, [alone.states[3]] * 2)[0].weights, alone.weights)  # 1 -> 2


@pytest.mark.plugins
@pytest.mark.slow
def test_copies_of_a_sharded_model_and_half_precision():
    assert_one_model(on_ranks(train, 4, {"replicas": 2, "wrap": ["Linear"]}), train({}))
    half, _ = on_two({"param_dtype": "bfloat16", "reduce_dtype": "float32", "min_parameters": 100, "wrap": ["Linear"]})
    for name, weight in train({}).weights.items():
        assert half.weights[name].dtype == torch.float32
        torch.testing.assert_close(half.weights[name], weight, rtol=0.1, atol=0.05)


@pytest.mark.plugins
def test_on_a_cpu_shares_are_in_the_memory_of_the_host_in_any_case():
    assert digest(on_two({"cpu_offload": True})[0].weights) == digest(on_two({})[0].weights)


@pytest.mark.plugins
def test_with_clipping_an_average_and_a_check_of_finiteness():
    others = {"clip": {"max_norm": 0.05}, "ema": {"decay": 0.9}, "finite": {"every": "1 steps"}}
    one, other = on_two({"wrap": ["Linear"]}, others=others)
    alone = train({}, others=others)
    assert_one_model([one, other], alone)


@pytest.mark.plugins
def test_clipping_by_the_largest_value_where_a_rank_has_an_empty_share():
    """The last layer has one row, so one of two ranks has none of it."""
    clip = {"clip": {"max_norm": 0.02, "norm_type": float("inf")}}
    one, other = on_two({"wrap": ["Linear"]}, others=clip)
    alone = train({}, others=clip)
    assert_one_model([one, other], alone)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(alone.weights, train({}).weights)  # there was something to clip


# Blocks that the module answers, and other plugins ------------------------------------


class Answering(PlainModule):
    def get_blocks(self):
        return [self.net[0], self.net[3]]


class Stranger(PlainModule):
    def get_blocks(self):
        return [torch.nn.Linear(1, 1)]


def blocks_of(module, **options):
    trainer = train_trainer(Fsdp(**options), module)
    return [name for name, part in trainer.module.named_modules() if isinstance(part, FSDPModule)]


def train_trainer(plugin, module, others=None, **options):
    torch.set_num_threads(1)
    plugins = {"fsdp": plugin, **(others or {})}
    trainer = tiny_trainer(plugins, module(), **{"train_batch_size": 12, "epochs": 1, **options})
    trainer.train()
    return trainer


def several_blocks():
    return blocks_of(Answering), blocks_of(Answering, min_parameters=100), blocks_of(Answering, wrap=["ReLU"])


@pytest.mark.plugins
def test_the_module_may_answer_its_blocks():
    for blocks in on_ranks(several_blocks, 2):
        assert blocks == (["", "net.0", "net.3"], ["", "net.0"], ["", "net.1"])


class Dropping(Answering):
    def __init__(self):
        super().__init__(dropout=0.3)

    def get_blocks(self):
        return [self.net]


def with_blocks(others):
    trainer = train_trainer(Fsdp(), Dropping, others)
    return digest(trainer.export_model()), [name for name, _ in trainer.module.named_parameters()]


@pytest.mark.plugins
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_the_same_blocks_checkpointed_compiled_and_shared():
    both = {"compile": {"backend": "aot_eager", "fullgraph": True}, "activation_checkpoint": {}}
    plain, compiled = on_ranks(with_blocks, 2, {}), on_ranks(with_blocks, 2, both)
    assert compiled == plain
    assert compiled[0][1] == [name for name, _ in PlainModule().named_parameters()]


class Overflows(CallbackInterface):
    """Has the gradients of which one rank has the share overflow in one step, and keeps what came of each."""

    def __init__(self, rank, step):
        self.rank, self.step, self.stepped = rank, step, []

    @hookimpl
    def on_end_backward(self, trainer):
        if (trainer.rank, trainer.global_step) == (self.rank, self.step):
            trainer.module.net[0].weight.grad.to_local().fill_(torch.inf)

    @hookimpl
    def on_end_train_step(self, stepped):
        self.stepped.append(stepped)


def with_scaler(rank, options):
    overflows = Overflows(rank, 2)
    amp = {"precision": "fp16", "init_scale": 64.0}
    trainer = train_trainer(
        Fsdp(wrap=["Linear"], **options), PlainModule, {"amp": amp, "overflows": overflows}, epochs=2
    )
    scale = trainer.plugins.get_plugin("amp").get_state()
    return digest(trainer.export_model()), overflows.stepped, scale, trainer.counters.skipped_steps


@pytest.mark.plugins
@pytest.mark.parametrize("options", [{}, {"param_dtype": "float16", "reduce_dtype": "float32"}])
def test_the_scaler_of_fp16_skips_on_all_ranks_what_overflows_on_one(options):
    one, other = on_ranks(with_scaler, 2, 1, options)
    assert one == other
    _, stepped, scale, skipped = one
    assert stepped == [True, True, False, True, True, True, True, True]
    assert (scale["scale"], skipped) == (32.0, 1)
    again, _ = on_ranks(with_scaler, 2, 0, options)
    assert again == one  # the step is left out whichever rank it overflows on


def two_precisions():
    train_trainer(Fsdp(param_dtype="float16"), PlainModule, {"amp": {"precision": "bf16"}})


@pytest.mark.plugins
def test_two_precisions_are_refused():
    message = "ValueError: fsdp.param_dtype=float16, and steps run under autocast of bfloat16, which would cast once"
    for outcome in run_ranks(two_precisions, 2):
        assert outcome.code == 1
        assert message in outcome.output


# A module that is made without memory -------------------------------------------------


class Layer(torch.nn.Module):
    """A block with a parameter and buffers of its own, and batch norm's."""

    def __init__(self, size=64):
        super().__init__()
        self.linear = torch.nn.Linear(size, size)
        self.norm = torch.nn.BatchNorm1d(size)
        self.drop = torch.nn.Dropout(0.2)
        self.scale = torch.nn.Parameter(torch.ones(size))
        self.register_buffer("shift", torch.zeros(size))
        self.register_buffer("order", torch.arange(size), persistent=False)
        self.reset_parameters()

    def reset_parameters(self):
        torch.nn.init.normal_(self.linear.weight, std=0.1)  # of a part within
        torch.nn.init.uniform_(self.scale)
        self.shift.zero_()
        self.order.copy_(torch.arange(len(self.order), device=self.order.device))

    def forward(self, x):
        return x + self.scale[self.order] * self.drop(torch.relu(self.norm(self.linear(x)))) + self.shift


class Large(TinyModule):
    """Ten layers, of which one at a time may be whole; two have one weight."""

    def __init__(self):
        with torch.device("cpu"):
            super().__init__(samples=48)
        linear = torch.nn.Linear
        layers = [Layer() for _ in range(10)]
        self.net = torch.nn.Sequential(linear(8, 64), linear(64, 64), *layers, linear(64, 64), linear(64, 1))
        self.net[-2].weight = self.net[1].weight


class Peak(TorchDispatchMode):
    """The largest number of bytes that tensors had at once."""

    def __init__(self):
        super().__init__()
        self.peak, self._alive = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        answer = func(*args, **(kwargs or {}))
        for tensor in answer if isinstance(answer, (list, tuple)) else [answer]:
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self._alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {place: kept for place, kept in self._alive.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return answer


class Until(CallbackInterface):
    """Measures until training begins, and keeps the weights that it begins with."""

    def __init__(self, measuring):
        self.measuring, self.begun = measuring, None

    @hookimpl(tryfirst=True)
    def on_begin_train(self, trainer):
        self.measuring.close()
        tensors = {**trainer.module.state_dict(), **dict(trainer.module.named_buffers())}
        self.begun = {name: whole_of(tensor) for name, tensor in tensors.items()}


def whole_of(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def train_meta(meta=True, module=Large, others=None, replicas=1, **options):
    torch.set_num_threads(1)
    peak = Peak()
    with contextlib.ExitStack() as measuring:  # also where the run fails: a mode left on slows every later test
        measuring.enter_context(peak)
        until = Until(measuring)
        plugins = {"fsdp": Fsdp(meta=meta, wrap=["Layer"], replicas=replicas), "until": until, **(others or {})}
        trainer = tiny_trainer(
            plugins, functools.partial(module) if meta else module(), **{"train_batch_size": 12, "epochs": 1, **options}
        )
        trainer.train()
    size = sum(weight.numel() * weight.element_size() for weight in trainer.module.parameters())
    return {
        "begun": until.begun,
        "peak": peak.peak / size,
        "weights": trainer.export_model(),
        "tied": trainer.module.net[-2].weight is trainer.module.net[1].weight,
    }


@pytest.mark.plugins
def test_a_module_without_memory_is_never_whole_and_begins_the_same_on_any_number_of_ranks():
    one, other = on_ranks(train_meta, 2)
    alone = train_meta()
    assert digest(one["begun"]) == digest(other["begun"]) == digest(alone["begun"])
    assert one["peak"] < 0.75
    assert train_meta(meta=False)["peak"] > 1
    assert one["tied"]
    assert alone["tied"]
    assert torch.equal(one["begun"]["net.3.order"], torch.arange(64))
    assert 0.09 < one["begun"]["net.3.linear.weight"].std() < 0.11
    assert not torch.equal(one["begun"]["net.3.scale"], one["begun"]["net.4.scale"])
    assert digest(one["weights"]) == digest(other["weights"])
    assert one["weights"].keys() == train_meta(meta=False)["weights"].keys()


@pytest.mark.plugins
@pytest.mark.slow
def test_a_resume_of_a_module_without_memory_has_the_same_bits(tmp_path):
    def run(name, **options):
        options = {"runs_folder": str(tmp_path), "run_name": name, **options}
        return [digest(rank["weights"]) for rank in on_ranks(train_meta, 2, others={"checkpoint": {}}, **options)]

    whole = run("whole")
    assert run("cut", max_steps=2) != whole
    assert run("cut", resume=True) == whole


@pytest.mark.plugins
@pytest.mark.slow
def test_a_module_without_memory_on_copies_of_a_sharded_model():
    ranks = on_ranks(train_meta, 4, replicas=2, others={"ema": {}, "clip": {}})
    assert len({digest(rank["begun"]) for rank in ranks}) == 1
    assert digest(ranks[0]["begun"]) == digest(train_meta()["begun"])
    assert len({digest(rank["weights"]) for rank in ranks}) == 1


class Split(TinyModule):
    def __init__(self):
        with torch.device("cpu"):
            super().__init__(samples=48)
        inner = [torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16)) for _ in "ab"]
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), *inner, torch.nn.Linear(16, 64), torch.nn.Linear(64, 1))


def begin_split(others):
    torch.set_num_threads(1)
    until = Until(contextlib.ExitStack())
    plugins = {"fsdp": Fsdp(wrap=["Sequential"], meta=True), "until": until, **others}
    trainer = tiny_trainer(plugins, functools.partial(Split), train_batch_size=12, epochs=1)
    trainer.train()
    return until.begun, trainer.export_model()


@pytest.mark.plugins
@pytest.mark.slow
def test_a_module_without_memory_whose_layers_are_split():
    split = {"tp": {"size": 2, "plan": {"net.1.0": "column", "net.1.2": "row", "net.2.0": "column", "net.2.2": "row"}}}
    four = on_ranks(begin_split, 4, split)
    alone, trained = begin_split({})
    assert {digest(begun) for begun, _ in four} == {digest(alone)}
    torch.testing.assert_close(four[0][1], trained)


class Forgets(Large):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.register_buffer("places", torch.arange(3))


class HalfForgets(Large):
    """Sets one half of it."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(4))

    def reset_parameters(self):
        self.gain[:2].fill_(1.0)


class SetsAll(Large):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(4))

    def reset_parameters(self):
        for weight in self.parameters():
            torch.nn.init.normal_(weight)


class HasData(Large):
    def __init__(self):
        super().__init__()
        self.inputs = torch.randn(48, 8)


@pytest.mark.plugins
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            Forgets,
            r"fsdp\.meta: nobody gives first values to gain \(Forgets\), mask \(Forgets\), places \(Forgets\): the "
            r"class of each must have a method reset_parameters\(\)",
        ),
        (HalfForgets, r"nobody gives first values to gain \(HalfForgets\): the class"),
        (HasData, r"fsdp\.meta=true, and HasData\.inputs is a tensor without values that is neither a parameter nor a"),
    ],
)
def test_values_that_nobody_gives(module, message):
    with pytest.raises(ValueError, match=message):
        train_meta(module=module)


@pytest.mark.plugins
def test_a_module_that_is_made_already_has_no_use_for_it():
    message = (
        r"fsdp\.meta=true, and PlainModule has its weights already: .* such as functools\.partial\(PlainModule, …\)"
    )
    with pytest.raises(ValueError, match=message):
        tiny_trainer({"fsdp": Fsdp(meta=True)}, PlainModule())


@pytest.mark.plugins
def test_what_is_in_a_block_of_its_own_is_set_there():
    for outcome in run_ranks(wrong_meta, 2):
        assert outcome.code == 1
        assert "SetsAll.reset_parameters() changes net.2.scale, which is in a block of its own" in outcome.output


def wrong_meta():
    train_meta(module=SetsAll)


@pytest.mark.plugins
def test_torch_s_own_layers_have_what_it_takes():
    """Attention has another name for it; what they begin with is drawn as they draw it."""
    with torch.device("meta"):
        model = torch.nn.ModuleList(
            [
                torch.nn.TransformerEncoderLayer(16, 2, 32),
                torch.nn.Embedding(10, 16),
                torch.nn.Conv2d(2, 4, 3),
                torch.nn.LSTM(4, 4),
                torch.nn.GroupNorm(2, 4),
                torch.nn.BatchNorm1d(4),
                torch.nn.PReLU(),
            ]
        )
    give_values(model, model, torch.device("cpu"), 0)
    attention = model[0].self_attn
    assert not attention.out_proj.bias.any()
    bound = (6 / (16 + 48)) ** 0.5
    assert bound * 0.9 < attention.in_proj_weight.abs().max() <= bound
    assert torch.equal(model[5].running_var, torch.ones(4))


# What is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"param_dtype": "float8"}, r"fsdp\.param_dtype='float8' must be one of float32, bfloat16, float16, or null"),
        ({"replicas": 0}, r"fsdp\.replicas=0 must be at least 1"),
        ({"min_parameters": -1}, r"fsdp\.min_parameters=-1 at least 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Fsdp(**options)


def wrong(plugin):
    train(plugin)


@pytest.mark.plugins
@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (
            {"wrap": ["Block"]},
            "fsdp.wrap names Block, and the model has none; it has Dropout, Linear, PlainModule, ReLU",
        ),
        ({"replicas": 3}, "fsdp.replicas=3 does not divide the 2 ranks"),
    ],
)
def test_what_does_not_fit_the_run(plugin, message):
    for outcome in run_ranks(wrong, 2, plugin):
        assert outcome.code == 1
        assert message in outcome.output
