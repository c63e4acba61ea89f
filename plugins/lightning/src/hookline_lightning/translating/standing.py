"""Callbacks under the names of Lightning's that stand for plugins of hookline; `translation` says for which."""

from __future__ import annotations

from typing import Any

from hookline_lightning.module import Callback


class LearningRateMonitor(Callback):
    """Stands for the plugin monitor with `learning_rate`."""

    def __init__(
        self, logging_interval: str | None = None, log_momentum: bool = False, log_weight_decay: bool = False
    ) -> None:
        self.logging_interval, self.log_momentum = logging_interval, log_momentum
        self.log_weight_decay = log_weight_decay


class DeviceStatsMonitor(Callback):
    """Stands for the plugin monitor with `gpu_utilization`, and `cpu_utilization` where asked or without a GPU."""

    def __init__(self, cpu_stats: bool | None = None) -> None:
        self._cpu_stats = cpu_stats


class ThroughputMonitor(Callback):
    """Stands for the plugin monitor with `throughput`, which counts samples itself."""

    def __init__(self, batch_size_fn: Any = None, length_fn: Any = None, **options: Any) -> None:
        self.batch_size_fn, self.length_fn, self.kwargs = batch_size_fn, length_fn, options


class ProgressBar(Callback):
    """Stands for the plugin progress."""


class TQDMProgressBar(ProgressBar):
    """Stands for the plugin progress; 0 as `refresh_rate` turns it off."""

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        self.refresh_rate, self.process_position, self.leave = refresh_rate, process_position, leave


class RichProgressBar(ProgressBar):
    """Stands for the plugin progress; 0 as `refresh_rate` turns it off."""

    def __init__(
        self, refresh_rate: int = 1, leave: bool = False, theme: Any = None, console_kwargs: Any = None
    ) -> None:
        self.refresh_rate, self.leave, self.theme, self.console_kwargs = refresh_rate, leave, theme, console_kwargs


class ModelSummary(Callback):
    """Stands for the plugin summary."""

    def __init__(self, max_depth: int = 1, **options: Any) -> None:
        self._max_depth, self.options = max_depth, options


class RichModelSummary(ModelSummary):
    """Stands for the plugin summary."""


class GradientAccumulationScheduler(Callback):
    """Stands for the plugin accumulate, whose window is the same all along."""

    def __init__(self, scheduling: dict[int, int]) -> None:
        self.scheduling = scheduling


class StochasticWeightAveraging(Callback):
    """Stands for the plugin swa."""

    def __init__(
        self, swa_lrs: float | list[float], swa_epoch_start: int | float = 0.8, annealing_epochs: int = 10,
        annealing_strategy: str = "cos", avg_fn: Any = None, device: Any = None,
    ) -> None:  # fmt: skip
        self._swa_lrs, self._swa_epoch_start, self._annealing_epochs = swa_lrs, swa_epoch_start, annealing_epochs
        self._annealing_strategy, self._avg_fn = annealing_strategy, avg_fn


class EMAWeightAveraging(Callback):
    """Stands for the plugin ema."""

    def __init__(
        self, device: Any = None, use_buffers: bool = True, decay: float = 0.999, update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None, update_starting_at_epoch: int | None = None,
    ) -> None:  # fmt: skip
        self.decay, self.use_buffers, self.update_every_n_steps = decay, use_buffers, update_every_n_steps
        self.update_starting_at_step, self.update_starting_at_epoch = update_starting_at_step, update_starting_at_epoch


class LearningRateFinder(Callback):
    """Is refused: the command `hookline lr-find` does it before a run."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass


class BatchSizeFinder(Callback):
    """Is refused: the command `hookline batch-find` does it before a run."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass
