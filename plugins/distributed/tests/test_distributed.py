"""What two ranks tell each other and agree on. Without a plugin that shares the model each trains its own."""

import dataclasses
import os
import pickle
import socket
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from hookline import CallbackInterface, Trainer, hookimpl, sharded
from hookline.testing import Memory, TinyModule, digest, hand_written_loop, on_ranks, run_ranks, tiny_trainer
from hookline.testing.faults import PRELOADED, run
from hookline_distributed import Distributed
from hookline_distributed.alike import as_text, describe
from hookline_distributed.outputs import interleaved
from hookline_distributed.stores import leave

PRELOADED += ["hookline_distributed"]
of_ranks = pytest.mark.xdist_group("ranks")


def two(function, *args):
    """Run a function on two ranks; return what it returned on each."""
    return on_ranks(function, 2, *args)


def rank():
    return int(os.environ.get("RANK", 0))


# Small values -------------------------------------------------------------------------


class Tells(CallbackInterface):
    @hookimpl
    def on_begin_train(self, trainer):
        hook = trainer.hook
        value = torch.tensor([1.0 + trainer.rank, 5.0])
        self.reduced = {
            op: hook.all_reduce(trainer=trainer, value=value, op=op).tolist() for op in ("sum", "min", "max")
        }
        self.kept = value.tolist()
        self.gathered = hook.all_gather(trainer=trainer, value=("rank", trainer.rank))


def small_values(folder):
    torch.set_num_threads(1)
    tells = Tells()
    trainer = tiny_trainer([Distributed(), tells], max_steps=1, runs_folder=folder)
    trainer.train()
    afterwards = trainer.hook.all_gather(trainer=trainer, value=1)
    return tells.reduced, tells.kept, tells.gathered, afterwards, str(trainer.run_dir), dist.is_initialized()


@of_ranks
def test_small_values_and_the_folder_of_the_run(tmp_path):
    (reduced, kept, gathered, afterwards, folder, initialized), other = two(small_values, str(tmp_path))
    assert reduced == other[0] == {"sum": [3.0, 10.0], "min": [1.0, 5.0], "max": [2.0, 5.0]}
    assert (kept, other[1]) == ([1.0, 5.0], [2.0, 5.0])
    assert gathered == other[2] == [("rank", 0), ("rank", 1)]
    assert afterwards == [1, 1]  # the group lasts as long as the process
    assert folder == other[4] == str(tmp_path / "run-1")
    assert [path.name for path in tmp_path.iterdir()] == ["run-1"]
    assert initialized


# Shares and the mesh -------------------------------------------------------------------


class Layers(CallbackInterface):
    """Splits single layers over two ranks, or would: both take the same share of the data."""

    def __init__(self, size=2):
        self.size = size

    @hookimpl
    def get_share(self, trainer):
        return trainer.rank // self.size, trainer.world_size // self.size

    @hookimpl(wrapper=True)
    def get_mesh_shape(self):
        return {**(yield), "layers": self.size}


class Counts(Memory):
    @hookimpl
    def on_end_val_step(self, trainer, batch):
        trainer.log(samples=float(len(batch[0])), over="epoch", reduce="sum", sync=True)

    @hookimpl
    def on_end_val_epoch(self, trainer, val_step_collated_outputs):
        self.outputs = val_step_collated_outputs[1].shape[0]


def shares(folder):
    torch.set_num_threads(1)
    memory = Counts()
    trainer = tiny_trainer([Distributed(), Layers(), memory], epochs=1, runs_folder=folder)
    trainer.train()
    mesh = trainer.hook.get_mesh(trainer=trainer)
    return (
        (trainer.share, trainer.shares), dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True)),
        mesh is trainer.hook.get_mesh(trainer=trainer), trainer.counters.samples, memory.outputs,
        trainer.metrics["samples"], digest(trainer.module.state_dict()),
    )  # fmt: skip


@of_ranks
def test_ranks_with_one_share_of_the_data_count_once(tmp_path):
    memory = Counts()
    alone = tiny_trainer([memory], epochs=1, runs_folder=str(tmp_path / "alone"))
    alone.train()
    expected = alone.counters.samples, memory.outputs, alone.metrics["samples"], digest(alone.module.state_dict())
    assert two(shares, str(tmp_path)) == [((0, 1), {"data": 1, "layers": 2}, True, *expected)] * 2


def too_many_layers(folder):
    trainer = tiny_trainer([Distributed(), Layers(3)], runs_folder=folder)
    with pytest.raises(ValueError, match=r"the mesh asks for a multiple of 3 \(layers\) ranks, and there are 2"):
        trainer.hook.get_mesh(trainer=trainer)


@of_ranks
def test_a_mesh_that_does_not_divide_the_ranks(tmp_path):
    two(too_many_layers, str(tmp_path))


# Alone --------------------------------------------------------------------------------


def test_alone_it_changes_nothing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    by_hand, module = TinyModule(), TinyModule()
    hand_written_loop(by_hand)
    trainer = tiny_trainer([Distributed()], module)
    trainer.train()
    assert trainer.world_size == 1
    assert digest(module.state_dict()) == digest(by_hand.state_dict())


def test_who_would_share_the_model_is_told_once_that_there_is_nobody(caplog, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    trainer = tiny_trainer({"distributed": {}, "shares": Shares()}, max_steps=1)
    trainer.train()
    trainer.validate()
    assert [record.getMessage() for record in caplog.records if "one process" in record.getMessage()] == [
        "distributed: this is one process, so there is nobody to share the model with (shares). `hookline fit run.yaml "
        "--nproc 2` starts two on this machine, `torchrun --nproc-per-node 2 -m hookline fit run.yaml` does as well"
    ]


def test_the_order_of_the_data_set():
    def column(*values):
        return torch.tensor(values)

    cpu = torch.device("cpu")
    assert interleaved([column(0, 2, 4), column(1, 3)], cpu).tolist() == [0, 1, 2, 3, 4]
    assert interleaved([column(0), column(1), column(2)], cpu).tolist() == [0, 1, 2]
    assert interleaved([["a", "c"], ["b"]], cpu) == ["a", "b", "c"]
    assert interleaved([column(0, 1), column()], cpu).tolist() == [0, 1]
    assert interleaved([column(0, 2), ["b"]], cpu) == [torch.tensor(0), "b", torch.tensor(2)]


# Evaluation ---------------------------------------------------------------------------


class Numbers(TinyModule):
    """Evaluates to whole numbers, whose means are exact in any order; several data sets, by size."""

    def __init__(self, *sizes):
        super().__init__()
        self.sizes = sizes

    def get_val_dataloaders(self, sampler, batch_size):
        sets = {f"of {size}": TensorDataset(torch.arange(size)) for size in self.sizes}
        loaders = {key: DataLoader(data, batch_size, sampler=sampler(data)) for key, data in sets.items()}
        return loaders if len(loaders) > 1 else next(iter(loaders.values()))

    def val_step(self, global_step, batch, device):
        (ids,) = batch
        self.log(lowest=ids.min(), reduce="min")
        if 1 in ids:
            self.log(only_here=7.0)  # on rank 1, where there are two
        return ids.float().mean(), ids, ids.sum(), [f"sample {number}" for number in ids.tolist()]


class Collects(CallbackInterface):
    def __init__(self):
        self.columns = {}

    @hookimpl
    def on_end_val_epoch(self, key, val_step_collated_outputs):
        self.columns[key] = [
            column.tolist() if isinstance(column, torch.Tensor) else column for column in val_step_collated_outputs
        ]


def evaluated(*cases):
    torch.set_num_threads(1)
    found = []
    for batch_size, *sizes in cases:
        collects = Collects()
        trainer = tiny_trainer([Distributed(), collects], Numbers(*sizes), val_batch_size=batch_size)
        found.append((trainer.validate(), collects.columns))
    return found


@of_ranks
@pytest.mark.filterwarnings("ignore:the val loader")
def test_an_evaluation_on_two_ranks_is_that_on_one():
    cases = [(1, 5), (2, 5), (2, 1), (4, 5, 1)]
    for_one = evaluated(*cases)
    for_two, other = two(evaluated, *cases)
    assert for_two == other
    for (metrics, columns), (alone, whole) in zip(for_two, for_one, strict=True):
        assert metrics == alone  # no bit differs, and each sample counts once
        for key in whole:
            assert columns[key][1] == whole[key][1] == list(range(len(whole[key][1])))  # in order
    metrics, columns = for_two[1]
    assert metrics == {"val_loss": 2.0, "lowest": 0.0, "only_here": 7.0}
    assert columns["default"][0] == [1.0, 2.0, 4.0]  # one loss a batch: the first of rank 0, of rank 1, the second of 0
    assert columns["default"][2] == [2, 4, 4]
    assert columns["default"][3] == [["sample 0", "sample 2"], ["sample 1", "sample 3"], ["sample 4"]]
    assert for_two[3][0]["val_loss/of 1"] == 0.0


def logged():
    torch.set_num_threads(1)

    class Logs(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, trainer, global_step):
            trainer.log(own=rank(), **{f"rank_{rank()}": 1.0})
            trainer.log(sync=True, mean=torch.tensor(1.0 + rank()))
            if rank() == 1:
                trainer.log(sync=True, reduce="max", of_rank_1=global_step)

        @hookimpl
        def on_log(self, metrics, global_step):
            told.append((global_step, dict(metrics)))

    told = []
    trainer = tiny_trainer([Distributed(), Logs()], epochs=1, log_every="2 steps", evaluate_every=None, max_steps=4)
    trainer.train()
    return told, dataclasses.asdict(trainer.best)


@of_ranks
def test_values_that_are_logged_of_all_ranks():
    (told, best), (told_too, best_too) = two(logged)
    assert [step for step, _ in told] == [step for step, _ in told_too]
    for (_, metrics), (_, others) in zip(told, told_too, strict=True):
        assert metrics.get("of_rank_1") == others.get("of_rank_1")
        assert metrics.get("mean") == others.get("mean")
        assert "rank_1" not in metrics
        assert "rank_0" not in others
    assert (told[0][1]["mean"], told[0][1]["of_rank_1"], told[0][1]["own"], told_too[0][1]["own"]) == (1.5, 2.0, 0, 1)
    assert best == best_too


def accurate(world_size):
    torch.set_num_threads(1)
    metrics = {"_target_": "torchmetrics.classification.MulticlassAccuracy", "num_classes": 3, "average": "micro"}

    class Classes(Numbers):
        def val_step(self, global_step, batch, device):
            (ids,) = batch
            return ids.float().mean(), ids % 3, (ids % 2) * 2

    found = []
    for size in (5, 1):
        plugins = {"distributed": {}, "metrics": {"val": {"accuracy": metrics}}}
        found.append(tiny_trainer(plugins, Classes(size), val_batch_size=2).validate())
    return found


@of_ranks
@pytest.mark.plugins
@pytest.mark.filterwarnings("ignore:the val loader")
def test_metrics_of_torchmetrics_on_two_ranks_are_those_on_one():
    assert two(accurate, 2) == [accurate(1)] * 2
    assert accurate(1)[0] == {"val_loss": 2.0, "val_accuracy": pytest.approx(0.2)}


# Uneven data --------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        for number in range(5 if rank() else 3):
            yield torch.full((2, 8), float(number)), torch.zeros(2, 1), torch.full((2,), number)


class Streams(TinyModule):
    def get_train_dataloader(self, sampler, batch_size):
        return sharded(DataLoader(Stream(), batch_size=None))


class Mixed(TinyModule):
    def get_train_dataloader(self, sampler, batch_size):
        return sharded(DataLoader(list(Stream()) if rank() else Stream(), batch_size=None))


def window_of(size):
    class Window(CallbackInterface):
        @hookimpl
        def get_window_size(self):
            return size

    return Window()


def trained(module, window=1, options=None, **of_trainer):
    """Return what is to be the same on both ranks; or the error."""
    trainer = tiny_trainer([Distributed(**(options or {})), window_of(window)], module, **of_trainer)
    try:
        trainer.train()
    except ValueError as error:
        return str(error)
    counters = dataclasses.asdict(trainer.counters)
    counters.pop("seconds")
    return counters, tuple(trainer.totals), [len(batch) for batch in module.seen]


def uneven():
    torch.set_num_threads(1)
    error = {"uneven": "error"}
    return (
        trained(TinyModule(17), train_batch_size=16),
        trained(TinyModule(17), window=2, train_batch_size=8),
        trained(TinyModule(17), options=error, train_batch_size=16),
        trained(TinyModule(20), options=error, train_batch_size=16),
        trained(TinyModule(21), train_batch_size=8, evaluate_every="7 samples"),
        trained(Streams(), window=2, train_batch_size=8, epochs=1),
        trained(Streams(), options=error, train_batch_size=8, epochs=1),
        trained(Mixed(), train_batch_size=8, epochs=1),
    )


@of_ranks
def test_ranks_with_different_numbers_of_batches():
    one, other = two(uneven)
    for ours, theirs in zip(one, other, strict=True):
        assert ours[:2] == theirs[:2]
    (dropped, totals, sizes), windows, refused, even, by_samples, streams, streams_refused, mixed = one
    assert (dropped["global_step"], totals[0], sizes, other[0][2]) == (2, 1, [8, 8], [8, 8])  # not the 9th of rank 0
    assert (windows[0]["global_step"], windows[0]["batches"]) == (4, 8)
    assert refused == (
        "the ranks have 2, 1 batches, and distributed.uneven=error: make the data set a multiple of the ranks, or let "
        "distributed.uneven=drop leave out what not all have"
    )
    assert even[0]["global_step"] == 4
    assert (by_samples[0]["samples"], by_samples[0]["evaluations"]) == (48, 6)
    assert (streams[0]["global_step"], streams[0]["batches"]) == (2, 3)  # windows of 2 and 2, of 1 and 2
    assert "a rank has a window of 0 micro-batches and another of 1" in streams_refused
    assert "the ranks have an unknown number of, 5 batches" in mixed


def resumed(state):
    torch.set_num_threads(1)
    module = TinyModule(23)
    trainer = tiny_trainer([Distributed(), Memory(state)], module, epochs=1, evaluate_every=None)
    trainer.train()
    return trainer.global_step, [len(batch) for batch in module.seen]


@of_ranks
def test_a_resume_between_two_batches_of_now():
    """17 samples are left, 9 and 8: 3 batches and 2, though both ranks have 3 in a whole epoch."""
    memory = Memory()
    tiny_trainer([memory], TinyModule(23), train_batch_size=6, max_steps=1, evaluate_every=None).train()
    assert two(resumed, memory.state) == [(3, [4, 4])] * 2


# Decisions ----------------------------------------------------------------------------


class Asks(CallbackInterface):
    """Asks for something on rank 1 alone at a step, and keeps what is served."""

    def __init__(self, step, ask):
        self.step, self.ask, self.saved, self.ended = step, ask, [], None

    @hookimpl
    def on_end_train_step(self, trainer, global_step):
        if (trainer.rank, global_step) == (1, self.step):
            self.ask(trainer)

    @hookimpl
    def save(self, trainer, reason):
        self.saved.append((trainer.global_step, reason))
        return True

    @hookimpl
    def on_end_run(self, trainer, status, reason):
        self.ended = trainer.global_step, status, reason, trainer.exit_code


def decided():
    torch.set_num_threads(1)
    found = []
    for vote_every, ask in (
        (1, lambda trainer: trainer.stop("enough", "preempted", 75)),
        (4, lambda trainer: trainer.stop("enough")),
        (100, lambda trainer: trainer.stop("too late")),
        (2, lambda trainer: trainer.save("just so", alone=True)),
    ):
        asks = Asks(3, ask)
        tiny_trainer([Distributed(vote_every=vote_every), asks], TinyModule(48), evaluate_every=None).train()
        found.append((asks.ended, asks.saved))
    return found


@of_ranks
def test_what_one_rank_asks_for_is_done_by_all_at_the_same_step():
    one, other = two(decided)
    assert (
        one
        == other
        == [
            ((4, "preempted", "enough", 75), [(4, "enough")]),
            ((8, "stopped", "enough", 0), [(8, "enough")]),
            ((12, "finished", "", 0), [(12, "end of training")]),
            ((12, "finished", "", 0), [(6, "just so"), (12, "end of training")]),
        ]
    )


class AllAsk(Asks):
    """Asks for the end on rank 1 alone at step 2, and on all ranks at step 3."""

    @hookimpl
    def on_end_train_step(self, trainer, global_step):
        if (trainer.rank, global_step) == (1, 2):
            trainer.stop("alone")
        if global_step == 3:
            trainer.stop("all of us", "preempted", 75, alone=False)
            trainer.stop("too late", alone=False)


def decided_by_all():
    torch.set_num_threads(1)
    found = []
    for vote_every in (1, 100):
        asks = AllAsk(0, None)
        tiny_trainer([Distributed(vote_every=vote_every), asks], TinyModule(48), evaluate_every=None).train()
        found.append((asks.ended, asks.saved))
    return found


@of_ranks
def test_what_all_ranks_ask_for_waits_for_no_vote():
    one, other = two(decided_by_all)
    assert one == other == [((3, "preempted", "all of us", 75), [(3, "all of us")])] * 2


class Clock(Asks):
    @hookimpl
    def on_boundary(self, trainer):
        if trainer.due("1 s"):
            trainer.save("every second")


class Slow(TinyModule):
    """Takes longer on rank 1, by a clock that nothing else moves."""

    now = 0.0

    def train_step(self, global_step, batch, device):
        self.now += 0.0625 * (1 + rank())
        return super().train_step(global_step, batch, device)


def by_the_clock():
    torch.set_num_threads(1)
    clock, module = Clock(0, None), Slow(48)
    trainer = tiny_trainer([Distributed(), clock], module, epochs=None, max_time="2 s", evaluate_every=None)
    with mock.patch("time.monotonic") as monotonic:
        monotonic.side_effect = lambda: module.now
        trainer.train()
    return clock.saved, clock.ended, trainer.counters.seconds


@of_ranks
def test_the_clock_of_rank_0_counts_for_all():
    one, other = two(by_the_clock)
    assert one == other
    assert one[0] == [(20, "every second"), (36, "every second, end of training")]  # a vote tells of the one before
    assert one[2] == 2.0


class WaitsInLayers(Layers):
    """Waits for rank 1, which does not come, in a group of a part of the mesh."""

    said = None

    @hookimpl
    def on_begin_train(self, trainer):
        group = trainer.hook.get_mesh(trainer=trainer)["layers"].get_group()
        with trainer.rank_zero_first():
            if rank() == 0:
                with pytest.raises(RuntimeError) as raised:
                    dist.all_reduce(torch.ones(1), group=group)
                self.said = str(raised.value)


def waits_in_layers():
    waits = WaitsInLayers()
    tiny_trainer([Distributed(timeout="3 s"), waits], max_steps=1).train()
    return waits.said


@of_ranks
def test_a_part_of_the_mesh_waits_no_longer_than_all_of_it():
    one, other = two(waits_in_layers)
    assert "3000ms" in one
    assert other is None


def counted():
    torch.set_num_threads(1)
    calls = []

    def counting(name):
        real = getattr(dist, name)

        def call(*args, **kwargs):
            calls.append((name, kwargs.get("async_op", False)))
            return real(*args, **kwargs)

        setattr(dist, name, call)

    class Begins(CallbackInterface):
        @hookimpl(trylast=True)
        def on_begin_train(self):
            for name in ("all_reduce", "all_gather_object", "broadcast", "broadcast_object_list", "barrier"):
                counting(name)

        @hookimpl
        def on_end_train_step(self, global_step):
            if global_step == 42:
                self.calls = list(calls)

    begins = Begins()
    module = TinyModule(samples=8 * 50)
    options = {"evaluate_every": None, "eval_when_finish": False, "epochs": 1}
    tiny_trainer([Distributed(), begins], module, **options).train()
    return begins.calls


@of_ranks
def test_no_step_waits_for_another_rank():
    assert two(counted) == [[("all_reduce", True)] * 10] * 2  # the votes, every 4 steps


# Ranks that differ --------------------------------------------------------------------


class Wide(TinyModule):
    def __init__(self):
        super().__init__()
        self.net[4] = torch.nn.Linear(16, 1 + rank())


class Ordered(TinyModule):
    """Names its heads as a set may, whose order is another in each process."""

    def __init__(self):
        super().__init__()
        self.heads = torch.nn.ModuleDict({name: torch.nn.Linear(8, 1) for name in ["age", "size"][:: 1 - 2 * rank()]})


class Buffered(TinyModule):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen_so_far", torch.zeros(1 + rank()))


class Loaders(TinyModule):
    """Has another loader on rank 1, in one way."""

    def __init__(self, stage, way):
        super().__init__()
        self.stage, self.way = stage, way

    def loader(self, stage, sampler, batch_size):
        way = self.way if (stage, rank()) == (self.stage, 1) else None
        dataset = TensorDataset(self.inputs, self.targets, torch.arange(50))
        dataset = torch.utils.data.Subset(dataset, range(40)) if way == "data" else dataset
        loader = DataLoader(dataset, batch_size, sampler=sampler(dataset))
        loader = sharded(list(loader)) if way == "class" else loader
        return {"other" if way == "key" else "default": loader}

    def get_train_dataloader(self, sampler, batch_size):
        return self.loader("train", sampler, batch_size)["default"]

    def get_val_dataloaders(self, sampler, batch_size):
        return self.loader("val", sampler, batch_size)


class More(CallbackInterface):
    """Is there on one rank alone."""


@dataclasses.dataclass(eq=False)
class Chosen(CallbackInterface):
    choice: dict = dataclasses.field(default_factory=dict)


def different():
    torch.set_num_threads(1)
    found = []
    for build in (
        lambda: tiny_trainer([Distributed()], seed=rank()),
        lambda: tiny_trainer([Distributed(vote_every=3 + rank())]),
        lambda: tiny_trainer([Distributed(), *([More()] if rank() else [])]),
        lambda: tiny_trainer([Distributed()], Wide()),
        lambda: tiny_trainer([Distributed(), Chosen({"a": [1, rank()]})]),
        lambda: tiny_trainer([Distributed(), Chosen({"a": object()})], max_steps=1),
        lambda: tiny_trainer([Distributed()], Ordered()),
        lambda: tiny_trainer([Distributed()], Buffered()),
        lambda: tiny_trainer([Distributed()], Loaders("train", "data")),
        lambda: tiny_trainer([Distributed(uneven="pad")], Loaders("train", "class")),
        lambda: tiny_trainer([Distributed()], Loaders("val", "data"), max_steps=1),
        lambda: tiny_trainer([Distributed()], Loaders("val", "class"), max_steps=1),
        lambda: tiny_trainer([Distributed()], Loaders("val", "key"), max_steps=1),
        lambda: tiny_trainer([Distributed()], Loaders("val", None), max_steps=1),
    ):
        try:
            build().train()
            found.append(None)
        except ValueError as error:
            found.append(str(error))
    return found


@of_ranks
def test_ranks_that_differ_are_refused_on_all_of_them():
    one, other = two(different)
    assert one == other
    end = "; all ranks of a run must have the same"
    begin = "rank 1 has another configuration than rank 0: "
    assert one == [
        f"{begin}trainer.seed is 1 instead of 0{end}",
        f"{begin}options.distributed.vote_every is 4 instead of 3{end}",
        f"{begin}plugins.more is More instead of missing{end}",
        f"{begin}parameters.net.4.weight is float32[2, 16] instead of float32[1, 16]{end}",
        f"{begin}options.chosen.choice is {{a: [1, 1]}} instead of {{a: [1, 0]}}{end}",
        None,
        f"{begin}number 6 of parameters is heads.size.weight instead of heads.age.weight, of the same in another "
        "order, as a set gives it, whose order is another in each process; sort it: ranks average and exchange by "
        "order",
        f"{begin}buffers.seen_so_far is float32[2] instead of float32[1]{end}",
        f"rank 1 has another training loader than rank 0: loader.samples is 40 instead of 50{end}",
        f"rank 1 has another training loader than rank 0: loader.class is Sharded instead of DataLoader{end}",
        f"rank 1 has another val loader than rank 0: loader.samples is 40 instead of 50{end}",
        f"rank 1 has another val loader than rank 0: loader.class is Sharded instead of DataLoader{end}",
        f"rank 1 has another val loader than rank 0: loader.key is other instead of default{end}",
        None,
    ]


def test_values_as_text_do_not_depend_on_the_process():
    assert (
        as_text({"a": [1, None, "x"], "b": (object(), print)})
        == "{a: [1, None, x], b: [object, builtin_function_or_method]}"
    )


@dataclasses.dataclass(eq=False)
class Door(CallbackInterface):
    key: str = dataclasses.field(default="", metadata={"secret": True})


def test_marked_secrets_are_compared_and_not_shown():
    one, other = (pickle.loads(pickle.dumps(describe(tiny_trainer([Door(key)]))["options"])) for key in ("a", "b"))
    assert one["door.key"] == "a" != other["door.key"]
    assert f"{one['door.key']}" == "***"


class Elsewhere(CallbackInterface):
    @hookimpl(wrapper=True)
    def run(self, trainer):
        trainer.counters.global_step = trainer.rank  # what a restore may do that has read other files
        return (yield)


def apart():
    with pytest.raises(ValueError, match="rank 1 has another place to begin at than rank 0: counters.global_step is 1"):
        tiny_trainer([Distributed(), Elsewhere()]).train()
    return True


@of_ranks
def test_ranks_that_begin_at_different_steps_are_refused():
    assert two(apart) == [True, True]


# One model ----------------------------------------------------------------------------


class Shares(CallbackInterface):
    """Makes one model of those of the ranks, or says so."""

    @hookimpl
    def shard_model(self, model):
        return model

    @hookimpl
    def on_end_backward(self, trainer):
        for weight in trainer.module.parameters() if trainer.world_size > 1 else ():
            dist.all_reduce(weight.grad)


class Apart(TinyModule):
    """Has other values on each rank, of every kind that may be given to all, or may not."""

    def __init__(self):
        super().__init__()
        own = rank() + 1.0
        self.register_buffer("large", torch.full((9 << 20,), own))  # 36 MiB: an exchange of its own
        self.register_buffer("small", torch.full((3,), own))
        self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).t() * own)
        self.register_buffer("whole", torch.full((2,), int(own)))
        self.register_buffer("none", torch.empty(0))


class Gives(CallbackInterface):
    @hookimpl
    def on_begin_train(self, trainer):
        tensors = [torch.empty(2, device="meta"), *trainer.module.buffers()]
        self.same = trainer.hook.broadcast(trainer=trainer, tensors=tensors) is tensors


def given():
    torch.set_num_threads(1)
    gives, module = Gives(), Apart()
    tiny_trainer([Distributed(), gives], module, max_steps=1, evaluate_every=None, eval_when_finish=False).train()
    return gives.same, dict(module.named_buffers())


@of_ranks
def test_tensors_of_rank_0_are_given_to_all():
    (same, one), (_, other) = two(given)
    assert same
    for name in ("large", "small", "turned", "whole", "none"):
        assert digest(one[name]) == digest(other[name])
    assert one["large"][-1] == one["small"][-1] == one["whole"][-1] == 1
    assert one["turned"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


class Leaves(Shares):
    """Leaves each rank the buffers that it has."""

    @hookimpl
    def shares_buffers(self):
        return False


def evaluated_with(sharing):
    torch.set_num_threads(1)
    module = TinyModule()
    tiny_trainer([Distributed(), sharing()], module, max_steps=2, evaluate_every="2 steps").train()
    return module.net[1].running_mean


@of_ranks
@pytest.mark.parametrize("sharing", [Shares, Leaves])
def test_an_evaluation_goes_by_the_buffers_of_rank_0_unless_each_has_its_own(sharing):
    one, other = two(evaluated_with, sharing)
    assert torch.equal(one, other) == (sharing is Shares)


class Spoils(CallbackInterface):
    """Changes one number on rank 1 after the second step."""

    def __init__(self, name, value=None):
        self.name, self.value = name, value

    @hookimpl(tryfirst=True)
    def on_begin_evaluation(self, trainer):
        if self.name == "net.1.running_mean":
            self.on_end_train_step(trainer, 2)

    @hookimpl
    def on_end_train_step(self, trainer, global_step):
        if global_step == 2 and (rank() == 1 or self.value is not None):
            with torch.no_grad():
                tensor = trainer.module.state_dict()[self.name].reshape(-1)
                tensor[-1] = 7.0 + tensor[-1] if self.value is None else self.value


class Own(CallbackInterface):
    @hookimpl(wrapper=True)
    def get_replicated(self):
        return {name: tensor for name, tensor in (yield).items() if name != "net.4.bias"}


def spoiled():
    torch.set_num_threads(1)
    found = []
    for plugins, options in (
        ([Shares(), Spoils("net.4.bias")], {}),
        ([Shares(), Spoils("net.0.weight")], {"evaluate_every": None, "eval_when_finish": False}),
        ([Shares(), Spoils("net.1.running_mean")], {}),
        ([Shares(), Spoils("net.1.running_mean")], {"evaluate_every": None, "eval_when_finish": False}),
        ([Shares(), Spoils("net.1.weight", float("nan"))], {}),
        ([Shares(), Spoils("net.4.bias"), Own()], {"evaluate_every": "2 steps", "max_steps": 2}),
        ([Spoils("net.0.weight")], {}),
    ):
        how = {"max_steps": 4, "evaluate_every": "2 steps", **options}
        found.append(said(tiny_trainer([Distributed(), *plugins], **how)))
    unverified = [Distributed(verify_model=False), Shares(), Spoils("net.0.weight")]
    return [*found, said(tiny_trainer(unverified, max_steps=4))]


def said(trainer):
    try:
        trainer.train()
    except ValueError as error:
        return str(error).partition(", so they")[0]
    return None


@of_ranks
def test_ranks_that_hold_other_bits_are_ended():
    one, other = two(spoiled)
    assert one == other == [
        "rank 1 has another net.4.bias than rank 0 before an evaluation, at step 2: 1 of the 9 tensors that ranks hold "
        "alike differ",
        "rank 1 has another net.0.weight than rank 0 before a save, at step 4: 1 of the 6 tensors that ranks hold "
        "alike differ",
        "rank 1 has another net.1.running_mean than rank 0 before an evaluation, at step 2: 1 of the 9 tensors that "
        "ranks hold alike differ",
        None, None, None, None, None,
    ]  # fmt: skip


def spoiled_replica():
    torch.set_num_threads(1)

    class Here(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, trainer, global_step):
            if rank() == 3:
                with torch.no_grad():
                    trainer.module.net[0].weight.to_local().add_(1)

    plugins = {"fsdp": {"replicas": 2}}
    fine = said(tiny_trainer(plugins, max_steps=1, train_batch_size=16))
    return fine, said(tiny_trainer({**plugins, "here": Here()}, max_steps=1, train_batch_size=16))


@pytest.mark.slow
@pytest.mark.plugins
@of_ranks
def test_replicas_of_a_share_that_hold_other_bits_are_ended():
    outcomes = run_ranks(spoiled_replica, 4)
    words = "rank 3 has another net.0.weight than rank 1 before an evaluation, at step 1: 1 of the"
    for fine, broken in (outcome.value for outcome in outcomes):
        assert fine is None
        assert broken.startswith(words)


# Rank 0 first -------------------------------------------------------------------------


class Prepares(TinyModule):
    """Prepares its data where asked, for longer than ranks wait for each other, and notes who does."""

    def __init__(self, where, folder, fails=False, each_machine=False):
        super().__init__()
        self.where, self.folder, self.fails, self.each_machine = where, folder, fails, each_machine

    def prepare(self):
        with self.trainer.rank_zero_first(each_machine=self.each_machine):
            path = self.folder / f"machine {rank()}" if self.each_machine else self.folder / "data"
            if not path.exists():
                time.sleep(1.5)  # it is what is tested
                if self.fails:
                    raise ZeroDivisionError("no data")
                path.write_text(f"by rank {rank()}")
            self.found = path.read_text()

    @hookimpl
    def on_setup(self):
        if self.where == "on_setup":
            self.prepare()

    def get_train_dataloader(self, sampler, batch_size):
        if self.where == "loader" and not hasattr(self, "found"):
            self.prepare()
        return super().get_train_dataloader(sampler, batch_size)


def prepared(folder):
    torch.set_num_threads(1)
    found = []
    for where, each_machine in (("on_setup", False), ("loader", False), ("loader", True)):
        if each_machine:
            os.environ["LOCAL_RANK"] = "0"
        path = folder / f"{where}, {each_machine}"
        path.mkdir(exist_ok=True)
        module = Prepares(where, path, each_machine=each_machine)
        tiny_trainer([Distributed(timeout="1 s")], module, max_steps=1).train()
        found.append(module.found)
    leave()
    began = time.monotonic()
    try:
        tiny_trainer([Distributed()], Prepares("loader", folder, fails=True), max_steps=1).train()
    except (ZeroDivisionError, RuntimeError) as error:
        found.append(f"{type(error).__name__}: {error}")
    return found, time.monotonic() - began


@of_ranks
def test_rank_0_goes_first_for_as_long_as_it_takes(tmp_path):
    ranks = two(prepared, tmp_path)
    failed = "ZeroDivisionError: no data"
    assert ranks[0][0] == ["by rank 0", "by rank 0", "by rank 0", failed]
    told = f"RuntimeError: rank 0, which went first in trainer.rank_zero_first(), has failed: {failed}"
    assert ranks[1][0] == ["by rank 0", "by rank 0", "by rank 1", told]
    assert ranks[1][1] < 30


def killed(folder):
    class Dies(Prepares):
        def prepare(self):
            with self.trainer.rank_zero_first():
                os._exit(9)

    try:
        tiny_trainer([Distributed()], Dies("loader", folder), max_steps=1).train()
    except RuntimeError as error:
        return "\n".join(error.__notes__)
    return None


@of_ranks
def test_a_rank_0_that_dies_while_the_others_wait(tmp_path):
    dead, other = run_ranks(killed, 2, tmp_path)
    assert dead.code == 9
    assert "has lost another rank" in other.value


def test_alone_nobody_waits(tmp_path):
    module = Prepares("loader", tmp_path)
    (tmp_path / "data").write_text("there")
    tiny_trainer(module=module, max_steps=1).train()
    assert module.found == "there"
    with pytest.raises(RuntimeError, match="Prepares is with no trainer yet"):
        Prepares("loader", tmp_path).prepare()


# When things go wrong -----------------------------------------------------------------


class Breaks(TinyModule):
    def train_step(self, global_step, batch, device):
        if rank() == 1 and global_step == 3:
            raise ZeroDivisionError("on rank 1")
        return super().train_step(global_step, batch, device)


def broken():
    torch.set_num_threads(1)
    began = time.monotonic()
    try:
        tiny_trainer([Distributed(vote_every=1)], Breaks(), epochs=50).train()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return None


@of_ranks
def test_an_error_on_one_rank_ends_all():
    (name, _, seconds), (name_too, words, _) = two(broken)
    assert (name_too, words) == ("ZeroDivisionError", "on rank 1")
    assert name in ("RuntimeError", "DistBackendError")
    assert seconds < 10


def meet(environment, **options):
    torch.set_num_threads(1)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    os.environ.update(environment)
    if options.pop("late", False) and rank() == 1:
        time.sleep(2)  # it is what is tested
    for _ in range(2):
        trainer = tiny_trainer([Distributed(**options)], max_steps=2)
        trainer.train()
        trainer.validate()
    return trainer.metrics


def meeting(environment, options):
    return meet(environment, **options)


@of_ranks
def test_ranks_meet_without_a_store_of_the_launcher(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    one, other = two(meeting, {"MASTER_PORT": str(port)}, {"late": True, "timeout": "1 s"})
    assert one == other
    one, other = two(meeting, {}, {"init_method": f"file://{tmp_path}/store"})
    assert one == other


def meeting_again():
    """Meet four times at one store, as processes that an agent starts anew do, which all count otherwise."""
    torch.set_num_threads(1)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    if rank() == 1:
        store.set("rank 1 asks", "a word of a process that is gone")
        store.wait(["to a word of a process that is gone"])  # rank 0 takes it for one of now, and then looks again
    found = []
    for number in range(4):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number * rank())
        tiny_trainer([Distributed(start_timeout="20 s")], max_steps=1).train()
        found.append(dist.get_world_size())
        leave()
    return found


@of_ranks
def test_a_store_that_has_outlived_others_who_met_there():
    assert two(meeting_again) == [[2] * 4] * 2


class Resumes(CallbackInterface):
    @hookimpl
    def restore(self, trainer):
        return False


def told_apart(folder):
    """Train where rank 1 knows which run to go on with and rank 0 takes the newest; which is another one at last."""
    torch.set_num_threads(1)
    run = os.path.join(folder, "run-1")
    os.makedirs(run, exist_ok=True)
    trainer = tiny_trainer([Distributed(), Resumes()], runs_folder=folder, max_steps=1, resume=run if rank() else True)
    trainer.train()
    found = trainer.options.resume, str(trainer.run_dir)
    leave()
    os.makedirs(os.path.join(folder, "run-2"), exist_ok=True)
    trainer = tiny_trainer([Distributed(), Resumes()], runs_folder=folder, max_steps=1, resume=run if rank() else True)
    with pytest.raises(ValueError, match="rank 1 has another configuration than rank 0: trainer.resume is .*run-1"):
        trainer.train()
    return found


@of_ranks
def test_ranks_go_on_with_the_run_that_rank_0_names(tmp_path):
    assert two(told_apart, str(tmp_path)) == [(True, str(tmp_path / "run-1"))] * 2


def in_vain(path):
    os.environ.update(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost")
    os.environ.pop("MASTER_PORT", None)
    message = "rank 0 of 2 has not met the others within 1 s .distributed.start_timeout.: rank 1 has not come"
    with pytest.raises(RuntimeError, match=message):
        tiny_trainer([Distributed(init_method=f"file://{path}", start_timeout="1 s")]).train()
    with pytest.raises(ValueError, match="torchrun started 2 processes, but does not say where they meet"):
        tiny_trainer([Distributed()]).train()
    os.environ["MASTER_PORT"] = "1"
    os.environ["RANK"] = "1"
    with pytest.raises(RuntimeError, match="there is no store to meet at"):
        tiny_trainer([Distributed(start_timeout="1 s")]).train()
    return True


@of_ranks
def test_a_rank_that_does_not_come(tmp_path):
    outcome = run(in_vain, str(tmp_path / "store"))
    assert outcome.value, outcome.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vote_every": 0}, "distributed.vote_every=0 must be at least 1 step"),
        ({"uneven": "fill"}, "distributed.uneven='fill' must be one of drop, error, pad, join"),
        ({"init_method": "tcp://x"}, "distributed.init_method='tcp://x' must be env:// or file:///path"),
        ({"timeout": "soon"}, "distributed.timeout='soon' is not a cadence"),
        ({"start_timeout": "5 steps"}, "distributed.start_timeout='5 steps' is not a duration; write one like"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        Distributed(**options)


def test_more_processes_than_devices(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="rank 1 is process 1 of its machine, which has 1 CUDA device.s.; start one"):
        Trainer(TinyModule(), [Distributed()], device="cuda")
