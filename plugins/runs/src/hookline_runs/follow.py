"""Follow runs while they are written: what was read once is not read again. Imports nothing heavy.

`Follower` keeps the curves of one run as arrays; `Glance` keeps of a run only what a list of runs shows, and finds it
without parsing every line. Both begin anew by themselves where the file was cut or replaced, leave a last line that is
not whole for the next time, and follow no symbolic link.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import stat
import time
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hookline_runs.records import COUNTERS, FILE, UNREADABLE, Run, Session, sum_up, take, touch

BLOCK = 1 << 22
LONGEST = 1 << 26  # what is no line by then is none of ours
HEAD, TAIL = 1 << 18, 1 << 16
COUNTED = COUNTERS[1:]
MARK = 256  # bytes by which a file is known again
BUCKETS = 1024  # a power of two


class Series:
    """Numbers by step, in order, eight bytes each."""

    def __init__(self, width: int) -> None:
        self.steps = array("q")
        self.columns = [array("d") for _ in range(width)]

    def put(self, step: int, values: Sequence[float]) -> None:
        """Keep values at a step, in place of older ones."""
        if not self.steps or step > self.steps[-1]:
            self.steps.append(step)
            for number, column in enumerate(self.columns):
                column.append(values[number])
            return
        at = bisect_left(self.steps, step)
        if self.steps[at] != step:
            self.steps.insert(at, step)
            for column in self.columns:
                column.insert(at, 0.0)
        for column, value in zip(self.columns, values, strict=True):
            column[at] = value

    def drop_behind(self, step: int) -> None:
        """Forget what is behind a step."""
        at = bisect_right(self.steps, step)
        del self.steps[at:]
        for column in self.columns:
            del column[at:]


class Curves:
    """What a training logs, one series for each metric; `only` those of these names where it is given."""

    def __init__(self, only: Collection[str] | None = None) -> None:
        self.only = only
        self.counters = Series(len(COUNTED))
        """`COUNTED`, for every step that logged."""
        self.by_name: dict[str, Series] = {}
        self.edition = 0
        """Grows whenever something before the last step has changed."""

    def drop_behind(self, step: int) -> None:
        """Forget the steps behind one."""
        if self.counters.steps and self.counters.steps[-1] > step:
            self.edition += 1
        for series in (self.counters, *self.by_name.values()):
            series.drop_behind(step)

    def put(self, step: int, counters: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Keep values; later ones of the same step and name stand."""
        counts = [float(counters[name]) for name in COUNTED]
        values = {n: float(value) for n, value in metrics.items() if self.only is None or n in self.only}
        if self.counters.steps and step < self.counters.steps[-1]:
            self.edition += 1
        self.counters.put(step, counts)
        for name, value in values.items():
            if name not in self.by_name:
                self.by_name[name] = Series(1)
            self.by_name[name].put(step, [value])

    def at(self, counter: str, steps: Sequence[int]) -> list[float]:
        """Return what a counter was at steps that have logged."""
        column = self.counters.columns[COUNTED.index(counter)]
        return [column[bisect_left(self.counters.steps, step)] for step in steps]


def thinned(series: Series, seen: int = 0) -> tuple[int, list[int], list[float | None]]:
    """Return about a thousand to two thousand points of a series, so that no spike is lost.

    Longer series are cut into buckets of 2**n points, of which the lowest and the highest are kept, in their order.
    Buckets stay what they are while the series grows, until n does, so that only the last is told again.

    Args:
        series: of one column.
        seen: how many points of it, from the first, were in an earlier answer.

    Returns:
        How many points of the earlier answer still stand, and steps and values of those behind; None for what is not
        finite.
    """
    steps, values = series.steps, series.columns[0]
    level = _level(len(steps))
    first = seen >> level if _level(seen) == level else 0
    if level == 0:
        return first, list(steps[first:]), [value if math.isfinite(value) else None for value in values[first:]]
    places: list[int] = []
    size = 1 << level
    for begin in range(first << level, len(steps), size):
        bucket: Sequence[float] = values[begin : begin + size]
        if not math.isfinite(sum(bucket)):
            finite = [value for value in bucket if math.isfinite(value)]
            low, high = (min(finite), max(finite)) if finite else (bucket[0], bucket[-1])
        else:
            low, high = min(bucket), max(bucket)
        if math.isfinite(low):
            places += sorted((begin + bucket.index(low), begin + bucket.index(high)))
        else:
            places += (begin, begin + len(bucket) - 1)
    shown = [values[place] if math.isfinite(values[place]) else None for place in places]
    return 2 * first, [steps[place] for place in places], shown


def averaged(series: Series, seen: int = 0) -> tuple[int, list[int], list[float | None]]:
    """Return the mean of each bucket of `thinned`, at the step in its middle; of short series all points.

    What is not finite does not count; None where nothing else is in a bucket. Arguments and result are as there.
    """
    level = _level(len(series.steps))
    if level == 0:
        return thinned(series, seen)
    steps, values = series.steps, series.columns[0]
    first = seen >> level if _level(seen) == level else 0
    places, means, size = [], list[float | None](), 1 << level
    for begin in range(first << level, len(steps), size):
        bucket = values[begin : begin + size]
        finite = [value for value in bucket if math.isfinite(value)]
        places.append(steps[begin + (len(bucket) - 1) // 2])
        means.append(math.fsum(finite) / len(finite) if finite else None)
    return first, places, means


def _level(count: int) -> int:
    """Return the least n for which 2**n points a bucket are enough."""
    return max(0, (count - 1).bit_length() - BUCKETS.bit_length() + 1)


class Reader:
    """Reads what was appended to the record of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.complete = False
        """Whether all was read that was there the last time."""
        self._forget()

    def _forget(self) -> None:
        self.offset = 0
        self._mark = b""
        self.run = Run(self.folder)
        self._sessions: dict[str, Session] = {}

    def update(self, deadline: float = math.inf) -> None:
        """Read what is new, until a moment on `time.monotonic` where there is much.

        Raises:
            OSError: there is no such file, or it is a link or no file.
        """
        with _open(self.folder) as file:
            size = os.fstat(file.fileno()).st_size
            if size < self.offset or _read(file, 0, len(self._mark)) != self._mark:
                self._forget()
            if self.offset == 0:
                self._begin(file, size)
            self.complete = True
            while self.offset < size:
                if time.monotonic() > deadline:
                    self.complete = False
                    break
                block = self._block(file, size)
                if not block:  # the last line is not whole yet
                    break
                self.offset += len(block)
                self._take(block)
            if len(self._mark) < MARK:
                self._mark = _read(file, 0, min(MARK, self.offset))
        sum_up(self.run, self._sessions)

    def _begin(self, file: io.FileIO, size: int) -> None:
        """Do what is to be done before the first block."""

    def _take(self, block: bytes) -> None:
        """Take in whole lines."""
        raise NotImplementedError

    def _block(self, file: io.FileIO, size: int) -> bytes:
        """Return the next whole lines, if there are any."""
        length = BLOCK
        while True:
            data = _read(file, self.offset, min(length, size - self.offset))
            end = data.rfind(b"\n") + 1
            if end or len(data) < length:
                return data[:end]
            if length >= LONGEST:
                return data
            length *= 2


def _open(folder: Path) -> io.FileIO:
    if folder.is_symlink():
        raise FileNotFoundError(f"{folder} is a link")
    wanted = ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY")  # a pipe must not hold us up
    flags = os.O_RDONLY
    for name in wanted:
        flags |= getattr(os, name, 0)
    file = io.FileIO(os.open(folder / FILE, flags), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FileNotFoundError(f"{folder / FILE} is no file")
    return file


def _read(file: io.FileIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length) or b""


class Follower(Reader):
    """All that is known of a run, its curves as arrays."""

    def _forget(self) -> None:
        super()._forget()
        self.id = os.urandom(4).hex()
        """Another one whenever reading has begun anew."""
        self.curves = Curves()

    def _take(self, block: bytes) -> None:
        for line in block.decode(errors="replace").rstrip("\n").split("\n"):
            try:
                take(self.run, self._sessions, self.curves, json.loads(line))
            except UNREADABLE:
                self.run.unreadable += 1


class Glance(Reader):
    """What a list of runs shows of one: all but its curves, objects and checkpoints.

    Looks for the few lines that tell it, and parses those alone. A long file is not read before it is listed: until it
    is, what its first and last lines tell stands for it.
    """

    def _forget(self) -> None:
        super()._forget()
        self._hasty: Run | None = None
        self._losses = Curves(only=set())
        self._best: tuple[float, int] | None = None

    @property
    def shown(self) -> Run:
        """What is known by now."""
        return self.run if self._hasty is None else self._hasty

    @property
    def best(self) -> tuple[float, int] | None:
        """The lowest validation loss and its step, once all was read."""
        return self._best if self._hasty is None else None

    def update(self, deadline: float = math.inf) -> None:
        """Read what is new; see `Reader.update`."""
        before = self.run, self.offset
        super().update(deadline)
        if self.complete:
            self._hasty = None
        elif self._hasty is not None:  # it may have ended, or died
            sum_up(self._hasty, {str(number): session for number, session in enumerate(self._hasty.sessions)})
        if before[0] is self.run and before[1] == self.offset:
            return
        series = self._losses.by_name.get(self.run.val_loss)
        if series is not None:
            pairs = zip(series.columns[0], series.steps, strict=True)
            self._best = min((pair for pair in pairs if pair[0] <= math.inf), default=None)

    def _begin(self, file: io.FileIO, size: int) -> None:
        if size <= HEAD + TAIL or self._hasty is not None:
            return
        head, tail = _read(file, 0, HEAD), _read(file, size - TAIL, TAIL)
        self._take(head[: head.rfind(b"\n") + 1])
        self._take(tail[tail.find(b"\n") + 1 : tail.rfind(b"\n") + 1])
        sum_up(self.run, self._sessions)
        hasty = self.run
        self._forget()
        self._hasty = hasty

    def _take(self, block: bytes) -> None:
        assert isinstance(self._losses.only, set)
        begins = _lines_with(block, [b'"begin"'])
        for place in begins:
            self._losses.only.add(self._name_of_loss(_line(block, place)))
        tokens = [b'"train"', b'"end"', *(json.dumps(name).encode() for name in self._losses.only)]
        for place in sorted(begins | _lines_with(block, tokens)):
            line = _line(block, place)
            if place in begins:  # a session that ended before it without a word had this as its last
                self._touch(_line_before(block, place))
            try:
                take(self.run, self._sessions, self._losses, json.loads(line))
            except UNREADABLE:
                self.run.unreadable += 1
        self._touch(_line_before(block, len(block)))
        self.run.objects, self.run.evaluations = [], []

    def _touch(self, line: bytes) -> None:
        with contextlib.suppress(*UNREADABLE):
            touch(self.run, self._sessions, json.loads(line))

    def _name_of_loss(self, line: bytes) -> str:
        try:
            return Run(self.folder, config=json.loads(line)["config"]).val_loss
        except UNREADABLE:
            return Run(self.folder).val_loss


def _lines_with(block: bytes, tokens: Sequence[bytes]) -> set[int]:
    """Return where the lines begin in which one of some words stands."""
    begins = set()
    for token in tokens:
        at = block.find(token)
        while at >= 0:
            begins.add(block.rfind(b"\n", 0, at) + 1)
            end = block.find(b"\n", at)
            at = block.find(token, end) if end >= 0 else -1
    return begins


def _line(block: bytes, begin: int) -> bytes:
    end = block.find(b"\n", begin)
    return block[begin:end] if end >= 0 else block[begin:]


def _line_before(block: bytes, end: int) -> bytes:
    return _line(block, block.rfind(b"\n", 0, max(0, end - 1)) + 1) if end else b""
