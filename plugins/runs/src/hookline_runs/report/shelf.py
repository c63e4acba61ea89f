"""The runs of a folder, as the page asks for them. Imports nothing heavy.

Names that a browser sends are looked up among the runs and objects that were found; none is joined to a path before.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hookline_runs import notes
from hookline_runs.compare import flatten, is_better_lower
from hookline_runs.edits import GONE
from hookline_runs.follow import Follower, Glance, Reader, Series
from hookline_runs.objects import FOLDER, NAMED
from hookline_runs.records import COUNTERS, FILE, plain
from hookline_runs.report import told
from hookline_runs.tally import Tally

PATIENCE = 0.3  # seconds that one look at the list may read records for
KINDS = {"png": "image/png", "csv": "text/plain; charset=utf-8"}
OPEN = 24  # runs whose curves are kept in memory


class Unknown(Exception):
    """What was asked for is not there."""


class _Listing:
    """Reads all runs of a folder, a while at a time, and tells what is new of each since an earlier answer."""

    def __init__(self, root: Path, reader: type[Reader]) -> None:
        self._root, self._reader = root, reader
        self._id = os.urandom(4).hex()
        self._number = 0
        self.readers: dict[str, Any] = {}
        self._told: dict[str, tuple[int, dict[str, Any]]] = {}

    def look(self, deadline: float) -> bool:
        """Read on until a moment; tell whether all was read."""
        found = set(folders(self._root))
        for name in [name for name in self.readers if name not in found]:
            del self.readers[name]
        for name in sorted(found - set(self.readers)):
            self.readers[name] = self._reader(self._root / name)
        # Those that were read to their end before take little, and must not wait for the others.
        for name, reader in sorted(self.readers.items(), key=lambda pair: not pair[1].complete):
            try:
                reader.update(deadline)
            except OSError:
                del self.readers[name]
        return all(reader.complete for reader in self.readers.values())

    def changed(self, shown: Mapping[str, dict[str, Any]], since: str) -> dict[str, Any]:
        """Return a token, and of what is shown all that is new since the answer of another one."""
        identity, _, number = since.partition(".")
        known = int(number) if identity == self._id and number.isdecimal() else -1
        self._number += 1
        for name, one in shown.items():
            if name not in self._told or self._told[name][1] != one:
                self._told[name] = self._number, one
        for name in [name for name in self._told if name not in shown]:
            del self._told[name]
        return {
            "token": f"{self._id}.{self._number}",
            "names": list(self._told),
            "runs": [one for changed, one in self._told.values() if changed > known],
        }


class Shelf:
    """The runs of a folder, as far as they were read; any number of threads may ask."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._runs, self._table = _Listing(root, Glance), _Listing(root, Tally)
        self._parameters: dict[str, tuple[dict[str, Any], dict[str, str]]] = {}
        self._followed: OrderedDict[str, tuple[threading.Lock, Follower]] = OrderedDict()
        self._listing, self._tallying, self._following = threading.Lock(), threading.Lock(), threading.Lock()

    def runs(self, since: str) -> dict[str, Any]:
        """Return the names of all runs, and what is new of each since an earlier answer."""
        with self._listing:
            complete = self._runs.look(time.monotonic() + PATIENCE)
            shown = {name: self._listed(name, glance) for name, glance in self._runs.readers.items()}
            return {"folder": str(self.root), "complete": complete, **self._runs.changed(shown, since)}

    def table(self, since: str) -> dict[str, Any]:
        """Return the last and the best value of each metric of all runs, those that are new since an earlier answer."""
        with self._tallying:
            complete = self._table.look(time.monotonic() + PATIENCE)
            shown = {name: _tallied(name, reader) for name, reader in self._table.readers.items()}
            return {"complete": complete, "lower": _lower(shown.values()), **self._table.changed(shown, since)}

    def whole(self, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what `runs` and `table` tell of some runs once those were read, however long it takes.

        Raises:
            Unknown: there is no such run.
        """
        listed, tallied = [], []
        for name in names:
            glance, tally = Glance(self.folder(name)), Tally(self.folder(name))
            try:
                glance.update()
                tally.update()
            except OSError as error:
                raise Unknown(f"there is no run {name!r} any more") from error
            listed.append(self._listed(name, glance))
            tallied.append(_tallied(name, tally))
        same = {"complete": True, "token": "", "names": list(names)}
        return {"folder": str(self.root), "runs": listed, **same}, {"lower": _lower(tallied), "runs": tallied, **same}

    def _listed(self, name: str, glance: Glance) -> dict[str, Any]:
        """Return what the list has of a run; its parameters are laid out once, for there may be many."""
        config = glance.shown.config
        if name not in self._parameters or self._parameters[name][0] is not config:
            self._parameters[name] = config, dict(flatten(config))
        noted = vars(notes.read_notes(self.root / name))
        return told.summary(glance) | {"parameters": self._parameters[name][1], "notes": noted}

    def run(
        self, name: str, axis: str, since: str, metrics: Sequence[str], fresh: Sequence[str], mean: bool = False
    ) -> dict[str, Any]:
        """Return what is new of a run since an earlier answer.

        Args:
            name: of the run.
            axis: what goes to the right, one of `AXES`.
            since: the token of the earlier answer, or nothing.
            metrics: whose curves go on from where they were in it.
            fresh: whose curves were not in it.
            mean: of long curves, give the means of stretches, not their lowest and highest values.

        Raises:
            Unknown: there is no such run.
        """
        with self.following(name) as follower:
            curves = follower.curves
            steps = curves.counters.steps
            facts = told.facts(follower)
            summed = f"{zlib.crc32(json.dumps(facts).encode()):08x}"
            last = steps[-1] if steps else 0
            token = f"{follower.id}.{curves.edition}.{summed}.{follower.offset}.{last}"
            if since == token and not fresh:
                return {"token": token}
            earlier = since.split(".") if since.count(".") == 4 else [""] * 5
            known = earlier[:2] == [follower.id, str(curves.edition)]
            answer: dict[str, Any] = {"token": token, "anew": not known, "live": told.live(follower), "curves": {}}
            if earlier[:3] != [follower.id, str(curves.edition), summed]:
                answer["facts"] = facts
            for metric in (*metrics, *fresh):
                if metric in curves.by_name:
                    seen = int(earlier[4]) if known and metric not in fresh else None
                    answer["curves"][metric] = told.points(follower, metric, axis, seen, mean)
            return answer

    def curves(self, names: Sequence[str], metrics: Sequence[str]) -> Iterator[list[Any]]:
        """Return all points of curves, a row for each, below a heading.

        Raises:
            Unknown: there is no such run; while rows are taken, there is none any more.
        """
        for name in names:
            self.folder(name)
        return self._points(names, metrics)

    def _points(self, names: Sequence[str], metrics: Sequence[str]) -> Iterator[list[Any]]:
        yield ["run", "metric", *COUNTERS, "value"]
        for name in names:
            for metric in metrics:
                with self.following(name) as follower:  # no longer than it takes to copy one curve
                    series = follower.curves.by_name.get(metric, Series(1))
                    columns = [follower.curves.at(counter, series.steps) for counter in COUNTERS[1:]]
                    kept = list(series.steps), *columns, list(series.columns[0])
                for row in zip(*kept, strict=True):
                    yield [name, metric, *(_whole(value) for value in row[:-1]), row[-1]]

    def object(self, name: str, file: str) -> tuple[str, bytes]:
        """Return the kind and the content of a file that the record of a run names.

        Raises:
            Unknown: the record names none such, or it is gone, or a link.
        """
        folder, _, inside = file.partition("/")
        match = NAMED.fullmatch(inside)
        with self.following(name) as follower:
            known = any(one.get("file") == file for one in follower.run.objects)
        if not known or folder != FOLDER or match is None or not {"/", "\\", "\0"}.isdisjoint(inside):
            raise Unknown(f"run {name!r} has no object {file!r}")
        if (self.root / name / FOLDER).is_symlink():
            raise Unknown(f"{FOLDER} of run {name!r} is a link")
        try:
            with open(os.open(self.root / name / file, os.O_RDONLY | notes.NO_LINKS), "rb") as opened:
                if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                    raise Unknown(f"{file!r} of run {name!r} is no file")
                return KINDS[match[3]], opened.read()
        except OSError as error:
            raise Unknown(f"{file!r} of run {name!r} is gone") from error

    def text(self, name: str, object: str, step: str) -> str:
        """Return a text that was logged at a step.

        Raises:
            Unknown: there is none.
        """
        with self.following(name) as follower:
            logged = [one for one in follower.run.objects if one["name"] == object and str(one["step"]) == step]
        if not logged or "text" not in logged[-1]:
            raise Unknown(f"run {name!r} has no text {object!r} of step {step}")
        return str(logged[-1]["text"])

    @contextlib.contextmanager
    def following(self, name: str) -> Iterator[Follower]:
        """Give what follows a run, up to date and to nobody else meanwhile.

        Raises:
            Unknown: there is no such run, or no more.
        """
        lock, follower = self._follow(name)
        with lock:
            try:
                follower.update()
            except OSError as error:
                raise Unknown(f"there is no run {name!r} any more") from error
            yield follower

    def folder(self, name: str) -> Path:
        """Return the folder of a run.

        Raises:
            Unknown: there is no such run.
        """
        if name not in set(folders(self.root)):
            raise Unknown(f"there is no run {name!r}")
        return self.root / name

    def _follow(self, name: str) -> tuple[threading.Lock, Follower]:
        with self._following:
            if name not in self._followed:
                self._followed[name] = threading.Lock(), Follower(self.folder(name))
            self._followed.move_to_end(name)
            while len(self._followed) > OPEN:
                self._followed.popitem(last=False)
            return self._followed[name]


def check_folder(folder: Path) -> None:
    """Refuse what is no folder of runs.

    Raises:
        ValueError: it is none.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder of runs {str(folder)!r}; training makes it (trainer.runs_folder)")
    if (folder / FILE).exists():
        raise ValueError(
            f"{str(folder)!r} is a run; name the folder that it lies in: {str(folder.absolute().parent)!r}"
        )


def folders(root: Path) -> Iterator[str]:
    """Give the names of run folders; links lead elsewhere and are none."""
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and (root / entry.name / FILE).is_file():
                if not entry.name.startswith(GONE):
                    yield entry.name


def _tallied(name: str, reader: Tally) -> dict[str, Any]:
    """Return what metrics came to; NaN as a word, since it is equal to nothing, and would be told as new each time."""
    metrics = {
        metric: plain(values | {key: told.short(values[key]) for key in ("last", "best")})
        for metric, values in reader.metrics
    }
    return {"name": name, "complete": reader.complete, "metrics": metrics}


def _lower(tallied: Iterable[Mapping[str, Any]]) -> dict[str, bool]:
    return {metric: is_better_lower(metric) for one in tallied for metric in one["metrics"]}


def _whole(value: float) -> float | int:
    return int(value) if isinstance(value, float) and value.is_integer() else value
