"""ACCMT's metrics: objects that compute values of all predictions and references of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hookline import Trainer

LARGEST, SMALLEST = (">", ">="), ("<", "<=")


class Metric:
    """Computes what a name in the dictionary of `validation_step` stands for; a subclass writes `compute`.

    Args:
        name: of the tuple that it is given.
        comparator: ">" where the largest value is the best, "<" where the smallest is; True and False say the same.
        main_metric: which of the computed values that is about; the one of this name unless given.
        greater_is_better: the same as `comparator`, as later versions of ACCMT have it.

    Raises:
        ValueError: a comparator that does not say what is best.
    """

    def __init__(
        self,
        name: str,
        comparator: str | bool = ">",
        main_metric: str | None = None,
        *,
        greater_is_better: bool | None = None,
    ) -> None:
        if greater_is_better is not None:
            comparator = greater_is_better
        if isinstance(comparator, bool):
            comparator = ">" if comparator else "<"
        if comparator not in (*LARGEST, *SMALLEST):
            raise ValueError(f'Metric({name!r}): comparator={comparator!r} must be ">" or "<": which value is the best')
        self.name = name
        self.comparator = comparator
        self.main_metric = name if main_metric is None else main_metric

    def compute(self, *arguments: Any) -> dict[str, Any]:
        """Return values by name, of predictions and references over the whole evaluation."""
        raise NotImplementedError(f"{type(self).__name__} needs a method compute(self, predictions, references)")

    @property
    def mode(self) -> str:
        """Whether the largest value is the best ("max"), or the smallest ("min")."""
        return "max" if self.comparator in LARGEST else "min"


class Accuracy(Metric):
    """The part of predictions that are their references: what a pair "accuracy" means where nothing else is said."""

    def compute(self, predictions: torch.Tensor, references: torch.Tensor) -> dict[str, Any]:
        """Return it."""
        return {self.name: (classes(predictions, references) == references).double().mean().item()}

    @staticmethod
    def can_compute(predictions: Any, references: Any) -> bool:
        """Tell whether these are classes, or scores of them and classes."""
        if not (isinstance(predictions, torch.Tensor) and isinstance(references, torch.Tensor)):
            return False
        if references.is_floating_point() or not references.ndim:
            return False
        if not predictions.is_floating_point():
            return predictions.shape == references.shape
        return predictions.ndim == references.ndim + 1 and classes(predictions, references).shape == references.shape


def classes(predictions: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Return the class with the highest score of each, where there are scores."""
    return predictions.argmax(dim=1) if predictions.ndim == references.ndim + 1 else predictions


def metrics_of(given: Any) -> list[Metric]:
    """Return the metrics of one or a list.

    Raises:
        TypeError: something else.
        ValueError: two of one name.
    """
    metrics = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    for metric in metrics:
        if not isinstance(metric, Metric):
            raise TypeError(
                f"metrics: {metric!r} is no Metric; give objects of subclasses of hookline_accmt.Metric, and answer "
                "metrics of torchmetrics in the module's get_metrics()"
            )
    names = [metric.name for metric in metrics]
    if len({*names}) < len(names):
        raise ValueError(f"metrics: {', '.join(names)}: two have one name")
    return metrics


class Collected:
    """What the metrics are given of an evaluation under way, batch by batch."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self.metrics = {metric.name: metric for metric in metrics}
        self._rows: dict[str, list[tuple[Any, ...]]] = {}

    def add(self, name: str, arguments: Any) -> None:
        """Keep the arguments of one batch on the host."""
        row = tuple(arguments) if isinstance(arguments, (tuple, list)) else (arguments,)
        self._rows.setdefault(name, []).append(tuple(map(on_host, row)))

    def compute(self, trainer: Trainer) -> dict[str, float]:
        """Return the values of all ranks' batches, computed by the first rank, and begin anew."""
        ranks = trainer.hook.all_gather(trainer=trainer, value=self._rows)
        self._rows = {}
        answer, error = {}, None
        if trainer.rank == 0:
            try:
                answer = self._values(
                    {name: [row for rows in ranks for row in rows.get(name, ())] for name in ranks[0]}
                )
            except Exception as raised:
                error = raised
        answer, failed = trainer.hook.all_gather(trainer=trainer, value=(answer, error is not None))[0]
        if error is not None:
            raise error
        if failed:
            raise RuntimeError("a metric has failed on the first rank, which says why")
        return dict(answer)

    def _values(self, rows: Mapping[str, list[tuple[Any, ...]]]) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, batches in rows.items():
            metric = self.metrics.get(name) or Accuracy(name)  # which this rank has had no batch for
            computed = metric.compute(*map(joined, zip(*batches, strict=True)))
            if not isinstance(computed, Mapping) or metric.main_metric not in computed:
                raise TypeError(
                    f"{type(metric).__name__}.compute must return a dictionary with {metric.main_metric!r} in it; it "
                    f"returned {computed!r}"
                )
            values |= {key: number(metric, key, value) for key, value in computed.items()}
        return values


def number(metric: Metric, key: str, value: Any) -> float:
    """Return one of the values that a metric has computed."""
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, (int, float)):
        raise TypeError(f"{type(metric).__name__}.compute returned a {type(value).__name__} for {key!r}, and no number")
    return value


def on_host(value: Any) -> Any:
    """Return an argument without its graph, on the host."""
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


def joined(batches: Sequence[Any]) -> Any:
    """Return the argument of a whole evaluation, of those of its batches."""
    first = batches[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(batches)) if first.ndim else torch.stack(list(batches))
    if isinstance(first, (list, tuple)):
        return [value for batch in batches for value in batch]
    return list(batches)
