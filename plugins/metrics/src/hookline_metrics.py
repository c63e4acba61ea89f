"""Metrics of torchmetrics, named in the configuration or by the module: one value an epoch, exact over all batches."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torchmetrics import Metric, MetricCollection

from hookline import CallbackInterface, Stage, hookimpl, instantiate

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"


# Build --------------------------------------------------------------------------------


def build_metric(given: Any, key: str) -> Any:
    """Return the metric that is given as one, or described by `_target_` and the arguments of that class.

    Raises:
        ValueError: it is neither, or cannot be built; the message begins with the key.
    """
    metric = instantiate(given, key)
    if not isinstance(metric, (Metric, MetricCollection)):
        raise ValueError(
            f"{key} is {metric!r}, which is no metric; give a torchmetrics.Metric, or in a configuration "
            "{_target_: torchmetrics.classification.BinaryAccuracy, threshold: 0.5}"
        )
    return metric


def flattened(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Give the values of a metric that computes several of them by name, each under `name_key`."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flattened(f"{name}_{key}", inner)
    else:
        yield name, value


# Listen -------------------------------------------------------------------------------


class StageMetrics(CallbackInterface):
    """The metrics of one stage, a plugin of its own: it is registered only where the stage has metrics.

    Args:
        key: where they stand in the configuration, for messages.
        stage: whose outputs they are updated with.
        metrics: metrics by name.
        inputs: which outputs of the step each metric's `update` is given, in this order.
    """

    def __init__(self, key: str, stage: Stage, metrics: dict[str, Any], inputs: list[int]) -> None:
        self.key = key
        self.stage = stage
        self.metrics = metrics
        self.inputs = inputs
        self.least = max(inputs) + 1  # outputs that a step must return

    def clear(self) -> None:
        """Begin anew."""
        for metric in self.metrics.values():
            metric.reset()

    def take(self, outputs: Sequence[Any]) -> None:
        """Update every metric with the outputs of a step."""
        if len(outputs) < self.least:
            raise ValueError(
                f"{self.key.partition('.')[0]}.inputs={self.inputs} asks for output {max(self.inputs)} of "
                f"{self.stage.value}_step, which returned {len(outputs)} (counted from 0): return "
                "(loss, predictions, references), or say which outputs the metrics shall be given"
            )
        chosen = [outputs[index] for index in self.inputs]
        for name, metric in self.metrics.items():
            try:
                metric.update(*chosen)
            except Exception as error:
                error.add_note(
                    f"{self.key}.{name} was updated with the outputs {self.inputs} of {self.stage.value}_step"
                )
                raise

    def tell(self, trainer: Trainer) -> None:
        """Compute every metric, over all ranks, and log what comes out."""
        for name, metric in self.metrics.items():
            for full_name, value in flattened(f"{self.stage.value}_{name}", metric.compute()):
                if isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1):
                    values: dict[str, Any] = {full_name: value}
                    trainer.log(over="epoch", **values)
                elif not trainer.sanity_checking:
                    trainer.log_object(full_name + trainer.log_suffix, value)


class TrainMetrics(StageMetrics):
    """Metrics over the batches of a training epoch, each with the weights of its step."""

    state_of_rank = True  # each has gathered its own share of the epoch under way

    @hookimpl
    def on_end_train_step(self, train_step_collated_outputs: list[Any]) -> None:  # type: ignore[override]
        if train_step_collated_outputs and not len(train_step_collated_outputs[0]):
            return  # this rank had no sample in this step
        self.take(train_step_collated_outputs)

    @hookimpl(wrapper=True)
    def train_epoch(self, trainer: Trainer) -> Generator[None, bool, bool]:
        complete = yield
        if complete:  # the epoch's values are flushed after its validation, before on_end_train_epoch
            self.tell(trainer)
            self.clear()
        return complete

    def get_state(self) -> dict[str, Any]:
        """Return what the metrics have gathered of the epoch under way."""
        return {
            name: {path: part.metric_state for path, part in parts(metric).items()}
            for name, metric in self.metrics.items()
        }

    def update_state(self, state: dict[str, Any]) -> None:
        """Take it back; a metric that has joined since begins with the rest of the epoch."""
        for name, kept in state.items():
            if name in self.metrics:
                for path, part in parts(self.metrics[name]).items():
                    for attribute, value in kept[path].items():
                        setattr(part, attribute, _copied(value, part.device))


class ValMetrics(StageMetrics):
    """Metrics over each validation loader."""

    @hookimpl
    def on_begin_val_epoch(self) -> None:
        self.clear()

    @hookimpl
    def on_end_val_step(self, outputs: tuple[Any, ...]) -> None:
        self.take(outputs)

    @hookimpl
    def on_end_val_epoch(self, trainer: Trainer) -> None:  # type: ignore[override]
        self.tell(trainer)


class TestMetrics(StageMetrics):
    """Metrics over each test loader."""

    @hookimpl
    def on_begin_test_epoch(self) -> None:
        self.clear()

    @hookimpl
    def on_end_test_step(self, outputs: tuple[Any, ...]) -> None:
        self.take(outputs)

    @hookimpl
    def on_end_test_epoch(self, trainer: Trainer) -> None:
        self.tell(trainer)


def parts(metric: Metric | MetricCollection) -> dict[str, Metric]:
    """Return the metrics that one consists of, itself included, by their path in it."""
    if isinstance(metric, MetricCollection):
        list(metric.values(copy_state=False))  # lets members that share a state refer to the one that is updated
    return {path: part for path, part in metric.named_modules() if isinstance(part, Metric)}


def _copied(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    return [_copied(item, device) for item in value] if isinstance(value, list) else value


def of_shares(trainer: Trainer, value: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
    """Return the state of a metric on one rank of each share of the data: those with the same would count twice."""
    ranks = trainer.hook.all_gather(trainer=trainer, value=(trainer.share, value.cpu()))
    return [state.to(value.device) for _, state in sorted(dict(ranks).items())]


# The plugin ---------------------------------------------------------------------------

LISTENERS: dict[Stage, type[StageMetrics]] = {
    Stage.TRAIN: TrainMetrics,
    Stage.VAL: ValMetrics,
    Stage.TEST: TestMetrics,
}


@dataclass(eq=False)
class Metrics(CallbackInterface):
    """Log metrics of each stage as `<stage>_<name>`, once an epoch (evaluations: once a loader).

    A metric is a `torchmetrics.Metric`, or a mapping of `_target_` and the arguments of that
    class. A module may bring its own from `get_metrics(stage)`, by name.
    """

    train: dict[str, Any] = field(default_factory=dict)
    val: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Any] = field(default_factory=dict)
    inputs: list[int] = field(default_factory=lambda: [1, 2])
    """Outputs of the step that a metric's `update` is given, counted from 0: predictions, references."""

    def __post_init__(self) -> None:
        if not self.inputs or min(self.inputs) < 0:
            raise ValueError(f"metrics.inputs={self.inputs} must name outputs of the step, counted from 0")
        self._metrics = {
            stage: {
                name: build_metric(given, f"metrics.{stage.value}.{name}")
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
                if f"{stage.value}_{name}" in reserved[stage]:
                    raise ValueError(
                        f"{key} would be logged as {stage.value}_{name}, which the trainer logs itself; rename it"
                    )
                if (other := seen.setdefault(id(metric), key)) != key:
                    raise ValueError(
                        f"{key} is the very object that is {other}, so their values would mix; use .clone()"
                    )
                metric.reset()
                metric.to(trainer.device)
                if trainer.shares < trainer.world_size:
                    for part in parts(metric).values():
                        part.dist_sync_fn = part.dist_sync_fn or functools.partial(of_shares, trainer)
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
