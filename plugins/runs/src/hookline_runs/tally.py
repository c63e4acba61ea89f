"""The last and the best value of each metric of a run, without its curves. Imports nothing heavy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from hookline_runs.compare import is_better_lower
from hookline_runs.follow import Reader
from hookline_runs.records import UNREADABLE, take

Point = tuple[float, int]


class _Totals:
    """Keeps of each metric its last value, and the best of those before it: a later one of the same step replaces it.

    Steps behind `limit` do not count: they were done again by a session that stands further below in the record.
    """

    def __init__(self) -> None:
        self.last: dict[str, Point] = {}
        self.best_before: dict[str, Point] = {}
        self.limit = math.inf
        self.furthest = -1
        self.cut: int | None = None
        """The step from which a training went on, in the line that was taken in last."""

    def drop_behind(self, step: int) -> None:
        """Tell the reader that it has counted what does not stand."""
        self.cut = step

    def put(self, step: int, counters: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Count the values of a step."""
        if step > self.limit:
            return
        self.furthest = max(self.furthest, step)
        for name, value in metrics.items():
            if name in self.last and self.last[name][1] != step:
                self.best_before[name] = _better(name, self.best_before.get(name), self.last[name])
            self.last[name] = float(value), step

    def best(self, name: str) -> Point:
        """Return the best value of a metric, and its step; NaN only where it was never anything else."""
        return _better(name, self.best_before.get(name), self.last[name])


def _better(name: str, one: Point | None, other: Point) -> Point:
    if one is None or math.isnan(one[0]):
        return other
    if math.isnan(other[0]):
        return one
    return other if (other[0] < one[0] if is_better_lower(name) else other[0] > one[0]) else one


class Tally(Reader):
    """Reads all lines of a record, and keeps of each metric its last and its best value alone.

    What a resumed training did again does not count. Where such a training is found behind steps that were counted,
    the record is read once more, with what was found.
    """

    def _forget(self) -> None:
        super()._forget()
        self._totals = _Totals()
        self._cuts: list[tuple[int, int]] = []  # where in the file a training begins, and from which step
        self._known = 0  # cuts that were known when the first line was read
        self._stale = False

    def update(self, deadline: float = math.inf) -> None:
        """Read what is new; see `Reader.update`."""
        super().update(deadline)
        if self.complete and self._stale:
            cuts = self._cuts
            self._forget()
            self._cuts, self._known = cuts, len(cuts)
            self.complete = False
            super().update(deadline)

    @property
    def metrics(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Give the names of metrics and what they came to, as the comparison of runs tells it."""
        totals = self._totals
        told = {name: (last, totals.best(name)) for name, last in totals.last.items()}
        for stage, values in self.run.evaluations:
            for name, value in values.items() if stage == "test" else ():
                if name != "step":
                    point = float(value), int(values["step"])
                    told[name] = point, _better(name, told[name][1] if name in told else None, point)
        for name, (last, best) in told.items():
            yield name, {"last": last[0], "last_step": last[1], "best": best[0], "best_step": best[1]}

    def _take(self, block: bytes) -> None:
        at = self.offset - len(block)
        totals = self._totals
        for line in block.rstrip(b"\n").split(b"\n"):
            cuts = self._cuts[: self._known]
            totals.limit = min((begun for place, begun in cuts if place > at), default=math.inf) if cuts else math.inf
            totals.cut = None
            try:
                take(self.run, self._sessions, totals, json.loads(line.decode(errors="replace")))
            except UNREADABLE:
                self.run.unreadable += 1
            if totals.cut is not None and all(place != at for place, _ in self._cuts):
                self._cuts.append((at, totals.cut))
                self._stale = self._stale or totals.furthest > totals.cut
            at += len(line) + 1
        self.run.objects, self.run.checkpoints, self.run.batches = [], [], {}
