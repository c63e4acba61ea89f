"""Metrics of torchmetrics: built as they are described, their values by name, and their state over ranks."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import ClasswiseWrapper

from hookline import instantiate, nearest

if TYPE_CHECKING:
    from hookline import Trainer

FIELDS = (
    "classification",
    "regression",
    "text",
    "image",
    "audio",
    "retrieval",
    "nominal",
    "clustering",
    "segmentation",
)
"""Modules of torchmetrics that have classes of metrics."""
BY_INDEX = 100  # values of one metric that are logged each under a name of its own


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


def with_class(given: Any, name: str, key: str) -> Any:
    """Return a description with its class: where it names none, that of torchmetrics that has the metric's name.

    Raises:
        ValueError: torchmetrics has none of this name; the message begins with the key.
    """
    if not isinstance(given, Mapping) or "_target_" in given:
        return given
    fields = [importlib.import_module(f"torchmetrics.{field}") for field in FIELDS]
    classes = {word.lower(): f"{field.__name__}.{word}" for field in fields for word in field.__all__}
    wanted = name.partition("/")[0].replace("_", "").lower()
    if wanted not in classes:
        raise ValueError(
            f"{key} names no class by _target_, and torchmetrics has none of the name {name!r}"
            f"{nearest(wanted, list(classes))}; write {key}: {{_target_: torchmetrics.classification.BinaryAccuracy}}"
        )
    return {"_target_": classes[wanted], **given}


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


def parts(metric: Metric | MetricCollection) -> dict[str, Metric]:
    """Return the metrics that one consists of, itself included, by their path in it."""
    if isinstance(metric, MetricCollection):
        list(metric.values(copy_state=False))  # lets members that share a state refer to the one that is updated
    return {path: part for path, part in metric.named_modules() if isinstance(part, Metric)}


def copied(value: Any, device: torch.device) -> Any:
    """Return a state of a metric with its tensors copied to a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {name: copied(item, device) for name, item in value.items()}
    return [copied(item, device) for item in value] if isinstance(value, list) else value


def sync(trainer: Trainer, part: Metric, *_: Any, **__: Any) -> None:
    """Give a metric the state of all ranks, in place of what torchmetrics would do for it.

    One rank of each share of the data counts. All of a state is gathered at once: torchmetrics takes lists piece by
    piece, and ends in an error or hangs where a rank has fewer pieces, or none.
    """
    own = copied(part.metric_state, torch.device("cpu"))
    ranks = trainer.hook.all_gather(trainer=trainer, value=(trainer.share, own))
    shares = [copied(state, part.device) for _, state in sorted(dict(ranks).items())]
    for name, reduction in part._reductions.items():
        of_ranks = [state[name] for state in shares]
        listed = isinstance(of_ranks[0], list)
        values: Any = list(itertools.chain.from_iterable(of_ranks)) if listed else torch.stack(of_ranks)
        setattr(part, name, reduction(values) if callable(reduction) and len(values) else values)
