"""Schedules of the learning rate or the momentum: a value by iteration, by epoch or by accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Scheduler:
    """A value between `lr_min` and `lr_max`.

    Args:
        lr_min: the lowest value.
        lr_max: the highest value, and the first where nothing else is said.
        stepsize: iterations of one phase.
    """

    by = "iter"
    """What `get_lr` is given: "iter", "epoch" or "acc"."""

    lr_min: float
    lr_max: float
    stepsize: int

    def __init__(self, lr_min: float = 1e-5, lr_max: float = 1e-1, stepsize: int = 1000) -> None:
        if not 0 < lr_min <= lr_max:
            raise ValueError(
                f"{type(self).__name__}: lr_min={lr_min} and lr_max={lr_max} must be above 0, and in order"
            )
        if stepsize < 1:
            raise ValueError(f"{type(self).__name__}: stepsize={stepsize} must be at least 1")
        self.lr_min, self.lr_max, self.stepsize = lr_min, lr_max, stepsize

    def get_lr(self, at: float) -> float:
        """Return the value at an iteration or an epoch, from 0, or at an accuracy, from 0 to 1."""
        raise NotImplementedError

    def get_state(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {}

    def update_state(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        vars(self).update(state)

    def _wave(self, at: float) -> float:
        """Return from 0 to 1 and back in two phases."""
        return 1 - abs(at / self.stepsize % 2 - 1)

    def _between(self, part: float) -> float:
        return self.lr_min + (self.lr_max - self.lr_min) * part


class StepScheduler(Scheduler):
    """`lr_max`, multiplied by `lr_decay` after each phase, down to `lr_min`."""

    def __init__(self, lr_decay: float = 0.1, **limits: Any) -> None:
        super().__init__(**limits)
        self.lr_decay = lr_decay

    def get_lr(self, at: float) -> float:
        """Return the value at an iteration."""
        return max(self.lr_max * self.lr_decay ** int(at // self.stepsize), self.lr_min)


class LinearDecayScheduler(Scheduler):
    """From `lr_max` to `lr_min` along a line, in one phase."""

    def get_lr(self, at: float) -> float:
        """Return the value at an iteration."""
        return self._between(max(1 - at / self.stepsize, 0))


class LogDecayScheduler(Scheduler):
    """From `lr_max` to `lr_min` by equal factors, in one phase."""

    def get_lr(self, at: float) -> float:
        """Return the value at an iteration."""
        return self.lr_max * math.pow(self.lr_min / self.lr_max, min(at / self.stepsize, 1))


class ExponentialDecayScheduler(Scheduler):
    """`lr_max * exp(-k * iteration)`, down to `lr_min`."""

    def __init__(self, k: float = 1e-3, **limits: Any) -> None:
        super().__init__(**limits)
        self.k = k

    def get_lr(self, at: float) -> float:
        """Return the value at an iteration."""
        return max(self.lr_max * math.exp(-self.k * at), self.lr_min)


class WarmRestartScheduler(Scheduler):
    """From `lr_max` to `lr_min` along a cosine in each phase, and up again at once."""

    def get_lr(self, at: float) -> float:
        """Return the value at an iteration."""
        return self._between((1 + math.cos(math.pi * (at % self.stepsize) / self.stepsize)) / 2)


class TriangularScheduler(Scheduler):
    """From `lr_min` to `lr_max` along a line in one phase, and back in the next."""

    def get_lr(self, at: float) -> float:
        """Return the value at an iteration."""
        return self._between(self._wave(at))


class InvTriangularScheduler(Scheduler):
    """From `lr_max` to `lr_min` and back; for the momentum beside a triangular learning rate."""

    def get_lr(self, at: float) -> float:
        """Return the value at an iteration."""
        return self._between(1 - self._wave(at))


class Triangular2Scheduler(Scheduler):
    """A triangle whose height is halved after each two phases."""

    def get_lr(self, at: float) -> float:
        """Return the value at an iteration."""
        return self._between(self._wave(at) * 0.5 ** int(at // (2 * self.stepsize)))


class TriangularExpScheduler(Scheduler):
    """A triangle whose height falls by `k` at each iteration."""

    def __init__(self, k: float = 0.9999, **limits: Any) -> None:
        super().__init__(**limits)
        self.k = k

    def get_lr(self, at: float) -> float:
        """Return the value at an iteration."""
        return self._between(self._wave(at) * self.k**at)


class EpochSetScheduler(Scheduler):
    """The value that was set for the last of certain epochs; `lr_max` before the first.

    Args:
        schedule: values by epoch, from 0.
        limits: as of every schedule.
    """

    by = "epoch"

    def __init__(self, schedule: Mapping[int, float], **limits: Any) -> None:
        super().__init__(**limits)
        self.schedule = dict(schedule)

    def get_lr(self, at: float) -> float:
        """Return the value at an epoch."""
        reached = [epoch for epoch in self.schedule if epoch <= at]
        return self.schedule[max(reached)] if reached else self.lr_max


class DecayWhenEpochScheduler(Scheduler):
    """`lr_max`, and from an epoch on multiplied by `lr_decay` in each, down to `lr_min`."""

    by = "epoch"

    def __init__(self, epoch: int, lr_decay: float = 0.1, **limits: Any) -> None:
        super().__init__(**limits)
        self.epoch, self.lr_decay = epoch, lr_decay

    def get_lr(self, at: float) -> float:
        """Return the value at an epoch."""
        return max(self.lr_max * self.lr_decay ** max(int(at) - self.epoch + 1, 0), self.lr_min)


class DecayToEpochScheduler(Scheduler):
    """From `lr_max` to `lr_min` along a line, reached at an epoch."""

    by = "epoch"

    def __init__(self, epoch: int, **limits: Any) -> None:
        super().__init__(**limits)
        if epoch < 1:
            raise ValueError(f"DecayToEpochScheduler: epoch={epoch} must be at least 1")
        self.epoch = epoch

    def get_lr(self, at: float) -> float:
        """Return the value at an epoch."""
        return self._between(max(1 - at / self.epoch, 0))


class DecayWhenAccScheduler(Scheduler):
    """`lr_max`, multiplied by `lr_decay` once for each accuracy that has been reached, down to `lr_min`.

    Args:
        accuracies: from 0 to 1; what was reached once counts for good.
        lr_decay: the factor.
        limits: as of every schedule.
    """

    by = "acc"

    def __init__(self, accuracies: list[float], lr_decay: float = 0.1, **limits: Any) -> None:
        super().__init__(**limits)
        self.accuracies, self.lr_decay = list(accuracies), lr_decay
        self.reached = 0

    def get_lr(self, at: float) -> float:
        """Return the value at an accuracy."""
        self.reached = max(self.reached, sum(accuracy <= at for accuracy in self.accuracies))
        return max(self.lr_max * self.lr_decay**self.reached, self.lr_min)

    def get_state(self) -> dict[str, Any]:
        """Return how many accuracies have been reached."""
        return {"reached": self.reached}


class TriangularDecayWhenAccScheduler(TriangularScheduler):
    """A triangle whose height is multiplied by `lr_decay` for each accuracy that has been reached."""

    def __init__(self, accuracies: list[float], lr_decay: float = 0.5, **limits: Any) -> None:
        super().__init__(**limits)
        self.accuracies, self.lr_decay = list(accuracies), lr_decay
        self.reached = 0

    def see_acc(self, accuracy: float) -> None:
        """Hear of the accuracy of a validation."""
        self.reached = max(self.reached, sum(one <= accuracy for one in self.accuracies))

    def get_lr(self, at: float) -> float:
        """Return the value at an iteration."""
        return self._between(self._wave(at) * self.lr_decay**self.reached)

    def get_state(self) -> dict[str, Any]:
        """Return how many accuracies have been reached."""
        return {"reached": self.reached}
