"""Measure each call of each hook in some steps of a run: its time, and for how many values it waits."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hookline import CallbackInterface, Stage, hookimpl
from hookline_profile.syncs import Calls, Operations

if TYPE_CHECKING:
    from hookline import Trainer

CORE = "core"
PHASES = {
    "take_window": "data loading",
    "prepare_batch": "copy to the device",
    "call_model": "forward, with the module's step",
    "run_backward": "backward",
    "step_optimizer": "optimizer",
    "step_schedulers": "schedulers",
    "evaluate": "evaluation",
    "save": "saving",
}
"""What the core does in verbs that take time."""
DATA = ("take_window", "count_samples")  # batches are in the memory of the host there
OFF, TIMES, SYNCS = "off", "times", "syncs"


@dataclass
class Row:
    """What one plugin did in one hook, over all steps that were measured, without what happened within."""

    hook: str
    plugin: str
    calls: int = 0
    seconds: float = 0.0
    syncs: int = 0


@dataclass
class Open:
    """A call that is under way."""

    row: Row
    began: float
    phase: str
    within: float = 0.0
    """Seconds of the calls within it."""


@dataclass
class Measured:
    """The measurement of one rank."""

    asked: int
    rank: int = 0
    ranks: int = 1
    device: str = "cpu"
    first: int = 0
    """The first step that was timed."""
    steps: int = 0
    """How many steps were timed."""
    synced: int = 0
    """In how many steps behind them waiting was counted."""
    seconds: float = 0.0
    """Of all timed steps."""
    other_syncs: int = 0
    """Outside of all calls."""
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)
    error: str = ""
    """Why waiting could not be counted."""


class Recorder(CallbackInterface):
    """Times the calls of some steps, then counts in as many further steps the values that they wait for; then stops.

    The two are apart because counting sees each operation, which takes time.

    Args:
        steps: how many steps of each.
        warmup: steps before that.
        keep: whether to keep each call, for a file.
    """

    def __init__(self, steps: int, warmup: int, keep: bool) -> None:
        self.measured = Measured(steps)
        self.events: list[dict[str, Any]] = []
        """Of all ranks, as a trace has them; only with `keep`."""
        self._steps, self._warmup, self._keep = steps, warmup, keep
        self.phase = OFF
        """What is measured now."""
        self._local, self._main = threading.local(), threading.get_ident()
        self._stack: list[Open] = []
        self._local.stack = self._stack
        self._zero = time.time() - time.perf_counter()  # clocks of machines are compared by the time of day
        self._start: int | None = None
        self._edge = 0.0
        self._modes, self._host = contextlib.ExitStack(), set[int]()

    # Around each call

    def begin(self, trainer: Trainer) -> None:
        """Measure a trainer that does not run yet."""
        self._trainer = trainer
        measured = self.measured
        measured.rank, measured.ranks, measured.device = trainer.rank, trainer.world_size, str(trainer.device)
        trainer.plugins.register(self, "trace")
        trainer.plugins.wrap_calls(self.wrap)

    def wrap(self, hook: str, implementation: Any) -> Callable[..., Any]:
        """Return the function of an implementation, measured."""
        function, plugin = implementation.function, implementation.plugin_name
        if implementation.plugin is self:
            return function  # type: ignore[no-any-return]

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.phase is OFF:
                return function(*args, **kwargs)
            under_way = self._enter(hook, plugin)
            try:
                return function(*args, **kwargs)
            finally:
                self._leave(under_way, 1)

        @functools.wraps(function)
        def halves(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            return (yield from self._halves(hook, plugin, function(*args, **kwargs)))

        return halves if implementation.wrapper or implementation.hookwrapper else call

    def _halves(self, hook: str, plugin: str, inner: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Measure a wrapper before and after its `yield`, but not what it wraps."""
        under_way = self._enter(hook, plugin)
        try:
            given = next(inner)
        except StopIteration as stop:
            return stop.value  # pluggy says that it has not yielded
        finally:
            self._leave(under_way, 1)
        while True:
            error, result = None, None
            try:
                result = yield given
            except BaseException as raised:
                error = raised
            under_way = self._enter(hook, plugin)
            try:
                given = inner.send(result) if error is None else inner.throw(error)
            except StopIteration as stop:
                return stop.value
            finally:
                self._leave(under_way, 0)

    def _enter(self, hook: str, plugin: str) -> Open:
        stage = self._trainer.stage
        shown = hook if stage is Stage.TRAIN else f"{hook} ({stage.value})"
        here = vars(self._local).setdefault("stack", [])
        rows = self.measured.rows
        row = rows.get((shown, plugin)) if here is self._stack else None
        if row is None:
            row = Row(shown, plugin)
            if here is self._stack and self.phase is not OFF:
                rows[shown, plugin] = row
        under_way = Open(row, time.perf_counter(), self.phase)
        here.append(under_way)
        return under_way

    def _leave(self, under_way: Open, calls: int) -> None:
        ended = time.perf_counter()
        here = self._local.stack
        here.remove(under_way)  # a generator may be closed late
        if under_way.phase is not TIMES or self.phase is not TIMES:
            return
        row, took = under_way.row, ended - under_way.began
        row.calls += calls
        row.seconds += took - under_way.within
        if here:
            here[-1].within += took
        if self._keep:
            self._keep_event(row.hook, under_way.began, ended, row.plugin)

    def _keep_event(self, name: str, began: float, ended: float, plugin: str) -> None:
        self.events.append(
            {
                "name": name,
                "cat": plugin,
                "ph": "X",
                "ts": (self._zero + began) * 1e6,
                "dur": (ended - began) * 1e6,
                "pid": self.measured.rank,
                "tid": threading.get_native_id(),
                "args": {"plugin": plugin},
            }
        )

    def _found(self) -> None:
        """Count that something waits."""
        if threading.get_ident() != self._main:
            return
        row = self._stack[-1].row if self._stack else None
        if row is None:
            self.measured.other_syncs += 1
        elif row.hook not in DATA:
            row.syncs += 1

    # Between steps

    @hookimpl
    def on_boundary(self, trainer: Trainer, global_step: int) -> None:
        """Begin and end what is measured."""
        now, measured = time.perf_counter(), self.measured
        if self._start is None:
            self._start = global_step - 1
        done = global_step - self._start - self._warmup
        if self.phase is TIMES:
            measured.steps, measured.seconds = measured.steps + 1, measured.seconds + now - self._edge
            if self._keep:
                self._keep_event(f"step {global_step}", self._edge, now, CORE)
            if done >= self._steps:
                self._end_times(trainer)
                self._count(trainer)
        elif self.phase is SYNCS:
            measured.synced += 1
            if done >= 2 * self._steps:
                self.end()
                trainer.stop("the steps to trace are done", "preempted", 0, alone=False)
        elif done >= 0 and not measured.steps:
            measured.first, self.phase = global_step + 1, TIMES
        self._edge = time.perf_counter()

    @hookimpl
    def on_end_train(self, trainer: Trainer) -> None:  # type: ignore[override]
        """Bring the calls of all ranks together, where training ends before all steps are measured."""
        if self.phase is TIMES:
            self._end_times(trainer)

    def end(self) -> None:
        """Measure no more."""
        self.phase = OFF
        self._modes.close()

    def _end_times(self, trainer: Trainer) -> None:
        self.phase = OFF
        if self._keep:
            every = trainer.hook.all_gather(trainer=trainer, value=self.events)
            self.events = sorted((event for events in every for event in events), key=lambda event: event["ts"])

    def _count(self, trainer: Trainer) -> None:
        self.phase = SYNCS
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        self._host = {id(state["step"]) for state in states if "step" in state}  # of Adam: on the CPU everywhere
        self._modes.enter_context(Operations(self._found, trainer.on_cpu, self._host))
        if trainer.on_cpu:
            self._modes.enter_context(Calls(self._found))
