"""The sampler that starts at a place in the data."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

from hookline.counters import Cursor

CHUNK = 4096  # indices converted to Python integers at once


def mix(*parts: object) -> int:
    """Return one seed that depends on all parts, equal on every machine; 63 bits."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class ResumableSampler(Sampler[int]):
    """Samples a data set in an order that depends only on (seed, epoch).

    The order is one stateless permutation. Ranks take strided shares of the part after the cursor, so a resumed epoch
    skips by index, loads nothing, and may run on another number of ranks. The module's `get_*_dataloader` gets a
    subclass bound to a run (`sampler_class`) and only calls `sampler(dataset)`.

    A plugin that draws another order wraps `get_sampler`, and returns a subclass with another `order`.
    """

    cursor: Cursor
    shuffle: bool
    share: int
    shares: int

    def __init__(self, data_source: Any) -> None:
        self.length = len(data_source)

    def __iter__(self) -> Iterator[int]:
        share = self.order()[self.cursor.consumed + self.share :: self.shares]
        return itertools.chain.from_iterable(map(torch.Tensor.tolist, torch.split(share, CHUNK)))

    def order(self) -> torch.Tensor:
        """Return what a whole epoch draws, over all ranks, `length` indices; it must depend only on (seed, epoch)."""
        return torch.randperm(self.length, generator=self.generator()) if self.shuffle else torch.arange(self.length)

    def generator(self) -> torch.Generator:
        """Return a new generator, seeded by (seed, epoch)."""
        return torch.Generator().manual_seed(mix(self.cursor.seed, self.cursor.epoch))

    def __len__(self) -> int:
        """Return the samples of a whole epoch on this rank, wherever the cursor is."""
        return len(range(self.share, self.length, self.shares))


def sampler_class(cursor: Cursor, shuffle: bool, share: int, shares: int) -> type[ResumableSampler]:
    """Return a sampler class bound to the cursor of a run and to this rank's share of the data."""
    bound = {"cursor": cursor, "shuffle": shuffle, "share": share, "shares": shares}
    return type("RunSampler", (ResumableSampler,), bound)
