"""What trackers have in common: a thread of their own, so that no service holds training up or breaks it.

A tracker is a plugin whose class derives from `Tracker`. It says what its service is told at the start, of values and
at the end; when that is, what is handed over and what becomes of failures is the same for all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookline.files import replacing
from hookline.installed import name_of, nearest
from hookline.interfaces import CallbackInterface, Stage
from hookline.marks import hookimpl
from hookline.schedule import seconds
from hookline.state import UNITS, snapshot
from hookline.tracking.values import Histogram, Image, Table, prepared

if TYPE_CHECKING:
    from hookline.trainer import Trainer

__all__ = ["Histogram", "Image", "Run", "Table", "Tracker"]

AXES = ("steps", "batches", "samples", "epochs", "seconds")
WAITING = 1000  # calls that may wait for the thread; more are dropped
FAILURES_ALLOWED = 3  # of one method in a row, before it is switched off

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

    def __post_init__(self) -> None:
        own = name_of(type(self))
        near = nearest(self.axis, AXES)
        if not self.axis or (self.axis not in AXES and near):
            raise ValueError(
                f"{own}.axis={self.axis!r} must be one of {', '.join(AXES)}, or the name of a logged value{near}"
            )
        self.__patience = seconds(self.close_timeout, f"{own}.close_timeout")
        self.__clerk: _Clerk | None = None
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
    def waiting(self) -> int:
        """How many calls wait for the thread: a service that takes much at once is given it when there are none."""
        return 0 if self.__clerk is None else self.__clerk.waiting

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

        self.__clerk = _Clerk(str(trainer.plugins.get_name(self)), start)

    def catch_up(self) -> None:
        """Wait until all that was logged so far is taken, for `close_timeout` at the longest.

        For a tracker of files, to be called by its `get_state`: a run that is killed after a save then has all that
        stands before it, and none of it comes again.
        """
        if self.__clerk is not None:
            self.__clerk.wait(self.__patience)

    def get_state(self) -> dict[str, Any]:
        """Return where the run stands on an axis that is no counter; who overrides it adds this to his own."""
        return {} if self.__reached is None else {"axis": self.axis, "place": self.__reached}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take it back, where the axis is the same."""
        self.__reached = state.get("place") if state.get("axis") == self.axis else None

    def __place(self, trainer: Trainer) -> float:
        if self.axis not in AXES:
            return self.__reached or 0
        counted: dict[str, float] = dict(zip(UNITS, snapshot(trainer.counters), strict=True))
        return counted[self.axis]

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
            self.__clerk.close(lambda: self.finish(status), self.__patience)
            self.__clerk = None

    def __tell(self, method: Callable[..., None], *arguments: Any) -> None:
        if self.__clerk is not None:
            self.__clerk.tell(method.__name__, lambda: method(*arguments))


class _Clerk:
    """Does calls in a thread of its own, one after the other, whatever becomes of them."""

    def __init__(self, name: str, start: Callable[[], None]) -> None:
        self.name = name
        # By the name of the method; None is the end.
        self._calls: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue(WAITING)
        self._finish: Callable[[], None] | None = None
        self._lost: Counter[str] = Counter()  # calls by method: of the thread, which alone counts here
        self._dropped: Counter[str] = Counter()  # and where there was no room
        self._failing: Counter[str] = Counter()  # how many failed in a row
        self._thread = threading.Thread(target=self._work, args=[start], name=f"hookline-{name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many calls have not begun."""
        return self._calls.qsize()

    def tell(self, what: str, call: Callable[[], None]) -> None:
        """Have something done soon; it is dropped where too much waits."""
        try:
            self._calls.put_nowait((what, call))
        except queue.Full:
            if not self._dropped:
                log.warning(
                    "%s is slower than training, or hangs: %d calls wait for it, and more are dropped until there is "
                    "room", self.name, WAITING,
                )  # fmt: skip
            self._dropped[what] += 1

    def wait(self, patience: float) -> None:
        """Wait until nothing waits any more, not for ever."""
        with self._calls.all_tasks_done:
            self._calls.all_tasks_done.wait_for(lambda: not self._calls.unfinished_tasks, patience)

    def close(self, finish: Callable[[], None], patience: float) -> None:
        """Have the last thing done, and wait for all of it, not for ever."""
        deadline = time.monotonic() + patience
        self._finish = finish
        with contextlib.suppress(queue.Full):
            self._calls.put(None, timeout=patience)
        self._thread.join(max(deadline - time.monotonic(), 0))
        lost = Counter(dict(self._lost)) + self._dropped
        if self._thread.is_alive():
            log.warning("%s has not taken all within %g s (close_timeout): the run ends without", self.name, patience)
            with self._calls.mutex:
                lost.update(told[0] for told in self._calls.queue if told is not None)
        if lost:
            said = ", ".join(f"{count} of {what}" for what, count in lost.items())
            log.warning("calls of %s failed or were dropped, and may be missing in its run: %s", self.name, said)

    def _work(self, start: Callable[[], None]) -> None:
        started = self._try(start, "it could not start")
        while (told := self._calls.get()) is not None:
            what, call = told
            if started and self._failing[what] < FAILURES_ALLOWED:
                self._do(what, call)
            else:
                self._lost[what] += 1
            self._calls.task_done()
        if started and self._finish is not None:
            self._try(self._finish, "it could not end its run")

    def _do(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            if not self._lost[what]:
                log.warning("%s of %s failed, and training goes on: %s", what, self.name, said)
            self._lost[what] += 1
            self._failing[what] += 1
            if self._failing[what] == FAILURES_ALLOWED:
                log.warning(
                    "%s of %s is switched off, and training goes on without it: %d failures in a row, the last: %s",
                    what, self.name, FAILURES_ALLOWED, said,
                )  # fmt: skip
        else:
            self._failing[what] = 0

    def _try(self, call: Callable[[], None], why: str) -> bool:
        """Do the first or the last call and return whether it has not failed; else say so."""
        try:
            call()
        except Exception as error:
            log.warning(
                "%s is switched off, and training goes on without it: %s: %s: %s",
                self.name, why, type(error).__name__, error,
            )  # fmt: skip
            return False
        return True
