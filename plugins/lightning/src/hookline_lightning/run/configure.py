"""What `configure_optimizers` may answer, and when schedulers then move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from hookline import nearest


@dataclass
class SchedulerConfig:
    """A scheduler and when it moves."""

    scheduler: Any
    interval: str = "epoch"
    """After each "epoch" or each "step"."""
    frequency: int = 1
    """After each so many of them; with "step" it counts batches of the epoch, as in Lightning."""
    monitor: str | None = None
    """The value that a scheduler is given which looks at one."""
    strict: bool = True
    """Whether a value that is not there is an error."""
    name: str | None = None
    """Has no meaning here; the plugin monitor logs learning rates."""
    reduce_on_plateau: bool = False
    """Whether the scheduler is given the value of `monitor`."""

    def __post_init__(self) -> None:
        if self.interval not in ("epoch", "step"):
            raise ValueError(f"lr_scheduler interval={self.interval!r} must be epoch or step")
        if self.frequency < 1:
            raise ValueError(f"lr_scheduler frequency={self.frequency} must be at least 1")
        if not callable(getattr(self.scheduler, "step", None)):
            raise ValueError(f"lr_scheduler scheduler={self.scheduler!r} is a {type(self.scheduler).__name__}, no one")
        self.reduce_on_plateau = self.reduce_on_plateau or isinstance(self.scheduler, ReduceLROnPlateau)
        if self.reduce_on_plateau and self.monitor is None:
            raise ValueError(
                f"lr_scheduler {type(self.scheduler).__name__} looks at a value: say which, "
                '{"optimizer": …, "lr_scheduler": {"scheduler": …, "monitor": "val_loss"}}'
            )


SCHEDULER_KEYS = [field.name for field in fields(SchedulerConfig)]
FORMS = (
    "an optimizer, a list of them, a pair of lists (optimizers, schedulers), "
    '{"optimizer": …, "lr_scheduler": …}, or several of these'
)


def read_optimizers(given: Any) -> tuple[list[torch.optim.Optimizer], list[SchedulerConfig]]:
    """Return the optimizers and schedulers that `configure_optimizers` answered, in any of its forms.

    Raises:
        TypeError: something else.
        ValueError: a key or a value that cannot be.
    """
    if given is None:
        return [], []
    if isinstance(given, Mapping):
        return _one(given)
    if isinstance(given, (list, tuple)):
        if len(given) == 2 and all(isinstance(part, (list, tuple)) for part in given):
            optimizers, schedulers = given
            return [_checked(one) for one in optimizers], [_scheduler(one, None) for one in schedulers]
        if given and all(isinstance(one, Mapping) for one in given):
            pairs = [_one(one) for one in given]
            return [one for pair in pairs for one in pair[0]], [one for pair in pairs for one in pair[1]]
        return [_checked(one) for one in given], []
    return [_checked(given)], []


def _one(given: Mapping[str, Any]) -> tuple[list[torch.optim.Optimizer], list[SchedulerConfig]]:
    _refuse_unknown("configure_optimizers answered a mapping with", given, ["optimizer", "lr_scheduler", "monitor"])
    if "optimizer" not in given:
        raise ValueError(f"configure_optimizers answered a mapping without optimizer; it has {', '.join(given)}")
    schedulers = []
    if given.get("lr_scheduler") is not None:
        schedulers = [_scheduler(given["lr_scheduler"], given.get("monitor"))]
    return [_checked(given["optimizer"])], schedulers


def _scheduler(given: Any, monitor: str | None) -> SchedulerConfig:
    if not isinstance(given, Mapping):
        return SchedulerConfig(given, monitor=monitor)
    _refuse_unknown("lr_scheduler has", given, SCHEDULER_KEYS)
    if "scheduler" not in given:
        raise ValueError(f"lr_scheduler is a mapping without scheduler; it has {', '.join(given)}")
    return SchedulerConfig(**{"monitor": monitor, **given})


def _refuse_unknown(where: str, given: Mapping[str, Any], known: list[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{where} {name!r}{nearest(name, known)}; it may have {', '.join(known)}")


def _checked(optimizer: Any) -> torch.optim.Optimizer:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"configure_optimizers must answer {FORMS}; in its answer is a {type(optimizer).__name__}")
    return optimizer
