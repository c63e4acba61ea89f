"""Record steps with torch.profiler: traces, and tables of what took the time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import record_function

from hookline import CallbackInterface, files, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

ROWS = 20
"""Of a table: the operations that took most time of their own."""

RUNS_ALREADY = "profile does not record: another profiler of torch runs already, in which all of it is"

log = logging.getLogger("hookline.profile")


@dataclass(eq=False)
class Profile(CallbackInterface):
    """Record a few optimizer steps with torch.profiler: a trace for a viewer, and a table of the costliest operations.

    A step reaches from the end of the step before to its own end, with the loading of its batches and with what comes
    in between: evaluations and saves.
    """

    wait: int = 5
    """Optimizer steps without the profiler before each recording."""
    warmup: int = 1
    """Steps with the profiler that are not kept, before each recording."""
    active: int = 3
    """Steps of each recording."""
    repeat: int = 1
    """How many recordings; 0 goes on until the run ends."""
    ranks: list[int] | None = field(default_factory=lambda: [0])
    """The ranks that record; null for all."""
    memory: bool = False
    """Whether to record what is allocated and freed."""
    shapes: bool = False
    """Whether to record the shapes of the inputs of operations."""
    stacks: bool = False
    """Whether to record the lines of Python that called an operation."""

    observer = True

    def __post_init__(self) -> None:
        for name, least in (("wait", 0), ("warmup", 1), ("active", 1), ("repeat", 0)):
            if getattr(self, name) < least:
                unit = "recordings; 0 goes on until the run ends" if name == "repeat" else "optimizer steps"
                raise ValueError(f"profile.{name}={getattr(self, name)} must be at least {least} {unit}")
        if self.ranks is not None and (not self.ranks or min(self.ranks) < 0):
            raise ValueError(f"profile.ranks={self.ranks} must name ranks, such as [0]; null records all")
        self._profiler: Any = None
        self._phases = Phases()
        self._chosen, self._steps, self._made = False, 0, 0
        self._left = 0  # steps until the end of the recording under way

    @hookimpl
    def on_setup(self, trainer: Trainer) -> None:
        if self.ranks is not None and max(self.ranks) >= trainer.world_size:
            raise ValueError(f"profile.ranks={self.ranks}: this run has the ranks 0 to {trainer.world_size - 1}")
        self._chosen = self.ranks is None or trainer.rank in self.ranks

    @hookimpl
    def on_begin_train(self, trainer: Trainer) -> None:
        self._steps = self._made = 0
        self._begin_where_due(trainer)

    @hookimpl
    def on_end_train_step(self, trainer: Trainer) -> None:  # type: ignore[override]
        self._steps += 1
        if self._profiler is not None:
            self._left -= 1
            if self._left:
                self._profiler.step()
                return
            self._end(trainer)
        self._begin_where_due(trainer)

    @hookimpl
    def on_end_run(self, trainer: Trainer) -> None:
        steps, self._steps = self._steps, 0
        if self._profiler is not None:
            self._end(trainer)
        if steps and self._chosen and not self._made:
            log.warning(
                "profile has recorded nothing: the run ended after %d steps, and a recording begins after %d "
                "(profile.wait=%d, profile.warmup=%d)",
                *(steps, self.wait + self.warmup, self.wait, self.warmup),
            )

    def _begin_where_due(self, trainer: Trainer) -> None:
        if not self._chosen or (self.repeat and self._made == self.repeat):
            return
        if self._steps % (self.wait + self.warmup + self.active) == self.wait:
            if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]  # a second one would take what the first has recorded
                trainer.say_once(RUNS_ALREADY)
                return
            profiler = torch.profiler.profile(
                schedule=torch.profiler.schedule(wait=0, warmup=self.warmup, active=self.active, repeat=1),
                record_shapes=self.shapes,
                profile_memory=self.memory,
                with_stack=self.stacks,
            )
            profiler.start()
            self._profiler, self._left = profiler, self.warmup + self.active
            trainer.plugins.register(self._phases, "profile.phases")

    def _end(self, trainer: Trainer) -> None:
        """End a recording, and write what it has: of fewer steps where the run ends in it."""
        trainer.plugins.unregister(self._phases)
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        steps = self.active - self._left
        if steps <= 0:
            return
        self._made += 1
        first, last = trainer.global_step - steps + 1, trainer.global_step
        trace = trainer.run_dir / "profile" / f"steps-{first}-{last}-rank-{trainer.rank}.json"
        files.make_folder(trace.parent)
        with files.replacing(trace) as new:
            profiler.export_chrome_trace(str(new))
        sort = "self_cpu_time_total" if trainer.on_cpu else "self_device_time_total"
        text = profiler.key_averages().table(sort_by=sort, row_limit=ROWS)
        with files.replacing(trace.with_suffix(".txt")) as new:
            new.write_text(text)
        log.info("steps %d to %d are in %s, for ui.perfetto.dev or chrome://tracing\n%s", first, last, trace, text)
        if trainer.rank == 0:
            trainer.log_object("profile", text)


def named(phase: str) -> Callable[..., Any]:
    """Return a wrapper of a verb that gives what it does a name in the trace."""

    def wrapper(self: Phases) -> Generator[None, Any, Any]:
        with record_function(phase):
            return (yield)

    return hookimpl(wrapper=True)(wrapper)


class Phases:
    """Names the phases of the loop in a trace; it takes part in a run while one is recorded."""

    take_window = named("data")
    call_model = named("forward")
    run_backward = named("backward")
    step_optimizer = named("optimizer")
    evaluate = named("evaluation")
    save = named("save")
