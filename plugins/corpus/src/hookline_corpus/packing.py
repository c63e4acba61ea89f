"""Documents of one shard, cut or fitted into sequences."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

Ids = np.ndarray[Any, Any]
NONE = -100
"""The target where there is no next token; `cross_entropy` ignores it."""


class Piece(NamedTuple):
    """Tokens of one document, and the token behind them, -100 at its end."""

    tokens: Ids
    behind: int


class Documents(NamedTuple):
    """The tokens of a shard, and how many each of its documents has."""

    tokens: Ids
    counts: Ids

    def piece(self, begin: int, end: int, stop: int) -> Piece:
        """Return tokens from `begin` to `end` of the document that stops at `stop`."""
        return Piece(self.tokens[begin:end], int(self.tokens[end]) if end < stop else NONE)


class Cut:
    """Documents after one another, in the given order; whoever takes tokens of them cuts where it likes."""

    def __init__(self, documents: Documents, order: Ids) -> None:
        self.documents = documents
        counts = documents.counts
        self.begins = (np.cumsum(counts) - counts)[order]
        self.counts = counts[order]
        self.ends = np.cumsum(self.counts)

    def pieces(self, begin: int, end: int) -> Iterator[Piece]:
        """Yield the pieces of documents between two places."""
        which = int(np.searchsorted(self.ends, begin, side="right"))
        while begin < end:
            stop = int(self.begins[which] + self.counts[which])
            first = stop - int(self.ends[which]) + begin
            taken = min(end, int(self.ends[which])) - begin
            yield self.documents.piece(first, first + taken, stop)
            begin, which = begin + taken, which + 1


class Fit:
    """Sequences of whole documents, as full as they get; longer documents are cut. In the given order."""

    def __init__(self, documents: Documents, length: int, order: Any) -> None:
        self.documents = documents
        self.stops = np.cumsum(documents.counts)
        self.bins = best_fit(documents.counts, length)
        self.order = order(len(self.bins))

    def pieces(self, number: int) -> Iterator[Piece]:
        """Yield the pieces of documents in a sequence."""
        for document, begin, end in self.bins[self.order[number]]:
            stop = int(self.stops[document])
            first = stop - int(self.documents.counts[document])
            yield self.documents.piece(first + begin, first + end, stop)


def best_fit(counts: Ids, length: int) -> list[list[tuple[int, int, int]]]:
    """Return which parts of which documents go into which sequence: the longest first, each where least room is left.

    A document of several lengths fills whole sequences, and its rest is fitted.
    """
    bins: list[list[tuple[int, int, int]]] = []
    rests = []
    for document, count in enumerate(counts.tolist()):
        whole = count - count % length
        bins += [[(document, begin, begin + length)] for begin in range(0, whole, length)]
        if count > whole:
            rests.append((document, whole, count))
    rooms: list[int] = []  # sorted, each once
    having: dict[int, list[int]] = {}  # the sequences that have so much room
    for part in sorted(rests, key=lambda part: part[1] - part[2]):
        size = part[2] - part[1]
        at = bisect.bisect_left(rooms, size)
        room = rooms[at] if at < len(rooms) else length
        if at < len(rooms):
            which = having[room].pop()
            if not having[room]:
                del having[rooms.pop(at)]
            bins[which].append(part)
        else:
            which = len(bins)
            bins.append([part])
        left = room - size
        if left:
            if left not in having:
                bisect.insort(rooms, left)
            having.setdefault(left, []).append(which)
    return bins


def sequence(pieces: list[Piece], length: int) -> dict[str, Ids]:
    """Return one sequence: its tokens, their targets, their documents from 1 and their positions in these.

    Behind the last piece: tokens 0 of document 0, with the target -100.
    """
    made = {name: np.zeros(length, np.int64) for name in ("tokens", "targets", "documents", "positions")}
    made["targets"][:] = NONE
    begin = 0
    for number, piece in enumerate(pieces, 1):
        end = begin + len(piece.tokens)
        made["tokens"][begin:end] = piece.tokens
        made["targets"][begin : end - 1] = piece.tokens[1:]
        made["targets"][end - 1] = piece.behind
        made["documents"][begin:end] = number
        made["positions"][begin:end] = np.arange(end - begin)
        begin = end
    return made
