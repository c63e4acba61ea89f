"""The clock of a schedule: what a move is, how many the run has, and lengths such as "500 steps" or "10%" in moves."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from hookline import every, seconds

if TYPE_CHECKING:
    from hookline import Trainer

MOMENTS = 1000  # moves of a whole run whose schedule follows the time
CLOCKS = ("steps", "epochs", "time")


class Clock(NamedTuple):
    """A unit of `CLOCKS`, and the length of the run in it."""

    unit: str
    total: int | None
    """Moves of the whole run; None if unknown."""
    steps_per_epoch: int | None
    seconds: int | None
    """The longest time of the run; None without one."""

    def moves(self, length: Any, where: str) -> int:
        """Return the moves of a length: "500 steps", "2 epochs", "10 min", "10%" of the run, or moves.

        Raises:
            ValueError: it is no length, or one that this run cannot count.
        """
        if isinstance(length, int) and not isinstance(length, bool) and length >= 0:
            return length
        percent = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", str(length))
        if percent:
            if self.total is None:
                raise ValueError(f"{where}={length!r} is a share of a run whose length is unknown: {CURE}")
            return round(self.total * float(percent[1]) / 100)
        try:
            number, unit = every(length)
        except ValueError:
            raise ValueError(f'{where}={length!r} must be like "500 steps", "2 epochs", "10 min" or "10%"') from None
        if unit == self.unit:
            return number
        if (unit, self.unit) == ("epochs", "steps") and self.steps_per_epoch is not None:
            return number * self.steps_per_epoch
        if (unit, self.unit) == ("seconds", "time") and self.seconds is not None:
            return round(MOMENTS * number / self.seconds)
        known = {"steps": "steps, or epochs of a known length", "epochs": "epochs", "time": "time"}[self.unit]
        raise ValueError(
            f'{where}={length!r}: this schedule goes by {self.unit} and counts {known}, or "10%" of the run'
        )


CURE = "the training loader has no length; set trainer.max_steps, or write lengths as steps"


def make_clock(trainer: Trainer, unit: str | None) -> Clock:
    """Return the clock of a run; without a unit it counts steps, or the time if only that limits the run.

    Raises:
        ValueError: the time shall count, and does not limit the run.
    """
    totals, limit = trainer.totals, trainer.options.max_time
    only_time = limit is not None and trainer.options.epochs is None and trainer.options.max_steps is None
    unit = unit or ("time" if only_time else "steps")
    if unit == "time" and limit is None:
        raise ValueError("lr_schedule.by='time' follows the share of trainer.max_time, which is not set")
    total = {"steps": totals.steps, "epochs": totals.epochs, "time": MOMENTS}[unit]
    return Clock(unit, total, totals.steps_per_epoch, None if limit is None else seconds(limit))
