"""Metrics of torchmetrics, named in the configuration or by the module: one value an epoch, exact over all batches.

`values` and `figures` know metrics, `listeners` import them and hear the steps of a stage, and the plugin is here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hookline import CallbackInterface, Stage, hookimpl
from hookline_metrics.listeners import StageMetrics, TestMetrics, TrainMetrics, ValMetrics
from hookline_metrics.values import build_metric, parts, sync, with_class

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

LISTENERS: dict[Stage, type[StageMetrics]] = {
    Stage.TRAIN: TrainMetrics,
    Stage.VAL: ValMetrics,
    Stage.TEST: TestMetrics,
}


@dataclass(eq=False)
class Metrics(CallbackInterface):
    """Log metrics of each stage as `<stage>_<name>`, once an epoch (evaluations: once a loader).

    A metric is a `torchmetrics.Metric`, or a mapping of `_target_` and the arguments of that
    class; without `_target_` it is the class of torchmetrics that has the metric's name. A module
    may bring its own from `get_metrics(stage)`, by name. One that is named `accuracy/few` is for
    the loader few alone.
    """

    train: dict[str, Any] = field(default_factory=dict)
    """Metrics of training by name."""
    val: dict[str, Any] = field(default_factory=dict)
    """Metrics of validations by name."""
    test: dict[str, Any] = field(default_factory=dict)
    """Metrics of tests by name."""
    inputs: list[int] = field(default_factory=lambda: [1, 2])
    """Outputs of the step that a metric's `update` is given, counted from 0: predictions, references. Where the first
    of them is a mapping, each metric is given what stands there under its name."""

    def __post_init__(self) -> None:
        if not self.inputs or min(self.inputs) < 0:
            raise ValueError(f"metrics.inputs={self.inputs} must name outputs of the step, counted from 0")
        self._metrics = {
            stage: {
                name: build_metric(with_class(given, name, key := f"metrics.{stage.value}.{name}"), key)
                for name, given in getattr(self, stage.value).items()
            }
            for stage in LISTENERS
        }

    @hookimpl
    def on_setup(self, trainer: Trainer) -> None:
        own_name = trainer.plugins.get_name(self)
        reserved = {
            Stage.TRAIN: {trainer.options.train_loss_metric_name, f"{trainer.options.train_loss_metric_name}_epoch"},
            Stage.VAL: {trainer.options.val_loss_metric_name},
            Stage.TEST: {"test_loss"},
        }
        seen: dict[int, str] = {}
        for stage, listener in LISTENERS.items():
            metrics = {**self._metrics[stage], **self._of_module(trainer, stage)}
            for name, metric in metrics.items():
                key = f"{own_name}.{stage.value}.{name}"
                base, slash, loader = name.partition("/")
                if not base or (slash and not loader):
                    raise ValueError(f"{key} must be named as accuracy is, or as accuracy/few for the loader few alone")
                if slash and stage is Stage.TRAIN:
                    raise ValueError(f"{key} is for one loader alone, and training has but one; name it {base}")
                if f"{stage.value}_{base}" in reserved[stage]:
                    raise ValueError(
                        f"{key} would be logged as {stage.value}_{name}, which the trainer logs itself; rename it"
                    )
                if (other := seen.setdefault(id(metric), key)) != key:
                    raise ValueError(
                        f"{key} is the very object that is {other}, so their values would mix; use .clone()"
                    )
                metric.reset()
                metric.to(trainer.device)
                for part in parts(metric).values() if trainer.world_size > 1 else ():
                    if part.dist_sync_fn is None:  # else its own way was chosen for it
                        part._sync_dist = functools.partial(sync, trainer, part)  # type: ignore[method-assign]
            if metrics:
                key = f"{own_name}.{stage.value}"
                trainer.plugins.register(listener(key, stage, metrics, list(self.inputs)), key)

    def _of_module(self, trainer: Trainer, stage: Stage) -> dict[str, Any]:
        get_metrics = getattr(trainer.module, "get_metrics", None)
        if get_metrics is None:
            return {}
        where = f"{type(trainer.module).__name__}.get_metrics({stage})"
        metrics = get_metrics(stage) or {}
        for name, metric in metrics.items():
            if name in self._metrics[stage]:
                raise ValueError(
                    f"metrics.{stage.value}.{name} is also a metric of {where}; give one of them another name"
                )
            build_metric(metric, f"{where}[{name!r}]")
        return dict(metrics)
