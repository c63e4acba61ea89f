"""The predictions of a rank in parts, each a file; and the rows of all ranks in the order of their places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hookline.files import clear, make_folder, replacing
from hookline_predict_writer.formats import Columns, Rows, check, column_of, plain


class Parts:
    """Collects the predictions of one loader on this rank, and writes them when they are many.

    Args:
        folder: for the parts of this rank and loader.
        limit: bytes of a part.
        form: the format that will hold all of them.
    """

    _states: Any = None

    def __init__(self, folder: Path, limit: int, form: str) -> None:
        self.folder, self.limit, self.form = folder, limit, form
        self.batches, self._shift = 0, 0
        self._forget()

    def _forget(self) -> None:
        self._places: list[int] = []
        self._rows: list[Rows] = []
        self._kinds: dict[str, set[Any]] = {}
        self._size = 0

    def go_on(self, batches: int, shares: int) -> Any:
        """Go on after this many batches; return the random states there, None at the beginning."""
        make_folder(self.folder)
        clear(self.folder)
        for path in self.folder.iterdir():
            if path.suffix == ".end" or int(path.stem) > batches:
                path.unlink()
        self.batches = batches
        if not batches:
            return None
        last = load(self.folder / f"{batches:09d}.pt")
        self._shift = (int(last["places"][-1]) // shares + 1) * shares
        return last["states"]

    def add(self, rows: Rows, places: Sequence[int], states: Any) -> None:
        """Take the predictions of one batch, with the random states after it.

        Raises:
            TypeError: a list has no plain data.
            ValueError: the format cannot hold them.
        """
        if self._size >= self.limit:  # of the batches before: the last one of a loader is never in a complete part
            self.write(self._states)
        host = {name: row.cpu() if torch.is_tensor(row) else plain(row) for name, row in rows.items()}
        if self._kinds and host.keys() != self._kinds.keys():
            raise ValueError(f"predict_step returned {[*host]} for a batch, and {[*self._kinds]} for another")
        for name, row in host.items():
            kind = (row.dtype, tuple(row.shape[1:])) if torch.is_tensor(row) else (None, ())
            self._kinds.setdefault(name, set()).add(kind)
        if not self._rows:
            check(self.form, {name: column_of(name, kinds) for name, kinds in self._kinds.items()})
        self._rows.append(host)
        self._places += [place + self._shift for place in places]
        self.batches += 1
        self._size += sum(row.nbytes if torch.is_tensor(row) else len(str(row)) for row in host.values())
        self._states = states

    def write(self, states: Any = None) -> None:
        """Write a part; without random states it is the last, which is predicted anew after a kill."""
        if self._rows:
            content = {
                "places": torch.tensor(self._places),
                "states": states,
                "kinds": {name: [*kinds] for name, kinds in self._kinds.items()},
                "rows": {name: together([batch[name] for batch in self._rows]) for name in self._rows[0]},
            }
            with replacing(self.folder / f"{self.batches:09d}.{'end' if states is None else 'pt'}") as new:
                torch.save(content, new)
        self._forget()


def listed(folder: Path, *suffixes: str) -> list[Path]:
    """Return the parts in a folder, in their order."""
    return sorted(path for path in folder.glob("[0-9]*.*") if path.suffix in (suffixes or (".pt", ".end")))


def load(path: Path) -> Any:
    """Read a part; its tensors stay on the disk until they are used."""
    return torch.load(path, weights_only=True, mmap=True)


def together(values: Sequence[Any]) -> Any:
    """Return the rows of several batches: a tensor where all have one shape, else a list of rows."""
    tensors = [value for value in values if torch.is_tensor(value)]
    if len(tensors) == len(values) and len({value.shape[1:] for value in tensors}) == 1:
        return torch.cat(tensors)
    return [row for value in values for row in value]


def columns_of(ranks: Sequence[Sequence[Path]]) -> tuple[Columns, int]:
    """Return what the rows of each output have in common, and how many there are."""
    kinds: dict[str, set[Any]] = {}
    total = 0
    for path in (path for paths in ranks for path in paths):
        part = load(path)
        if kinds and part["kinds"].keys() != kinds.keys():
            raise ValueError(f"predict_step returned {[*part['kinds']]} for a batch, and {[*kinds]} for another")
        total += len(part["places"])
        for name, some in part["kinds"].items():
            kinds.setdefault(name, set()).update(some)
    return {name: column_of(name, some) for name, some in kinds.items()}, total


def blocks(ranks: Sequence[Sequence[Path]]) -> Iterator[Rows]:
    """Yield the rows of all ranks in the order of their places, a part of each rank in memory at a time."""
    waiting = [list(paths) for paths in ranks]
    heads: list[Any] = [None] * len(ranks)
    while True:
        for rank, paths in enumerate(waiting):
            if heads[rank] is None and paths:
                heads[rank] = load(paths.pop(0))
        if not any(heads):
            return
        bound = min(head["places"][-1] for head in heads if head)
        taken = []
        for rank, head in enumerate(heads):
            if head:
                number = int(torch.searchsorted(head["places"], bound, right=True))
                taken.append(_cut(head, slice(number)))
                heads[rank] = _cut(head, slice(number, None)) if number < len(head["places"]) else None
        order = torch.argsort(torch.cat([one["places"] for one in taken]), stable=True)
        joined = {name: together([one["rows"][name] for one in taken]) for name in taken[0]["rows"]}
        yield {
            name: rows[order] if torch.is_tensor(rows) else [rows[place] for place in order.tolist()]
            for name, rows in joined.items()
        }


def _cut(part: Any, which: slice) -> Any:
    return {"places": part["places"][which], "rows": {name: rows[which] for name, rows in part["rows"].items()}}
