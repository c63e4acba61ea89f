"""Parts of loaders, rounded as Lightning rounds them, and training on the same first batches."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import hookline
from hookline import CallbackInterface, Stage, hookimpl


def split(limits: Mapping[str, Any]) -> tuple[dict[str, Any], dict[Stage, int | float]]:
    """Return the options of the plugin limits that mean the same in Lightning, and by stage those that do not.

    Lightning rounds fractions down, and `overfit_batches` leaves validation its own data.
    """
    if "fast_dev_run" in limits:
        return dict(limits), {}
    same, otherwise = {}, {}
    for stage in Stage:
        overfit = limits.get("overfit_batches") if stage in (Stage.TRAIN, Stage.VAL) else None
        name = f"{stage.value}_batches"
        if overfit is not None:
            otherwise[stage] = overfit
        elif isinstance(limits.get(name), float):
            otherwise[stage] = limits[name]
        elif name in limits:
            same[name] = limits[name]
    return same, otherwise


class Portion:
    """The first batches of a loader.

    Args:
        loader: one of training begins at `trainer.position`.
        batches: how many of a whole epoch.
        trainer: whose position counts; None for an evaluation.
    """

    def __init__(self, loader: Iterable[Any], batches: int, trainer: hookline.Trainer | None) -> None:
        self.loader, self.batches, self.trainer = loader, batches, trainer

    def __iter__(self) -> Iterator[Any]:
        done = 0 if self.trainer is None else self.trainer.position
        return itertools.islice(self.loader, max(self.batches - done, 0))

    def __len__(self) -> int:
        return self.batches


class Portions(CallbackInterface):
    """Gives parts of loaders.

    Args:
        amounts: by stage, a number of batches or (a float) a fraction.
        overfit: whether training is on the same batches in each epoch.
    """

    def __init__(self, amounts: Mapping[Stage, int | float], overfit: bool) -> None:
        self.amounts, self.overfit = amounts, overfit

    @hookimpl(wrapper=True)
    def get_sampler(self, stage: Stage) -> Generator[None, type, type]:
        sampler = yield
        if self.overfit and stage is Stage.TRAIN:
            return type(sampler.__name__, (sampler,), {"shuffle": False})
        return sampler

    @hookimpl(wrapper=True, tryfirst=True)
    def setup_loader(self, trainer: hookline.Trainer, stage: Stage) -> Generator[None, Iterable[Any], Iterable[Any]]:
        loader, amount = (yield), self.amounts.get(stage)
        if amount is None:
            return loader
        return Portion(loader, self._count(amount, loader, stage), trainer if stage is Stage.TRAIN else None)

    @staticmethod
    def _count(amount: int | float, loader: Any, stage: Stage) -> int:
        try:
            total = len(loader)
        except TypeError:
            if isinstance(amount, int):
                return amount
            raise ValueError(
                f"limit_{stage.value}_batches={amount} is a fraction, but the loader does not know how many batches it "
                "has; say a number of batches"
            ) from None
        if isinstance(amount, int):
            return min(amount, total)
        if total and not int(amount * total):
            raise ValueError(
                f"limit_{stage.value}_batches={amount} of {total} batches is less than one; one is {1 / total:.3g}"
            )
        return int(amount * total)
