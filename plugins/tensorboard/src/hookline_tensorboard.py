"""Write what is logged for TensorBoard, below the run's folder."""

from __future__ import annotations

import importlib
import inspect
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hookline import Stage
from hookline.tracking import Run, Table, Tracker, flat

__version__ = "0.1.0"

SET_BY = {  # what sets arguments of SummaryWriter
    "log_dir": "the option tensorboard.folder",
    **dict.fromkeys(("comment", "purge_step"), "the plugin, from the run"),
}


@dataclass(eq=False)
class Tensorboard(Tracker):
    """Write numbers, texts, images, histograms, tables and the configuration for TensorBoard."""

    folder: str = "tensorboard"
    """Where to, below the folder of the run; or an absolute path, below which each run has a folder of its name."""
    init: dict[str, Any] = field(default_factory=dict)
    """Other arguments of torch's `SummaryWriter`: `max_queue`, `flush_secs`, `filename_suffix`."""

    local = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if ".." in Path(self.folder).parts:
            raise ValueError(
                f"tensorboard.folder={self.folder!r} must lie below the folder of the run, as 'tensorboard' does, or "
                "be an absolute path; trainer.runs_folder says where runs are"
            )
        self.refuse_set(self.init, SET_BY)
        if self.init:
            known = inspect.signature(self._writer_class()).parameters
            self.refuse_unknown("init", self.init, "SummaryWriter", known.keys() - SET_BY.keys())

    def _writer_class(self) -> Any:
        return self.import_sdk("torch.utils.tensorboard", "'tensorboard>=2.18'").SummaryWriter

    def start(self, run: Run) -> None:
        """Open a file of events, and have those dropped that training comes to again.

        Raises:
            ValueError: TensorBoard is not installed.
        """
        writer = self._writer_class()
        self._run, self._place_reached = run.folder, run.place
        self._within: Any = None  # the writer of validations under way
        self._batch_reached = run.batch
        folder = self._home = run.folder / self.folder
        if Path(self.folder).is_absolute():
            folder = self._home = folder / run.folder.name
        purge = None
        if run.stage is Stage.TRAIN:
            purge = int(run.place) + 1 if run.place else 0
        else:
            folder /= run.stage.value  # beside the curves of the training
        self._wait_for_a_later_name(folder)
        self._writer = writer(str(folder), purge_step=purge, **self.init)
        summary = importlib.import_module("torch.utils.tensorboard.summary")
        parameters = {
            name: value if isinstance(value, bool | int | float | str) else json.dumps(value, default=str)
            for name, value in flat(run.config)
        }
        _, begun, self._over = summary.hparams(parameters, {})
        self._writer.file_writer.add_summary(begun)
        self._writer.flush()

    def log_metrics(self, metrics: Mapping[str, float], place: float) -> None:
        """Write a point for each value."""
        step = self._step(place)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_batch(self, metrics: Mapping[str, float], batch: int) -> None:
        """Write a point for each value beside the others, because these steps are not theirs."""
        if self._within is None:
            folder = self._home / "batches"
            self._wait_for_a_later_name(folder)
            purge = self._batch_reached + 1 if self._batch_reached else 0
            self._within = self._writer_class()(str(folder), purge_step=purge, **self.init)
        elif batch <= self._batch_reached:  # a state of before was put back
            drop_behind(self._within, batch)
        self._batch_reached = batch
        for name, value in metrics.items():
            self._within.add_scalar(name, value, batch)
        self._within.flush()

    def log_text(self, name: str, text: str, place: float) -> None:
        """Write a text."""
        self._writer.add_text(name, text, self._step(place))

    def log_image(self, name: str, pixels: Any, place: float) -> None:
        """Write an image."""
        self._writer.add_image(name, pixels, self._step(place), dataformats="HWC")

    def log_histogram(self, name: str, values: Any, place: float) -> None:
        """Write a histogram."""
        self._writer.add_histogram(name, values, self._step(place))

    def log_table(self, name: str, table: Table, place: float) -> None:
        """Write a table, as a text that TensorBoard shows as one."""
        self.log_text(name, table.markdown, place)

    def log_file(self, name: str, path: Path, place: float) -> None:
        """Write where a file lies: TensorBoard keeps none."""
        shown = path.relative_to(self._run) if path.is_relative_to(self._run) else path
        self.log_text(f"files/{name}", shown.as_posix(), place)

    def finish(self, status: str) -> None:
        """Say how the run has ended, and close the file."""
        self.log_text("status", status, self._place_reached)
        if status in ("finished", "stopped"):  # the first end that it reads counts, and others may be gone on with
            self._writer.file_writer.add_summary(self._over)
        self._writer.close()
        if self._within is not None:
            self._within.close()

    def _step(self, place: float) -> int:
        """Return what TensorBoard is told of a place; where it goes back, what is behind it is dropped."""
        if place < self._place_reached:  # a state of before was put back
            drop_behind(self._writer, int(place))
        self._place_reached = place
        return int(place)

    def _wait_for_a_later_name(self, folder: Path) -> None:
        """Wait until a new file of events is sorted behind those that are there: their names begin with the second."""
        self.wait_until(lambda: not any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")))


def drop_behind(writer: Any, step: int) -> None:
    """Have TensorBoard leave out what stands in a folder for this step and later ones."""
    events = importlib.import_module("tensorboard.compat.proto.event_pb2")
    begun = events.SessionLog(status=events.SessionLog.START)
    writer.file_writer.add_event(events.Event(step=step, session_log=begun))
