"""Which samples make which batch: the draws of the user's samplers, from the cursor on, dealt to ranks."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from hookline.counters import Cursor
from hookline.data.cursor import ResumableSampler, mix, sampler_class
from hookline.data.seeding import States

Agree = Callable[[list[Any]], None]

INNER = (  # attributes under which loaders, samplers and data sets hold inner ones
    "loader", "dataloader", "base_dataloader", "sampler", "batch_sampler", "base_sampler", "dataset", "datasets",
    "iterable",
)  # fmt: skip
PLAIN = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)  # draw only from torch's RNG
ARGUMENTS = (
    "batch_size", "num_workers", "collate_fn", "pin_memory", "drop_last", "timeout", "worker_init_fn",
    "multiprocessing_context", "generator", "prefetch_factor", "persistent_workers", "pin_memory_device", "in_order",
)  # fmt: skip


def length(loader: Any) -> int | None:
    """Return how many batches a loader has, or None if it does not know."""
    try:
        return len(loader)
    except TypeError:
        return None


def arguments_of(loader: DataLoader[Any], *but: str) -> dict[str, Any]:
    """Return the arguments of a loader's constructor, without data set and samplers."""
    return {name: getattr(loader, name) for name in ARGUMENTS if name not in but}


def parts(loader: Any) -> list[Any]:
    """Return a loader and its inner loaders, samplers and data sets, found under the usual names."""
    found: list[Any] = []
    waiting = [loader]
    while waiting and len(found) < 100:
        part = waiting.pop(0)
        if part is None or isinstance(part, (str, int, torch.Tensor)) or any(part is other for other in found):
            continue
        found.append(part)
        for name in INNER:
            inner = None
            with contextlib.suppress(Exception):  # the user's objects may raise anything
                inner = getattr(part, name, None)
            waiting += inner if isinstance(inner, (list, tuple)) and name == "datasets" else [inner]
    return found


class Epochs:
    """Calls `set_epoch` of the user's samplers, batch samplers and streams.

    If you have set another epoch by hand, it stays.
    """

    def __init__(self) -> None:
        self._told: dict[int, tuple[Any, int]] = {}

    def tell(self, loader: Any, epoch: int) -> None:
        """Set the epoch of a loader and its inner parts."""
        for part in parts(loader):
            if not callable(getattr(part, "set_epoch", None)):
                continue
            _, last = self._told.get(id(part), (part, 0))
            if getattr(part, "epoch", None) in (None, last, epoch):
                self._told[id(part)] = part, epoch
                part.set_epoch(epoch)


# Ranks --------------------------------------------------------------------------------


class Sharded:
    """A loader that yields only this rank's share; see `sharded`."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


def sharded(loader: Any) -> Any:
    """Mark a loader as sharded: each rank's loader yields only that rank's own share of the data.

    For streams and other iterables that hookline cannot shard itself.
    """
    return Sharded(loader)


def shard(items: Any, share: int, shares: int) -> Iterator[Any]:
    """Yield one rank's share of items that come in the same order on all ranks: every `shares`-th of them.

    In a loading worker it yields that worker's part of the share: call it in `__iter__` of an `IterableDataset`.

    Args:
        items: any iterable, equal on all ranks.
        share: the share: `trainer.share`.
        shares: the number of shares: `trainer.shares`.
    """
    worker = torch.utils.data.get_worker_info()
    number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
    return itertools.islice(items, share + number * shares, None, shares * workers)


def is_shared(loader: Any, share: int, shares: int) -> bool:
    """Tell whether a sampler in a loader limits it to this rank's share.

    Raises:
        ValueError: the sampler has another share.
    """
    for part in parts(loader):
        if isinstance(part, (Sharded, ResumableSampler)):
            return True
        replicas, rank = getattr(part, "num_replicas", None), getattr(part, "rank", None)
        if isinstance(replicas, int) and isinstance(rank, int) and (replicas, rank) != (1, 0):
            if (replicas, rank) != (shares, share):
                raise ValueError(
                    f"the {type(part).__name__} of a loader is for share {rank} of {replicas}, and this rank takes "
                    f"share {share} of {shares}: make it with num_replicas=trainer.shares and rank=trainer.share, or "
                    "pass `sampler=sampler(dataset)`"
                )
            return True
    return False


# Batches ------------------------------------------------------------------------------


class Batches:
    """The batches of a map-style loader: their places in the epoch, with the indices that its samplers draw.

    A place is that of a batch's first sample, so no two are equal, whatever batch size and number of ranks a run had
    before a resume. Starts at the cursor. The draws of the user's sampler depend only on (seed, epoch); each rank takes
    its share of them, unless the sampler has sharded already. `__len__` is that of a whole epoch on this rank.

    Args:
        loader: the user's.
        cursor: the place to start, and the epoch.
        share: this rank's share of the data.
        shares: the number of shares.
        sampler: the class that the module got for this loader; the loader may hold another of the run's samplers.
        agree: gets the first draws of an epoch if ranks take shares of them, and raises if ranks differ.
        own: each rank has its own data, so nothing is sharded.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        cursor: Cursor,
        share: int,
        shares: int,
        agree: Agree,
        sampler: type | None = None,
        own: bool = False,
    ) -> None:
        self.cursor, self.share, self.shares, self.agree = cursor, share, shares, agree
        batches: Any = loader.batch_sampler
        self.batched = type(batches) is BatchSampler or is_of_torchdata(batches, "BatchSampler")  # these only cut
        self.size = (batches.batch_size or 1) if self.batched else 1
        self.drop_last = self.batched and batches.drop_last
        source: Any = batches.sampler if self.batched else loader.sampler if batches is None else batches
        self.name = type(source).__name__
        given = sampler if sampler is not None and issubclass(sampler, ResumableSampler) else None
        like: Any = given or sampler_class(cursor, True, share, shares)
        if isinstance(source, ResumableSampler):
            source, own = bound(source, like, like.cursor), False
        elif is_exact(source) and (type(source) in PLAIN or loader.generator is None):
            made = (sampler_class(cursor, True, 0, 1) if own else like)(source.data_source)
            made.shuffle = like.shuffle and type(source) is not SequentialSampler
            source = made
        self.repeatable = is_repeatable(source)
        self.runs = isinstance(source, ResumableSampler)  # starts at the cursor and shards by itself
        self.dealt = not self.runs and not own and not is_shared(source, share, shares)
        self.source = source if self.runs else rebound(source, like)
        self.shared = self.dealt or (self.runs and not own)  # one draw serves all ranks
        cursor.draw_by(self.size * (shares if self.shared else 1))
        cursor.settle_place()

    def __len__(self) -> int:
        items = len(self.source)
        if self.dealt:
            items = len(range(self.share, items, self.shares))
        return items // self.size if self.drop_last else -(-items // self.size)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        place, further = self.cursor.consumed + self.share, self.cursor.draw  # the batch's first sample in the epoch
        if not self.shared:  # ranks have places of their own
            place, further = self.cursor.consumed * self.shares + self.share, further * self.shares
        for drawn in self._of_the_run() if self.runs else self._of_the_user():
            if not drawn or (self.drop_last and len(drawn) < self.size):
                return
            yield place, drawn if self.batched else drawn[0]
            place += further

    def _of_the_run(self) -> Iterator[list[Any]]:
        """Return the draws for each batch, empty ones behind the last; no generator, to save a call in each batch."""
        source = iter(self.source)
        return map(list, map(itertools.islice, itertools.repeat(source), itertools.repeat(self.size)))

    def _of_the_user(self) -> Iterator[list[Any]]:
        """Yield the draws for each batch of this rank, from the cursor on; draw and skip earlier ones."""
        shares = self.shares if self.dealt else 1
        number = self.size * shares
        draws = Draws(self.source, mix(self.cursor.seed, self.cursor.epoch, "sampler"))
        draws.take(self.cursor.consumed)
        drawn = draws.take(number)
        if self.dealt and shares > 1:
            self.agree(drawn)
        while drawn:
            yield drawn[self.share :: shares] if self.dealt else drawn
            drawn = draws.take(number)


class Draws:
    """The draws of a sampler under an RNG of its own, unaffected by other draws and by how many it takes at once."""

    def __init__(self, source: Any, seed: int) -> None:
        self.source, self.states = source, States(seed)
        self.items: Iterator[Any] | None = None

    def take(self, number: int) -> list[Any]:
        """Draw the next items."""
        if not number:
            return []
        return self.states.under_way(self._take, number)  # type: ignore[no-any-return]

    def _take(self, number: int) -> list[Any]:
        if self.items is None:
            self.items = iter(self.source)
        return list(itertools.islice(self.items, number))


def is_exact(sampler: Any) -> bool:
    """Tell whether a sampler visits the whole data set once, in order or shuffled by the global RNG."""
    if type(sampler) is SequentialSampler:
        return True
    shuffles = type(sampler) is RandomSampler and sampler.generator is None
    if not shuffles and not is_of_torchdata(sampler, "RandomSampler"):  # its own generator is seeded by the global one
        return False
    return not sampler.replacement and sampler.num_samples == len(sampler.data_source)


def is_of_torchdata(sampler: Any, name: str) -> bool:
    """Tell whether a sampler is torchdata's version of the torch sampler of this name."""
    kind = type(sampler)
    return kind.__module__ == "torchdata.stateful_dataloader.sampler" and kind.__name__ == name


def is_repeatable(sampler: Any) -> bool:
    """Tell whether a sampler certainly draws the same again, given the epoch and the global RNG state."""
    if isinstance(sampler, (ResumableSampler, range, list, tuple)) or callable(getattr(sampler, "set_epoch", None)):
        return True
    if type(sampler) is BatchSampler:
        return is_repeatable(sampler.sampler)
    return type(sampler) in PLAIN and getattr(sampler, "generator", None) is None


def bound(sampler: ResumableSampler, like: type[ResumableSampler], cursor: Any) -> ResumableSampler:
    """Return a sampler of the run bound to this cursor: a copy, if another run or stage made it."""
    if type(sampler) is like and sampler.cursor is cursor:
        return sampler
    mine = copy.copy(sampler)
    mine.cursor, mine.share, mine.shares = cursor, like.share, like.shares
    return mine


def rebound(source: Any, like: type[ResumableSampler]) -> Any:
    """Return a copy of a user's sampler whose inner run sampler draws from the whole epoch.

    The skip then applies to the output of the user's sampler.
    """
    for name, inner in vars(source).items() if hasattr(source, "__dict__") else ():
        if isinstance(inner, ResumableSampler):
            mine = copy.copy(source)
            setattr(mine, name, bound(inner, like, Whole(like.cursor)))
            return mine
    return source


class Whole:
    """A cursor at the beginning of the epoch of another cursor."""

    consumed = 0

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)
