"""Train and evaluate on less data: limits by loader, a quick dry run, overfitting a few batches."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hookline import CallbackInterface, Stage, hookimpl, hookspecs

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

Amount = int | float
"""A number of batches, or (a float) the fraction of a loader above 0 and at most 1."""


class Limited:
    """The first batches of a loader.

    Args:
        loader: any iterable of batches; one of training begins at `trainer.position`.
        batches: how many batches of a whole epoch to give.
        trainer: whose position of the epoch counts, None for an evaluation.
    """

    def __init__(self, loader: Iterable[Any], batches: int, trainer: Trainer | None) -> None:
        self.loader = loader
        self.batches = batches
        self.trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        done = 0 if self.trainer is None else self.trainer.position
        return itertools.islice(self.loader, max(self.batches - done, 0))

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever training stands in it."""
        return self.batches


@dataclass(eq=False)
class Limits(CallbackInterface):
    """Train, validate, test and predict on less than the loaders give.

    An amount is a number of batches (an int: of micro-batches on each rank) or a fraction of
    the loader (a float above 0 and at most 1, rounded to at least one batch).
    """

    fast_dev_run: int | bool = False
    """Try everything once: this many batches (true for one) of each loader, for one epoch, in a run folder apart."""
    overfit_batches: int | float | None = None
    """Train on the same first batches every epoch, in the data set's order, and validate on the very same."""
    train_batches: int | float | None = None
    """Amount of each training epoch."""
    val_batches: int | float | None = None
    """Amount of each validation loader."""
    test_batches: int | float | None = None
    """Amount of each test loader."""
    predict_batches: int | float | None = None
    """Amount of each prediction loader."""

    def __post_init__(self) -> None:
        if self.fast_dev_run < 0:
            raise ValueError(f"limits.fast_dev_run={self.fast_dev_run} must be a number of batches, true or false")
        for name in ("overfit_batches", *(f"{stage.value}_batches" for stage in Stage)):
            amount = getattr(self, name)
            if isinstance(amount, float) and not 0 < amount <= 1:
                raise ValueError(
                    f"limits.{name}={amount} is a fraction, which must be above 0 and at most 1; "
                    "write a number of batches without a point"
                )
            if isinstance(amount, int) and amount < 1:
                raise ValueError(f"limits.{name}={amount} must be at least 1 batch; null is no limit")
        for name in ("train_batches", "val_batches"):
            if self.overfit_batches is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"limits.{name} and limits.overfit_batches both say how many batches: overfitting trains and "
                    "validates on the same ones; leave one of the two out"
                )

    @hookimpl(tryfirst=True)
    def on_setup(self, trainer: Trainer) -> None:
        if not self.fast_dev_run:
            return
        options = trainer.options
        if options.resume:
            warnings.warn(
                f"limits.fast_dev_run begins a run of its own, so resume={options.resume!r} is left aside", stacklevel=2
            )
        options.epochs, options.evaluate_every, options.sanity_val_steps = 1, "epoch", 0
        options.resume = False
        options.run_name += "-dev"

    @hookimpl(wrapper=True)
    def get_sampler(self, stage: Stage) -> Generator[None, type, type]:
        sampler = yield
        if self.overfit_batches is None or stage is not Stage.TRAIN:
            return sampler
        return type(sampler.__name__, (sampler,), {"shuffle": False})

    @hookimpl(wrapper=True, tryfirst=True)
    def setup_loader(self, trainer: Trainer, stage: Stage, key: str) -> Generator[None, Iterable[Any], Iterable[Any]]:
        loader = yield
        if self.overfit_batches is not None and stage is Stage.VAL:
            # A sampler of evaluation gives the same order, from the beginning, wherever training stands.
            sampler = trainer.hook.get_sampler(trainer=trainer, stage=stage)
            train = trainer.module.get_train_dataloader(sampler=sampler, batch_size=trainer.micro_batch_size)
            if isinstance(train, Mapping):
                train = trainer.hook.join_loaders(trainer=trainer, loaders=train, sampler=sampler)
            loader = hookspecs.setup_loader(trainer=trainer, loader=train, stage=stage, key=key)
        name, amount = self._amount(stage)
        if amount is None:
            return loader
        batches = count(amount, loader, f"limits.{name}", f"the {stage.value} loader {key!r}")
        return Limited(loader, batches, trainer if stage is Stage.TRAIN else None)

    def _amount(self, stage: Stage) -> tuple[str, Amount | None]:
        """Return the limit that holds for a stage, after the name of its option."""
        name = f"{stage.value}_batches"
        if self.fast_dev_run:
            return "fast_dev_run", int(self.fast_dev_run)
        if self.overfit_batches is not None and stage in (Stage.TRAIN, Stage.VAL):
            return "overfit_batches", self.overfit_batches
        return name, getattr(self, name)


def count(amount: Amount, loader: Iterable[Any], option: str, what: str) -> int:
    """Return how many batches an amount is of a loader; one without a length may turn out to give fewer.

    Raises:
        ValueError: a fraction of a loader that has no length.
    """
    try:
        total = len(loader)  # type: ignore[arg-type]  # the TypeError is the answer "unknown"
    except TypeError:
        if isinstance(amount, float):
            raise ValueError(
                f"{option}={amount} is a fraction, but {what} does not know how many batches it has; "
                "write a number of batches"
            ) from None
        return amount
    return min(amount, total) if isinstance(amount, int) else min(max(round(amount * total), 1), total)
