"""A `train_epoch` or a `val_epoch` of the user's, performed as that of a run."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch

import hookline
from hookline import CallbackInterface, Stage, hookimpl, hookspecs


class _Stop(BaseException):
    """Leaves a `train_epoch` of the user's between two steps; no `except Exception` of his takes it."""


class Drawn:
    """A loader that gives the batches of this epoch that are left, and knows how large they were.

    A loop over it that is begun anew before any step, as after a look at one batch, gives the same batches once more;
    one that is begun after a step, as to show some results, goes through the user's loader.

    Args:
        loader: the user's.
        batches: those that are left.
        again: returns them once more.
        trainer: whose run it is.
        stage: training or validation.
    """

    def __init__(
        self,
        loader: Any,
        batches: Iterator[Any],
        again: Callable[[], Iterator[Any]],
        trainer: hookline.Trainer,
        stage: Stage,
    ) -> None:
        self.loader, self._batches, self._again, self._trainer = loader, batches, again, trainer
        self._count = functools.partial(trainer.hook.count_samples, trainer=trainer, stage=stage)
        self.stepped = False
        """Whether a step has been made on some of the batches."""
        self.samples: list[int] = []
        """Of each batch that was drawn."""

    def __iter__(self) -> Iterator[Any]:
        if not self.stepped:
            for batch in self.whole():
                self.samples.append(self._count(batch=batch))
                yield batch
            return
        if self._trainer.shares > 1:
            raise RuntimeError(
                "train_loader is gone through once more after the steps of an epoch, and only before them each process "
                "has its share of the data: on several processes keep what the second loop needs in the first"
            )
        yield from self.loader

    def whole(self) -> Iterator[Any]:
        """Return the batches, from the first of them."""
        if self.samples:
            self._batches = self._again()
            self.samples.clear()
        return self._batches

    def mean(self, losses: Any) -> tuple[Any, int]:
        """Return the mean of a history over samples, and how many; over its entries where these are not the batches."""
        losses = torch.as_tensor(losses)
        counts = self.samples[: len(losses)]  # a stop may come behind a step whose loss is not kept yet
        if not len(counts) == len(losses) >= len(self.samples) - 1:
            return losses.mean(), sum(self.samples)
        samples = torch.tensor(counts, dtype=losses.dtype, device=losses.device)
        return (losses * samples).sum() / samples.sum(), sum(counts)

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class OwnEpoch(CallbackInterface):
    """Has a `train_epoch` of the user's train; each step of the first optimizer is one of the run."""

    def __init__(self, facade: Any) -> None:
        self.facade = facade

    @hookimpl
    def train_epoch(self, trainer: hookline.Trainer, batches: Iterator[Any]) -> bool:
        facade = self.facade
        if facade._by_base:
            return hookspecs.train_epoch(trainer, batches)
        loader, before = facade.train_loader, facade.loss_iter
        again = lambda: iter(trainer.loaders.get(Stage.TRAIN)["default"])  # noqa: E731
        drawn = Drawn(loader, batches, again, trainer, Stage.TRAIN)
        base = _BaseEpoch(facade, trainer, drawn)
        step = functools.partial(_step, trainer, drawn, base)
        facade.train_loader, facade._within = drawn, base
        first: Any = next(iter(facade.optimizers().values()))
        handle = first.register_step_post_hook(step)
        try:
            facade.train_epoch()
            _finish(facade, trainer, drawn, base)
        except _Stop:
            return False
        finally:
            handle.remove()
            facade.train_loader, facade._within = loader, None
            losses = getattr(facade, "loss_history", None)
            if losses is not None and facade.loss_iter > before and not base.called:
                mean, samples = drawn.mean(losses[before : facade.loss_iter])
                name = f"{trainer.options.train_loss_metric_name}_epoch"
                trainer.log(over="epoch", weighted_by=samples, **{name: mean})
        return base.went_on


def _step(trainer: hookline.Trainer, drawn: Drawn, base: _BaseEpoch, *_: Any) -> None:
    """Count a step of the user's, and bring it to its boundary."""
    if base.under_way:
        return
    trainer.counters.global_step += 1
    _count(trainer, drawn, base)
    drawn.stepped = True
    if not trainer.settle(counted=True):
        raise _Stop


def _count(trainer: hookline.Trainer, drawn: Drawn, base: _BaseEpoch) -> None:
    """Count the batches that were drawn since the last step."""
    batches = len(drawn.samples) - base.counted
    trainer.counters.batches += batches
    trainer.counters.samples += sum(drawn.samples[base.counted :]) * trainer.shares
    trainer.position += batches
    base.counted = len(drawn.samples)


def _finish(facade: Any, trainer: hookline.Trainer, drawn: Drawn, base: _BaseEpoch) -> None:
    """Count what is left of an epoch of the user's, and warn of what had no effect in it."""
    kind = type(facade).__name__
    cast(Any, trainer.module).require_same()
    if not base.called:
        _count(trainer, drawn, base)
        if not drawn.stepped:
            first, *_ = facade.optimizers()
            trainer.say_once(
                f"{kind}.train_epoch made no step of {first}, the first of its optimizers, whose steps are those of "
                "the run: saves and stops by steps wait for one. Where another trains, make that the first attribute"
            )
    given = [name for name in ("lr_scheduler", "mtm_scheduler") if getattr(facade, name) is not None]
    if given and not facade._applied and not facade._owns("apply_lr_schedule"):
        trainer.say_once(
            f"{' and '.join(given)} had no effect on this epoch: {kind}.train_epoch is to call "
            "apply_lr_schedule() and apply_mtm_schedule() where they are to act"
        )


class _BaseEpoch:
    """What `train_epoch` of the base does when a `train_epoch` of the user's calls it."""

    def __init__(self, facade: Any, trainer: hookline.Trainer, drawn: Drawn) -> None:
        self.facade, self.trainer, self.drawn = facade, trainer, drawn
        self.called = self.under_way = False
        self.went_on = True
        self.counted = 0
        """Batches of which a step of the user's has been counted."""

    def by_base(self) -> None:
        """Train on the epoch's batches by the core's loop."""
        if self.drawn.stepped:
            raise RuntimeError(
                f"train_epoch() of the base trains on this epoch's batches, and {type(self.facade).__name__}."
                "train_epoch has gone through them already: write the other pass as a loop of your own"
            )
        cast(Any, self.trainer.module).require_same()
        begin_base_epoch(self.facade, self.trainer)
        self.called = self.under_way = True
        try:
            self.went_on = hookspecs.train_epoch(self.trainer, self.drawn.whole())
        finally:
            self.under_way, self.drawn.stepped = False, True


def begin_base_epoch(facade: Any, trainer: hookline.Trainer) -> None:
    """Do what the `train_epoch` of LERNOMATIC begins with: models train, and gradients that were left are gone."""
    for model in facade.models().values():
        model.set_train()
    if not trainer.window.begun:  # else the gradients of a run that was cut within a window
        trainer.zero_grad()


class OwnValidation(CallbackInterface):
    """Has a `val_epoch` of the user's validate."""

    def __init__(self, facade: Any) -> None:
        self.facade = facade

    @hookimpl
    def evaluate(
        self, trainer: hookline.Trainer, stage: Stage, loaders: Mapping[str, Any], limit: int | None
    ) -> dict[str, float]:
        facade = self.facade
        if stage is not Stage.VAL or facade._by_base:
            return hookspecs.evaluate(trainer, stage, loaders, limit)
        loader, losses, accuracies = facade.val_loader, *_counts(facade)
        again = functools.partial(_first, loaders["default"], limit)
        drawn = Drawn(loader, again(), again, trainer, stage)
        base = _BaseValidation(facade, trainer, loaders["default"], limit)
        facade.val_loader, facade._within = drawn, base
        try:
            with trainer.evaluation.under_way(stage):
                facade.val_epoch()
                if base.metrics is not None:
                    return {**base.metrics, **trainer.logs.collect()}
                losses_now, accuracies_now = _counts(facade)
                if losses_now > losses:
                    mean, samples = drawn.mean(facade.val_loss_history[losses:losses_now])
                    trainer.log(weighted_by=samples, **{trainer.options.val_loss_metric_name: mean})
                if accuracies_now > accuracies:
                    trainer.log(weighted_by=sum(drawn.samples), val_acc=float(facade.acc_history[accuracies_now - 1]))
                return trainer.logs.collect()
        finally:
            facade.val_loader, facade._within = loader, None


def _first(loader: Any, limit: int | None) -> Iterator[Any]:
    return itertools.islice(loader, limit)


def _counts(facade: Any) -> tuple[int, int]:
    """Return how many losses and accuracies of validations there are; 0 where `_init_history` makes none."""
    return getattr(facade, "val_loss_iter", 0), getattr(facade, "acc_iter", 0)


class _BaseValidation:
    """What `val_epoch` of the base does when a `val_epoch` of the user's calls it."""

    def __init__(self, facade: Any, trainer: hookline.Trainer, loader: Any, limit: int | None) -> None:
        self.facade, self.trainer, self.loader, self.limit = facade, trainer, loader, limit
        self.metrics: dict[str, float] | None = None

    def by_base(self) -> None:
        """Validate by the core's loop, and keep the accuracy."""
        trainer, hook = self.trainer, self.trainer.hook
        totals = {"default": min(len(self.loader), self.limit or len(self.loader))}
        hook.on_begin_evaluation(trainer=trainer, stage=Stage.VAL, totals=totals)
        hook.on_begin_val_epoch(trainer=trainer, key="default")
        trainer.evaluation.take_batches(Stage.VAL, "default", itertools.islice(self.loader, self.limit))
        self.metrics = trainer.logs.collect()
        if not trainer.sanity_checking:
            self.facade._keep_accuracy(self.metrics)


class OneOptimizer(CallbackInterface):
    """Has the loop of the base step `optimizer` alone, where a trainer has others beside it."""

    def __init__(self, facade: Any) -> None:
        self.facade = facade

    @hookimpl
    def step_optimizer(self, trainer: hookline.Trainer, optimizer: torch.optim.Optimizer, closure: Any) -> bool:
        return optimizer is not self.facade.optimizer or hookspecs.step_optimizer(trainer, optimizer, closure)
