"""Keep what is logged as a table in the run's folder, one row for each place on the axis."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hookline import Stage
from hookline.files import replacing
from hookline.tracking import Run, Tracker

__version__ = "0.1.0"


@dataclass(eq=False)
class Csv(Tracker):
    """Write `metrics.csv` into the folder of the run: a row for each place, a column for each name.

    What is logged at the place of the last row joins it; a name that is new adds a column. The format stands in the
    README.
    """

    local = True

    def start(self, run: Run) -> None:
        """Open the table, and drop the rows that training comes to again.

        Raises:
            ValueError: the table that is there is placed by something else.
        """
        training = run.stage is Stage.TRAIN
        self._run = run
        self._within: Csv | None = None  # the table of validations under way
        self._open(run.folder / ("metrics.csv" if training else f"metrics-{run.stage.value}.csv"), run.place)

    def _open(self, path: Path, place: float) -> None:
        self._path = path
        self._file: io.FileIO | None = None
        self._row: dict[str, str] = {}  # the last one
        names, _ = read(self._path)
        if names and names[0] != self.axis:
            raise ValueError(
                f"{self._path} is placed by {names[0]}, and csv.axis={self.axis!r}: go on with csv.axis={names[0]}, "
                "or move the file away"
            )
        self._names = names or [self.axis]
        self._rewrite(place)

    def log_metrics(self, metrics: Mapping[str, float], place: float) -> None:
        """Add a row, or to the last one.

        Raises:
            OSError: the disk is full.
        """
        if self._row and place < float(self._row[self.axis]):
            self._rewrite(place)  # a state of before was put back
        same = bool(self._row) and place == float(self._row[self.axis])
        row = {name: repr(float(value)) for name, value in metrics.items() if name != self.axis}
        self._row = {**(self._row if same else {self.axis: repr(place)}), **row}
        begin = self._last if same else self._end
        joined = [name for name in row if name not in self._names]
        line = line_of(self._row.get(name, "") for name in self._names)
        if joined or len(line) < self._end - begin:  # a shorter line would leave the end of the longer behind
            self._names += joined
            self._rewrite(place, self._row)
        else:
            self._write(line, begin)

    def log_batch(self, metrics: Mapping[str, float], batch: int) -> None:
        """Add a row to a table of its own, `metrics-batches.csv`."""
        if self._within is None:
            self._within = Csv(axis="batch_of_validation")
            self._within._open(self._run.folder / "metrics-batches.csv", self._run.batch)
        self._within.log_metrics(metrics, batch)

    def finish(self, status: str) -> None:
        """Close the tables."""
        if self._within is not None:
            self._within._close()
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _rewrite(self, place: float, last: Mapping[str, str] | None = None) -> None:
        """Write the table anew, with the rows up to a place, and take the new for the old at once.

        Args:
            place: of the last row that may stay.
            last: the row of this place; None for the one that is there.
        """
        _, rows = read(self._path)
        kept = [row for row in rows if float(row[self.axis]) <= place]
        if last is not None:
            kept = [*(row for row in kept if float(row[self.axis]) < place), dict(last)]
        self._close()
        head = [line_of(self._names), *(line_of(row.get(name, "") for name in self._names) for row in kept)]
        with replacing(self._path) as new:
            new.write_bytes(b"".join(head))
        self._file = open(self._path, "r+b", buffering=0)  # noqa: SIM115  # open until the run ends
        self._row = kept[-1] if kept else {}
        self._end = sum(map(len, head))
        self._last = self._end - (len(head[-1]) if kept else 0)

    def _write(self, line: bytes, begin: int) -> None:
        """Write the last row by one system call, so that a kill leaves it whole, or as it was."""
        assert self._file is not None
        self._file.seek(begin)
        written = 0
        try:
            written = self._file.write(line)
        finally:
            if written < len(line):
                self._file.truncate(begin)
                self._last = self._end = begin
        if written < len(line):
            raise OSError(f"only {written} of {len(line)} bytes went into {self._path}; is the disk full?")
        self._last, self._end = begin, begin + len(line)


def line_of(fields: Iterable[str]) -> bytes:
    """Return a line of a table."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(fields)
    return text.getvalue().encode()


def read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the names and the rows of a table, if there is one; a last row that is not whole is left out."""
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
    names, *lines = [*csv.reader(io.StringIO(whole, newline=""))] or [[]]
    return names, [{name: text for name, text in zip(names, line, strict=True) if text} for line in lines]
