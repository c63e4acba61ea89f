"""What a module of today's Lightning logs: where it goes, and what callbacks see of it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from hookline import Stage

INSTEAD = "loss of the module"  # under which a value waits that is told in the place of the run's own mean loss
OWN_WORDS = ("over", "reduce", "sync", "prog", "weighted_by")  # keywords of Trainer.log
REDUCTIONS = {
    "mean": "mean", "avg": "mean", "sum": "sum", "min": "min", "max": "max",
    torch.mean: "mean", torch.sum: "sum", torch.min: "min", torch.max: "max", sum: "sum", min: "min", max: "max",
}  # fmt: skip


class Values:
    """Takes what `self.log` is given: hands it to the run, and keeps the newest value of each name in the view."""

    def __init__(self, bridge: Any) -> None:
        self.bridge = bridge
        self.between = False
        """Whether a hook of a beginning or an end is called, where `self.log` is of the epoch."""
        self.known = ""
        """The event under way that comes when the metrics of an evaluation are known."""
        self.ending = False
        """Whether the values of the epoch are told right now."""
        self.batch: Any = None
        """The batch under way, as `training_step` and its kind have it."""
        self._size: int | None = None  # its samples, as Lightning guesses them
        self._names: dict[str, tuple[str, bool, bool]] = {}  # full name: plain name, whether logged, whether shown
        # of training and of evaluations: objects of torchmetrics whose value is due, by full name; and those to be
        # reset behind it, by id, each with the suffix that it had first
        self._metrics: dict[bool, dict[str, tuple[str, Any, dict[str, Any]]]] = {True: {}, False: {}}
        self._used: dict[bool, dict[int, tuple[Any, str]]] = {True: {}, False: {}}
        self._unsynced: dict[str, str] = {}  # names of newest values that are this rank's so far, with the reduction

    # Batches --------------------------------------------------------------------------

    def begin_batch(self, batch: Any) -> None:
        """Take the batch whose samples weigh means from here on; None behind it."""
        self.batch, self._size = batch, None

    def _weight(self) -> int | None:
        """Return the samples of the batch under way as Lightning takes them, 1 without a batch; None if unknown."""
        if self.batch is None:
            return 1
        if self._size is None:
            sizes = sizes_in(self.batch)
            self._size = next((size for size in sizes if size is not None), None)
            if self._size is not None and any(size != self._size for size in sizes):
                self.bridge.trainer.say_once(
                    f"means over an epoch take a batch ({type(self.batch).__name__}) for {self._size} samples, the "
                    "first dimension of the first tensor in it, and other parts have another: say "
                    "self.log(…, batch_size=…)",
                    about="the batch size of Lightning",
                )
        return self._size

    # Taking ---------------------------------------------------------------------------

    def take(
        self, name: str, value: Any, *, prog_bar: bool, logger: bool | None, on_step: bool | None,
        on_epoch: bool | None, reduce_fx: Any, sync: bool, with_key: bool, first_rank: bool, batch_size: int | None,
        metric_attribute: str | None,
    ) -> None:  # fmt: skip
        """Log a value as `self.log` means it."""
        core = self.bridge.trainer
        reduce = self._checked(name, reduce_fx)
        training = core.stage is Stage.TRAIN
        of_steps = training and not self.between
        on_step = of_steps if on_step is None else on_step
        on_epoch = not of_steps if on_epoch is None else on_epoch
        if not on_step and not on_epoch:
            raise ValueError(f"self.log({name!r}, on_step=False, on_epoch=False) logs nothing; leave one of them out")
        if first_rank and core.rank:
            return
        suffix = core.logs.suffix if with_key else ""
        if is_metric(value):
            self._use(name, value, suffix, metric_attribute)
        fork = on_step and on_epoch
        step_name, epoch_name = (f"{name}_step", f"{name}_epoch") if fork else (name, name)
        plain = name + suffix
        for full in (step_name + suffix, epoch_name + suffix):
            self._names[full] = (plain, logger is not False, prog_bar)
        options: dict[str, Any] = {"prog": prog_bar, "sync": sync, "weighted_by": batch_size}
        # the value of this batch, which Lightning logs, is nowhere else once `forward` has returned
        shown = getattr(value, "_forward_cache", None) if is_metric(value) else value
        if on_step and shown is not None:
            self._put(step_name + suffix, newest(name, shown), for_callbacks=training, reduce=reduce if sync else "")
            if training:
                core.log(**options, **{step_name: shown})
        if on_epoch or not training:
            if batch_size is None and reduce == "mean" and not is_metric(value):
                options["weighted_by"] = self._weight()
            with nullcontext() if with_key else core.logs.suffixed(""):
                self._take_over_epoch(epoch_name, value, reduce, options)
            if self.between:  # it is known at once, as in Lightning
                of_ranks = "" if is_metric(value) or not sync else reduce
                now = value.compute() if is_metric(value) else value
                self._put(epoch_name + suffix, newest(name, now), reduce=of_ranks)

    def _checked(self, name: str, reduce_fx: Any) -> str:
        if self.known:
            raise ValueError(
                f"self.log({name!r}) in {self.known}: the metrics of this evaluation are known by then, so the value "
                f"would belong to none; log it in {self.known.removesuffix('end')}epoch_end"
            )
        found = REDUCTIONS.get(reduce_fx.lower() if isinstance(reduce_fx, str) else reduce_fx)
        if found is None:
            raise ValueError(f"self.log({name!r}, reduce_fx={reduce_fx!r}): must be mean, sum, min or max")
        if name in OWN_WORDS:
            raise ValueError(f"self.log({name!r}): this name is a word of the run's own; take another")
        return found

    def _take_over_epoch(self, name: str, value: Any, reduce: str, options: dict[str, Any]) -> None:
        core = self.bridge.trainer
        training = core.stage is Stage.TRAIN
        if is_metric(value):
            self._metrics[training][name + core.logs.suffix] = (name, value, options)
            return
        if training and name == f"{core.options.train_loss_metric_name}_epoch":  # which the run logs itself
            name = INSTEAD
        core.log(over="epoch" if training else "interval", reduce=reduce, **options, **{name: value})

    # Objects of torchmetrics ----------------------------------------------------------

    def _use(self, name: str, metric: Any, suffix: str, attribute: str | None) -> None:
        """Remember an object that is reset when the values of this epoch or evaluation are told."""
        used = self._used[self.bridge.trainer.stage is Stage.TRAIN]
        if id(metric) not in used:
            if attribute is None and not any(one is metric for one in self.bridge.modules()):
                raise ValueError(
                    f"self.log({name!r}, {type(metric).__name__}(…)): this object of torchmetrics is no attribute of "
                    "the module, so nobody would move it to the device or keep it in a checkpoint; make it one in "
                    "__init__ (several in a ModuleList, ModuleDict or MetricCollection)"
                )
            used[id(metric)] = (metric, suffix)
        elif used[id(metric)][1] != suffix:
            self.bridge.trainer.say_once(
                f"self.log({name!r}, {type(metric).__name__}(…)) logs one object for several loaders: as in Lightning, "
                "its value of a later loader covers the earlier ones, too; make an object for each loader"
            )

    def log_metrics(self, known: bool = False) -> None:
        """Log what the objects that were logged have seen so far; they are reset later.

        Args:
            known: let callbacks see the values at once.
        """
        core = self.bridge.trainer
        training = core.stage is Stage.TRAIN
        metrics, self._metrics[training] = self._metrics[training], {}
        over = "epoch" if training else "interval"
        for full_name, (name, metric, options) in metrics.items():
            value = metric.compute()
            with nullcontext() if full_name != name else core.logs.suffixed(""):
                core.log(over=over, **options, **{name: value})
            if known:
                self._put(full_name, newest(name, value))

    def reset_metrics(self, training: bool) -> None:
        """Reset the objects that were logged in this epoch of training, or in this evaluation."""
        used, self._used[training] = self._used[training], {}
        for metric, _ in used.values():
            metric.reset()

    # The newest values ----------------------------------------------------------------

    def _put(self, name: str, value: torch.Tensor, for_callbacks: bool = True, reduce: str = "") -> None:
        plain, logged, shown = self._names[name]
        view = self.bridge.view
        if for_callbacks:
            view.values[plain] = view.values[name] = value
            if reduce and self.bridge.trainer.world_size > 1:
                self._unsynced[plain] = self._unsynced[name] = reduce
        if logged:
            view.logged[name] = value
        if shown:
            view.shown[name] = value

    def put_epoch(self, metrics: Mapping[str, float]) -> None:
        """Take the values of an epoch that the module has logged."""
        for name in self._names.keys() & metrics.keys():
            self._put(name, torch.tensor(metrics[name]))

    def put_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Take the values of an evaluation, also those that plugins have logged."""
        self.put_epoch(metrics)
        view = self.bridge.view
        for name in metrics.keys() - self._names.keys():
            view.values[name] = view.logged[name] = torch.tensor(metrics[name])

    def put_others(self, metrics: Mapping[str, float]) -> None:
        """Take values of the run and of plugins, those that the module has not logged under the same name."""
        for name in metrics.keys() - self._names.keys():
            self.bridge.view.logged[name] = torch.tensor(metrics[name])

    def sync(self) -> None:
        """Reduce over all ranks the newest values that were logged with `sync_dist`, where callbacks decide by them."""
        core, values = self.bridge.trainer, self.bridge.view.values
        if core.world_size == 1:
            return
        ranks = core.hook.all_gather(
            trainer=core, value={name: (values[name].item(), reduce) for name, reduce in self._unsynced.items()}
        )
        self._unsynced = {}
        for name in sorted({name for rank in ranks for name in rank}):
            reduce = next(rank[name][1] for rank in ranks if name in rank)
            found = torch.tensor([rank[name][0] for rank in ranks if name in rank])
            values[name] = getattr(torch, reduce)(found)

    def hides(self, name: str) -> bool:
        """Tell whether a value is kept from trackers."""
        _, logged, shown = self._names.get(name, ("", True, True))
        return not (logged or shown)

    def forget(self) -> None:
        """Forget all newest values; whoever has looked at them keeps what was there."""
        view = self.bridge.view
        view.values, view.logged, view.shown, self._unsynced = {}, {}, {}, {}

    def get_state(self) -> dict[str, Any]:
        """Return the newest values, which schedulers and callbacks look at, and of which kinds they are."""
        view = self.bridge.view
        kept = {"values": view.values, "logged": view.logged, "shown": view.shown}
        numbers = {key: {name: float(one) for name, one in values.items()} for key, values in kept.items()}
        return {**numbers, "names": {name: list(kinds) for name, kinds in self._names.items()}}

    def update_state(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        view = self.bridge.view
        view.values, view.logged, view.shown = (
            {name: torch.tensor(one) for name, one in state.get(key, {}).items()}
            for key in ("values", "logged", "shown")
        )
        self._names = {name: tuple(kinds) for name, kinds in state.get("names", {}).items()}


def newest(name: str, value: Any) -> torch.Tensor:
    """Return a logged value as callbacks see it, with no graph, as it is now."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"self.log({name!r}, …) takes one number, not a tensor of shape {tuple(value.shape)}")
        kept = value.detach().clone().squeeze()
        return kept if kept.dtype in (torch.float32, torch.float64) else kept.to(torch.get_default_dtype())
    return torch.tensor(float(value))


def sizes_in(batch: Any) -> Iterator[int | None]:
    """Yield the first dimension of each tensor in a batch, 1 for one of none, and None for what else is in it."""
    if isinstance(batch, torch.Tensor):
        yield batch.size(0) if batch.ndim else 1
    elif isinstance(batch, Iterable) and not isinstance(batch, (str, bytes)) and not hasattr(batch, "dtype"):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from sizes_in(part)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from sizes_in(getattr(batch, field.name))
    else:
        yield None


def is_metric(value: Any) -> bool:
    """Tell whether a value is an object of torchmetrics."""
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(value, torchmetrics.Metric)
