"""The data set: sequences of tokens, by place."""

from __future__ import annotations

import bisect
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from hookline import nearest
from hookline_corpus.order import Epoch, Spot, draws_of, shuffled
from hookline_corpus.packing import Cut, Fit, Piece, sequence
from hookline_corpus.reading import Ahead, Encoder, Entry, Source
from hookline_corpus.shards import shards_of

CHOICES = {"packing": ("cut", "fit"), "until": ("longest", "shortest")}


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Sequences of tokens, packed from the documents of one or several sources; by place, in an order of its own.

    The order of an epoch is a function of the seed and the epoch. `DataLoader(tokens, batch_size)` takes it as it is.

    Args:
        sources: by name: a pattern of files, a list of these, a stream of a library, or an object with shards; one
            source needs no name.
        length: tokens of a sequence.
        tokenizer: "bytes"; a function of a text that returns ids, or its dotted path; a tokenizer with `encode`.
        weights: how much of each source, in any unit; none: each once in an epoch.
        until: when an epoch ends: when the longest source is through (shorter ones are repeated), or the shortest.
        packing: cut: documents after one another, cut where a sequence is full; fit: whole documents as they fit.
        end: the id that follows each text; None for none.
        vocabulary: how many ids there are, to refuse others; None for no check.
        shuffle: whether shards, documents and sources are shuffled.
        seed: of the order; None: that of the run, with the plugin corpus, else 0.
        lanes: how many places of the epoch are read at the same time.
        index: the folder of what is known of each shard.
    """

    def __init__(
        self,
        sources: Any,
        length: int,
        tokenizer: Any = "bytes",
        weights: Mapping[str, float] | None = None,
        until: str = "longest",
        packing: str = "cut",
        end: int | None = None,
        vocabulary: int | None = None,
        shuffle: bool = True,
        seed: int | None = None,
        lanes: int = 8,
        index: str = "corpus-index",
    ) -> None:
        for name, word in (("packing", packing), ("until", until)):
            if word not in CHOICES[name]:
                raise ValueError(
                    f"corpus: {name}={word!r} must be one of {', '.join(CHOICES[name])}{nearest(word, CHOICES[name])}"
                )
        for name, number in (("length", length), ("lanes", lanes)):
            if number < 1:
                raise ValueError(f"corpus: {name}={number} must be at least 1")
        named = sources if isinstance(sources, Mapping) else {"documents": sources}
        if not named:
            raise ValueError("corpus: sources is empty; name at least one")
        check_weights(weights or {}, [*named])
        self.length, self.until, self.packing = length, until, packing
        self.weights, self.shuffle, self.lanes = dict(weights or {}), shuffle, lanes
        self.seed, self._own_seed = seed or 0, seed is not None
        encoder = Encoder(tokenizer, end, vocabulary)
        self.sources = {
            name: Source(name, shards_of(given), encoder, length, packing, Path(index)) for name, given in named.items()
        }
        self._passes: dict[str, Passes] = {}
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._ahead, self._process = Ahead(), os.getpid()

    # The index ------------------------------------------------------------------------

    def measure(self, part: int = 0, parts: int = 1) -> dict[tuple[str, int], Entry]:
        """Return what the index says of every `parts`-th shard; read those that it does not know.

        Raises:
            OSError: a shard cannot be read.
            ValueError: it holds something else than documents.
        """
        keys = [(name, number) for name, one in self.sources.items() for number in range(len(one.shards.names))]
        return {(name, number): self.sources[name].entry(number) for name, number in keys[part::parts]}

    def use_index(self, entries: Mapping[tuple[str, int], Entry]) -> None:
        """Take what the index says of all shards.

        Raises:
            ValueError: a source is empty, or nothing of it would be in an epoch.
        """
        found = {}
        for name, source in self.sources.items():
            mine = [entries[name, number] for number in range(len(source.shards.names))]
            found[name] = Passes(source, mine, self.length, self.packing)
        lengths = {name: len(passes) for name, passes in found.items()}
        for name, number in lengths.items():
            if not number:
                raise ValueError(f"corpus: the source {name!r} is empty: no document of its shards has a token")
        self.draws = draws_of(lengths, self.weights, self.until)
        self._passes, self._ahead = found, Ahead()

    @property
    def passes(self) -> dict[str, Passes]:
        """The sources, as soon as their shards are known."""
        if not self._passes:
            self.use_index(self.measure())
        return self._passes

    def marks(self) -> dict[str, Any]:
        """Return all that the order depends on, as plain data."""
        encoder = next(iter(self.sources.values())).encoder
        return {
            "shards": {name: [entry.digest for entry in one.entries] for name, one in self.passes.items()},
            "options": {
                "length": self.length, "packing": self.packing, "tokenizer": encoder.name, "end": encoder.end,
                "weights": dict(self.weights), "until": self.until, "shuffle": self.shuffle, "seed": self.seed,
                "lanes": self.lanes,
            },
        }  # fmt: skip

    # Sequences ------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch, which loading workers see too."""
        return self._epoch.tolist()[0]  # type: ignore[no-any-return]

    def set_epoch(self, epoch: int) -> None:
        """Go to the order of an epoch."""
        self._epoch.fill_(epoch)

    def use_seed(self, seed: int) -> None:
        """Take the seed of a run, unless there is one of its own."""
        if not self._own_seed:
            self.seed, self._ahead = seed, Ahead()

    def order(self) -> Epoch:
        """Return the order of the epoch."""
        self.passes  # noqa: B018 - the draws are known with them
        return Epoch(self.draws, min(self.lanes, sum(self.draws)), self.seed, self.epoch, self.shuffle)

    def __len__(self) -> int:
        return len(self.order())

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        order = self.order()
        if not 0 <= place < len(order):
            raise IndexError(f"corpus: there is no sequence {place}; an epoch has {len(order)}")
        if self._process != os.getpid():  # threads and what they read are not in a forked worker
            self._ahead, self._process = Ahead(), os.getpid()
        spot = order.locate(place)
        name = [*self.sources][spot.source]
        made = sequence([*self._pieces(name, spot, order.draws[spot.source])], self.length)
        return {key: torch.from_numpy(array) for key, array in made.items()} | {"source": torch.tensor(spot.source)}

    def _pieces(self, name: str, spot: Spot, draws: int) -> Iterator[Piece]:
        """Yield the pieces of a sequence; a source goes on where the epoch before left it."""
        passes = self._passes[name]
        turn, number = divmod(self.epoch * draws + spot.number, len(passes))
        last = min(number + spot.last - spot.number, len(passes) - 1)
        keyed = functools.partial(self._ahead.get, (spot.lane, name))
        return passes.pieces(self.seed, turn if self.shuffle else None, number, last, keyed)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ahead": Ahead(), "_process": 0}


class Passes:
    """A source, gone through again and again; each pass has another order.

    Args:
        source: the source.
        entries: what is known of its shards.
        length: tokens of a sequence.
        packing: "cut" or "fit".
    """

    def __init__(self, source: Source, entries: list[Entry], length: int, packing: str) -> None:
        self.source, self.entries, self.length, self.cut = source, entries, length, packing == "cut"
        self.sizes = np.array([entry.tokens if self.cut else entry.sequences for entry in entries], np.int64)
        self.total = int(self.sizes.sum())
        self._rows: dict[tuple[int, int | None], tuple[np.ndarray[Any, Any], list[int]]] = {}

    def __len__(self) -> int:
        return -(-self.total // self.length) if self.cut else self.total

    def pieces(self, seed: int, turn: int | None, number: int, last: int, ahead: Callable[..., Any]) -> Iterator[Piece]:
        """Yield the pieces of a sequence of a pass; `turn` None is the order of the shards as they are.

        Args:
            seed: of the order.
            turn: the number of the pass.
            number: of the sequence.
            last: the last sequence that will be wanted.
            ahead: keeps shards, and reads ahead.
        """
        shards, ends = self._row(seed, turn)
        unit = self.length if self.cut else 1
        begin, end = number * unit, min((number + 1) * unit, self.total)
        final = bisect.bisect_right(ends, min((last + 1) * unit, self.total) - 1)
        while begin < end:
            place = bisect.bisect_right(ends, begin)
            following = next((later for later in range(place + 1, final + 1) if self.sizes[shards[later]]), None)

            def read(wanted: tuple[Any, int]) -> Cut | Fit:
                return self._read(int(shards[wanted[1]]), seed, wanted[0])

            shard = ahead((turn, place), None if following is None else (turn, following), read)
            stop, first = min(end, ends[place]), ends[place] - int(self.sizes[shards[place]])
            yield from shard.pieces(begin - first, stop - first) if self.cut else shard.pieces(begin - first)
            begin = stop

    def _row(self, seed: int, turn: int | None) -> tuple[np.ndarray[Any, Any], list[int]]:
        """Return the shards of a pass in their order, and where each ends; those of the last two passes are kept."""
        if (seed, turn) not in self._rows:
            number = len(self.sizes)
            shards = np.arange(number) if turn is None else shuffled(number, seed, self.source.name, turn)
            kept = [*self._rows.items()][-1:]
            self._rows = {**dict(kept), (seed, turn): (shards, np.cumsum(self.sizes[shards]).tolist())}
        return self._rows[seed, turn]

    def _read(self, number: int, seed: int, turn: int | None) -> Cut | Fit:
        documents, _ = self.source.load(number, self.entries[number])

        def order(size: int) -> np.ndarray[Any, Any]:
            return np.arange(size) if turn is None else shuffled(size, seed, self.source.name, turn, number)

        return Cut(documents, order(len(documents.counts))) if self.cut else Fit(documents, self.length, order)


def check_weights(weights: Mapping[str, float], names: list[str]) -> None:
    """Refuse weights that do not fit the sources.

    Raises:
        ValueError: one is not above 0, or they are not those of the sources.
    """
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            raise ValueError(f"corpus: weights.{name}={weight} must be above 0; to do without a source, leave it out")
    if weights and weights.keys() != {*names}:
        raise ValueError(f"corpus: weights has {[*weights]}, and sources has {names}: give a weight to each of them")
