"""Parts of loaders, rounded as Lightning rounds them."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import hookline
from hookline import CallbackInterface, Stage, hookimpl


def split(limits: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the options of the plugin limits that mean the same in Lightning, and fractions, which it rounds down."""
    known = [field.name for field in fields(Portions)]
    fractions = {name: amount for name, amount in limits.items() if name in known and isinstance(amount, float)}
    return {name: amount for name, amount in limits.items() if name not in fractions}, fractions


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


@dataclass(eq=False)
class Portions(CallbackInterface):
    """Gives parts of loaders, each a fraction of its batches."""

    train_batches: float | None = None
    val_batches: float | None = None
    test_batches: float | None = None
    predict_batches: float | None = None

    @hookimpl(wrapper=True, tryfirst=True)
    def setup_loader(self, trainer: hookline.Trainer, stage: Stage) -> Generator[None, Iterable[Any], Iterable[Any]]:
        loader, fraction = (yield), getattr(self, f"{stage.value}_batches")
        if fraction is None:
            return loader
        return Portion(loader, self._count(fraction, loader, stage), trainer if stage is Stage.TRAIN else None)

    @staticmethod
    def _count(fraction: float, loader: Any, stage: Stage) -> int:
        try:
            total = len(loader)
        except TypeError:
            raise ValueError(
                f"limit_{stage.value}_batches={fraction} is a fraction, but the loader does not know how many batches "
                "it has; say a number of batches"
            ) from None
        if total and not int(fraction * total):
            raise ValueError(
                f"limit_{stage.value}_batches={fraction} of {total} batches is less than one; one is {1 / total:.3g}"
            )
        return int(fraction * total)
