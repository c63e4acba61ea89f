"""Ranks of which some have more training data than others, and nothing is left out: against sums done by hand."""

import dataclasses
import os

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from hookline import CallbackInterface, ModuleInterface, hookimpl, sharded
from hookline.testing import Memory, TinyModule, digest, on_ranks, tiny_trainer
from hookline.testing.faults import PRELOADED
from hookline_distributed import Distributed
from hookline_distributed.uneven import without_samples

pytestmark = [pytest.mark.plugins]
PRELOADED += [__name__, "hookline_distributed", "hookline_ddp", "hookline_fsdp", "hookline_accumulate"]
of_ranks = pytest.mark.xdist_group("ranks")


def two(function, *args):
    """Run a function on two ranks; return what it returned on each."""
    return on_ranks(function, 2, *args)


def rank():
    return int(os.environ["RANK"])


# One rank with the union ----------------------------------------------------------------


class Plain(TinyModule):
    """Without batch norm, whose statistics depend on the batch of a rank; the seed of its dropout is the rank's."""

    def __init__(self, samples, dropout=0.0):
        super().__init__(samples, dropout)
        self.net[1] = torch.nn.Identity()
        self.calls = 0

    def train_step(self, global_step, batch, device):
        self.log(calls=1.0, over="epoch", reduce="sum", sync=True)
        self.calls += 1
        return super().train_step(global_step, batch, device)


class Watch(CallbackInterface):
    """Keeps what a step's end is told, and what is logged."""

    def __init__(self):
        self.told, self.logged = [], []

    def on_end_train_step(self, global_step, losses, predictions):
        self.told.append((global_step, losses.numel(), len(predictions)))

    @hookimpl
    def on_log(self, metrics):
        self.logged += [value for name, value in metrics.items() if name == "calls"]


def trained(policy, sharing, samples, window, options):
    module, watch = Plain(samples), Watch()
    plugins = {sharing: {}, "watch": watch, "distributed": {"uneven": policy}}
    if window > 1:
        plugins["accumulate"] = {"steps": window}
    trainer = tiny_trainer(plugins, module, train_batch_size=8 * window, evaluate_every="7 samples", **options)
    trainer.train()
    weights = trainer.hook.export_model(trainer=trainer)
    counters = dataclasses.asdict(trainer.counters)
    counters.pop("seconds")
    return weights, counters, trainer.metrics, watch.told, watch.logged, module.calls, tuple(trainer.totals)


def cases(*given):
    torch.set_num_threads(1)
    return [trained(*case, {}) for case in given]


# Samples, micro-batches of 4 a step and rank: what the last step of an epoch has on rank 0 and on rank 1.
SPLITS = {
    (21, 1): ([3], [2]),  # 4 4 3 and 4 4 2
    (17, 1): ([1], []),  # 4 4 1 and 4 4
    (45, 2): ([4, 3], [4, 2]),
    (41, 2): ([4, 1], [4]),
    (33, 2): ([1], []),
    (16, 1): ([4], [4]),
}


def alone(samples, window):
    module, watch = Plain(samples), Watch()
    trainer = tiny_trainer([watch], module, train_batch_size=8 * window, evaluate_every="7 samples")
    trainer.train()
    return dict(module.state_dict()), trainer.counters, trainer.metrics, watch.told


@of_ranks
@pytest.mark.parametrize(("policy", "sharing"), [("pad", "ddp"), ("join", "ddp"), ("pad", "fsdp")])
def test_two_ranks_with_any_split_are_one_rank_with_the_union(policy, sharing):
    found = two(cases, *[(policy, sharing, *split) for split in SPLITS])
    for split, (of_rank_0, of_rank_1) in zip(SPLITS, zip(*found, strict=True), strict=True):
        weights, counters, metrics, told, logged, calls, totals = of_rank_0
        whole, expected, whole_metrics, whole_told = alone(*split)
        torch.testing.assert_close(dict(weights), whole, atol=1e-5, rtol=1e-4)
        assert digest(weights) == digest(of_rank_1[0])
        assert (counters, totals) == (of_rank_1[1], of_rank_1[6])
        assert (counters["samples"], counters["global_step"]) == (expected.samples, expected.global_step)
        assert counters["evaluations"] == expected.evaluations > 2  # they are due at numbers of samples
        assert metrics == of_rank_1[2] == pytest.approx(whole_metrics, abs=1e-5)
        last = SPLITS[split]
        steps = counters["global_step"] // 2
        for mine, (_, batches, predictions) in zip(last, (told[steps - 1], of_rank_1[3][steps - 1]), strict=True):
            assert (batches, predictions) == (len(mine), sum(mine))  # none of those that only fill up
        for one, other, both in zip(told, of_rank_1[3], whole_told, strict=True):
            assert one[2] + other[2] == both[2]
        real = sum(each[1] for each in told + of_rank_1[3])
        assert sum(logged) == sum(of_rank_1[4]) == real  # what a step logs that only fills up is dropped, on each rank
        assert calls + of_rank_1[5] == real  # the module's own count of calls


# By hand --------------------------------------------------------------------------------


class Sum(ModuleInterface):
    """Subtracts from its weight, with SGD of rate 1, the mean of the samples of each step."""

    def __init__(self, *of_ranks):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.of_ranks, self.path, self.sizes = of_ranks, [], []

    def train_step(self, global_step, batch, device):
        return (self.weight * batch).mean(), batch

    def on_end_train_step(self, global_step, losses, batch):
        self.path.append(round(-float(self.weight.detach()), 4))
        self.sizes.append(len(batch))

    def get_train_dataloader(self, sampler, batch_size):
        return sharded(DataLoader(Stream(self.of_ranks[rank()]), batch_size=None))

    def get_val_dataloaders(self, sampler, batch_size):
        return None

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), 1.0)], []


class Stream(IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter([torch.tensor(batch) for batch in self.batches])


class Listed(Sum):
    """Says how many batches there are, and not how large each is."""

    def get_train_dataloader(self, sampler, batch_size):
        return sharded([torch.tensor(batch) for batch in self.of_ranks[rank()]])


class Windows(CallbackInterface):
    def __init__(self, size, cut=None):
        self.size, self.cut = size, cut

    @hookimpl
    def get_window_size(self):
        return self.size

    @hookimpl
    def on_boundary(self, trainer, global_step):
        if global_step == self.cut:
            trainer.stop("enough", alone=False)


def summed(policy):
    torch.set_num_threads(1)
    found = []
    for kind, window, *batches in (
        (Sum, 1, [[1.0, 2.0], [3.0]], [[10.0, 20.0, 30.0]]),
        (Sum, 2, [[1.0], [5.0], [9.0]], [[3.0, 7.0]]),
        (Sum, 1, [[4.0]], []),
        (Listed, 1, [[1.0], [2.0, 4.0]], [[5.0, 6.0], [3.0], [8.0]]),
    ):
        module = kind(*batches)
        plugins = {"ddp": {}, "distributed": {"uneven": policy}, "windows": Windows(window)}
        trainer = tiny_trainer(plugins, module, epochs=1, train_batch_size=8)
        trainer.train()
        found.append((module.path, module.sizes, trainer.counters.samples))
    return found


@of_ranks
@pytest.mark.parametrize("policy", ["pad", "join"])
def test_streams_and_batches_of_any_size_against_sums_by_hand(policy):
    one, other = two(summed, policy)
    for (path, sizes, samples), (path_too, sizes_too, samples_too), expected in zip(
        one,
        other,
        [
            # (1 + 2 + 10 + 20 + 30) / 5 = 12.6, and 3 / 1
            ([12.6, 15.6], [2, 1], [3, 0], 6),
            # a window of [1], [5] and one of [3 7]: (1 + 5 + 3 + 7) / 4 = 4, and 9 / 1
            ([4.0, 13.0], [2, 1], [2, 0], 5),
            # rank 1 never has a batch
            ([4.0], [1], [0], 1),
            # (1 + 5 + 6) / 3 = 4, (2 + 4 + 3) / 3 = 3, 8 / 1
            ([4.0, 7.0, 15.0], [1, 2, 0], [2, 1, 1], 7),
        ],
        strict=True,
    ):
        assert (path, sizes, sizes_too, samples) == expected
        assert (path_too, samples_too) == (path, samples)


# Resume ---------------------------------------------------------------------------------


def cut_and_resumed(policy):
    """Train on streams of 4 batches and of 1, whole; and cut after step 2, where rank 1 has nothing left."""
    torch.set_num_threads(1)
    batches = [[1.0, 2.0], [3.0], [4.0], [9.0]], [[10.0, 20.0, 30.0]]
    found, memory = [], Memory()
    for cut, state, epochs in ((None, None, 2), (2, memory, 2), (None, memory, 2)):
        module = Sum(*batches)
        plugins = {"ddp": {}, "distributed": {"uneven": policy}, "windows": Windows(1, cut)}
        if state is not None:
            plugins["memory"] = state
        trainer = tiny_trainer(plugins, module, epochs=epochs, train_batch_size=8)
        trainer.train()
        found.append((module.path, module.sizes, digest(module.state_dict()), trainer.counters.samples))
    return found


@of_ranks
@pytest.mark.parametrize("policy", ["pad", "join"])
def test_a_resume_where_a_rank_has_run_out(policy):
    for number, (whole, cut, resumed) in enumerate(two(cut_and_resumed, policy)):
        assert (len(whole[0]), whole[3]) == (8, 16)
        assert cut[0] == whole[0][:2]
        assert resumed[0] == whole[0][2:]
        assert resumed[1] == whole[1][2:] == [[1, 1, 2, 1, 1, 1], [0, 0, 3, 0, 0, 0]][number]
        assert resumed[2:] == whole[2:]


def resumed_of_other_size(state):
    torch.set_num_threads(1)
    module = Plain(23)
    plugins = {"ddp": {}, "distributed": {"uneven": "pad"}, "memory": Memory(state)}
    trainer = tiny_trainer(plugins, module, epochs=1, evaluate_every=None)
    trainer.train()
    return trainer.global_step, [sorted(batch) for batch in module.seen], trainer.counters.samples


@of_ranks
def test_a_resume_between_two_batches_of_now_uses_each_sample_once():
    """17 samples are left, 9 and 8: 3 batches and 2, though both ranks have 3 in a whole epoch."""
    memory, first = Memory(), Plain(23)
    tiny_trainer([memory], first, train_batch_size=6, max_steps=1, evaluate_every=None).train()
    (steps, seen, samples), (steps_too, seen_too, samples_too) = two(resumed_of_other_size, memory.state)
    assert (steps, samples) == (steps_too, samples_too) == (4, 23)
    assert [len(batch) for batch in seen] == [4, 4, 1]
    assert [len(batch) for batch in seen_too] == [4, 4]  # the last of them again, at zero weight, is kept nowhere
    used = [number for batch in first.seen + seen + seen_too for number in batch]
    assert sorted(used) == list(range(23))


# What a module counts --------------------------------------------------------------------


class Counts(Plain):
    """Keeps statistics of its inputs, in batch norm, a metric and buffers; nothing of it comes into the loss."""

    def __init__(self):
        from torchmetrics import MeanMetric

        super().__init__(17)  # batches of 4: one more on rank 0
        self.norm = torch.nn.BatchNorm1d(8, affine=False)
        self.mean = MeanMetric(sync_on_compute=False)
        self.register_buffer("counted", torch.zeros((), dtype=torch.int64))

    def train_step(self, global_step, batch, device):
        self.norm(twice(batch[0]))
        self.mean.update(batch[0])
        self.counted += len(batch[0])
        return super().train_step(global_step, batch, device)


def twice(inputs):
    """Return each value two times, since batch norm refuses a batch of one."""
    return inputs[:, :, None].expand(-1, -1, 2)


def counted(policy, sharing):
    torch.set_num_threads(1)
    module = Counts()
    plugins = {sharing: {"broadcast_buffers": False}, "distributed": {"uneven": policy}}
    tiny_trainer(plugins, module, evaluate_every=None).train()
    by_hand = torch.nn.BatchNorm1d(8, affine=False)
    for ids in module.seen:
        by_hand(twice(module.inputs[ids]))
    ids = [number for batch in module.seen for number in batch]
    own = {**module.norm.state_dict(), "mean": module.mean.compute(), "counted": module.counted}
    hand = {**by_hand.state_dict(), "mean": module.inputs[ids].mean(), "counted": torch.tensor(len(ids))}
    return own, hand, len(module.seen)


@of_ranks
@pytest.mark.parametrize(("policy", "sharing"), [("pad", "ddp"), ("join", "ddp"), ("pad", "fsdp")])
def test_what_only_fills_up_counts_nowhere_in_the_module(policy, sharing):
    found = two(counted, policy, sharing)
    assert [batches for _, _, batches in found] == [6, 4]
    for own, by_hand, _ in found:
        torch.testing.assert_close(own, by_hand)


# What cannot be -------------------------------------------------------------------------


def refused():
    torch.set_num_threads(1)
    found = []
    for plugins in ({"fsdp": {}}, {"ddp": {"find_unused_parameters": True}}, {}):
        with pytest.raises(ValueError, match="join") as caught:
            tiny_trainer({**plugins, "distributed": {"uneven": "join"}}, Plain(16)).train()
        found.append(str(caught.value))
    module = Plain(16)
    module.net[1] = torch.nn.SyncBatchNorm(16)
    with pytest.raises(ValueError, match=r"uneven=pad does not go with the SyncBatchNorm net\.1, whose statistics"):
        tiny_trainer({"fsdp": {}, "distributed": {"uneven": "pad"}}, module).train()
    return found


@of_ranks
def test_who_cannot_stand_aside_is_refused_with_what_can():
    one, other = two(refused)
    assert one == other
    for message in one:
        assert "no plugin here lets a rank take part in a step without computing it. ddp does" in message
        assert "let distributed.uneven=pad have a rank go on with a batch at zero weight" in message


# Alone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["pad", "join"])
def test_alone_it_changes_nothing(policy, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    digests = []
    for plugins in ([], [Distributed(uneven=policy)]):
        module = TinyModule()
        trainer = tiny_trainer(plugins, module)
        trainer.train()
        digests.append((digest(module.state_dict()), trainer.counters.samples))
    assert digests[0] == digests[1]


def test_alone_each_sample_of_a_window_weighs_the_same():
    """Else a run that goes on with one rank would weigh a last micro-batch of one sample as one of 4."""
    whole, _, _, told = alone(41, 2)
    module = Plain(41)
    plugins = {"distributed": {"uneven": "pad"}, "accumulate": {"steps": 4}}
    trainer = tiny_trainer(plugins, module, train_batch_size=16)
    trainer.train()
    assert [len(batch) for batch in module.seen[8:11]] == [4, 4, 1]
    torch.testing.assert_close(dict(module.state_dict()), whole, atol=1e-5, rtol=1e-4)
    assert (trainer.global_step, trainer.counters.samples) == (len(told), 82)


def test_an_output_of_no_sample():
    assert without_samples(torch.ones(4, 3)).shape == (0, 3)
    assert without_samples(torch.tensor(1)).shape == (0,)
    assert without_samples("text") is None
