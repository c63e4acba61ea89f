"""What trackers have in common: a thread of their own, so that no service holds training up or breaks it.

A tracker is a plugin whose class derives from `Tracker`. It says what its service is told at the start, of values and
at the end; when that is, what is handed over and what becomes of failures is the same for all.
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

__all__ = ["Histogram", "Image", "Run", "Table", "Tracker", "below", "flat"]

AXES = ("steps", "batches", "samples", "epochs", "seconds")
FEW = 40  # names that a message lists

log = logging.getLogger("hookline.tracking")


@dataclass(frozen=True)
class Run:
    """What a tracker is told of the run that begins."""

    name: str
    folder: Path
    """Of the run; a service that writes to disk writes below it."""
    config: Mapping[str, Any]
    """Resolved, its secrets masked."""
    stage: Stage
    place: float
    """Where on the axis it goes on: 0, or what was reached before it was cut."""
    id: str | None
    """What `start` answered when this run was tracked before; None where it is a new one."""
    batch: int = 0
    """How many validation batches were told of by `log_batch`, up to where it goes on."""

    @property
    def plain_config(self) -> Any:
        """`config` as JSON has it: dictionaries, lists, and texts for what JSON lacks."""
        return json.loads(json.dumps(self.config, default=str))


@dataclass(eq=False)
class Tracker(CallbackInterface):
    """Hands what is logged to a service, in order, by one thread of its own; rank 0 alone does.

    Derive from it, and override `start`, `log_metrics` and what else the service can keep. All of these are called in
    that thread, and may take their time and raise, and training goes on. A failure of `start` switches the tracker off,
    three in a row of another method that method alone, and what comes while a thousand calls wait is dropped. A warning
    says so the first time, and one at the end of the run how many calls of which methods were lost.
    """

    axis: str = "steps"
    """What values are placed by: steps (of the optimizer), batches, samples, epochs or seconds; or the name of a value.

    Each flush then lies at the last value that was logged by this name, such as a running total of tokens.
    """
    close_timeout: str = "1 min"
    """How long the end of a run waits for what the service has not taken yet."""

    observer = True  # what is private here has two underscores: subclasses have names of their own
    whole_places: ClassVar[bool] = False
    """Whether the service takes whole numbers alone for places: it is given these, and `axis` cannot be seconds."""

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
        self.__reached: float | None = None  # the last value of the name that `axis` is

    # What a tracker says of its service --------------------------------------------------

    def start(self, run: Run) -> str | None:
        """Begin a run of the service, or go on with `run.id`; return the id by which it can be gone on with later."""
        raise NotImplementedError

    def log_metrics(self, metrics: Mapping[str, float], place: float) -> None:
        """Keep values by name at a place on the axis; they may be NaN or infinite."""
        raise NotImplementedError

    def log_batch(self, metrics: Mapping[str, float], batch: int) -> None:
        """Keep values of a validation under way, by the number of its batch in the run: an axis of their own."""

    def log_text(self, name: str, text: str, place: float) -> None:
        """Keep a text."""

    def log_image(self, name: str, pixels: Any, place: float) -> None:
        """Keep an image, or a figure that was drawn: a numpy array (height, width, 3) of uint8."""

    def log_histogram(self, name: str, values: Any, place: float) -> None:
        """Keep the distribution of values: a numpy array (n,) of float64, of finite numbers."""

    def log_table(self, name: str, table: Table, place: float) -> None:
        """Keep a table."""

    def log_file(self, name: str, path: Path, place: float) -> None:
        """Keep a file, or all files of a folder: a model that was saved, above all."""

    def finish(self, status: str) -> None:
        """End the run of the service: "finished", "stopped", "preempted" or "failed"."""

    @property
    def local(self) -> bool:
        """Whether it is kept in files: a save then waits until all that was logged before it is written."""
        return False

    @property
    def waiting(self) -> int:
        """How many calls wait for the thread: a service that takes much at once is given it when there are none."""
        return 0 if self.__clerk is None else self.__clerk.waiting

    # What it says to an SDK ---------------------------------------------------------------

    def import_sdk(self, module: str, needs: str) -> Any:
        """Import what speaks to the service.

        Args:
            module: its name in Python.
            needs: what pip is to be told where it is missing.

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
        """Refuse arguments of the SDK in the option `init` that something else sets: an option of the plugin, say.

        Args:
            init: the names that are given.
            set_by: what sets an argument.

        Raises:
            ValueError: one of these arguments is given.
        """
        for name in init:
            if name in set_by:
                raise ValueError(f"{name_of(type(self))}.init: {name} is set by {set_by[name]}; leave it out")

    def refuse_unknown(self, where: str, given: Iterable[str], sdk: str, known: Iterable[str]) -> None:
        """Refuse arguments that the SDK does not have, with the nearest that it has.

        Args:
            where: the option in which they are given.
            given: their names.
            sdk: what takes arguments.
            known: the names of these.

        Raises:
            ValueError: one that is not known.
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
        self.__begin(trainer, Stage.TRAIN)  # when it is known where a run that was cut goes on

    def __begin(self, trainer: Trainer, stage: Stage) -> None:
        self.__end("failed")  # of a run whose end was never told
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
        """Wait until all that was logged so far is taken, for `close_timeout` at the longest.

        A tracker of files (`local`) does at each save: a run that is killed behind it then has all that stands before,
        and none of it comes again. Who hands it to another thread or process overrides this, to wait for that too.
        """
        if self.__clerk is not None:
            self.__clerk.wait(self.patience)

    def wait_until(self, done: Callable[[], bool]) -> bool:
        """Wait until something is done by others, for `close_timeout` at the longest; return whether it is."""
        deadline = time.monotonic() + self.patience
        while not done():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def get_state(self) -> dict[str, Any]:
        """Return where the run stands on an axis that is no counter; who overrides it adds this to his own."""
        if self.local:
            self.catch_up()
        return {} if self.__reached is None else {"axis": self.axis, "place": self.__reached}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take it back, where the axis is the same."""
        self.__reached = state.get("place") if state.get("axis") == self.axis else None

    def __place(self, trainer: Trainer) -> float:
        counted: dict[str, float] = dict(zip(UNITS, snapshot(trainer.counters), strict=True))
        place = counted[self.axis] if self.axis in AXES else self.__reached or 0
        return int(place) if self.whole_places else place

    @hookimpl
    def on_log(self, trainer: Trainer, metrics: Mapping[str, float], global_step: int) -> None:
        if self.__clerk is None:  # nothing was left to train, but something to tell
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
