"""What listens to the steps of one stage, updates its metrics and logs what they come to."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torchmetrics import Metric

from hookline import CallbackInterface, Stage, hookimpl, nearest
from hookline.tracking import Table
from hookline_metrics.figures import draw
from hookline_metrics.values import copied, is_number, mode_of, parts, results

if TYPE_CHECKING:
    from hookline import Trainer

log = logging.getLogger("hookline.metrics")


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
    _gone_on: frozenset[str] = frozenset()  # the metrics that have what the epoch under way has had so far

    @hookimpl
    def on_begin_train_epoch(self, trainer: Trainer) -> None:  # type: ignore[override]
        """Warn of metrics that miss the beginning of an epoch that is gone on with."""
        late = [name for name in self.metrics if name not in self._gone_on]
        if trainer.position and late and trainer.rank == 0:
            log.warning(
                "%s: the checkpoint has no such metric, so the first value covers the rest of the epoch alone, from "
                "batch %d on", ", ".join(late), trainer.position,
            )  # fmt: skip
        self._gone_on = frozenset(self.metrics)

    @hookimpl
    def on_end_train_step(self, train_step_collated_outputs: list[Any]) -> None:  # type: ignore[override]
        if train_step_collated_outputs and not train_step_collated_outputs[0].numel():
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
        here = {name: parts(metric) for name, metric in self.metrics.items() if name in state}
        self._gone_on = frozenset(name for name, found in here.items() if _fits(found, state[name]))
        for name in self._gone_on:
            for path, part in here[name].items():
                for attribute, value in state[name][path].items():
                    setattr(part, attribute, copied(value, part.device))


def _fits(found: Mapping[str, Metric], state: Mapping[str, Mapping[str, Any]]) -> bool:
    """Tell whether a state is one of these metrics, not of other ones or for other classes under the same name."""
    if found.keys() != state.keys() or any(
        part.metric_state.keys() != state[path].keys() for path, part in found.items()
    ):
        return False
    pairs = [(value, state[path][name]) for path, part in found.items() for name, value in part.metric_state.items()]
    return all(getattr(one, "shape", None) == getattr(other, "shape", None) for one, other in pairs)


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
