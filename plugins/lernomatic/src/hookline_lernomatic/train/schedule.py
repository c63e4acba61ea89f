"""Schedules of the learning rate or the momentum: a value by iteration, by epoch or by accuracy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch


class LRScheduler:
    """A value by the iteration; a subclass of your own gives `get_lr`.

    Args:
        lr_min: the lowest value.
        lr_max: the highest value.
        stepsize: iterations of one phase, of the schedules that have phases.
        start_iter: the iteration from which a triangle begins.
        lr_history_size: how many values to keep in `lr_history`.
        no_lr_history: keep none.

    Raises:
        ValueError: a value that cannot be.
    """

    def __init__(
        self,
        *,
        lr_min: float = 1e-4,
        lr_max: float = 1.0,
        stepsize: int = 1000,
        start_iter: int = 0,
        lr_history_size: int = 0,
        no_lr_history: bool = False,
    ) -> None:
        if not 0 <= lr_min <= lr_max:
            raise ValueError(f"{self!r}: lr_min={lr_min} and lr_max={lr_max} must be at least 0, and in order")
        if start_iter and type(self).__module__ == __name__ and not isinstance(self, TriangularScheduler):
            raise ValueError(f"{self!r}: start_iter={start_iter} has no effect; only a triangle begins late")
        self.lr_min, self.lr_max = lr_min, lr_max
        self.stepsize, self.start_iter = self._positive("stepsize", stepsize), start_iter
        self.lr_history = torch.zeros(lr_history_size) if lr_history_size and not no_lr_history else None
        """The values so far: the first `lr_history_size` that were asked for."""
        self.lr_history_ptr = 0

    def __repr__(self) -> str:
        return type(self).__name__

    def get_lr(self, cur_iter: int) -> float:
        """Return the value at an iteration, from 0."""
        raise NotImplementedError(f"{self!r}.get_lr(cur_iter) is to return a value")

    def rate_for(self, trainer: Any) -> float:
        """Return the value at the place of a trainer."""
        return self.get_lr(trainer.loss_iter)

    def get_state(self) -> dict[str, Any]:
        """Return what a resumed run needs; a schedule of your own that changes as it goes adds to it."""
        return {"lr_history": self.lr_history, "lr_history_ptr": self.lr_history_ptr}

    def update_state(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        vars(self).update(state)

    def plot_history(self, ax: Any, title: str | None = None) -> None:
        """Draw the values so far on axes of matplotlib.

        Raises:
            ValueError: there are none.
        """
        if self.lr_history is None or not self.lr_history_ptr:
            raise ValueError(f"{self!r} has kept no values: give lr_history_size=")
        ax.plot(range(self.lr_history_ptr), self.lr_history[: self.lr_history_ptr])
        ax.set_xlabel("Iteration")
        ax.set_ylabel("Learning rate")
        ax.set_title(title or f"[{self!r}] learning rate history")

    def _update_lr_history(self, lr: float) -> float:
        """Keep a value where there is room for it; return it."""
        if self.lr_history is not None and self.lr_history_ptr < len(self.lr_history):
            self.lr_history[self.lr_history_ptr] = lr
            self.lr_history_ptr += 1
        return lr

    def _positive(self, name: str, number: int) -> int:
        if number < 1:
            raise ValueError(f"{self!r}: {name}={number} must be at least 1")
        return number

    def _between(self, part: float) -> float:
        return self.lr_min + (self.lr_max - self.lr_min) * part


class StepScheduler(LRScheduler):
    """`lr_max`, multiplied by `lr_decay` after each `lr_decay_every` iterations, down to `lr_min`."""

    def __init__(self, lr_decay: float = 0.001, lr_decay_every: int = 10000, **limits: Any) -> None:
        super().__init__(**limits)
        self.lr_decay, self.lr_decay_every = lr_decay, self._positive("lr_decay_every", lr_decay_every)

    def get_lr(self, cur_iter: int) -> float:
        """Return the value at an iteration."""
        fallen = self.lr_max * self.lr_decay ** (cur_iter // self.lr_decay_every)
        return self._update_lr_history(max(fallen, self.lr_min))


class LinearDecayScheduler(LRScheduler):
    """From `lr_max` to `lr_min` along a line, in `num_iters` iterations."""

    def __init__(self, num_iters: int = 100000, **limits: Any) -> None:
        super().__init__(**limits)
        self.num_iters = self._positive("num_iters", num_iters)

    def get_lr(self, cur_iter: int) -> float:
        """Return the value at an iteration."""
        return self._update_lr_history(self._between(max(1 - cur_iter / self.num_iters, 0)))


class LogDecayScheduler(LRScheduler):
    """From `lr_max` to `lr_min` by equal factors, in `num_iter` iterations."""

    def __init__(self, num_iter: int = 50000, **limits: Any) -> None:
        super().__init__(**limits)
        self.num_iter = self._positive("num_iter", num_iter)
        if not self.lr_min:
            raise ValueError(f"{self!r}: lr_min=0 cannot be reached by equal factors")

    def get_lr(self, cur_iter: int) -> float:
        """Return the value at an iteration."""
        part = min(cur_iter / self.num_iter, 1)
        return self._update_lr_history(self.lr_max * math.pow(self.lr_min / self.lr_max, part))


class ExponentialDecayScheduler(LRScheduler):
    """`lr_max * exp(-k * iteration)`."""

    def __init__(self, k: float = 0.001, **limits: Any) -> None:
        super().__init__(**limits)
        self.k = k

    def get_lr(self, cur_iter: int) -> float:
        """Return the value at an iteration."""
        return self._update_lr_history(self.lr_max * math.exp(-self.k * cur_iter))


class WarmRestartScheduler(LRScheduler):
    """From `lr_max` to `lr_min` along a cosine in `2 * stepsize * step_per_epoch` iterations, and up again at once.

    Args:
        step_per_epoch: iterations of an epoch; `stepsize` then counts epochs.
        limits: as of every schedule.
    """

    def __init__(self, step_per_epoch: int = 1000, **limits: Any) -> None:
        super().__init__(**limits)
        self.step_per_epoch = self._positive("step_per_epoch", step_per_epoch)

    def get_lr(self, cur_iter: int) -> float:
        """Return the value at an iteration."""
        period = 2 * self.stepsize * self.step_per_epoch
        return self._update_lr_history(self._between((1 + math.cos(math.pi * (cur_iter % period) / period)) / 2))


class TriangularScheduler(LRScheduler):
    """From `lr_min` to `lr_max` along a line in `stepsize` iterations, and back in the next."""

    def get_lr(self, cur_iter: int) -> float:
        """Return the value at an iteration."""
        return self._update_lr_history(self._between(self._height(max(cur_iter - self.start_iter, 0))))

    def _height(self, place: int) -> float:
        """Return from 0 to 1 and back in two phases."""
        return 1 - abs(place / self.stepsize % 2 - 1)


class InvTriangularScheduler(TriangularScheduler):
    """From `lr_max` to `lr_min` and back; for the momentum beside a triangular learning rate."""

    def _height(self, place: int) -> float:
        return 1 - super()._height(place)


class Triangular2Scheduler(TriangularScheduler):
    """A triangle whose height is halved after each two phases."""

    def _height(self, place: int) -> float:
        return super()._height(place) * 0.5 ** (place // (2 * self.stepsize))


class TriangularExpScheduler(TriangularScheduler):
    """A triangle that falls as a whole, by `exp(-k * iteration)`."""

    def __init__(self, k: float = 0.1, **limits: Any) -> None:
        super().__init__(**limits)
        self.k = k

    def get_lr(self, cur_iter: int) -> float:
        """Return the value at an iteration."""
        place = max(cur_iter - self.start_iter, 0)
        fallen = math.exp(-self.k * cur_iter) if place else 1
        return self._update_lr_history(self._between(self._height(place)) * fallen)


class Triangular2ExpScheduler(TriangularExpScheduler, Triangular2Scheduler):
    """A triangle whose height is halved after each two phases, and that falls by `exp(-k * iteration)`."""


class EpochSetScheduler(LRScheduler):
    """A value that changes at certain epochs.

    Args:
        schedule: numbers by epoch; that of epoch 0 is the first value.
        lr_value: whether the other numbers are values (True), or multiply the value that there is (False).
        limits: as of every schedule.

    Raises:
        ValueError: no dictionary of whole numbers with 0 among them.
    """

    def __init__(self, schedule: Mapping[int, float], lr_value: bool | None = None, **limits: Any) -> None:
        super().__init__(**limits)
        if not isinstance(schedule, dict):
            raise ValueError(f"{self!r}: schedule={schedule!r} must be a dict of epochs and numbers")
        if wrong := [epoch for epoch in schedule if type(epoch) is not int]:
            raise ValueError(f"{self!r}: {wrong[0]!r} in schedule must be a whole number, an epoch")
        if 0 not in schedule:
            raise ValueError(f"{self!r}: schedule must say the value of epoch 0")
        if lr_value is None and len(schedule) > 1:
            warnings.warn(
                f"{self!r} multiplies by the numbers of its schedule, as its documentation says; LERNOMATIC took them "
                "for values whatever was asked. Say lr_value=True for values, or lr_value=False",
                stacklevel=2,
            )
        self.schedule, self.lr_value = dict(schedule), bool(lr_value)

    def get_lr(self, cur_epoch: int) -> float:
        """Return the value at an epoch, from 0."""
        reached = [self.schedule[epoch] for epoch in sorted(self.schedule) if epoch <= cur_epoch]
        return self._update_lr_history(reached[-1] if self.lr_value else math.prod(reached))

    def rate_for(self, trainer: Any) -> float:
        """Return the value at the epoch of a trainer."""
        return self.get_lr(trainer.cur_epoch)


class DecayWhenEpoch(LRScheduler):
    """`lr_max`, multiplied by `lr_decay` after each `num_epochs` epochs, down to `lr_min`."""

    def __init__(self, num_epochs: int = 8, lr_decay: float = 0.9, **limits: Any) -> None:
        super().__init__(**limits)
        self.num_epochs, self.lr_decay = self._positive("num_epochs", num_epochs), lr_decay

    def get_lr(self, cur_epoch: int) -> float:
        """Return the value at an epoch, from 0."""
        fallen = self.lr_max * self.lr_decay ** (cur_epoch // self.num_epochs)
        return self._update_lr_history(max(fallen, self.lr_min))

    def rate_for(self, trainer: Any) -> float:
        """Return the value at the epoch of a trainer."""
        return self.get_lr(trainer.cur_epoch)


class DecayToEpoch(LRScheduler):
    """`initial_lr` for some epochs, then along a line to `final_lr`.

    Args:
        non_decay_time: epochs with `initial_lr`.
        decay_length: epochs from there to `final_lr`.
        initial_lr: the first value.
        final_lr: the last.
        limits: as of every schedule.
    """

    def __init__(
        self, non_decay_time: int, decay_length: int, initial_lr: float, final_lr: float = 0.0, **limits: Any
    ) -> None:
        super().__init__(**limits)
        self.non_decay_time, self.decay_length = non_decay_time, self._positive("decay_length", decay_length)
        self.initial_lr, self.final_lr = initial_lr, final_lr

    def get_lr(self, cur_epoch: int) -> float:
        """Return the value at an epoch, from 0."""
        part = min(max(cur_epoch - self.non_decay_time, 0) / self.decay_length, 1)
        return self._update_lr_history(self.initial_lr + (self.final_lr - self.initial_lr) * part)

    def rate_for(self, trainer: Any) -> float:
        """Return the value at the epoch of a trainer."""
        return self.get_lr(trainer.cur_epoch)


class DecayWhenAcc(LRScheduler):
    """`initial_lr`, multiplied by `lr_decay` for each validation whose accuracy has fallen far below the best.

    Args:
        initial_lr: the first value.
        acc_thresh: which part of the best accuracy it must fall.
        lr_decay: the factor.
        limits: as of every schedule.
    """

    def __init__(
        self, initial_lr: float = 0.01, acc_thresh: float = 0.05, lr_decay: float = 0.9, **limits: Any
    ) -> None:
        super().__init__(**limits)
        self.initial_lr, self.acc_thresh, self.lr_decay = initial_lr, acc_thresh, lr_decay
        self.best_acc, self.learning_rate, self.seen = 0.0, initial_lr, 0

    def get_lr(self, cur_acc: float) -> float:
        """Return the value after one more accuracy."""
        self.best_acc = max(self.best_acc, cur_acc)
        if cur_acc < self.best_acc * (1 - self.acc_thresh):
            self.learning_rate *= self.lr_decay
        return self._update_lr_history(self.learning_rate)

    def rate_for(self, trainer: Any) -> float:
        """Return the value after the accuracies of a trainer, each of which counts once."""
        if trainer.acc_iter == self.seen:
            return self._update_lr_history(self.learning_rate)
        self.seen = trainer.acc_iter
        return self.get_lr(trainer.get_cur_acc())

    def get_state(self) -> dict[str, Any]:
        """Return the accuracies that were seen, and what has come of them."""
        own = {name: getattr(self, name) for name in ("best_acc", "learning_rate", "seen")}
        return super().get_state() | own


class TriangularDecayWhenAcc(TriangularScheduler):
    """A triangle that is lower by `lr_decay` while the accuracy is far below the best.

    Args:
        lr_decay: the factor.
        acc_thresh: which part of the best accuracy it must have fallen.
        limits: as of every schedule.
    """

    def __init__(self, lr_decay: float = 0.9, acc_thresh: float = 0.05, **limits: Any) -> None:
        super().__init__(**limits)
        self.lr_decay, self.acc_thresh, self.best_acc = lr_decay, acc_thresh, 0.0

    def get_lr(self, cur_iter: int, cur_acc: float) -> float:  # type: ignore[override]
        """Return the value at an iteration, with the newest accuracy."""
        self.best_acc = max(self.best_acc, cur_acc)
        place = max(cur_iter - self.start_iter, 0)
        rate = self._between(self._height(place))
        if place and cur_acc < self.best_acc * (1 - self.acc_thresh):
            rate *= self.lr_decay
        return self._update_lr_history(rate)

    def rate_for(self, trainer: Any) -> float:
        """Return the value at the iteration of a trainer, with its newest accuracy."""
        return self.get_lr(trainer.loss_iter, trainer.get_cur_acc() or 0.0)

    def get_state(self) -> dict[str, Any]:
        """Return the best accuracy."""
        return super().get_state() | {"best_acc": self.best_acc}
