"""Metrics of torchmetrics, named in the configuration or by the module: one value an epoch, exact over all batches."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryConfusionMatrix, MulticlassConfusionMatrix, MultilabelConfusionMatrix
from torchmetrics.wrappers import ClasswiseWrapper

from hookline import CallbackInterface, Stage, hookimpl, instantiate, nearest
from hookline.tracking import Table

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

BY_INDEX = 100  # values of one metric that are logged each under a name of its own
READABLE = 20  # curves or matrices in one figure, and classes of a matrix that is written out
CONFUSION = (BinaryConfusionMatrix, MulticlassConfusionMatrix, MultilabelConfusionMatrix)

log = logging.getLogger("hookline.metrics")


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


# Values -------------------------------------------------------------------------------


def results(name: str, metric: Metric | MetricCollection) -> Iterator[tuple[str, Any, Metric | None]]:
    """Compute a metric; give each value with its name and with the metric whose whole value it is.

    What is computed by name is `name_key`; up to a hundred numbers in a row are `name_0`, `name_1` and so on.
    """
    value = metric.compute()
    if not isinstance(metric, MetricCollection):
        yield from flattened(name, value, metric)
        return
    members = dict(metric.items(copy_state=False))
    for key, inner in value.items():
        yield from flattened(f"{name}_{key}", inner, members.get(key))


def flattened(name: str, value: Any, metric: Metric | None) -> Iterator[tuple[str, Any, Metric | None]]:
    """Give the values that one consists of; see `results`."""
    row = value.ndim == 1 if isinstance(value, torch.Tensor) else isinstance(value, (list, tuple))
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flattened(f"{name}_{key}", inner, None)
    elif row and len(value) <= BY_INDEX and all(map(is_number, value)) and not is_number(value):
        for index, number in enumerate(value):
            yield f"{name}_{index}", number, None
    else:
        yield name, value, metric


def is_number(value: Any) -> bool:
    """Tell whether a value is one number."""
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def mode_of(name: str, metrics: Mapping[str, Any]) -> str | None:
    """Return "min" or "max", as the metric says itself whose value has a name; None where it does not say so.

    Args:
        name: of the value, without that of the stage.
        metrics: metrics by name, one of a single loader with the loader's key in it.
    """
    given, _, loader = name.partition("/")
    for key in (f"{own}/{loader}" for own in _beginnings(given)) if loader else ():
        if key in metrics:
            return _mode(given.removeprefix(key.partition("/")[0]), metrics[key])
    for key in _beginnings(given):
        if key in metrics:
            return _mode(given.removeprefix(key), metrics[key])
    return None


def _beginnings(name: str) -> Iterator[str]:
    """Give a name and what is left of it without its last words, the longest first."""
    words = name.split("_")
    return ("_".join(words[:end]) for end in range(len(words), 0, -1))


def _mode(rest: str, metric: Metric | MetricCollection) -> str | None:
    """Return which way a value of a metric is better, by what its name has behind that of the metric."""
    if isinstance(metric, MetricCollection):
        return mode_of(rest.removeprefix("_"), dict(metric.items(copy_state=False))) if rest else None
    wrapped = isinstance(metric, ClasswiseWrapper)
    if metric.higher_is_better is None or not (not rest or rest[1:].isdecimal() or wrapped):
        return None
    return "max" if metric.higher_is_better else "min"


# Figures ------------------------------------------------------------------------------


def draw(metric: Metric, value: Any) -> Any:
    """Return what a metric has computed as a figure of matplotlib.

    Raises:
        ImportError: there is no matplotlib.
        ValueError: there is too much to see.
    """
    from matplotlib.figure import Figure  # one that pyplot knows nothing of, so that nobody has to close it

    figure = Figure(layout="constrained")
    if isinstance(metric, CONFUSION):
        several = value.ndim == 3
        draw_matrices(figure, {f"Label {label}": one for label, one in enumerate(value)} if several else {"": value})
        return figure
    if isinstance(value, tuple) and (isinstance(value[0], list) or value[0].ndim == 2):
        check_readable(len(value[0]), "curves")
    metric.plot(value, ax=figure.subplots())
    return figure


def draw_matrices(figure: Any, matrices: Mapping[str, torch.Tensor]) -> None:
    """Draw confusion matrices by title: colours, and where there are few classes also the numbers."""
    check_readable(len(matrices), "matrices")
    columns = math.ceil(math.sqrt(len(matrices)))
    rows = math.ceil(len(matrices) / columns)
    classes = len(next(iter(matrices.values())))
    side = max(4.0, 0.6 * min(classes, READABLE))
    figure.set_size_inches(side * columns, side * rows)
    for place, (title, matrix) in enumerate(matrices.items(), 1):
        numbers = matrix.cpu().numpy()
        axes = figure.add_subplot(rows, columns, place, title=title, xlabel="predicted class", ylabel="true class")
        image = axes.imshow(numbers)
        if classes > READABLE:
            figure.colorbar(image)
            continue
        axes.set(xticks=range(classes), yticks=range(classes))
        for row, column in itertools.product(range(classes), repeat=2):
            number = numbers[row, column]
            dark = image.norm(number) < 0.5
            text = f"{number:.2f}" if matrix.is_floating_point() else str(number)
            axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black")


def check_readable(number: int, things: str) -> None:
    """Refuse to draw what takes long and nobody can read.

    Raises:
        ValueError: how many there are, and how many may be.
    """
    if number > READABLE:
        raise ValueError(f"{number} {things} in one figure are more than anybody can read; up to {READABLE} are drawn")


# Listen -------------------------------------------------------------------------------


class StageMetrics(CallbackInterface):
    """The metrics of one stage, a plugin of its own: it is registered only where the stage has metrics.

    Args:
        key: where they stand in the configuration, for messages.
        stage: whose outputs they are updated with.
        metrics: metrics by name; one of a single loader has the loader's key in its name.
        inputs: which outputs of the step each metric's `update` is given, in this order.
    """

    def __init__(self, key: str, stage: Stage, metrics: dict[str, Any], inputs: list[int]) -> None:
        self.key = key
        self.stage = stage
        self.metrics = metrics
        self.inputs = inputs
        self.least = max(inputs) + 1  # outputs that a step must return
        self.named = inputs[0]  # the output that may hold what each metric is given, by name
        self.active = metrics  # those of the loader under way
        self.step = f"{stage.value}_step"  # for messages
        self._warned: set[str] = set()

    def clear(self) -> None:
        """Begin anew."""
        for metric in self.active.values():
            metric.reset()

    def take(self, outputs: Sequence[Any]) -> None:
        """Update every metric with the outputs of a step, or each with what a mapping among them has for it."""
        if not self.active:  # none of this loader
            return
        given: Any = outputs[self.named] if self.named < len(outputs) else None
        if not isinstance(given, torch.Tensor):
            rows = given if isinstance(given, list) else [given]  # of training a list, one for each micro-batch
            if rows and all(self._is_by_name(row, len(outputs)) for row in rows):
                for row in rows:
                    self._take_by_name(row)
                return
        if len(outputs) < self.least:
            raise ValueError(
                f"{self.key.partition('.')[0]}.inputs={self.inputs} asks for output {max(self.inputs)} of "
                f"{self.step}, which returned {len(outputs)} (counted from 0): return "
                "(loss, predictions, references) or (loss, {name: (predictions, references)}), or say which outputs "
                "the metrics shall be given"
            )
        chosen = [outputs[index] for index in self.inputs]
        for name, metric in self.active.items():
            self._update(name, metric, chosen, f"the outputs {self.inputs} of {self.step}")

    def _is_by_name(self, value: Any, outputs: int) -> bool:
        """Tell whether an output holds what each metric is given; there are metrics that are given a mapping, too."""
        if not isinstance(value, Mapping):
            return False
        return outputs < self.least or isinstance(next(iter(value.values()), None), (tuple, list))

    def _take_by_name(self, given: Mapping[str, Any]) -> None:
        for name, metric in self.active.items():
            if name not in given:
                raise ValueError(
                    f"{self.key}.{name}: {self.step} returned nothing for {name!r}, only for "
                    f"{', '.join(given) or 'none'}; return {{name: (predictions, references)}} with each metric's name"
                )
            if not isinstance(given[name], (tuple, list)):
                raise ValueError(
                    f"{self.key}.{name}: {self.step} returned a {type(given[name]).__name__} for {name!r}; a metric is "
                    "given a tuple, (predictions, references)"
                )
            chosen = [value.detach() if isinstance(value, torch.Tensor) else value for value in given[name]]
            self._update(name, metric, chosen, f"what {self.step} returned for it")

    def _update(self, name: str, metric: Any, chosen: list[Any], source: str) -> None:
        try:
            metric.update(*chosen)
        except Exception as error:
            error.add_note(f"{self.key}.{name} was updated with {source}")
            raise

    def tell(self, trainer: Trainer) -> None:
        """Compute every metric, over all ranks, and log what comes out."""
        heard = trainer.rank == 0 and not trainer.sanity_checking and trainer.plugins.heard["on_log_object"]
        for name, metric in self.active.items():
            for full_name, value, drawer in results(f"{self.stage.value}_{name}", metric):
                if is_number(value):
                    values: dict[str, Any] = {full_name: value}
                    trainer.log(over="epoch", **values)
                elif heard:
                    full_name += trainer.logs.suffix
                    trainer.log_object(full_name, self.shown(full_name, value, drawer))

    def shown(self, name: str, value: Any, metric: Metric | None) -> Any:
        """Return what is logged of a value that is not one number: a figure, a table, or else the value itself."""
        if isinstance(value, torch.Tensor) and value.ndim == 1:
            return Table(["index", name], [[index, number] for index, number in enumerate(value.tolist())])
        if metric is None or type(metric).plot is Metric.plot:
            return value
        try:
            return draw(metric, value)
        except Exception as error:  # a picture that fails ends no training
            why = f"{type(error).__name__}: {error}"
            if isinstance(error, ImportError):
                why += "; `pip install 'hookline-metrics[figures]'` brings matplotlib"
            if name not in self._warned:
                self._warned.add(name)
                log.warning("%s cannot be drawn, so trackers get no figure of it: %s", name, why)
            return value


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


class EvaluationMetrics(StageMetrics):
    """Metrics over each loader of an evaluation, those of that loader alone among them."""

    @hookimpl
    def on_begin_evaluation(self, stage: Stage, totals: Mapping[str, int | None]) -> None:
        """Refuse metrics of loaders that are not there.

        Raises:
            ValueError: which metric, and which loaders there are.
        """
        for name in self.metrics if stage is self.stage else ():
            _, _, loader = name.partition("/")
            if loader and loader not in totals:
                raise ValueError(
                    f"{self.key}.{name}: there is no {stage.value} loader {loader!r}"
                    f"{nearest(loader, totals)}; there are {', '.join(totals)}"
                )

    def begin(self, loader: str) -> None:
        """Begin anew with the metrics of a loader: its own take the place of those of all."""
        self.active = {}
        for name in sorted(self.metrics, key=lambda name: "/" in name):
            base, _, own = name.partition("/")
            if own in ("", loader):
                self.active[base] = self.metrics[name]
        self.step = f"{self.stage.value}_step of the loader {loader!r}"
        self.clear()


class ValMetrics(EvaluationMetrics):
    """Metrics over each validation loader."""

    @hookimpl
    def on_begin_val_epoch(self, key: str) -> None:
        self.begin(key)

    @hookimpl
    def on_end_val_step(self, outputs: tuple[Any, ...]) -> None:
        self.take(outputs)

    @hookimpl
    def on_end_val_epoch(self, trainer: Trainer) -> None:  # type: ignore[override]
        self.tell(trainer)

    @hookimpl(wrapper=True)
    def get_mode(self, metric: str) -> Generator[None, str, str]:
        """Answer what the metric of torchmetrics says itself, whatever it is named."""
        known = mode_of(metric.removeprefix("val_"), self.metrics) if metric.startswith("val_") else None
        if known is None:
            return (yield)
        with contextlib.suppress(ValueError):  # its name alone says nothing
            yield
        return known


class TestMetrics(EvaluationMetrics):
    """Metrics over each test loader."""

    @hookimpl
    def on_begin_test_epoch(self, key: str) -> None:
        self.begin(key)

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
    if isinstance(value, dict):
        return {name: _copied(item, device) for name, item in value.items()}
    return [_copied(item, device) for item in value] if isinstance(value, list) else value


def sync(trainer: Trainer, part: Metric, *_: Any, **__: Any) -> None:
    """Give a metric the state of all ranks, in place of what torchmetrics would do for it.

    One rank of each share of the data counts. All of a state is gathered at once: torchmetrics takes lists piece by
    piece, and ends in an error or hangs where a rank has fewer pieces, or none.
    """
    own = _copied(part.metric_state, torch.device("cpu"))
    ranks = trainer.hook.all_gather(trainer=trainer, value=(trainer.share, own))
    shares = [_copied(state, part.device) for _, state in sorted(dict(ranks).items())]
    for name, reduction in part._reductions.items():  # as `add_state` was told, which nothing public says again
        of_ranks = [state[name] for state in shares]
        listed = isinstance(of_ranks[0], list)
        values: Any = list(itertools.chain.from_iterable(of_ranks)) if listed else torch.stack(of_ranks)
        setattr(part, name, reduction(values) if callable(reduction) and len(values) else values)


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
    class. A module may bring its own from `get_metrics(stage)`, by name. One that is named
    `accuracy/few` is for the loader few alone.
    """

    train: dict[str, Any] = field(default_factory=dict)
    val: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Any] = field(default_factory=dict)
    inputs: list[int] = field(default_factory=lambda: [1, 2])
    """Outputs of the step that a metric's `update` is given, counted from 0: predictions, references. Where the first
    of them is a mapping, each metric is given what stands there under its name."""

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
                        # `dist_sync_fn` gathers tensor by tensor; only here is all of a state in one hand
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
