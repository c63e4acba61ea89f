"""How far training is, as the module is shown it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import hookline

KEYS = (
    "best_train_loss", "best_valid_loss", "epoch", "epoch_step", "global_step", "eval_global_step", "evaluations_done",
    "additional_metrics", "skip_batches",
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


class StatusDict(dict[str, Any]):
    """A dictionary that `refresh` writes the place of a run into; keys of the user's own stay, and are in checkpoints.

    `skip_batches` is among it where checkpoints are saved every so many steps.
    """

    def __missing__(self, name: str) -> Any:
        raise KeyError(f"{name!r}; there are {', '.join(self)}")

    def refresh(self, trainer: hookline.Trainer, place: Place) -> None:
        """Write how far a run is."""
        best, counters = trainer.best, trainer.counters
        self["best_train_loss"], self["best_valid_loss"] = best.train_loss, best.valid_loss
        self["epoch"], self["epoch_step"], self["global_step"] = place.epoch, place.epoch_step, place.global_step
        self["eval_global_step"], self["evaluations_done"] = place.eval_global_step, counters.evaluations
        loss = trainer.options.val_loss_metric_name
        self["additional_metrics"] = {
            name.removeprefix("val_"): value for name, value in trainer.metrics.items() if name != loss
        }
        if saves_by_steps(trainer):
            self["skip_batches"] = place.skip_batches

    def own(self) -> dict[str, Any]:
        """Return what the user has added."""
        return {name: value for name, value in self.items() if name not in KEYS}


def saves_by_steps(trainer: hookline.Trainer) -> bool:
    """Tell whether checkpoints are saved every so many steps."""
    return any(hookline.every(one).unit in ("steps", "batches") for one in cadences(trainer))


def cadences(trainer: hookline.Trainer) -> list[str]:
    """Return when the plugin checkpoint saves; nothing where there is none."""
    given = getattr(trainer.plugins.get_plugin("checkpoint"), "every", None)
    return [] if given is None else [given] if isinstance(given, str) else list(given)
