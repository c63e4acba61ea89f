"""Show how far a run is: bars on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import rich.progress
from rich.console import Console, Group, RenderableType
from rich.progress import Task, TaskID
from rich.progress_bar import ProgressBar
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from hookline import CallbackInterface, Stage, every, hookimpl
from hookline_progress.live import Parked
from hookline_progress.notebook import Area
from hookline_progress.validation import Standing, Validations

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

SHARE = 50  # a drawing that took t is followed by none for 50 t: a slow terminal slows training by 2 % at most
BELOW = 12  # lines of a terminal that the table of a validation leaves to its own frame, the bars and the values
KEPT = 10  # lines that a notebook shows above the bars
LOGGER = "hookline.progress"  # nothing is logged to it; its level says whether there is anything to be seen


def count(done: float, total: float | None) -> str:
    """Return "3/10", or "3" where nobody knows the end."""
    return f"{done:.0f}" if total is None else f"{done:.0f}/{total:.0f}"


def rate(task: Task) -> str:
    """Return how fast a bar moves."""
    return "" if task.speed is None else f"{task.speed:.3g}/s" if task.speed < 100 else f"{task.speed:.0f}/s"


def left(task: Task) -> str:
    """Return the time a bar will take at its present rate."""
    return f"{duration(task.time_remaining)} left" if task.time_remaining else ""


def duration(seconds: float) -> str:
    """Return "h:mm:ss"."""
    return str(timedelta(seconds=int(seconds)))


def values(metrics: Mapping[str, float]) -> list[str]:
    """Return "name value" of each metric."""
    return [f"{name} {value:.5g}" for name, value in metrics.items()]


def line(parts: Iterable[str]) -> str:
    """Return one line of what there is to say."""
    return ", ".join(part for part in parts if part)


def epoch_of(trainer: Trainer) -> str:
    """Return "epoch 2/3": the one under way, the last when training is over."""
    epochs = trainer.totals.epochs
    number = trainer.epoch + 1
    return f"epoch {count(number if epochs is None else min(number, epochs), epochs)}"


def silenced() -> bool:
    """Tell whether the level of the logger, or of one above it that is hookline's, is set higher than INFO."""
    levels = (logging.getLogger(name).level for name in (LOGGER, LOGGER.partition(".")[0]))
    return next((level for level in levels if level), logging.INFO) > logging.INFO


class Bars(rich.progress.Progress):
    """Rich's bars below a table and above a line of values.

    Drawn when `draw` says so and not whenever a bar comes or goes.
    """

    validation: Segments | None = None
    values = ""

    def __init__(self, console: Console, disable: bool) -> None:
        super().__init__(console=console, disable=disable)
        self.live = Parked(
            console=console,
            auto_refresh=False,  # no thread
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # what goes into a file stays in it
            get_renderable=lambda: Group("", *self.get_renderables()),  # an empty line for others to write into
        )

    def refresh(self) -> None:
        """Do nothing: rich would draw at each `add_task` and `reset`, that is, at each of many short epochs."""

    def draw(self) -> None:
        """Draw the bars as they are now."""
        super().refresh()

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the last validation, the bars in one table, and the values."""
        if self.validation is not None:
            yield self.validation
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(max_width=40)  # the only one that may be narrower where room is short
        for _ in range(3):
            table.add_column(no_wrap=True)
        for task in self.tasks:
            pulse = task.total is None
            bar = ProgressBar(task.total, task.completed, pulse=pulse, animation_time=time.monotonic())
            table.add_row(task.description, bar, count(task.completed, task.total), rate(task), left(task))
        yield table
        if self.values:
            yield Text(self.values, no_wrap=True, overflow="ellipsis")


@dataclass(eq=False)
class Progress(CallbackInterface):
    """Show epochs, steps, validations and the last logged values of a run on standard error; on rank 0 only."""

    refresh: float = 0.1
    """Seconds from one drawing of the bars to the next, at least."""
    every: str = "30 s"
    """Where there is no terminal: the time between lines, beside those of epochs and validations."""
    higher: list[str] = field(default_factory=list)
    """Metrics whose best value is the highest, where their names do not say so; without keys of loaders."""
    lower: list[str] = field(default_factory=list)
    """Metrics whose best value is the lowest, likewise."""
    force_terminal: bool | None = None
    """Draw bars (true) or write lines (false) whatever standard error is."""

    observer = True

    def __post_init__(self) -> None:
        if both := sorted(set(self.higher) & set(self.lower)):
            raise ValueError(f"progress.higher and progress.lower both name {', '.join(both)}; leave one of them")
        if not self.refresh > 0:
            raise ValueError(f"progress.refresh={self.refresh} must be above 0 seconds")
        try:
            self._cadence, unit = every(self.every)
        except ValueError as error:
            raise ValueError(f"progress.every: {error}") from None
        if unit != "seconds":
            raise ValueError(f'progress.every={self.every!r} must be a time, such as "30 s" or "5 min"')
        self._validations = Validations(self.higher, self.lower)

    @hookimpl
    def on_setup(self, trainer: Trainer) -> None:
        if trainer.rank != 0:
            trainer.plugins.unregister(self)
        self._validations = Validations(self.higher, [*self.lower, trainer.options.val_loss_metric_name])

    def get_state(self) -> dict[str, Any]:
        """Return the best and the last values of the validations."""
        return self._validations.get_state()

    def update_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._validations.update_state(state)

    # The run --------------------------------------------------------------------------

    @hookimpl
    def on_begin_run(self) -> None:
        dumb = os.environ.get("TERM") in ("dumb", "unknown")
        silent = silenced()
        asked = self.force_terminal
        self._notebook = Area() if asked is None and not silent and Console().is_jupyter else None
        self._terminal = not silent and (sys.stderr.isatty() and not dumb if asked is None else asked)
        console = Console(
            stderr=True, force_terminal=self._terminal, force_jupyter=False, highlight=False, quiet=silent
        )
        self._bars = Bars(console, disable=not self._terminal)
        self._redirected: list[tuple[logging.StreamHandler, object]] = []  # type: ignore[type-arg]
        self._began = self._said = time.monotonic()
        self._due = -math.inf
        self._lines = deque[str](maxlen=KEPT)
        self._shown: dict[str, float] = {}
        self._steps: TaskID | None = None
        self._epoch: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._totals: Mapping[str, int | None] = {}
        self._validated: tuple[str, dict[str, Standing]] | None = None

    @hookimpl(trylast=True)
    def on_end_run(self, trainer: Trainer, stage: Stage, status: str, reason: str) -> None:
        self._stop()
        if self._terminal and self._validated is not None:
            self._bars.console.print(self._table(sys.maxsize))
        where = "" if stage is Stage.TRAIN else f"{stage.value} "
        if self._steps is not None:
            totals, counters = trainer.totals, trainer.counters
            step = count(counters.global_step, totals.steps)
            where = f"at step {step}, {count(counters.epochs, totals.epochs)} epochs, "
        why = f": {reason.strip().splitlines()[0]}" if reason.strip() else ""
        self._say(f"{status} {where}after {duration(time.monotonic() - self._began)}{why}")

    def _start(self) -> None:
        """Show the bars; what is printed or logged to the terminal meanwhile appears above them."""
        before = {id(stream): stream for stream in (sys.stdout, sys.stderr)}
        if not self._terminal or self._bars.live.is_started:
            return
        self._bars.start()
        after = dict(zip(before, (sys.stdout, sys.stderr), strict=False))
        loggers = [logging.root, *logging.root.manager.loggerDict.values()]
        for handler in [handler for logger in loggers for handler in getattr(logger, "handlers", ())]:
            if isinstance(handler, logging.StreamHandler) and id(handler.stream) in before:
                # A handler holds the stream of its birth, and what it wrote there would be wiped away.
                self._redirected.append((handler, handler.stream))
                handler.setStream(after[id(handler.stream)])

    def _stop(self) -> None:
        """Take the bars away and give back the streams."""
        for handler, stream in self._redirected:
            handler.setStream(stream)
        self._redirected = []
        self._bars.stop()
        self._bars.values = ""
        for task in self._bars.task_ids:  # a notebook goes on showing what is left
            self._bars.remove_task(task)

    def _say(self, text: str) -> None:
        """Write a line, above the bars if there are any."""
        self._said = time.monotonic()
        if self._notebook is not None:
            self._lines.append(text)
            self._draw()
        else:
            self._bars.console.print(Text(text), soft_wrap=True)

    def _draw(self) -> None:
        """Draw the bars, or write the line that has become due."""
        begin = time.monotonic()
        if self._notebook is not None:
            lines = [Text(said, no_wrap=True, overflow="ignore") for said in self._lines]
            self._notebook.show(*lines, *self._bars.get_renderables())
        elif self._terminal:
            self._bars.draw()
        elif begin >= self._said + self._cadence:
            self._say(self._standing())
        end = time.monotonic()
        self._due = end + max(self.refresh, SHARE * (end - begin))

    def _standing(self) -> str:
        """Say in one line what the bars say."""
        tasks = {task.id: task for task in self._bars.tasks}
        if self._evaluation is not None:
            task = tasks[self._evaluation]
            return line([f"{task.description} {count(task.completed, task.total)}", rate(task), left(task)])
        assert self._steps is not None
        assert self._epoch is not None
        steps, epoch = tasks[self._steps], tasks[self._epoch]
        step = f"step {count(steps.completed, steps.total)}"
        return line([epoch.description, step, *values(self._shown), rate(steps), left(steps)])

    # Training -------------------------------------------------------------------------

    @hookimpl
    def on_begin_train(self, trainer: Trainer, global_step: int) -> None:
        totals = trainer.totals
        loss, best = trainer.options.val_loss_metric_name, trainer.best.valid_loss
        if best < self._validations.best.get(loss, (math.inf, None))[0]:
            self._validations.best[loss] = best, None  # this plugin was not there then
        self._epoch = self._bars.add_task("", total=totals.batches_per_epoch)
        self._steps = self._bars.add_task("step", total=totals.steps, completed=global_step)
        self._name_epoch(trainer)
        self._start()
        ends = line(
            [f"{totals.epochs} epochs" if totals.epochs else "", f"{totals.steps} steps" if totals.steps else ""]
        )
        goes_on = f", going on after step {global_step}" if global_step else ""
        self._say(f"training: {ends or 'until it is stopped'}{goes_on}")

    @hookimpl
    def on_begin_train_epoch(self, trainer: Trainer) -> None:  # type: ignore[override]
        self._name_epoch(trainer)

    def _name_epoch(self, trainer: Trainer) -> None:
        assert self._epoch is not None
        self._bars.reset(self._epoch, completed=trainer.position, description=epoch_of(trainer))

    @hookimpl
    def on_end_train_step(self, trainer: Trainer) -> None:  # type: ignore[override]
        if time.monotonic() >= self._due:
            self._look(trainer)
            self._draw()

    def _look(self, trainer: Trainer) -> None:
        """Take over where the trainer is."""
        assert self._steps is not None
        assert self._epoch is not None
        self._bars.update(self._steps, completed=trainer.global_step)
        self._bars.update(self._epoch, completed=trainer.position)

    @hookimpl
    def on_end_train_epoch(self, trainer: Trainer) -> None:  # type: ignore[override]
        self._look(trainer)
        if not self._terminal and self._notebook is None:
            self._say(f"{self._standing()}, epoch done")

    @hookimpl
    def on_log(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        if self._steps is None:  # an evaluation on its own
            self._say(f"{trainer.stage.value}: {line(values(metrics))}")
            return
        train_loss = trainer.options.train_loss_metric_name
        wanted = {train_loss, f"{train_loss}_epoch"} | trainer.logs.shown
        self._shown |= {name: value for name, value in metrics.items() if name in wanted}
        of_batches = {} if trainer.stage is Stage.TRAIN else metrics  # of the validation under way
        self._bars.values = "  ".join(values({**self._shown, **of_batches}))

    # Evaluation -----------------------------------------------------------------------

    @hookimpl
    def on_begin_evaluation(self, totals: Mapping[str, int | None]) -> None:
        self._totals = totals
        self._start()

    @hookimpl
    def on_begin_val_epoch(self, trainer: Trainer, key: str) -> None:
        self._begin_loader("sanity check" if trainer.sanity_checking else "val", key)

    @hookimpl
    def on_begin_test_epoch(self, key: str) -> None:
        self._begin_loader("test", key)

    @hookimpl
    def on_begin_predict_epoch(self, key: str) -> None:
        self._begin_loader("predict", key)

    def _begin_loader(self, name: str, key: str) -> None:
        self._evaluation = self._bars.add_task(
            f"{name} {key}" if len(self._totals) > 1 else name, total=self._totals.get(key)
        )

    @hookimpl
    def on_end_val_step(self, index: int) -> None:
        if time.monotonic() >= self._due:
            self._look_at_batch(index)

    @hookimpl
    def on_end_test_step(self, index: int) -> None:
        if time.monotonic() >= self._due:
            self._look_at_batch(index)

    @hookimpl
    def on_end_predict_step(self, index: int) -> None:
        if time.monotonic() >= self._due:
            self._look_at_batch(index)

    def _look_at_batch(self, index: int) -> None:
        assert self._evaluation is not None
        self._bars.update(self._evaluation, completed=index + 1)
        self._draw()

    @hookimpl
    def on_end_val_epoch(self) -> None:  # type: ignore[override]
        self._end_loader()

    @hookimpl
    def on_end_test_epoch(self) -> None:
        self._end_loader()

    @hookimpl
    def on_end_predict_epoch(self) -> None:
        self._end_loader()

    def _end_loader(self) -> None:
        if self._evaluation is not None:
            self._bars.remove_task(self._evaluation)
            self._evaluation = None

    @hookimpl
    def on_end_validation(self, trainer: Trainer, metrics: Mapping[str, float], global_step: int) -> None:
        self._validations.keys = self._totals if len(self._totals) > 1 else ()
        standings = self._validations.take(metrics, global_step)
        where = f"step {count(global_step, trainer.totals.steps)}, {epoch_of(trainer)}"
        self._validated = f"validation at {where}", standings
        if self._terminal or self._notebook is not None:
            console = self._bars.console
            self._bars.validation = Segments(console.render(self._table(console.height - BELOW)))  # laid out once
        marked = [f"{name} {s.value:.5g}{' (best)' if s.is_best else ''}" for name, s in standings.items()]
        self._say(f"validated at {where}: {line(marked)}")

    def _table(self, room: int) -> Table:
        """Return the last validation as a table of so many rows at most."""
        assert self._validated is not None
        return self._validations.table(*self._validated, self._bars.console, max(room, 1))
