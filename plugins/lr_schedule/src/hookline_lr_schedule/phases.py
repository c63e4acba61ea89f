"""Schedules by name, and compositions of them, built of the schedulers of torch."""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import math
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.optim import lr_scheduler

from hookline import nearest
from hookline_lr_schedule.clock import CURE, Clock

log = logging.getLogger("hookline.lr_schedule")


@dataclass
class InverseSquareRoot:
    """The factor sqrt(timescale / (timescale + moves)); torch has no scheduler of it."""

    timescale: int

    def __call__(self, moves: int) -> float:
        """Return the factor after some moves."""
        return math.sqrt(self.timescale / (self.timescale + moves))


class Kind(NamedTuple):
    """How a name is built: torch's class, the argument for its length, and arguments that differ from torch's."""

    scheduler: Any
    length: str = ""
    given: Mapping[str, Any] = {}
    taken: tuple[str, ...] = ()
    """The options, if they are not the arguments of torch's class."""
    alone: bool = False
    """Whether it cannot be a phase among others: it sets rates of its own."""


KINDS = {
    "constant": Kind(lr_scheduler.ConstantLR, given={"factor": 1.0}, taken=("",)),
    "warmup": Kind(lr_scheduler.LinearLR, "total_iters", {"start_factor": None, "end_factor": 1.0}),
    "linear": Kind(lr_scheduler.LinearLR, "total_iters", {"start_factor": 1.0, "end_factor": 0.0}),
    "cosine": Kind(lr_scheduler.CosineAnnealingLR, "T_max"),
    "polynomial": Kind(lr_scheduler.PolynomialLR, "total_iters"),
    "exponential": Kind(lr_scheduler.ExponentialLR),
    "step": Kind(lr_scheduler.StepLR),
    "multi_step": Kind(lr_scheduler.MultiStepLR),
    "inverse_sqrt": Kind(lr_scheduler.LambdaLR, taken=("timescale",)),
    "function": Kind(lr_scheduler.LambdaLR, taken=("path",)),
    "one_cycle": Kind(lr_scheduler.OneCycleLR, "total_steps", {"max_lr": None, "cycle_momentum": False}, alone=True),
    "triangular": Kind(lr_scheduler.CyclicLR, "", {"max_lr": None, "cycle_momentum": False}, alone=True),
    "plateau": Kind(lr_scheduler.ReduceLROnPlateau, alone=True),
}
COMPOSED = {"warmup_stable_decay": {"warmup": "10%", "decay": "20%"}}
LENGTHS = ("step_size", "step_size_up", "step_size_down", "timescale", "milestones")
OURS = {"optimizer", "last_epoch", "lr_lambda"}


class Phase(NamedTuple):
    """A part of a schedule."""

    name: str
    options: dict[str, Any]
    length: Any
    """As it is written; None for the rest of the run."""


def read(where: str, given: Any) -> list[Phase]:
    """Return the phases of "cosine", {"cosine": {…}} or a list of phases, each with its length as `for`.

    Raises:
        ValueError: an unknown name or option, or phases that cannot follow each other.
    """
    if isinstance(given, list) and given:
        phases = [one for index, item in enumerate(given) for one in read(f"{where}.{index}", item)]
        alone = [phase.name for phase in phases if KINDS[phase.name].alone]
        if alone and len(phases) > 1:
            raise ValueError(f"{where}: {alone[0]} sets rates of its own and cannot be one phase of several")
        if sum(phase.length is None for phase in phases) > 1:
            raise ValueError(f"{where}: more than one phase has no length; give all but one a `for`")
        return phases
    return _read_one(where, {given: {}} if isinstance(given, str) else given)


def _read_one(where: str, entry: Any) -> list[Phase]:
    """Return the phases of {name: options, "for": length}: one, but for a name that is a composition."""
    names = [name for name in entry if name != "for"] if isinstance(entry, Mapping) else []
    known = [*KINDS, *COMPOSED]
    if len(names) != 1:
        raise ValueError(
            f"{where}={entry!r} must be a name, {{name: options, for: length}} or a list of such; names are "
            f"{', '.join(known)}"
        )
    (name,) = names
    if name not in known:
        raise ValueError(
            f"{where}: there is no schedule {name!r}{nearest(str(name), known)}; there are {', '.join(known)}"
        )
    options = entry[name] or {}
    options = {"path": options} if name == "function" and isinstance(options, str) else dict(options)
    if name in COMPOSED:
        _check(f"{where}.{name}", options, [*COMPOSED[name]])
        lengths = {**COMPOSED[name], **options}
        ends = Phase("warmup", {}, lengths["warmup"]), Phase("linear", {}, lengths["decay"])
        return [ends[0], Phase("constant", {}, None), ends[1]]
    kind = KINDS[name]
    if name != "function":  # whose other options are arguments of the user's function
        taken = kind.taken or {*inspect.signature(kind.scheduler).parameters} - OURS - {kind.length}
        _check(f"{where}.{name}", options, [*taken, *(["metric"] if name == "plateau" else [])])
    elif "path" not in options:
        raise ValueError(f"{where}.function.path is needed: the dotted path of a function or a class")
    return [Phase(name, options, entry.get("for"))]


def _check(where: str, options: Mapping[str, Any], known: list[str]) -> None:
    for option in options:
        if option not in known:
            raise ValueError(
                f"{where} has no option {option!r}{nearest(option, known)}; it has {', '.join(sorted(known))}"
            )


def build(optimizer: torch.optim.Optimizer, phases: list[Phase], clock: Clock, where: str) -> Any:
    """Return torch's scheduler of the phases.

    Raises:
        ValueError: lengths that do not fit the run, or what torch refuses.
    """
    lengths = measure(phases, clock, where)
    if not any(length != 0 for length in lengths):  # of a run that trains nothing
        phases, lengths = phases[-1:], [1]
    made, before = [], 0
    for phase, length in zip(phases, lengths, strict=True):
        if length != 0:
            made.append(_build_one(optimizer, phase, length, clock, before, where))
        before = length or 0
    if len(made) == 1:
        return made[0]
    ends = itertools.accumulate(length for length in lengths[:-1] if length)
    return lr_scheduler.SequentialLR(optimizer, made, [*ends][: len(made) - 1])


def measure(phases: list[Phase], clock: Clock, where: str) -> list[int | None]:
    """Return the moves of each phase; the one without a length has the rest of the run, None if that is unknown."""
    given = [None if phase.length is None else clock.moves(phase.length, f"{where}.for") for phase in phases]
    total = clock.total
    left = None if total is None else total - sum(length or 0 for length in given)
    if left is None and None in given[:-1]:
        raise ValueError(
            f"{where}: the phase {phases[given.index(None)].name} takes the rest of a run whose length is unknown: "
            f"{CURE}"
        )
    if left and left > 0 and None not in given:
        raise ValueError(
            f"{where}: the phases end {left} {clock.unit} before the run, which has {total}; leave the `for` of one "
            "away, for the rest"
        )
    if left is not None and left < 0:
        names = ", ".join(f"{phase.name} {length}" for phase, length in zip(phases, given, strict=True) if length)
        log.warning("%s: the run ends before its phases (%s): it has %d %s", where, names, total, clock.unit)
    return [max(left, 0) if length is None and left is not None else length for length in given]


def _build_one(
    optimizer: torch.optim.Optimizer, phase: Phase, length: int | None, clock: Clock, before: int, where: str
) -> Any:
    kind, here = KINDS[phase.name], f"{where}.{phase.name}"
    options = {**kind.given, **phase.options}
    for name in set(LENGTHS) & options.keys():
        many = isinstance(options[name], list)
        moves = [clock.moves(one, f"{here}.{name}") for one in (options[name] if many else [options[name]])]
        options[name] = moves if many else moves[0]
    if kind.length and length is None:
        raise ValueError(f"{here} ends with the run, whose length is unknown: {CURE}")
    if kind.length:
        options[kind.length] = length
    if phase.name == "warmup" and options["start_factor"] is None:
        options["start_factor"] = 1 / (length or 1)
    if "max_lr" in options and options["max_lr"] is None:
        options["max_lr"] = [group["lr"] for group in optimizer.param_groups]
    if kind.scheduler is lr_scheduler.LambdaLR:
        options = {"lr_lambda": _factor(phase, options, before, here)}
    try:
        return kind.scheduler(optimizer, **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{here}: {kind.scheduler.__name__}: {error}") from error


def _factor(phase: Phase, options: dict[str, Any], before: int, where: str) -> Any:
    """Return the function of a `LambdaLR`."""
    if phase.name == "inverse_sqrt":
        timescale = options.get("timescale", before)
        if not timescale:
            raise ValueError(f"{where}.timescale is needed where no warm-up comes before, such as 1000")
        return InverseSquareRoot(timescale)
    path, arguments = options["path"], {name: value for name, value in options.items() if name != "path"}
    try:
        found = pkgutil.resolve_name(path)
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(f"{where}.path={path!r} cannot be imported: {error}") from error
    return (
        found(**arguments) if inspect.isclass(found) else functools.partial(found, **arguments) if arguments else found
    )
