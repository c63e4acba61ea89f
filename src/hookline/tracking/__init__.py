"""The base of all trackers: each has its own thread, so that no service slows training down or breaks it.

A tracker is a plugin whose class derives from `Tracker`. It implements what its service gets at the start, for values
and at the end; the base decides when, and handles failures.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hookline.cadence import seconds
from hookline.counters import UNITS, snapshot
from hookline.files import replacing
from hookline.installed import name_of, nearest
from hookline.interfaces import CallbackInterface, Stage
from hookline.marks import hookimpl
from hookline.tracking.clerk import Clerk
from hookline.tracking.values import Histogram, Image, Table, below, flat, prepared

if TYPE_CHECKING:
    from hookline.trainer import Trainer

__all__ = ["Histogram", "Image", "Run", "Table", "Tracker", "below", "flat", "prepared"]

AXES = ("steps", "batches", "samples", "epochs", "seconds")
FEW = 40  # the most names in a message

log = logging.getLogger("hookline.tracking")


@dataclass(frozen=True)
class Run:
    """The run that begins, as `Tracker.start` gets it."""

    name: str
    folder: Path
    """The run's folder; a service that writes to disk writes below it."""
    config: Mapping[str, Any]
    """Resolved, with secrets masked."""
    stage: Stage
    place: float
    """The position on the axis from which the run continues: 0, or the one reached before it was cut."""
    id: str | None
    """The return value of `start` when this run was tracked before; None for a new run."""
    batch: int = 0
    """The number of validation batches that `log_batch` got before the point from which the run continues."""

    @property
    def plain_config(self) -> Any:
        """`config` as JSON: dictionaries, lists, and texts for values that JSON lacks."""
        return json.loads(json.dumps(self.config, default=str))


@dataclass(eq=False)
class Tracker(CallbackInterface):
    """Sends logged values to a service, in order, from a thread of its own, on rank 0 only.

    Derive from it, and override `start`, `log_metrics` and whatever else the service can keep. The thread calls all of
    these; they may be slow and may raise, and training continues. A failure of `start` switches the tracker off; three
    failures in a row of another method switch off that method. Calls are dropped while a thousand wait. A warning says
    so the first time, and one at the end of the run reports how many calls of which methods were lost.
    """

    axis: str = "steps"
    """The axis of values: steps (of the optimizer), batches, samples, epochs or seconds; or the name of a logged value.

    With a name, each flush lies at the last value logged by this name, such as a running total of tokens.
    """
    close_timeout: str = "1 min"
    """How long the end of a run waits for the service to take the remaining values."""

    observer = True  # private names have two underscores here, so that subclasses cannot clash
    whole_places: ClassVar[bool] = False
    """Whether the service accepts only whole numbers as positions; `axis` then cannot be seconds."""

    def __post_init__(self) -> None:
        own = name_of(type(self))
        near = nearest(self.axis, AXES)
        if not self.axis or (self.axis not in AXES and near):
            raise ValueError(
                f"{own}.axis={self.axis!r} must be one of {', '.join(AXES)}, or the name of a logged value{near}"
            )
        if self.whole_places and self.axis == "seconds":
            raise ValueError(
                f"{own}.axis='seconds': the service takes whole numbers for places, and keeps the time of each value "
                "as well; take steps, batches, samples or epochs"
            )
        self.patience = seconds(self.close_timeout, f"{own}.close_timeout")
        """`close_timeout` in seconds."""
        self.__clerk: Clerk | None = None
        self.__config: Mapping[str, Any] = {}
        self.__stage = Stage.TRAIN
        self.__reached: float | None = None  # the last value of the name in `axis`

    # What a tracker sends to its service -------------------------------------------------

    def start(self, run: Run) -> str | None:
        """Begin a run of the service, or continue `run.id`; return the id for a later resume."""
        raise NotImplementedError

    def log_metrics(self, metrics: Mapping[str, float], place: float) -> None:
        """Log values by name at a position on the axis; they may be NaN or infinite."""
        raise NotImplementedError

    def log_batch(self, metrics: Mapping[str, float], batch: int) -> None:
        """Log values of a validation under way, by the number of its batch in the run: a separate axis."""

    def log_text(self, name: str, text: str, place: float) -> None:
        """Log a text."""

    def log_image(self, name: str, pixels: Any, place: float) -> None:
        """Log an image or a drawn figure: a numpy array (height, width, 3) of uint8."""

    def log_histogram(self, name: str, values: Any, place: float) -> None:
        """Log the distribution of values: a numpy array (n,) of float64, of finite numbers."""

    def log_table(self, name: str, table: Table, place: float) -> None:
        """Log a table."""

    def log_file(self, name: str, path: Path, place: float) -> None:
        """Log a file, or all files of a folder: mainly a saved model."""

    def finish(self, status: str) -> None:
        """End the run of the service: "finished", "stopped", "preempted" or "failed"."""

    @property
    def local(self) -> bool:
        """Whether the tracker writes files: a save then waits until everything logged before it is written."""
        return False

    @property
    def waiting(self) -> int:
        """How many calls wait for the thread: a service that takes much at once can get it when this is 0."""
        return 0 if self.__clerk is None else self.__clerk.waiting

    # Helpers for an SDK -------------------------------------------------------------------

    def import_sdk(self, module: str, needs: str) -> Any:
        """Import the SDK of the service.

        Args:
            module: its name in Python.
            needs: its name for `pip install`.

        Raises:
            ValueError: it cannot be imported.
        """
        try:
            return importlib.import_module(module)
        except ImportError as error:
            own = name_of(type(self))
            raise ValueError(
                f"{own} needs the module {module}, which cannot be imported ({error}): `pip install {needs}`"
            ) from error

    def refuse_set(self, init: Iterable[str], set_by: Mapping[str, str]) -> None:
        """Refuse arguments of the SDK in the option `init` that something else sets, such as an option of the plugin.

        Args:
            init: the names in the option.
            set_by: what sets an argument, by the argument's name.

        Raises:
            ValueError: one of these arguments is in the option.
        """
        for name in init:
            if name in set_by:
                raise ValueError(f"{name_of(type(self))}.init: {name} is set by {set_by[name]}; leave it out")

    def refuse_unknown(self, where: str, given: Iterable[str], sdk: str, known: Iterable[str]) -> None:
        """Refuse arguments that the SDK does not have; the message names the nearest one.

        Args:
            where: the option with the arguments.
            given: their names.
            sdk: the function or class that takes them.
            known: the names that it takes.

        Raises:
            ValueError: an unknown name.
        """
        names = sorted(known)
        for name in given:
            if name not in names:
                few = f"; it has {', '.join(names)}" if len(names) < FEW else ""
                raise ValueError(
                    f"{name_of(type(self))}.{where}: {sdk} has no argument {name!r}{nearest(name, names)}{few}"
                )

    # When -------------------------------------------------------------------------------

    @hookimpl
    def on_setup(self, trainer: Trainer) -> None:
        if trainer.rank != 0:
            trainer.plugins.unregister(self)

    @hookimpl
    def on_begin_run(self, trainer: Trainer, stage: Stage, config: Mapping[str, Any]) -> None:
        self.__config, self.__stage = config, stage
        if stage is not Stage.TRAIN:
            self.__begin(trainer, stage)

    @hookimpl(tryfirst=True)
    def on_begin_train(self, trainer: Trainer) -> None:
        self.__begin(trainer, Stage.TRAIN)  # the position of a resumed run is known only now

    def __begin(self, trainer: Trainer, stage: Stage) -> None:
        self.__end("failed")  # of a run without `on_end_run`
        note = trainer.run_dir / "trackers" / f"{trainer.plugins.get_name(self)}.json"
        before = json.loads(note.read_text())["id"] if trainer.options.resume and note.exists() else None
        place, batch = self.__place(trainer), trainer.counters.evaluation_batches
        run = Run(trainer.run_dir.name, trainer.run_dir, self.__config, stage, place, before, batch)

        def start() -> None:
            identity = self.start(run)
            if identity is not None and stage is Stage.TRAIN:
                note.parent.mkdir(exist_ok=True)
                with replacing(note) as new:
                    new.write_text(json.dumps({"id": identity}))

        self.__clerk = Clerk(str(trainer.plugins.get_name(self)), start)

    def catch_up(self) -> None:
        """Wait until the service has taken everything logged so far, for at most `close_timeout`.

        A tracker of files (`local`) does so at each save: a run that is killed afterwards then has everything logged
        before the save, and logs none of it again. Override it if you pass values to another thread or process, and
        wait for that.
        """
        if self.__clerk is not None:
            self.__clerk.wait(self.patience)

    def wait_until(self, done: Callable[[], bool]) -> bool:
        """Wait until a condition holds, for at most `close_timeout`; return whether it does."""
        deadline = time.monotonic() + self.patience
        while not done():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def get_state(self) -> dict[str, Any]:
        """Return the position on an axis that is a logged value; an override must include it."""
        if self.local:
            self.catch_up()
        return {} if self.__reached is None else {"axis": self.axis, "place": self.__reached}

    def update_state(self, state: dict[str, Any]) -> None:
        """Load the position, if the axis is the same."""
        self.__reached = state.get("place") if state.get("axis") == self.axis else None

    def __place(self, trainer: Trainer) -> float:
        counted: dict[str, float] = dict(zip(UNITS, snapshot(trainer), strict=False))
        place = counted[self.axis] if self.axis in AXES else self.__reached or 0
        return int(place) if self.whole_places else place

    @hookimpl
    def on_log(self, trainer: Trainer, metrics: Mapping[str, float], global_step: int) -> None:
        if self.__clerk is None:  # nothing is left to train, but values are left to log
            self.__begin(trainer, trainer.stage)
        if trainer.stage is not self.__stage:
            self.__tell(self.log_batch, dict(metrics), global_step)
            return
        if self.axis not in AXES and math.isfinite(metrics.get(self.axis, math.nan)):
            self.__reached = metrics[self.axis]
        self.__tell(self.log_metrics, dict(metrics), self.__place(trainer))

    @hookimpl
    def on_log_object(self, trainer: Trainer, name: str, value: Any) -> None:
        known = prepared(value)
        if known is not None:
            kind, value = known
            self.__tell(getattr(self, f"log_{kind}"), name, value, self.__place(trainer))

    @hookimpl
    def on_checkpoint(self, trainer: Trainer, path: Path, kind: str) -> None:
        if kind == "model":
            self.__tell(self.log_file, path.stem, path, self.__place(trainer))

    @hookimpl
    def on_end_run(self, trainer: Trainer, stage: Stage, status: str) -> None:
        if self.__clerk is not None and stage is Stage.TRAIN and self.axis not in AXES and self.__reached is None:
            log.warning(
                "%s.axis=%r: no value of this name was logged, so all values lie at 0; without one there are %s",
                trainer.plugins.get_name(self), self.axis, ", ".join(AXES),
            )  # fmt: skip
        self.__end(status)

    def __end(self, status: str) -> None:
        if self.__clerk is not None:
            self.__clerk.close(lambda: self.finish(status), self.patience)
            self.__clerk = None

    def __tell(self, method: Callable[..., None], *arguments: Any) -> None:
        if self.__clerk is not None:
            self.__clerk.tell(method.__name__, lambda: method(*arguments))
