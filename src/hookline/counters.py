"""The progress of a run: its counters, its place in the data, its best values, and its expected length."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple


@dataclasses.dataclass(slots=True)
class Counters:
    """The progress of a run. All counters only grow."""

    global_step: int = 0
    """Completed optimizer steps; skipped ones count too."""
    batches: int = 0
    """Trained micro-batches of each rank."""
    epochs: int = 0
    """Completed epochs; during an epoch this is its index."""
    evaluations: int = 0
    evaluation_batches: int = 0
    """Batches of these validations, on this rank."""
    samples: int = 0
    """Trained samples of all ranks; with several ranks each batch counts as a full one, so that ranks agree."""
    skipped_steps: int = 0
    """Updates that did not change the weights."""
    seconds: float = 0.0
    """Training time over all sessions of the run."""

    def update_state(self, values: Mapping[str, Any]) -> None:
        """Load the values of `dataclasses.asdict`."""
        for name, value in values.items():
            setattr(self, name, value)


UNITS = ("steps", "batches", "epochs", "evaluations", "samples", "seconds")
"""The units of cadences, in the order of `snapshot`."""
EVALUATIONS, SECONDS = UNITS.index("evaluations"), UNITS.index("seconds")
snapshot = operator.attrgetter("counters.global_step", *(f"counters.{unit}" for unit in UNITS[1:]), "cursor.position")
"""Return a run's counters as a tuple, and its place in the epoch; no Python function, because every step calls it."""


@dataclasses.dataclass
class Best:
    """The lowest losses so far; that of training only if some plugin can use losses."""

    train_loss: float = math.inf
    valid_loss: float = math.inf

    def take(self, name: str, value: float) -> bool:
        """Keep a value if it is lower than the best; NaN never is."""
        better: bool = value < getattr(self, name)
        if better:
            setattr(self, name, value)
        return better

    def update_state(self, values: Mapping[str, float]) -> None:
        """Load the values of `dataclasses.asdict`."""
        self.train_loss, self.valid_loss = values["train_loss"], values["valid_loss"]


class Totals(NamedTuple):
    """The expected length of the run; None if unknown."""

    batches_per_epoch: int | None
    steps_per_epoch: int | None
    steps: int | None
    epochs: int | None


def lesser(total: int | None, limit: int | None) -> int | None:
    """Return the lesser of two numbers, either of which may be unknown."""
    return min((number for number in (total, limit) if number is not None), default=None)


@dataclasses.dataclass
class Cursor:
    """The place in the data: the epoch, and how much of it is trained."""

    seed: int = 0
    epoch: int = 0
    position: int = 0
    """Trained batches of this epoch on each rank (not fetched batches)."""
    consumed: int = 0
    """Samples of this epoch drawn for them, over all ranks; with a batch sampler of the user's, batches."""
    draw: int = 0
    """How many of these one batch draws over all ranks; 0 if the loader does not tell."""
    samples: int | None = None
    """Samples of the data set; None if unknown."""
    batches: int | None = None
    """Batches of this epoch on each rank; None if unknown."""
    loader_state: Any = None
    """The state of a stateful loader where the run was cut, until the loader gets it back."""

    def begin_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self.epoch, self.position, self.consumed, self.loader_state = epoch, 0, 0, None

    def move_to(self, position: int) -> None:
        """Go to a place in the epoch, in batches."""
        self.position, self.consumed = position, position * self.draw

    def begin_loader(self, samples: int | None) -> None:
        """Begin a loader of a data set of this many samples, whose batch size is still unknown."""
        self.draw, self.samples = 0, samples

    def set_length(self, batches: int | None) -> None:
        """Set how many batches the epoch has on each rank."""
        self.batches = batches

    def draw_by(self, draw: int) -> None:
        """Set how many samples each batch draws over all ranks."""
        self.draw = draw

    def settle_place(self) -> None:
        """Make `position` and `consumed` agree: earlier batches may have had another size."""
        if self.consumed:
            self.position = self.consumed // self.draw
        else:
            self.consumed = self.position * self.draw

    def keep_loader_state(self, state: Any) -> None:
        """Keep the state of a stateful loader where the run was cut."""
        self.loader_state = state

    def take_loader_state(self) -> Any:
        """Return the state of the stateful loader, once."""
        state, self.loader_state = self.loader_state, None
        return state

    def get_state(self) -> dict[str, int]:
        """Return the place as plain data."""
        return {"epoch": self.epoch, "position": self.position, "consumed": self.consumed}

    def update_state(self, state: Mapping[str, int]) -> None:
        """Go to a place that `get_state` returned."""
        self.epoch, self.position, self.consumed = state["epoch"], state["position"], state["consumed"]
