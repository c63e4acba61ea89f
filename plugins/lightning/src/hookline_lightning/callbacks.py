"""Callbacks under the names of Lightning's: those that run, and those that stand for a plugin of hookline."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch

from hookline import seconds
from hookline_lightning.files.checkpoints import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from hookline_lightning.module import Callback
from hookline_lightning.translating.arguments import duration as written
from hookline_lightning.translating.standing import (
    BatchSizeFinder,
    DeviceStatsMonitor,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    ThroughputMonitor,
    TQDMProgressBar,
)

log = logging.getLogger("hookline.lightning")

__all__ = [
    "BasePredictionWriter", "BatchSizeFinder", "Callback", "Checkpoint", "DeviceStatsMonitor", "EMAWeightAveraging",
    "EarlyStopping", "GradientAccumulationScheduler", "LambdaCallback", "LearningRateFinder", "LearningRateMonitor",
    "ModelCheckpoint", "ModelSummary", "OnExceptionCheckpoint", "ProgressBar", "RichModelSummary", "RichProgressBar",
    "StochasticWeightAveraging", "TQDMProgressBar", "ThroughputMonitor", "Timer",
]  # fmt: skip


class EarlyStopping(Callback):
    """Ends training when a value has not improved.

    Args:
        monitor: the value.
        min_delta: by how much it must be better than the best to be an improvement.
        patience: how many times in a row it may not improve.
        verbose: log improvements and the end.
        mode: "min" or "max".
        strict: whether a value that is not there is an error.
        check_finite: end where it is NaN or infinite.
        stopping_threshold: end where it is this good.
        divergence_threshold: end where it is worse than this.
        check_on_train_epoch_end: look at the end of an epoch, and not of a validation; by default where each epoch
            has one validation.
        log_rank_zero_only: have rank 0 alone log.
    """

    def __init__(
        self, monitor: str, min_delta: float = 0.0, patience: int = 3, verbose: bool = False, mode: str = "min",
        strict: bool = True, check_finite: bool = True, stopping_threshold: float | None = None,
        divergence_threshold: float | None = None, check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ) -> None:  # fmt: skip
        if mode not in ("min", "max"):
            raise ValueError(f"EarlyStopping(mode={mode!r}) must be min or max")
        self.monitor, self.patience, self.verbose, self.mode, self.strict = monitor, patience, verbose, mode, strict
        self.min_delta, self.check_finite = abs(min_delta), check_finite
        self.stopping_threshold, self.divergence_threshold = stopping_threshold, divergence_threshold
        self.check_on_train_epoch_end, self.log_rank_zero_only = check_on_train_epoch_end, log_rank_zero_only
        self.wait_count = self.stopped_epoch = 0
        self.stopping_reason_message: str | None = None
        self.best_score = torch.tensor(float("inf") if mode == "min" else float("-inf"))

    @property
    def state_key(self) -> str:
        """Under which its state is kept."""
        return f"EarlyStopping{{'monitor': {self.monitor!r}, 'mode': {self.mode!r}}}"

    def state_dict(self) -> dict[str, Any]:
        """Return what it has seen."""
        names = ("wait_count", "stopped_epoch", "best_score", "patience", "stopping_reason_message")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        vars(self).update(state)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Choose when to look."""
        if self.check_on_train_epoch_end is None:
            self.check_on_train_epoch_end = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Look."""
        if self.check_on_train_epoch_end:
            self._look(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Look."""
        if not self.check_on_train_epoch_end and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._look(trainer)

    def _look(self, run: Any) -> None:
        values = run.callback_metrics
        if run.fast_dev_run or self.monitor not in values:
            if self.strict and not run.fast_dev_run:
                there = ", ".join(values) or "nothing"
                raise RuntimeError(
                    f"EarlyStopping(monitor={self.monitor!r}): nobody has logged it; there is {there}. Log it by "
                    "self.log, or say strict=False"
                )
            return
        why = self._judge(values[self.monitor].squeeze())
        if run.strategy.reduce_boolean_decision(why is not None, all=False):
            self.stopped_epoch, self.stopping_reason_message = run.current_epoch, why
            run.should_stop = True
            if self.verbose and (run.is_global_zero or not self.log_rank_zero_only):
                log.info("early stopping: %s", why or "another rank stops")

    def _judge(self, value: torch.Tensor) -> str | None:
        """Return why training ends, or None."""
        sign = 1 if self.mode == "min" else -1
        if self.check_finite and not torch.isfinite(value):
            return f"{self.monitor} = {value} is not finite"
        if self.stopping_threshold is not None and sign * value < sign * self.stopping_threshold:
            return f"{self.monitor} = {value} is as good as {self.stopping_threshold}"
        if self.divergence_threshold is not None and sign * value > sign * self.divergence_threshold:
            return f"{self.monitor} = {value} is worse than {self.divergence_threshold}"
        if sign * value + self.min_delta < sign * self.best_score.to(value.device):
            self.best_score, self.wait_count = value, 0
            if self.verbose:
                log.info("%s improved to %.3f", self.monitor, value)
            return None
        self.wait_count += 1
        if self.wait_count < self.patience:
            return None
        return f"{self.monitor} did not improve {self.wait_count} times; its best is {self.best_score:.3f}"


class Timer(Callback):
    """Measures the time of training, and ends it after some.

    Args:
        duration: days, hours, minutes and seconds ("00:12:00:00"), a dict or a timedelta; None to measure alone.
        interval: look after each "step" or "epoch".
        verbose: log the end.
    """

    def __init__(self, duration: Any = None, interval: str = "step", verbose: bool = True) -> None:
        if interval not in ("step", "epoch"):
            raise ValueError(f"Timer(interval={interval!r}) must be step or epoch")
        self.limit = None if duration is None else seconds(written(duration, "Timer.duration"))
        self.interval, self.verbose = interval, verbose
        self._began: dict[str, float] = {}
        self._ended: dict[str, float] = {}
        self._offset = 0.0

    def start_time(self, stage: str = "train") -> float | None:
        """Return when a stage began, in seconds of a clock."""
        return self._began.get(stage)

    def end_time(self, stage: str = "train") -> float | None:
        """Return when a stage ended."""
        return self._ended.get(stage)

    def time_elapsed(self, stage: str = "train") -> float:
        """Return the seconds that a stage has taken."""
        offset = self._offset if stage == "train" else 0.0
        began = self._began.get(stage)
        return offset if began is None else self._ended.get(stage, time.monotonic()) - began + offset

    def time_remaining(self, stage: str = "train") -> float | None:
        """Return the seconds that are left of `duration`."""
        return None if self.limit is None else self.limit - self.time_elapsed(stage)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Look, as the time of an earlier session may be over."""
        self._look(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin."""
        self._began["train"] = time.monotonic()
        self._ended.pop("train", None)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End."""
        self._ended["train"] = time.monotonic()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin."""
        self._began["validate"] = time.monotonic()
        self._ended.pop("validate", None)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """End."""
        self._ended["validate"] = time.monotonic()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin."""
        self._began["test"] = time.monotonic()
        self._ended.pop("test", None)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """End."""
        self._ended["test"] = time.monotonic()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look."""
        if self.interval == "step":
            self._look(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Look."""
        if self.interval == "epoch":
            self._look(trainer)

    def _look(self, run: Any) -> None:
        if self.limit is not None and run.strategy.broadcast(self.time_elapsed() >= self.limit):
            run.should_stop = True
            if self.verbose:
                log.info("Timer: %s have passed", timedelta(seconds=int(self.time_elapsed())))

    def state_dict(self) -> dict[str, Any]:
        """Return the time that training has taken."""
        return {"time_elapsed": {"train": self.time_elapsed()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._offset = state["time_elapsed"]["train"]


class LambdaCallback(Callback):
    """Calls functions at events: `LambdaCallback(on_train_start=lambda trainer, module: …)`; each name is an event."""

    def __init__(self, **functions: Callable[..., Any] | None) -> None:
        for name, function in functions.items():
            if name not in ("setup", "teardown") and not name.startswith("on_"):
                raise TypeError(f"LambdaCallback({name}=…): {name!r} is no event")
            if function is not None:
                setattr(self, name, function)


class BasePredictionWriter(Callback):
    """Writes predictions: override `write_on_batch_end` or `write_on_epoch_end`.

    Args:
        write_interval: which of them is called: "batch", "epoch" or "batch_and_epoch".
    """

    def __init__(self, write_interval: str = "batch") -> None:
        if write_interval not in ("batch", "epoch", "batch_and_epoch"):
            raise ValueError(f"write_interval={write_interval!r} must be batch, epoch or batch_and_epoch")
        self.interval = write_interval

    def write_on_batch_end(
        self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Sequence[int] | None, batch: Any,
        batch_idx: int, dataloader_idx: int,
    ) -> None:  # fmt: skip
        """Write what is predicted of a batch."""
        raise NotImplementedError(f"{type(self).__name__} has no write_on_batch_end")

    def write_on_epoch_end(
        self, trainer: Any, pl_module: Any, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write what is predicted of all batches."""
        raise NotImplementedError(f"{type(self).__name__} has no write_on_epoch_end")

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write, if it is for batches."""
        if self.interval != "epoch":
            indices = trainer.predict_loop.current_batch_indices
            self.write_on_batch_end(trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write, if it is for epochs."""
        if self.interval != "batch":
            loop = trainer.predict_loop
            self.write_on_epoch_end(trainer, pl_module, loop.predictions, loop.epoch_batch_indices)
