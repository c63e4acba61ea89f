"""Which sequence comes when: a function of the seed, the epoch and the place, with no state."""

from __future__ import annotations

import bisect
import functools
import hashlib
from typing import Any, NamedTuple

import numpy as np
import torch

BLOCK = 1024  # places among which the sources are shuffled


def shuffled(number: int, *parts: object) -> np.ndarray[Any, Any]:
    """Return the numbers below `number` in an order that depends on the parts alone, equal on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randperm(number, generator=generator).numpy()


class Spot(NamedTuple):
    """Where a sequence comes from."""

    lane: int
    source: int
    number: int
    """Of the sequences of this source in the epoch."""
    last: int
    """The last number of this source that the lane comes to."""


class Epoch(NamedTuple):
    """The order of an epoch: `draws` sequences of each source, mixed in proportion, in several lanes.

    An epoch is one row of sequences, in which every block has its share of each source. Lanes are equal parts of the
    row, and places take turns among them: so neighbours in a batch are far apart, and who takes every n-th place reads
    some of the parts only, each in its order.
    """

    draws: tuple[int, ...]
    lanes: int
    seed: int
    epoch: int
    shuffle: bool

    def __len__(self) -> int:
        return sum(self.draws)

    def locate(self, place: int) -> Spot:
        """Return where the sequence of a place comes from."""
        row, lane = divmod(place, self.lanes)
        source, number = self._at(self._begin(lane) + row)
        return Spot(lane, source, number, before(self, self._begin(lane + 1))[source] - 1)

    def _begin(self, lane: int) -> int:
        each, more = divmod(len(self), self.lanes)
        return lane * each + min(lane, more)

    def _at(self, column: int) -> tuple[int, int]:
        """Return the source of a column of the row, and the number of its sequence."""
        block = self._block(column)
        sources, numbers = mixed(self, block)
        inside = column - sum(self._until(block))
        return int(sources[inside]), int(numbers[inside])

    def _block(self, column: int) -> int:
        return bisect.bisect_right(range(self.blocks), column, key=lambda block: sum(self._until(block))) - 1

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return -(-len(self) // BLOCK)

    def _until(self, block: int) -> list[int]:
        """Return how many sequences of each source there are before a block."""
        return [block * number // self.blocks for number in self.draws]


@functools.lru_cache(maxsize=1024)
def before(epoch: Epoch, column: int) -> list[int]:
    """Return how many sequences of each source there are before a column."""
    if column == len(epoch):
        return [*epoch.draws]
    block = epoch._block(column)
    until = epoch._until(block)
    sources = mixed(epoch, block)[0][: column - sum(until)]
    return [number + int((sources == source).sum()) for source, number in enumerate(until)]


@functools.lru_cache(maxsize=256)
def mixed(epoch: Epoch, block: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the source of each place in a block, and the number of its sequence."""
    begin, end = epoch._until(block), epoch._until(block + 1)
    counts = [after - before for before, after in zip(begin, end, strict=True)]
    sources = np.repeat(np.arange(len(counts)), counts)
    if epoch.shuffle and len(counts) > 1:
        sources = sources[shuffled(len(sources), epoch.seed, "mixture", epoch.epoch, block)]
    numbers = np.empty_like(sources)
    for source, (first, count) in enumerate(zip(begin, counts, strict=True)):
        numbers[sources == source] = np.arange(first, first + count)
    return sources, numbers


def draws_of(lengths: dict[str, int], weights: dict[str, float], until: str) -> tuple[int, ...]:
    """Return how many sequences of each source an epoch has; without weights all, once.

    Raises:
        ValueError: of a source there would be none.
    """
    if not weights:
        return tuple(lengths.values())
    turns = [length / weights[name] for name, length in lengths.items()]
    turn = max(turns) if until == "longest" else min(turns)
    draws = {name: round(turn * weights[name]) for name in lengths}
    for name, number in draws.items():
        if not number:
            raise ValueError(
                f"corpus: nothing of {name!r} ({lengths[name]} sequences, weight {weights[name]}) would be in an epoch "
                f"with until={until}: take until: longest, or other weights"
            )
    return tuple(draws.values())
