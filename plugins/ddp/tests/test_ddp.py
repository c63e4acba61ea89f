"""Two ranks over gloo, against loops written by hand; and what one process says."""

import contextlib
import itertools
import logging
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from hookline import CallbackInterface, Stage, hookimpl, set_seed
from hookline.counters import Cursor
from hookline.data import mix, sampler_class
from hookline.testing import (
    Memory,
    PlainModule,
    TinyModule,
    assert_one_model,
    digest,
    hand_written_loop,
    on_ranks,
    run_ranks,
    tiny_trainer,
    train_tiny,
)
from hookline.testing.faults import PRELOADED
from hookline_ddp import Ddp

PRELOADED += ["hookline_ddp", "hookline_distributed", "torch.nn.parallel.distributed"]


def two(function, *args):
    """Run a function on two ranks; return what it returned on each."""
    outcomes = run_ranks(function, 2, *args)
    assert [outcome.code for outcome in outcomes] == [0, 0], "\n".join(outcome.output for outcome in outcomes)
    assert not any("FutureWarning" in outcome.output for outcome in outcomes), outcomes[0].output
    return [outcome.value for outcome in outcomes]


# Parity -------------------------------------------------------------------------------


def by_hand(window):
    """Train as `tiny_trainer` does on two ranks, in the loop that one would write with DistributedDataParallel."""
    rank = int(os.environ["RANK"])
    if dist.is_initialized():
        dist.destroy_process_group()
    store = dist.TCPStore("localhost", int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group("gloo", store=dist.PrefixStore(f"by hand {window}", store), rank=rank, world_size=2)
    set_seed(mix(0, rank))
    module = TinyModule(samples=48)
    model = DistributedDataParallel(module, gradient_as_bucket_view=True)
    cursor = Cursor(seed=0)
    sampler = sampler_class(cursor, shuffle=True, share=rank, shares=2)
    batches = len(module.get_train_dataloader(sampler, 4))
    (optimizer,), (scheduler,) = module.get_optimizers_schedulers(-(-batches // window), 2)
    model.train()
    step = 0
    for epoch in range(2):
        cursor.begin_epoch(epoch)
        loader = module.get_train_dataloader(sampler, 4)
        loader.generator = torch.Generator()
        iterator = iter(loader)
        while taken := list(itertools.islice(iterator, window)):
            for index, batch in enumerate(taken):
                with model.no_sync() if index + 1 < len(taken) else contextlib.nullcontext():
                    loss, _ = model(stage=Stage.TRAIN, global_step=step + 1, batch=batch, device="cpu")
                    (loss / len(taken)).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
    found = digest(module.state_dict()), digest(optimizer.state_dict()["state"]), digest(torch.get_rng_state())
    del model
    dist.destroy_process_group()
    return found


class Watch(CallbackInterface):
    """Counts the averagings of gradients by whole buckets, and sees the model of each stage."""

    def __init__(self):
        self.averaged = 0
        self.evaluated = set()

    @hookimpl(trylast=True)
    def on_begin_train(self, trainer):
        if isinstance(trainer.model, DistributedDataParallel) and not self.averaged:
            trainer.model.register_comm_hook(None, self.average)

    def average(self, state, bucket):
        self.averaged += 1
        return default_hooks.allreduce_hook(None, bucket)

    @hookimpl
    def on_end_val_step(self, trainer):
        self.evaluated.add(type(trainer.model).__name__)


def ours(windows):
    torch.set_num_threads(1)
    found = []
    for window in windows:
        hand = by_hand(window)
        plugins = {"ddp": Ddp()} | ({"accumulate": {"steps": window}} if window > 1 else {})
        options = {"train_batch_size": 8 * window, "evaluate_every": None, "eval_when_finish": False}
        trainer = tiny_trainer(plugins, TinyModule(samples=48), **options)
        trainer.train()
        state = digest(trainer.module.state_dict()), digest(trainer.optimizers[0].state_dict()["state"])
        found.append((hand, (*state, digest(torch.get_rng_state())), digest(list(trainer.module.parameters()))))
    return found


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_the_bits_are_those_of_a_loop_by_hand():
    for of_rank_0, of_rank_1 in zip(*two(ours, [1, 3]), strict=True):
        for hand, trained, _ in (of_rank_0, of_rank_1):
            assert trained == hand
        assert of_rank_0[2] == of_rank_1[2]
        assert of_rank_0[1][2] != of_rank_1[1][2]  # the random states are not


def look(trainer):
    watch = trainer.plugins.get_plugin("watch")
    return trainer.module.seen, trainer.global_step, watch.averaged, watch.evaluated, type(trainer.model).__name__


def halves():
    return {"accumulate": {"steps": 2}, "watch": Watch()}


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_two_ranks_with_half_the_batch_are_one_rank_within_rounding():
    alone = train_tiny(halves(), look=look, train_batch_size=8)
    one, other = on_ranks(train_tiny, 2, {"ddp": {}, **halves()}, look=look, train_batch_size=8)
    assert_one_model([one, other], alone)
    seen, steps, averaged, evaluated, after = one.looked
    together = [sorted(first + second) for first, second in zip(seen, other.looked[0], strict=True)]
    assert together == [sorted(batch) for batch in alone.looked[0]]
    assert steps == averaged == 12  # once an optimizer step, though there are two micro-batches in it
    assert evaluated == {"PlainModule"}  # evaluation has no forward of all ranks together
    assert after == "DistributedDataParallel"


# Options ------------------------------------------------------------------------------


class Buffers(PlainModule):
    """Keeps the mean of its inputs as a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def train_step(self, global_step, batch, device):
        loss, *rest = super().train_step(global_step, batch, device)
        with torch.no_grad():
            self.mean += batch[0].mean(0)
        return loss, *rest


def with_options(cases):
    torch.set_num_threads(1)
    found = []
    for options in cases:
        module = Buffers()
        tiny_trainer([Ddp(**options)], module, max_steps=4).train()
        found.append((list(module.parameters()), module.mean))
    return found


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_options_change_how_and_not_what():
    cases = [
        {},
        {"static_graph": True, "bucket_cap_mb": 1},
        {"find_unused_parameters": True},
        {"compression": "fp16"},
        {"compression": "powersgd"},
        {"broadcast_buffers": False},
    ]
    one, other = two(with_options, cases)
    (plain, mean), *rest = one
    for (weights, _), (same, _) in zip(one, other, strict=True):
        assert digest(weights) == digest(same)
    for weights, _ in rest:
        torch.testing.assert_close(weights, plain, atol=2e-2, rtol=0)
    assert digest(plain) == digest(rest[0][0]) == digest(rest[1][0])
    assert digest(plain) != digest(rest[2][0])  # it did compress
    assert torch.equal(mean, other[0][1])
    assert not torch.equal(rest[4][1], other[5][1])  # buffers are each rank's own


class Unused(PlainModule):
    def __init__(self):
        super().__init__()
        self.idle = torch.nn.Linear(2, 2)


class Frozen(PlainModule):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


def refused():
    torch.set_num_threads(1)
    found = []
    for plugin, module in ((Ddp(), Unused()), (Ddp(compression="bf16"), PlainModule())):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            tiny_trainer([plugin], module).train()
        found.append("\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())]))
    trainer = tiny_trainer([Ddp()], Frozen())  # of which nothing can be averaged
    trainer.validate()
    tiny_trainer([Ddp(find_unused_parameters=True)], Unused()).train()
    return found


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_what_torch_refuses_is_said_in_our_words():
    for unused, bf16 in two(refused):
        assert "with hookline this is `ddp.find_unused_parameters: true`" in unused
        assert "ddp.compression=bf16 needs CUDA: gloo, which joins ranks on CPUs, has none; take fp16" in bf16


# Weights that come and go ---------------------------------------------------------------


class Thawing(PlainModule):
    """Changes what is trained, at a moment of the run; every rank would begin its new weights otherwise."""

    def __init__(self, case, other_rank=None):
        super().__init__()
        self.case, self.on = case, other_rank in (None, int(os.environ.get("RANK", 0)))
        self.extra = None
        if case != "freeze at an epoch" and case != "add":
            self.net[0].requires_grad_(False)
        if case == "frozen whole":
            self.requires_grad_(False)

    def train_step(self, global_step, batch, device):
        loss, predictions = super().train_step(global_step, batch, device)
        return (loss if self.extra is None else loss + (self.extra(batch[0]) - 1).square().mean()), predictions

    @hookimpl
    def on_begin_train(self, trainer):
        if self.case == "frozen whole":
            self.requires_grad_(True)
        if self.case == "add" and self.extra is None:
            self.extra = torch.nn.Linear(8, 1)
            torch.nn.init.constant_(self.extra.weight, 0.1 + trainer.rank)
            torch.nn.init.constant_(self.extra.bias, 0.0)
            trainer.optimizers[0].add_param_group({"params": list(self.extra.parameters()), "initial_lr": 1e-2})
            trainer.schedulers[0].scheduler.base_lrs.append(1e-2)

    @hookimpl(specname="on_begin_train_epoch")
    def change(self, epoch):
        if epoch == 1 and self.on and self.case.endswith("an epoch"):
            self.net[0].requires_grad_(self.case == "unfreeze at an epoch")

    @hookimpl(specname="on_end_train_step")
    def change_at_a_step(self, global_step):
        if global_step == 3 and self.case == "unfreeze at a step":
            self.net[0].requires_grad_(True)


CASES = ("unfreeze at an epoch", "unfreeze at a step", "freeze at an epoch", "frozen whole", "add")


def thawed(plugins, state):
    torch.set_num_threads(1)
    found = {}
    for case in CASES:
        module = Thawing(case)
        tiny_trainer(plugins, module).train()
        found[case] = module.state_dict()
    resumed = Thawing("resume")  # what is frozen here was trained where the run was cut
    trainer = tiny_trainer({**plugins, "memory": Memory(state)}, resumed)
    trainer.train()
    found["resume"] = resumed.state_dict()
    holds = Holds()
    tiny_trainer({**plugins, "holds": holds}, Thawing("unfreeze at an epoch")).train()
    return found, holds.same


class Holds(CallbackInterface):
    """Takes the model once, as a module does that calls it in an `update` of its own."""

    @hookimpl
    def on_begin_train(self, trainer):
        self.model = trainer.model

    @hookimpl
    def on_end_train(self, trainer):
        self.same = self.model is trainer.model


def other_weights():
    torch.set_num_threads(1)
    with pytest.raises(ValueError, match="ddp averages weights in their order") as caught:
        tiny_trainer([Ddp()], Thawing("unfreeze at an epoch", 1)).train()
    return str(caught.value)


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_what_is_trained_may_change_at_any_time():
    memory = Memory()
    tiny_trainer([memory], PlainModule(), max_steps=3, evaluate_every=None).train()
    alone, _ = thawed({}, memory.state)
    (one, kept), (other, _) = two(thawed, {"ddp": {}}, memory.state)
    for case, weights in one.items():
        assert digest(weights) == digest(other[case]), case
        torch.testing.assert_close(weights, alone[case], msg=case)
    assert kept


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_ranks_that_train_other_weights_are_refused_on_all_of_them():
    words = (
        "ddp averages weights in their order, and number 0 is net.0.weight (float32[16, 8], trained) on rank 1 and "
        "net.0.weight (float32[16, 8], not trained) on rank 0: add, freeze and unfreeze the same on all ranks at the "
        "same step"
    )
    assert two(other_weights) == [words, words]


class Apart(TinyModule):
    """Begins apart on each rank, and is never trained."""

    def __init__(self):
        super().__init__()
        torch.nn.init.constant_(self.net[0].weight, float(os.environ["RANK"]))
        self.net[1].running_mean.fill_(float(os.environ["RANK"]))
        self.requires_grad_(False)


def begun_apart():
    module = Apart()
    tiny_trainer([Ddp()], module).validate()
    return digest(module.state_dict()), module.net[0].weight.sum().item()


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_a_model_of_which_nothing_is_trained_is_that_of_rank_0_too():
    one, other = two(begun_apart)
    assert one == other
    assert one[1] == 0


def static(steps):
    torch.set_num_threads(1)
    found = []
    for size, promised in ((size, promised) for size in steps for promised in (False, True)):
        module, options = PlainModule(), {"train_batch_size": 4 * size, "evaluate_every": None}
        plugins = {"ddp": {"static_graph": promised}, "accumulate": {"steps": size}}
        tiny_trainer(plugins, module, **options).train()
        found.append(module.state_dict())
    return found


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_a_static_graph_with_windows():
    """Torch ends in an assertion of its own where the first backward that it sees is one that is not averaged."""
    one, other = two(static, [2, 3])
    assert digest(one) == digest(other)
    for plain, promised in (one[:2], one[2:]):
        torch.testing.assert_close(promised, plain)


class Searched(PlainModule):
    """Steps by a line search, which looks at the loss: each rank's own would lead it another way."""

    def __init__(self):
        super().__init__(samples=16)
        self.double()
        self.inputs, self.targets = self.inputs.double(), self.targets.double()
        self.calls = 0

    @hookimpl
    def update(self, trainer, window):
        first = []

        def closure():
            self.calls += 1
            trainer.zero_grad()
            outputs = trainer.hook.run_window(trainer=trainer, window=window)
            first.extend(() if first else outputs)
            return sum(loss for loss, *_ in outputs) / len(outputs)

        trainer.step(closure=closure)
        return first

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.LBFGS(self.parameters(), max_iter=8, line_search_fn="strong_wolfe")], []


def searched(plugins):
    torch.set_num_threads(1)
    module = Searched()
    tiny_trainer(plugins, module, train_batch_size=16, evaluate_every=None).train()
    return dict(module.state_dict()), module.calls


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_a_line_search_goes_one_way_on_all_ranks():
    alone, calls = searched({})
    for weights, calls_of_rank in two(searched, {"ddp": {}}):
        assert calls_of_rank == calls
        torch.testing.assert_close(weights, alone)
    assert calls > 16  # it did search


# Several runs of one process ----------------------------------------------------------


def again_and_again():
    torch.set_num_threads(1)
    watch = Watch()
    trainer = tiny_trainer([Ddp(), watch], PlainModule(), epochs=1)
    trainer.validate()
    trainer.train()
    first = trainer.global_step, digest(trainer.module.state_dict())
    trainer.options.epochs = 2
    trainer.train()
    second = trainer.global_step, digest(trainer.module.state_dict()), trainer.validate(), trainer.test()
    another = tiny_trainer([Ddp()], PlainModule(), epochs=2)
    another.train()
    return first, second, digest(another.module.state_dict()), watch.averaged, dist.is_initialized()


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_several_runs_of_one_trainer_and_of_two():
    one, other = two(again_and_again)
    assert one == other
    (steps, weights), (steps_too, trained_on, validated, tested), another, averaged, initialized = one
    assert (steps, steps_too, averaged, initialized) == (6, 12, 12, True)
    assert weights != trained_on
    assert validated["val_loss"] == tested["test_loss"]
    assert another  # a second trainer has the group of the first


class Converted(CallbackInterface):
    """Answers another model than the module, as a compiler may."""

    @hookimpl
    def compile_model(self, model):
        return Around(model)


class Around(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, **arguments):
        self.calls += 1
        return self.inner(**arguments)


def converted():
    torch.set_num_threads(1)
    trainer = tiny_trainer([Ddp(), Converted()], PlainModule(), epochs=1)
    trainer.train()
    return type(trainer.model.module).__name__, trainer.model.module.calls


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_what_others_made_of_the_model_stays_in_evaluations_and_afterwards():
    assert two(converted) == [("Around", 6 + 3)] * 2  # batches of training, and of an evaluation


@pytest.mark.slow
@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_processes_end_in_order():
    """Torch 2.13 ends one of ten with SIGABRT where its group, or gloo's thread, outlives the run."""
    for _ in range(10):
        on_ranks(train_tiny, 2, {"ddp": {}, **halves()})


# Alone --------------------------------------------------------------------------------


@pytest.mark.plugins
def test_alone_it_changes_nothing_and_says_what_to_do(caplog):
    by_hand, module = TinyModule(), TinyModule()
    hand_written_loop(by_hand)
    with caplog.at_level(logging.WARNING, "hookline"):
        tiny_trainer([Ddp()], module).train()
    assert "distributed: this is one process, so there is nobody to share the model with (ddp)" in caplog.text
    assert "torchrun --nproc-per-node 2 -m hookline fit run.yaml" in caplog.text
    assert digest(module.state_dict()) == digest(by_hand.state_dict())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compression": "zip"}, "ddp.compression='zip' must be one of none, fp16, bf16, powersgd"),
        ({"bucket_cap_mb": 0}, "ddp.bucket_cap_mb=0 must be at least 1 megabyte"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        Ddp(**options)
