"""How far training is, as the module is shown it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import hookline

KEYS = (
    "best_train_loss", "best_valid_loss", "epoch", "epoch_step", "global_step", "eval_global_step", "evaluations_done",
    "additional_metrics",
)  # fmt: skip


@dataclass
class Place:
    """What the trainer does not count itself, as its steps are of the optimizer."""

    epoch: int = 0
    """Index of the epoch, from its beginning to the beginning of the next."""
    epoch_step: int = 0
    """Index of the batch in its epoch."""
    global_step: int = 0
    """Batches trained on."""
    eval_global_step: int = 0
    """Batches validated on."""
    skip_batches: int = 0
    """Batches of this epoch that the last checkpoint has."""


class StatusDict(Mapping[str, Any]):
    """A live view of a run; it changes by itself, and is not for anybody to change.

    `skip_batches` is among it where checkpoints are saved every so many steps.
    """

    def __init__(self, trainer: hookline.Trainer, place: Place) -> None:
        self._trainer = trainer
        self._place = place

    def __getitem__(self, name: str) -> Any:
        trainer = self._trainer
        if name in ("best_train_loss", "best_valid_loss"):
            return getattr(trainer.best, name.removeprefix("best_"))
        if name == "evaluations_done":
            return trainer.counters.evaluations
        if name == "additional_metrics":
            loss = trainer.options.val_loss_metric_name
            return {key.removeprefix("val_"): value for key, value in trainer.metrics.items() if key != loss}
        if name in self:
            return getattr(self._place, name)
        raise KeyError(f"{name!r}; there are {', '.join(self)}")

    def __contains__(self, name: object) -> bool:
        return any(name == key for key in self)

    def __iter__(self) -> Iterator[str]:
        yield from KEYS
        checkpoint = self._trainer.plugins.get_plugin("checkpoint")
        if any(hookline.every(one).unit in ("steps", "batches") for one in cadences(checkpoint)):
            yield "skip_batches"

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


def cadences(checkpoint: Any) -> list[str]:
    """Return when a plugin saves."""
    given = getattr(checkpoint, "every", None)
    return [] if given is None else [given] if isinstance(given, str) else list(given)
