"""A split micro-batch has the gradient of the whole one, each sample counts once, and the size survives a resume."""

import dataclasses
import weakref

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from hookline import CallbackInterface, hookimpl
from hookline.testing import Memory, PlainModule, TinyModule, count_syncs, digest, tiny_trainer
from hookline_oom import Oom


class Limited(TinyModule):
    """Runs out of memory in batches of more than so many samples, in the forward or in the backward."""

    def __init__(self, limit=100, backward=False, **options):
        super().__init__(**options)
        self.limit, self.backward = limit, backward
        self.register_buffer("count", torch.zeros(()))

    def train_step(self, global_step, batch, device):
        self.count += len(batch[0])
        self.log(size=float(len(batch[0])), reduce="sum")
        loss, predictions = super().train_step(global_step, batch, device)
        if len(batch[0]) > self.limit:
            if not self.backward:
                raise torch.OutOfMemoryError("out of memory in the forward")
            predictions.register_hook(out_of_memory)
        return loss, predictions


class PlainLimited(Limited):
    """Has neither batch norm nor dropout."""

    def __init__(self, limit=100, backward=False, samples=50):
        super().__init__(limit, backward, samples=samples, dropout=0.0)
        del self.net[1]

    def get_val_dataloaders(self, sampler, batch_size):
        return None


def out_of_memory(gradient):
    raise torch.OutOfMemoryError("out of memory in the backward")


class Heard(CallbackInterface):
    def __init__(self):
        self.logs, self.outputs = [], []

    @hookimpl
    def on_log(self, metrics):
        self.logs.append(dict(metrics))

    @hookimpl
    def on_end_train_step(self, train_step_collated_outputs):
        self.outputs.append(train_step_collated_outputs)


def train(plugins, module=None, **options):
    trainer = tiny_trainer(plugins, module, **{"log_every": "1 steps", **options})
    trainer.train()
    return trainer


def assert_close(one, other):
    states = [dict(trainer.module.state_dict()) for trainer in (one, other)]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


# Where memory suffices ----------------------------------------------------------------


@pytest.mark.plugins
@pytest.mark.parametrize(
    "plugins",
    [
        {},
        {"accumulate": {"steps": 2}, "clip": {"max_norm": 0.1}, "finite": {"policy": "skip"}},
        {"amp": {"precision": "fp16"}, "sam": {}, "ema": {"decay": 0.5}},
    ],
    ids=["plain", "window", "fp16"],
)
@pytest.mark.parametrize("first", [True, False])
def test_changes_no_bit_where_memory_suffices(plugins, first):
    ends = []
    for oom in ({}, {"oom": {}}):
        memory, heard = Memory(every="1 steps"), Heard()
        named = {**oom, **plugins} if first else {**plugins, **oom}
        trainer = train({**named, "memory": memory, "heard": heard}, Limited(), train_batch_size=16)
        for state in memory.states.values():
            state["trainer"]["counters"]["seconds"] = 0
        ends.append((digest(memory.states), trainer.module.seen, heard.logs, digest(heard.outputs)))
    assert ends[0] == ends[1]


def test_waits_for_nothing():
    assert count_syncs(lambda: train([Oom()])) == count_syncs(lambda: train([]))


# Where it does not --------------------------------------------------------------------


def train_by_hand(batches, window, sizes):
    """Train without a framework, each micro-batch in parts of these sizes."""
    module = TinyModule()
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, -(-len(batches) // window))
    torch.manual_seed(5)
    for begin in range(0, len(batches), window):
        taken = batches[begin : begin + window]
        for inputs, targets, _ in taken:
            own = sizes[len(inputs)]
            for part, truth in zip(inputs.split(own), targets.split(own), strict=True):
                loss = torch.nn.functional.mse_loss(module.net(part), truth)
                loss = loss / len(taken) if len(taken) > 1 else loss
                (loss * (len(part) / len(inputs))).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return module


class OnList(Limited):
    """Has its batches in a list, and draws as the loop by hand does."""

    def __init__(self, limit, backward):
        super().__init__(limit, backward)
        self.batches = list(DataLoader(TensorDataset(self.inputs, self.targets, torch.arange(50)), 12))

    def get_train_dataloader(self, sampler, batch_size):
        return self.batches

    @hookimpl
    def on_begin_train(self):
        torch.manual_seed(5)


@pytest.mark.plugins
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("limit", "sizes"),
    [(100, {12: [12], 2: [2]}), (11, {12: [6, 6], 2: [2]}), (4, {12: [3, 3, 3, 3], 2: [2]})],
)
def test_has_the_bits_of_a_loop_by_hand(limit, sizes, window, backward):
    module = OnList(limit, backward)
    plugins = {"oom": {}, **({"accumulate": {"steps": window}} if window > 1 else {})}
    train(plugins, module, epochs=1, train_batch_size=12 * window)
    by_hand = train_by_hand(module.batches, window, sizes)
    assert digest(module.net.state_dict()) == digest(by_hand.net.state_dict())
    assert module.count == 50
    assert sorted(number for ids in module.seen for number in ids) == [*range(50)]


@pytest.mark.parametrize("backward", [False, True])
def test_the_training_is_that_of_whole_batches_and_each_sample_counts_once(backward, caplog):
    heard, told, oom = Heard(), Heard(), Oom()
    split = train([oom, heard], PlainLimited(3, backward))
    whole = train([told], PlainLimited())
    assert_close(split, whole)
    assert oom.limit == 2
    assert split.module.count == whole.module.count
    assert [row["size"] for row in heard.logs if "size" in row] == [row["size"] for row in told.logs if "size" in row]
    losses = [[row["train_loss"] for row in one.logs if "train_loss" in row] for one in (heard, told)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for one, other in zip(heard.outputs, told.outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert dataclasses.replace(split.counters, seconds=0) == dataclasses.replace(whole.counters, seconds=0)
    assert [row.message for row in caplog.records if row.name == "hookline.oom"] == [
        f"memory ran out: at most {size} samples pass the model at once from now on" for size in (4, 2)
    ]


class Weighing(PlainLimited):
    """Has a mean over tokens, of which each sample has its own number; some have none."""

    def train_step(self, global_step, batch, device):
        super().train_step(global_step, batch, device)
        inputs, targets, ids = batch
        tokens = (ids % 4).float().unsqueeze(1)
        return (tokens * (self.net(inputs) - targets) ** 2).sum() / tokens.sum(), tokens

    @hookimpl
    def get_weight(self, batch):
        return float((batch[2] % 4).sum())


@pytest.mark.plugins
@pytest.mark.parametrize("limit", [3, 1])
def test_parts_weigh_what_the_module_says(limit):
    plugins = {"accumulate": {"steps": 2}}
    split = train({"oom": {}, **plugins}, Weighing(limit), train_batch_size=16)
    whole = train(plugins, Weighing(), train_batch_size=16)
    assert_close(split, whole)


@pytest.mark.plugins
def test_sam_takes_both_passes_in_parts():
    split = train({"sam": {"rho": 0.5}, "oom": {}}, PlainLimited(3))
    whole = train({"sam": {"rho": 0.5}}, PlainLimited())
    assert_close(split, whole)
    assert split.module.count == 100


class Growing(PlainLimited):
    """Has longer rows from its fifth batch on, with which only half the samples fit."""

    def get_train_dataloader(self, sampler, batch_size):
        batches = list(DataLoader(TensorDataset(self.inputs, self.targets, torch.arange(50)), 10))
        return [[*batch, torch.zeros(10, 2 + (place > 3))] for place, batch in enumerate(batches)]

    def train_step(self, global_step, batch, device):
        self.limit = 100 if batch[3].shape[1] == 2 else 5
        return super().train_step(global_step, batch[:3], device)


def test_a_batch_larger_than_any_before_is_tried_first(caplog):
    module = Growing()
    train([Oom()], module, epochs=1)
    assert module.count == 50
    assert [len(ids) for ids in module.seen] == [10, 10, 10, 10, 5, 5]
    assert "counts twice" not in caplog.text


class Once(PlainLimited):
    """Has no memory in its sixth step, at the first try."""

    failed = False

    def train_step(self, global_step, batch, device):
        if global_step == 6 and not self.failed and not self.trainer.idle:
            Once.failed = True
            raise torch.OutOfMemoryError("another program has taken it")
        return super().train_step(global_step, batch, device)


def test_memory_that_runs_out_unforeseen_is_told(caplog):
    Once.failed = False
    split, whole = train([Oom()], Once()), train([], PlainLimited())
    assert_close(split, whole)
    assert "memory ran out in a window whose size had fitted before" in caplog.text
    assert split.global_step == 14


def test_what_the_failed_pass_held_is_free_when_it_goes_on():
    class Watching(PlainLimited):
        held = None

        def train_step(self, global_step, batch, device):
            if self.held is not None:
                assert self.held() is None
            activation = self.net[0](batch[0])
            if len(batch[0]) > 4:
                self.__class__.held = weakref.ref(activation)
                raise torch.OutOfMemoryError("out of memory")
            return torch.nn.functional.mse_loss(self.net[2:](activation), batch[1])

    trainer = train([Oom()], Watching(), max_steps=2)
    assert trainer.module.held is not None


# Batches of every kind ----------------------------------------------------------------


@dataclasses.dataclass
class Row:
    inputs: torch.Tensor
    more: dict


def as_dataclass(inputs, targets, ids):
    return Row(inputs, {"targets": targets, "ids": ids.numpy(), "names": [str(n) for n in ids.tolist()], "scale": 1.0})


def as_tuple(inputs, targets, ids):
    return (inputs, {"targets": targets, "ids": ids, "names": tuple(map(str, ids.tolist())), "none": None, "text": "a"})


class Shaped(PlainLimited):
    """Has batches of another shape, and outputs of many."""

    def __init__(self, shape, limit):
        super().__init__(limit)
        self.shape = shape

    def get_train_dataloader(self, sampler, batch_size):
        batches = DataLoader(TensorDataset(self.inputs, self.targets, torch.arange(50)), 10)
        return [self.shape(*batch) for batch in batches]

    @hookimpl
    def count_samples(self, batch):
        return len(batch.inputs if isinstance(batch, Row) else batch[0])

    def train_step(self, global_step, batch, device):
        inputs, more = (batch.inputs, batch.more) if isinstance(batch, Row) else batch
        ids = torch.as_tensor(more["ids"])
        assert [int(name) for name in more["names"]] == ids.tolist()
        loss, predictions = super().train_step(global_step, (inputs, more["targets"], ids), device)
        pairs = {"error": (predictions, more["targets"])}
        return loss, pairs, predictions.mean(), float(ids.float().mean()), list(more["names"]), None


@pytest.mark.parametrize("shape", [as_dataclass, as_tuple])
def test_batches_and_outputs_of_every_kind(shape):
    heard, told = Heard(), Heard()
    train([Oom(), heard], Shaped(shape, 3), epochs=1)
    train([told], Shaped(shape, 100), epochs=1)
    assert len(heard.outputs) == len(told.outputs) == 5
    for (loss, pairs, mean, number, names, none), other in zip(heard.outputs, told.outputs, strict=True):
        torch.testing.assert_close(loss, other[0], rtol=1e-4, atol=1e-5)
        for tensor, whole in zip(pairs[0]["error"], other[1][0]["error"], strict=True):
            torch.testing.assert_close(tensor, whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mean, other[2], rtol=1e-4, atol=1e-5)
        assert number == pytest.approx(other[3])
        assert (names, none) == (other[4], other[5])


def with_a_matrix(inputs, targets, ids):
    return (inputs, {"targets": targets, "ids": ids, "names": list(map(str, ids.tolist())), "matrix": torch.ones(3, 3)})


def test_says_what_cannot_be_split():
    with pytest.raises(ValueError, match=r"cannot split a batch of 10 samples with a Tensor of shape \(3, 3\) in it"):
        train([Oom()], Shaped(with_a_matrix, 3))
    with pytest.raises(torch.OutOfMemoryError) as raised:
        train([Oom()], PlainLimited(0))
    assert "oom cannot split it any more: a single sample does not fit" in raised.value.__notes__


def test_says_which_output_cannot_be_put_together():
    class Square(PlainLimited):
        def train_step(self, global_step, batch, device):
            loss, predictions = super().train_step(global_step, batch, device)
            return loss, predictions.T @ predictions

    with pytest.raises(ValueError, match=r"output of train_step, a Tensor of shape \(1, 1\), of parts of \[2, 2, 2, 2"):
        train([Oom(), Heard()], Square(3))
    train([Oom()], Square(3), max_steps=1)  # nobody takes it


# State --------------------------------------------------------------------------------


@pytest.mark.plugins
def test_a_resumed_run_ends_with_the_same_bits():
    def end(memory):
        train({"oom": {}, "accumulate": {"steps": 2}, "memory": memory}, Limited(3), train_batch_size=16)
        memory.state["trainer"]["counters"]["seconds"] = 0
        return digest(memory.state)

    whole = Memory(every="1 steps")
    expected, states = end(whole), dict(whole.states)
    assert states[3]["plugins"]["oom"] == {"limit": 2}
    for step, state in states.items():
        if step < 8:
            assert end(Memory(state)) == expected, step


class Stops(Limited):
    stops = True

    def on_end_backward(self, global_step, loss_tensor):
        if self.stops and global_step == 2 and not self.trainer.idle:
            self.trainer.stop("enough", "preempted", within_window=True)


class StopsWhileTried(Limited):
    def on_end_backward(self, global_step, loss_tensor):
        if global_step == 0:
            self.trainer.stop("enough", "preempted", within_window=True)


@pytest.mark.plugins
@pytest.mark.parametrize("stops", [Stops, StopsWhileTried])
def test_a_run_that_is_cut_within_a_window_goes_on_with_the_same_bits(stops):
    def run(module, memory):
        return train({"oom": {}, "accumulate": {"steps": 2}, "memory": memory}, module, train_batch_size=16)

    memory = Memory()
    cut = run(stops(3), memory)
    assert cut.status == "preempted"
    assert len(memory.state["window"]["outputs"]) == 1
    resumed, whole = run(Limited(3), Memory(memory.state)), run(Limited(3), Memory())
    assert digest(resumed.module.state_dict()) == digest(whole.module.state_dict())


def test_an_object_that_another_trainer_had_begins_anew():
    oom = Oom()
    train([oom], Limited(3))
    train([oom], Limited())
    assert oom.limit is None


class Ranks(CallbackInterface):
    @hookimpl
    def get_ranks(self):
        return 0, 0, 2


def test_refuses_several_ranks():
    with pytest.raises(ValueError, match="oom works in one process: with several ranks, one that runs out of memory"):
        train([Ranks(), Oom()], PlainModule())
