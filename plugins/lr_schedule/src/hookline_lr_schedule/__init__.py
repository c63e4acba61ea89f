"""Schedule learning rates, and any other number of an optimizer or a module, by name and by composition."""

from __future__ import annotations

import functools
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import lr_scheduler

from hookline import CallbackInterface, hookimpl
from hookline_lr_schedule.clock import CLOCKS, Clock, make_clock
from hookline_lr_schedule.phases import Phase, build, measure, read
from hookline_lr_schedule.values import Value, blend, setters_of_groups, setters_of_module

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

Made = tuple[list[torch.optim.Optimizer], list[Any]]


@dataclass(eq=False)
class LrSchedule(CallbackInterface):
    """Schedule learning rates and other values, by name and by phases, over the length that the run will have."""

    schedule: Any = "cosine"
    """A name, {name: options}, or a list of phases {name: options, for: length}; null leaves learning rates alone."""
    warmup: str | None = None
    """The length of a linear warm-up before the schedule: "500 steps", "1 epoch", "5%" of the run."""
    by: str | None = None
    """Whether it moves with steps, epochs or time; null for steps, or for the time if only that limits the run."""
    optimizer: int | None = None
    """The place of the optimizer among the module's; null for all of them."""
    replace: bool = False
    """Whether to drop the schedulers that the module returns for these optimizers, instead of refusing them."""
    values: dict[str, Any] = field(default_factory=dict)
    """Other values: `optimizer.weight_decay`, `optimizer.betas.0` or `module.PATH` to {name: {from, to, …}}."""

    def __post_init__(self) -> None:
        if self.by is not None and self.by not in CLOCKS:
            raise ValueError(f"lr_schedule.by={self.by!r} must be one of {', '.join(CLOCKS)}, or null")
        phases = [] if self.schedule is None else read("lr_schedule.schedule", self.schedule)
        self._plateau = [phase for phase in phases if phase.name == "plateau"]
        self._phases = [phase for phase in phases if phase.name != "plateau"]
        if self.warmup is not None:
            self._warm_up(self.warmup)
        if self.schedule is None and not self.values:
            raise ValueError("lr_schedule has nothing to do: give schedule, values or both")
        self._values = {target: _read_value(target, given) for target, given in self.values.items()}
        if not self.replace:
            self.drop_schedulers = None  # type: ignore[assignment]  # hides the method

    def _warm_up(self, length: str) -> None:
        first = [phase.name for phase in self._phases[:1]]
        if first in (["warmup"], ["one_cycle"], ["triangular"]):
            raise ValueError(f"lr_schedule.warmup={length!r}: {first[0]} begins with a warm-up of its own")
        if self.schedule is None:
            raise ValueError(f"lr_schedule.warmup={length!r} needs a schedule to come after it, such as constant")
        if self._plateau and "%" in length:  # the rate that plateau has reached could not be found in a longer run
            raise ValueError(f'lr_schedule.warmup={length!r}: before plateau it must be like "500 steps" or "1 epoch"')
        self._phases.insert(0, Phase("warmup", {}, length))

    # The schedules --------------------------------------------------------------------

    @hookimpl(wrapper=True, trylast=True, specname="setup_optimizers")
    def drop_schedulers(self) -> Generator[None, Made, Made]:
        """Drop the module's schedulers, before others of the plugins look at the optimizers."""
        optimizers, schedulers = yield
        chosen = self._choose(optimizers)
        for entry in (entry for entry in schedulers if _scheduler(entry).optimizer in chosen):
            if isinstance(_scheduler(entry), (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR)):
                name = type(_scheduler(entry)).__name__
                raise ValueError(f"lr_schedule.replace=true: {name} has overwritten the optimizer's rates; return none")
            for group in _scheduler(entry).optimizer.param_groups:
                group["lr"] = group.get("initial_lr", group["lr"])
        for group in (group for optimizer in chosen for group in optimizer.param_groups):
            group.pop("initial_lr", None)
        return optimizers, [entry for entry in schedulers if _scheduler(entry).optimizer not in chosen]

    @hookimpl(wrapper=True, tryfirst=True)
    def setup_optimizers(self, trainer: Trainer) -> Generator[None, Made, Made]:
        """Add the schedulers, when the optimizers are complete."""
        optimizers, schedulers = yield
        if others := trainer.plugins.performers("step_schedulers"):
            raise ValueError(
                f"lr_schedule: {others[0]} moves schedulers in a way of its own, which would leave these out"
            )
        chosen, clock = self._choose(optimizers), make_clock(trainer, self.by)
        if self.schedule is not None:
            self._refuse_two(trainer, chosen, schedulers)
        when = "epoch" if clock.unit == "epochs" else "step"
        added: list[Any] = []
        for optimizer in chosen:
            if self._phases:
                added.append((self._scheduler_of(trainer, optimizer, clock), when))
            added += [self._follow(trainer, optimizer, phase) for phase in self._plateau]
        added += [(self._value(trainer, chosen, target, clock), when) for target in self._values]
        return optimizers, [*schedulers, *added]

    def _scheduler_of(self, trainer: Trainer, optimizer: torch.optim.Optimizer, clock: Clock) -> Any:
        where = "lr_schedule.schedule"
        if self._plateau:
            return build(optimizer, self._phases, clock._replace(total=None), where)  # the warm-up alone
        if clock.unit != "time":
            return build(optimizer, self._phases, clock, where)
        apply = blend(setters_of_groups([optimizer], "lr", where), Phase("", {}, None), where)
        make = functools.partial(build, phases=self._phases, clock=clock, where=where)
        return Value(optimizer, make, apply, None, lambda: trainer.counters.seconds, clock.seconds)

    def _follow(self, trainer: Trainer, optimizer: torch.optim.Optimizer, phase: Phase) -> tuple[Any, str, str]:
        options = dict(phase.options)
        metric = options.pop("metric", trainer.options.val_loss_metric_name)
        options.setdefault("mode", trainer.hook.get_mode(trainer=trainer, metric=metric))
        clock = Clock("steps", None, None, None)
        return build(optimizer, [Phase("plateau", options, None)], clock, "lr_schedule.schedule"), "validation", metric

    def _value(self, trainer: Trainer, chosen: list[torch.optim.Optimizer], target: str, clock: Clock) -> Value:
        phase, where = self._values[target], f"lr_schedule.values.{target}"
        kind, _, path = target.partition(".")
        setters = (
            setters_of_groups(chosen, path, where)
            if kind == "optimizer"
            else setters_of_module(trainer.module, path, where)
        )
        plain = Phase(phase.name, {key: v for key, v in phase.options.items() if key not in ("from", "to")}, None)
        length = None if phase.length is None else clock.moves(phase.length, f"{where}.for")
        if length is not None:
            clock = clock._replace(total=length)
        make = functools.partial(build, phases=[plain], clock=clock, where=where)
        (end,) = measure([plain], clock, where)
        elapsed = (lambda: trainer.counters.seconds) if clock.unit == "time" else None
        return Value(chosen[0], make, blend(setters, phase, where), end, elapsed, clock.seconds)

    # Checks ---------------------------------------------------------------------------

    def _choose(self, optimizers: list[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
        if self.optimizer is None:
            return optimizers
        if not 0 <= self.optimizer < len(optimizers):
            raise ValueError(
                f"lr_schedule.optimizer={self.optimizer}: the module has {len(optimizers)} optimizer(s), from 0"
            )
        return [optimizers[self.optimizer]]

    def _refuse_two(self, trainer: Trainer, chosen: list[torch.optim.Optimizer], schedulers: list[Any]) -> None:
        for scheduler in map(_scheduler, schedulers):
            if getattr(scheduler, "optimizer", None) in chosen and not isinstance(scheduler, Value):
                raise ValueError(
                    f"lr_schedule.schedule: {type(trainer.module).__name__}.get_optimizers_schedulers returned "
                    f"{type(scheduler).__name__} for the same optimizer, and both would move its learning rate; return "
                    "no schedulers there, or set lr_schedule.replace=true"
                )


def _scheduler(entry: Any) -> Any:
    return entry[0] if isinstance(entry, tuple) else entry


def _read_value(target: str, given: Any) -> Phase:
    """Return the phase of a value, whose options may have `from` and `to`."""
    where = f"lr_schedule.values.{target}"
    kind, _, path = target.partition(".")
    if kind not in ("optimizer", "module") or not path:
        raise ValueError(
            f"{where} must be optimizer.NAME or module.PATH, such as optimizer.weight_decay or module.net.3.p"
        )
    if target == "optimizer.lr":
        raise ValueError(f"{where}: learning rates follow lr_schedule.schedule")
    bare, ends = given, {}
    if isinstance(given, dict):
        bare = {
            n: {k: v for k, v in o.items() if k not in ("from", "to")} if isinstance(o, dict) else o
            for n, o in given.items()
        }
        ends = {k: v for o in given.values() if isinstance(o, dict) for k, v in o.items() if k in ("from", "to")}
    phases = read(where, bare)
    if len(phases) > 1 or phases[0].name in ("plateau", "one_cycle", "triangular"):
        raise ValueError(f"{where}: a value follows one schedule of a shape, such as linear or cosine, or a function")
    return phases[0]._replace(options={**phases[0].options, **ends})
