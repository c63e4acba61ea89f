"""Any loader, cut anywhere and gone on with on any number of ranks: each sample as often as in the user's own loop."""

import dataclasses
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.habits.common import ByEpoch, Ids, Seen, Stream, attributes, flat, own_loop, train
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from hookline import data
from hookline.counters import Cursor
from hookline.data.sampling import Epochs
from hookline.testing import Memory

quick = settings(deadline=None, database=None, derandomize=True, max_examples=60)


def with_run(made):
    """Return a maker of loaders that pass the run's sampler on."""
    return lambda length, size, sampler: made(length, size, sampler(Ids(length)))


KINDS = {  # of length, batch size and the sampler class of the run
    "the run's sampler": with_run(lambda n, size, own: DataLoader(Ids(n), size, sampler=own)),
    "the run's sampler in a BatchSampler": with_run(
        lambda n, size, own: DataLoader(Ids(n), batch_sampler=BatchSampler(own, size, False))
    ),
    "the run's sampler, single samples": with_run(lambda n, size, own: DataLoader(Ids(n), None, sampler=own)),
    "in order": lambda n, size, _: DataLoader(Ids(n), size),
    "single samples": lambda n, size, _: DataLoader(Ids(n), None),
    "shuffle": lambda n, size, _: DataLoader(Ids(n), size, shuffle=True),
    "with replacement": lambda n, size, _: DataLoader(Ids(n), size, sampler=RandomSampler(Ids(n), True, 2 * n)),
    "weighted": lambda n, size, _: DataLoader(Ids(n), size, sampler=WeightedRandomSampler(torch.ones(n), n + 3)),
    "a subset": lambda n, size, _: DataLoader(Ids(n), size, sampler=SubsetRandomSampler(range(0, n, 2))),
    "by epoch": lambda n, size, _: DataLoader(Ids(n), size, sampler=ByEpoch(n)),
    "batches by epoch": lambda n, size, _: DataLoader(Ids(n), batch_sampler=BatchSampler(ByEpoch(n), size, False)),
    "a shuffle buffer": lambda n, size, _: DataLoader(Ids(n), size, sampler=Buffer(n)),
    "own batches": lambda n, size, _: DataLoader(Ids(n), batch_sampler=Runs(n, size)),
}
RANDOM = ("with replacement", "weighted")  # what the user's own loop draws is another draw


class Buffer(torch.utils.data.Sampler):
    """A sampler of the user's that draws each index when it is asked for it, out of a few."""

    def __init__(self, length):
        self.length = length

    def set_epoch(self, epoch): ...

    def __iter__(self):
        waiting = [*range(self.length)]
        while waiting:
            yield waiting.pop(random.randrange(min(len(waiting), 5)))

    def __len__(self):
        return self.length


class Runs(torch.utils.data.Sampler):
    """A batch sampler of the user's, with batches of several sizes."""

    def __init__(self, length, size):
        self.length, self.size = length, size

    def __iter__(self):
        at = 0
        for size in itertools.cycle([self.size, 1, self.size + 1]):
            if at >= self.length:
                return
            yield [*range(at, min(at + size, self.length))]
            at += size

    def __len__(self):
        return len([*iter(self)])


@dataclasses.dataclass
class Ranks:
    """All ranks of a run at once, in this process: each has the loader of its own share."""

    kind: str
    length: int
    size: int
    epoch: int
    workers: int = 0
    seed: int = 5

    def loader(self, sampler):
        """Return the user's loader."""
        loader = KINDS[self.kind](self.length, self.size, sampler)
        if not self.workers:
            return loader
        taken = {"batch_sampler": loader.batch_sampler} if loader.batch_sampler else {"batch_size": None}
        taken |= {} if loader.batch_sampler else {"sampler": loader.sampler}
        return DataLoader(loader.dataset, num_workers=self.workers, **taken)

    def go(self, shares, cursor, batches=None):
        """Take some batches on each rank, or all that are left; return them, with their samples, and the cursor."""
        taken, cursors = [], []
        for share in range(shares):
            mine = dataclasses.replace(cursor)
            sampler = data.sampler_class(mine, True, share, shares)
            user = self.loader(sampler)
            Epochs().tell(user, self.epoch)
            before = attributes(user)
            loader = data.RunLoader(user, mine, share, shares, sampler)
            loader.place()
            rows = []
            for batch in itertools.islice(loader, batches):
                single = batch[0].ndim == 0  # a pair of numbers might be two samples, for all that anybody knows
                samples, doubt = (1, "") if single else data.counted(batch, loader.given)
                assert not doubt
                rows.append((batch[0].reshape(-1).tolist(), batch[1].reshape(-1).tolist(), samples))
            assert attributes(user) == before
            if batches is None and not cursor.consumed:
                assert len(loader) == len(rows)
            mine.position += len(rows)
            mine.consumed += len(rows) * mine.draw
            taken.append(rows)
            cursors.append(mine)
        return taken, cursors[0]

    def begun(self):
        """Return a cursor at the beginning of the epoch."""
        return Cursor(seed=self.seed, epoch=self.epoch)

    def by_hand(self):
        """Return what the user's own loop gets, sorted; of random draws what one rank gets that goes on to the end."""
        if self.kind in RANDOM:
            return flat([ids for ids, _, _ in self.go(1, self.begun())[0][0]])
        user = self.loader(data.sampler_class(self.begun(), True, 0, 1))
        Epochs().tell(user, self.epoch)
        return flat(own_loop_of(user))


def own_loop_of(loader):
    """Return the ids that a loop over a loader gets."""
    return [batch[0].reshape(-1).tolist() for batch in loader]


def agrees(ranks, shares, then, cut):
    """Cut an epoch, go on on other ranks, and compare with the loop of the user and with an epoch that is not cut."""
    whole, _ = ranks.go(shares, ranks.begun())
    cut = min(cut, *(len(rows) for rows in whole))
    before, cursor = ranks.go(shares, ranks.begun(), cut)
    after, _ = ranks.go(then, cursor)
    rows = [row for rank in (*before, *after) for row in rank]
    hand = ranks.by_hand()
    assert flat([ids for ids, _, _ in rows]) == hand
    assert all(samples == len(ids) for ids, _, samples in rows)
    weighted = sum(sum(ids) / len(ids) * samples for ids, _, samples in rows) / sum(row[2] for row in rows)
    assert weighted == pytest.approx(sum(hand) / len(hand), abs=1e-9)
    draws = [draw for _, drawn, _ in rows for draw in drawn]
    assert len(set(draws)) == len(draws)
    if then == shares:
        assert [a + b for a, b in zip(before, after, strict=True)] == whole


@settings(quick, max_examples=200)
@given(
    st.sampled_from(sorted(KINDS)),
    st.integers(4, 40),
    st.integers(1, 6),
    st.integers(0, 2),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 8),
)
def test_each_sample_as_often_as_in_the_users_own_loop(kind, length, size, epoch, shares, then, cut):
    agrees(Ranks(kind, length, size, epoch), shares, then, cut)


@settings(quick, max_examples=5)
@given(st.sampled_from(sorted(KINDS)), st.integers(1, 2), st.integers(0, 3))
def test_with_loading_workers_too(kind, shares, cut):
    ranks = Ranks(kind, 9, 2, 1)
    agrees(dataclasses.replace(ranks, workers=2), shares, shares, cut)
    alone = ranks.go(shares, ranks.begun())
    assert dataclasses.replace(ranks, workers=1).go(shares, ranks.begun())[0] == alone[0]


class Shared(Stream):
    """A stream that takes one rank's part."""

    def __init__(self, length, share, shares):
        super().__init__(length)
        self.share, self.shares = share, shares

    def __iter__(self):
        return data.shard(super().__iter__(), self.share, self.shares)


@quick
@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 4), st.integers(0, 8))
def test_streams_that_are_shared(length, size, shares, cut):
    seen, draws = [], []
    for share in range(shares):
        user = data.sharded(DataLoader(Shared(length, share, shares), size))
        before = attributes(user)
        whole = [*data.RunLoader(user, Cursor(seed=1), share, shares)]
        rest = [*data.RunLoader(user, Cursor(seed=1, position=cut), share, shares)]
        assert str(rest) == str(whole[cut:])
        assert attributes(user) == before
        seen += [batch[0].tolist() for batch in whole]
        draws += [draw for batch in whole for draw in batch[1].tolist()]
    assert flat(seen) == [*range(length)]
    assert len(set(draws)) == length


@quick
@given(st.booleans(), st.integers(1, 40), st.integers(1, 6), st.integers(1, 4), st.integers(0, 4))
def test_the_last_dropped(shuffle, length, size, shares, cut):
    seen = []
    for share in range(shares):
        user = DataLoader(Ids(length), size, shuffle=shuffle, drop_last=True)
        loader = data.RunLoader(user, Cursor(), share, shares)
        whole = [batch[0].tolist() for batch in loader]
        assert len(whole) == len(loader) == len(range(share, length, shares)) // size
        assert all(len(batch) == size for batch in whole)
        rest = data.RunLoader(user, Cursor(position=cut), share, shares)
        assert [batch[0].tolist() for batch in rest] == whole[cut:]
        seen += whole
    assert len(set(flat(seen))) == len(flat(seen))
    if shares == 1 and not shuffle:
        assert seen == own_loop(user)[0]


# Whole runs ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the training loader draws its order from a sampler of its own")
@settings(quick, max_examples=25)
@given(
    st.sampled_from(sorted(set(KINDS) - {"the run's sampler, single samples", "single samples"})),
    st.integers(8, 20),
    st.integers(1, 4),
    st.integers(0, 20),
)
def test_a_run_resumed_anywhere(kind, length, size, at):
    def module():
        return Seen(lambda sampler, batch_size: KINDS[kind](length, batch_size, sampler))

    memory, options = Memory(every="1 steps"), {"train_batch_size": size, "epochs": 2, "evaluate_every": None}
    whole = train(module(), [memory], **options)
    hand = Ranks(kind, length, size, 0, seed=0)
    assert flat(whole.module.seen[0]) == [int(index) for index in hand.by_hand()]
    at = min(at, whole.global_step - 1)
    if at:
        resumed = train(module(), [Memory(memory.states[at])], **options)
        batches = [batch for epoch in range(2) for batch in whole.module.seen[epoch]]
        again = [batch for epoch in range(2) for batch in resumed.module.seen.get(epoch, [])]
        assert again == batches[at:]
        assert resumed.module.draws == whole.module.draws[-len(resumed.module.draws) :]
        assert resumed.counters.samples == whole.counters.samples


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_users_loop_gets_is_what_it_says(kind):
    """Hold the measure itself against arithmetic."""
    found = Ranks(kind, 11, 3, 1).by_hand()
    of_kind = {"a subset": [*range(0, 11, 2)]}
    expected = of_kind.get(kind, [*range(11)])
    assert found == expected or (kind in RANDOM and len(found) == {"weighted": 14}.get(kind, 22))
    assert own_loop(DataLoader(Ids(3), 2)) == {0: [[0, 1], [2]]}
