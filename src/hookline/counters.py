"""How far a run is: its counters, its place in the data, its best values, and how long it will be."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple


@dataclasses.dataclass(slots=True)
class Counters:
    """How far a run is. All of them only grow."""

    global_step: int = 0
    """Optimizer steps completed; an update that was refused counts too."""
    batches: int = 0
    """Micro-batches trained on, by each rank."""
    epochs: int = 0
    """Epochs completed; while one is under way this is its index."""
    evaluations: int = 0
    evaluation_batches: int = 0
    """Batches of these validations, on this rank."""
    samples: int = 0
    """Samples trained on, over all ranks; with several, each batch counts as a full one, so that they agree."""
    skipped_steps: int = 0
    """Updates that left the weights as they were."""
    seconds: float = 0.0
    """Time spent in training, over all sessions of the run."""

    def update_state(self, values: Mapping[str, Any]) -> None:
        """Become what `dataclasses.asdict` has made of others."""
        for name, value in values.items():
            setattr(self, name, value)


UNITS = ("steps", "batches", "epochs", "evaluations", "samples", "seconds")
"""What cadences count, in the order of `snapshot`."""
snapshot = operator.attrgetter("global_step", *UNITS[1:])
"""Return a run's counters as a tuple: taken every step, hence by a function that is not Python."""


@dataclasses.dataclass
class Best:
    """The best losses so far; of training only where somebody listens, to whom losses are worth keeping."""

    train_loss: float = math.inf
    valid_loss: float = math.inf

    def take(self, name: str, value: float) -> bool:
        """Keep a value if it is lower than the best; NaN never is."""
        better: bool = value < getattr(self, name)
        if better:
            setattr(self, name, value)
        return better

    def update_state(self, values: Mapping[str, float]) -> None:
        """Become what `dataclasses.asdict` has made of others."""
        self.train_loss, self.valid_loss = values["train_loss"], values["valid_loss"]


class Totals(NamedTuple):
    """How long the run will be; None where nobody can know."""

    batches_per_epoch: int | None
    steps_per_epoch: int | None
    steps: int | None
    epochs: int | None


def lesser(total: int | None, limit: int | None) -> int | None:
    """Return the lesser of two numbers either of which may be unknown."""
    return min((number for number in (total, limit) if number is not None), default=None)


@dataclasses.dataclass
class Cursor:
    """The place in the data: which epoch, and how much of it has been trained on."""

    seed: int = 0
    epoch: int = 0
    position: int = 0
    """Batches of this epoch trained on, by each rank (not batches fetched)."""
    consumed: int = 0
    """Samples of this epoch drawn for them, over all ranks; batches where a batch sampler of the user's makes them."""
    draw: int = 0
    """How many of these one batch draws over all ranks; 0 where the loader does not say."""
    samples: int | None = None
    """Samples of the data set; None where nobody can know."""
    loader_state: Any = None
    """What a stateful loader said where the run was cut, until it is given back to it."""

    def begin_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self.epoch, self.position, self.consumed, self.loader_state = epoch, 0, 0, None

    def advance(self, batches: int) -> None:
        """Pass over batches that have been trained on."""
        self.position += batches
        self.consumed += batches * self.draw

    def move_to(self, position: int) -> None:
        """Go to a place in the epoch, in batches."""
        self.position, self.consumed = position, position * self.draw

    def begin_loader(self, samples: int | None) -> None:
        """Have a loader of a data set of so many samples, of whose batches nothing is known yet."""
        self.draw, self.samples = 0, samples

    def draw_by(self, draw: int) -> None:
        """Have each batch draw so many samples over all ranks."""
        self.draw = draw

    def settle_place(self) -> None:
        """Have the two measures of the place agree: the batches of before may have been of another size."""
        if self.consumed:
            self.position = self.consumed // self.draw
        else:
            self.consumed = self.position * self.draw

    def keep_loader_state(self, state: Any) -> None:
        """Have what a stateful loader said where the run was cut."""
        self.loader_state = state

    def take_loader_state(self) -> Any:
        """Return that, once."""
        state, self.loader_state = self.loader_state, None
        return state

    def get_state(self) -> dict[str, int]:
        """Return the place as plain data."""
        return {"epoch": self.epoch, "position": self.position, "consumed": self.consumed}

    def update_state(self, state: Mapping[str, int]) -> None:
        """Go to a place that was returned."""
        self.epoch, self.position, self.consumed = state["epoch"], state["position"], state["consumed"]
