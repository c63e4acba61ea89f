"""Learning-rate schedulers of a run: when they move, which metric they follow, their length, and how they resume."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch.optim import lr_scheduler

from hookline.counters import Counters

PROGRESS = {  # the parts of a scheduler's state that are progress, not construction
    "last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial", "best", "num_bad_epochs",
    "cooldown_counter", "_schedulers", "T_cur", "T_i",
}  # fmt: skip


class Scheduled(NamedTuple):
    """A scheduler, when it moves (after each "step", "epoch" or "validation"), and the metric it follows."""

    scheduler: Any
    when: str
    metric: str | None = None
    """The metric for its `step`; None for schedulers without one."""


def is_plateau(scheduler: Any) -> bool:
    """Tell whether a scheduler follows a metric."""
    return isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)


def schedule_all(schedulers: Sequence[Any], val_loss: str = "val_loss") -> list[Scheduled]:
    """Return when each scheduler moves, and which metric it follows.

    Args:
        schedulers: schedulers, or tuples (scheduler, when) or (scheduler, when, metric).
        val_loss: the metric of a `ReduceLROnPlateau` without a named one.

    Raises:
        TypeError: an entry that is no scheduler.
        ValueError: an entry with another word than step, epoch or validation, or with a wrong metric.
    """
    scheduled = []
    for entry in schedulers:
        given = entry if isinstance(entry, tuple) else (entry,)
        scheduler = given[0]
        plateau, name = is_plateau(scheduler), type(scheduler).__name__
        if isinstance(scheduler, type) or not callable(getattr(scheduler, "step", None)):
            said = f"the class {scheduler.__name__}" if isinstance(scheduler, type) else f"a {name}"
            raise TypeError(
                f"get_optimizers_schedulers returned {said} where a scheduler is meant: return it, or a tuple with "
                'when it moves, (scheduler, "epoch") or (scheduler, "validation", "val_accuracy")'
            )
        when = given[1] if len(given) > 1 else "validation" if plateau else "step"
        metric = given[2] if len(given) > 2 else val_loss if plateau else None
        if when not in ("step", "epoch", "validation"):
            raise ValueError(
                f"get_optimizers_schedulers pairs {name} with {when!r}; a scheduler "
                'moves after each "step", "epoch" or "validation"'
            )
        if plateau and when == "step":
            raise ValueError(
                f'get_optimizers_schedulers pairs {name} with "step"; it follows a metric of an evaluation, so it '
                'moves after each "validation" or "epoch"'
            )
        if plateau and len(given) < 3 and scheduler.mode == "max":
            raise ValueError(
                f'get_optimizers_schedulers: {name}(mode="max") would follow {val_loss!r}, which is best where it is '
                f'least; name what it follows: (scheduler, "validation", "val_accuracy")'
            )
        scheduled.append(Scheduled(scheduler, when, metric))
    return scheduled


# Lengths ------------------------------------------------------------------------------


def length_of(scheduler: Any) -> int | None:
    """Return the number of moves in a schedule; None if it has no end or its length is unknown."""
    if isinstance(scheduler, lr_scheduler.CosineAnnealingLR):
        return scheduler.T_max
    if isinstance(scheduler, lr_scheduler.OneCycleLR):
        return scheduler.total_steps
    if isinstance(scheduler, lr_scheduler.PolynomialLR):
        return scheduler.total_iters
    if isinstance(scheduler, lr_scheduler.LinearLR):
        return scheduler.total_iters if scheduler.end_factor < scheduler.start_factor else None
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        last = length_of(scheduler._schedulers[-1])
        return None if last is None else scheduler._milestones[-1] + last
    return None


def wrong_length(scheduler: Any, planned: int | None) -> str:
    """Return a warning if a schedule moved past its end, or is longer than training; else "".

    Args:
        scheduler: any scheduler.
        planned: the planned number of moves, if training has reached its limits; else None.
    """
    length, moves = length_of(scheduler), getattr(scheduler, "last_epoch", 0)
    if length is None or not (moves > length or (planned is not None and max(planned, moves) < length - 1)):
        return ""
    what = "has been moved past its end" if moves > length else f"is at move {moves} where training ends"
    return (
        f"{type(scheduler).__name__} {what}: it was made for {length} moves. "
        "`self.trainer.totals.steps` says in get_optimizers_schedulers how many optimizer steps the run will have, "
        "with max_steps too; steps per epoch times epochs does not"
    )


# Resuming -----------------------------------------------------------------------------


class Moved(NamedTuple):
    """A schedule that continues differently from how it was saved."""

    said: str
    optimizer: Any
    settings: list[dict[str, Any]]
    """The values it sets in each of the optimizer's groups, if it was replayed."""

    def set(self) -> str:
        """Set the values in the optimizer, whose own state is loaded by then; return the warning."""
        for group, values in zip(self.optimizer.param_groups if self.settings else (), self.settings, strict=False):
            group.update(values)
        return self.said


def go_on(
    schedulers: Sequence[Scheduled], saved: Sequence[Mapping[str, Any]], as_built: bool, counters: Counters
) -> Iterator[Moved]:
    """Move schedulers to the place of saved ones; yield those that continue differently.

    A schedule that is built as before loads its state. One that is built differently, for a longer run say, moves to
    the place of the saved one if `as_built`; otherwise it becomes the saved one. If schedulers were added, removed or
    exchanged, all move to the place that the counters of the run give. Call this before the optimizer's state is
    loaded, and `set` afterwards.

    Raises:
        ValueError: the saved schedules are asked for, and other schedulers are built.
    """
    if [_kind(one.scheduler.state_dict()) for one in schedulers] != [_kind(kept) for kept in saved]:
        yield from _go_on_with_others(schedulers, saved, as_built, counters)
        return
    for (scheduler, *_), kept in zip(schedulers, saved, strict=True):
        settings: list[dict[str, Any]] = []
        built = scheduler.state_dict()
        different = built_otherwise(built, kept) if isinstance(scheduler, lr_scheduler.LRScheduler) else []
        if type(scheduler) is lr_scheduler.LambdaLR:  # its functions are not part of its state
            rates = [rate(kept["last_epoch"]) * base for rate, base in by_group(scheduler)]
            if not same(rates, kept["_last_lr"][: len(rates)]):
                different.append(f"rates {kept['_last_lr']} → {rates}")
        if not different or not as_built:
            scheduler.load_state_dict(kept)
            how = "as it was saved, since trainer.schedulers=as_saved"
        elif not _replays(scheduler):  # its place depends on its history
            scheduler.load_state_dict({name: (kept if name in PROGRESS else built)[name] for name in built})
            how = "as it is built now, from where it was"
        else:
            settings = replay(scheduler, kept["last_epoch"])
            how = f"as it is built now, at its move {kept['last_epoch']}; trainer.schedulers=as_saved for the other"
        if different:
            said = f"{type(scheduler).__name__} was another one when it was saved ({'; '.join(different)}): it goes on "
            yield Moved(said + how, scheduler.optimizer, settings)


def _go_on_with_others(
    schedulers: Sequence[Scheduled], saved: Sequence[Mapping[str, Any]], as_built: bool, counters: Counters
) -> Iterator[Moved]:
    names = ", ".join(type(one.scheduler).__name__ for one in schedulers) or "none"
    were = "; ".join(map(_construction, saved)) or "none"
    said = f"the checkpoint has other schedulers ({were}) than the run builds ({names})"
    if not as_built:
        raise ValueError(f"{said}, and trainer.schedulers=as_saved: build those of the checkpoint, or set as_built")
    said += ": those of the run go on from here as they are built" if schedulers else ": its learning rates stay"
    moves = {"step": counters.global_step - counters.skipped_steps, "epoch": counters.epochs}
    for scheduler, when, _ in schedulers:
        optimizer = getattr(scheduler, "optimizer", None)
        if _replays(scheduler):
            yield Moved(said, optimizer, replay(scheduler, moves.get(when, counters.evaluations)))
        else:
            yield Moved(said, optimizer, [{"lr": group["lr"]} for group in optimizer.param_groups] if optimizer else [])
    if not schedulers:
        yield Moved(said, None, [])


def _kind(state: Mapping[str, Any]) -> Any:
    """Return what the states of schedulers of one class have in common; None for objects of other libraries."""
    inner = [_kind(kept) for kept in state.get("_schedulers") or () if isinstance(kept, Mapping)]
    return ({*state} - PROGRESS, inner) if "last_epoch" in state else None


def _construction(state: Mapping[str, Any]) -> str:
    plain = (f"{name}={value}" for name, value in state.items() if isinstance(value, (int, float, str)))
    return ", ".join(said for said in plain if said.partition("=")[0] not in PROGRESS)


def _replays(scheduler: Any) -> bool:
    """Tell whether the place of a scheduler follows from its number of moves."""
    known = isinstance(scheduler, lr_scheduler.LRScheduler) and not is_plateau(scheduler)
    return known and scheduler.last_epoch == 0


def by_group(scheduler: Any) -> Iterator[tuple[Any, float]]:
    """Yield the function and the first rate of each group of a `LambdaLR`."""
    return zip(scheduler.lr_lambdas, scheduler.base_lrs, strict=False)


def built_otherwise(built: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Return the differences of two scheduler states except for their progress: `name was → is`."""
    different = []
    for name, mine in built.items():
        if name in PROGRESS or name not in saved:
            continue
        grows = name in ("base_lrs", "min_lrs", "lr_lambdas")  # groups may have joined later
        if not (grows and len(mine) != len(saved[name])) and not same(mine, saved[name]):
            different.append(f"{name} {saved[name]!r} → {mine!r}" if isinstance(mine, (int, float, str)) else name)
    for one, other in zip(built.get("_schedulers") or (), saved.get("_schedulers") or (), strict=False):
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            different += built_otherwise(one, other)
    return different


def same(one: Any, other: Any) -> bool:
    """Tell whether two values of a state are equal; for values that are not plain data only the type counts."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    plain = (int, float, str, type(None))
    return bool(one == other) if isinstance(one, plain) and isinstance(other, plain) else type(one) is type(other)


def replay(scheduler: Any, moves: int) -> list[dict[str, Any]]:
    """Move a newly built schedule to its place after `moves`; return the values it sets in each group."""
    groups = scheduler.optimizer.param_groups
    before = [{name: copy.copy(value) for name, value in group.items() if name != "params"} for group in groups]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the optimizer has not stepped
        while scheduler.last_epoch < moves:
            scheduler.step()
    return [
        {name: value for name, value in group.items() if name in ("lr", "initial_lr") or value != was.get(name)}
        for group, was in zip(
            [{n: v for n, v in group.items() if n != "params"} for group in groups], before, strict=True
        )
    ]
