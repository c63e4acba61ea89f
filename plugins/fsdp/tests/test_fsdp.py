"""Two ranks over gloo that share a model, against loops written by hand and against one rank."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hookline import CallbackInterface, Stage, copy_state, hookimpl, set_seed
from hookline.data import Cursor, mix, sampler_class
from hookline.testing import Memory, TinyModule, check_plugin, digest, run_ranks, tiny_trainer
from hookline_fsdp import Fsdp

pytestmark = pytest.mark.xdist_group("ranks")


class Plain(TinyModule):
    """Without batch norm, so that two ranks do what one does, but for rounding; dropout where it is asked for."""

    def __init__(self, dropout=0.0):
        super().__init__(samples=48)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Dropout(dropout), torch.nn.Linear(16, 1)
            self.net = torch.nn.Sequential(*layers)


class Own(Memory):
    """Begins from a state of this rank's own, which is no option: those are the same on all ranks."""

    own = None

    @hookimpl
    def restore(self, trainer, stage):
        state = copy_state(self.own)
        return self.own is not None and trainer.hook.set_run_state(trainer=trainer, state=state, stage=stage)


class Windows(CallbackInterface):
    def __init__(self, size):
        self.size = size

    @hookimpl
    def get_window_size(self):
        return self.size


def share_of(trainer):
    """Return how much of the model is here."""
    parameters = list(trainer.module.parameters())
    here = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters)
    return here / sum(p.numel() for p in parameters)


def train(plugin, states=None, window=1, dropout=0.0, others=None, module=Plain, **options):
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    memory = Own(every="1 steps")
    memory.own = states[rank] if states else None
    plugins = {"fsdp": Fsdp(**plugin), "memory": memory, "windows": Windows(window)}
    plugins |= others or {}
    trainer = tiny_trainer(plugins, module(dropout), train_batch_size=12 * window, **options)
    trainer.train()
    return {
        "states": memory.states,
        "weights": trainer.export_model(),
        "metrics": dict(trainer.metrics),
        "again": trainer.validate(),
        "seen": trainer.module.seen,
        "share": share_of(trainer),
    }


class Apart(Plain):
    """Begins with other weights on each rank."""

    def __init__(self, dropout=0.0):
        super().__init__(dropout)
        with torch.no_grad():
            self.net[0].weight.add_(float(os.environ.get("RANK", "0")))


def on_two(*arguments, **keywords):
    outcomes = run_ranks(train_with, 2, arguments, keywords)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].output + outcomes[1].output
    return [outcome.value for outcome in outcomes]


def train_with(arguments, keywords):
    return train(*arguments, **keywords)


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


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
    assert_close(one["weights"], alone["weights"])
    assert digest(one["weights"]) == digest(other["weights"])
    assert one["metrics"] == one["again"] == other["metrics"] == pytest.approx(alone["metrics"])
    assert 0.4 < one["share"] < 0.6
    steps = 4 if window == 1 else 2
    assert {*one["states"]} == {*alone["states"]} == {*range(1, 2 * steps + 1)}
    epoch = [index for rank in (one, other) for batch in rank["seen"][:4] for index in batch]
    assert sorted(epoch) == list(range(48))


def by_hand():
    """Train as one would with `fully_shard`."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    store = dist.TCPStore("localhost", int(os.environ["MASTER_PORT"]), 2, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    module = Plain(0.3)
    set_seed(mix(0, rank))
    for layer in (module.net[0], module.net[3]):
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    (optimizer,), (scheduler,) = module.get_optimizers_schedulers(4, 2)
    cursor = Cursor(seed=0)
    sampler = sampler_class(cursor, shuffle=True, share=rank, shares=2)
    for epoch in range(2):
        cursor.begin_epoch(epoch)
        loader = module.get_train_dataloader(sampler, 6)
        loader.generator = torch.Generator()
        for batch in loader:
            loss, _ = module(stage=Stage.TRAIN, global_step=1, batch=batch, device="cpu")
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return {name: weight.full_tensor() for name, weight in module.state_dict().items()}


@pytest.mark.plugins
def test_the_same_bits_as_a_loop_written_by_hand():
    outcomes = run_ranks(by_hand, 2)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].output
    one, _ = on_two({"wrap": ["Linear"]}, dropout=0.3)
    assert digest(one["weights"]) == digest(outcomes[0].value)


@pytest.mark.plugins
def test_a_resume_has_the_same_bits_and_other_numbers_of_ranks_go_on():
    whole = on_two({"wrap": ["Linear"]}, dropout=0.3)
    states = [rank["states"] for rank in whole]
    resumed = on_two({"wrap": ["Linear"]}, [rank[3] for rank in states], dropout=0.3)
    for rank, again in zip(states, resumed, strict=True):
        assert without_clock(again["states"][8]) == without_clock(rank[8])
    assert digest(states[0][8]["module"]) == digest(states[1][8]["module"])

    two = on_two({})
    alone = train({})
    assert_close(train({}, [two[0]["states"][3]])["weights"], alone["weights"])  # 2 -> 1
    assert_close(on_two({}, [alone["states"][3]] * 2)[0]["weights"], alone["weights"])  # 1 -> 2


@pytest.mark.plugins
@pytest.mark.slow
def test_copies_of_a_sharded_model_and_half_precision():
    outcomes = run_ranks(train_with, 4, ({"replicas": 2, "wrap": ["Linear"]},), {}, timeout=100)
    assert [outcome.code for outcome in outcomes] == [0] * 4, outcomes[0].output
    assert_close(outcomes[3].value["weights"], train({})["weights"])
    half, _ = on_two({"param_dtype": "bfloat16", "reduce_dtype": "float32", "min_parameters": 100, "wrap": ["Linear"]})
    for name, weight in train({})["weights"].items():
        assert half["weights"][name].dtype == torch.float32
        torch.testing.assert_close(half["weights"][name], weight, rtol=0.1, atol=0.05)


@pytest.mark.plugins
def test_with_clipping_an_average_and_a_check_of_finiteness():
    others = {"clip": {"max_norm": 0.05}, "ema": {"decay": 0.9}, "finite": {"every": "1 steps"}}
    one, other = on_two({"wrap": ["Linear"]}, others=others)
    alone = train({}, others=others)
    assert_close(one["weights"], alone["weights"])
    assert one["metrics"] == other["metrics"] == pytest.approx(alone["metrics"])


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
        ({"wrap": ["Block"]}, "fsdp.wrap names Block, and the model has none; it has Dropout, Linear, Plain, ReLU"),
        ({"replicas": 3}, "fsdp.replicas=3 does not divide the 2 ranks"),
    ],
)
def test_what_does_not_fit_the_run(plugin, message):
    for outcome in run_ranks(wrong, 2, plugin):
        assert outcome.code == 1
        assert message in outcome.output
