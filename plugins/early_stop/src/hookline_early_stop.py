"""Stop training when a metric improves no more, is good enough, or is lost."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hookline import CallbackInterface, Watched, every, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

log = logging.getLogger("hookline.early_stop")


@dataclass(eq=False)
class EarlyStop(CallbackInterface):
    """Stop training when a metric improves no more, is good enough, or is lost.

    Decides at the boundary of each step that has a new value; a run that it has stopped stays stopped when resumed.
    """

    metric: str = "val_loss"
    """Metric of the evaluations; one whose name begins with "train" is one that training logs."""
    mode: str | None = None
    """Whether the smallest ("min") or the largest ("max") is the best; null: what the verb get_mode answers."""
    patience: Any = 3
    """Values without improvement, or a cadence ("3 evaluations", "500 steps", "30 min"), or null for no limit."""
    min_delta: Any = 0.0
    """By how much a value must be better than the best to be an improvement: a number, or a share of it ("1%")."""
    threshold: float | None = None
    """Stop when a value is this good."""
    divergence: float | None = None
    """Stop when a value is worse than this."""
    stop_at_nan: bool = True
    """Stop when a value is NaN or infinite; with false it is no improvement."""
    resume_stopped: bool = False
    """Whether a run that was stopped, and is resumed, goes on; its patience begins anew."""

    def __post_init__(self) -> None:
        self.on_setup()
        self._number, self._counter = patience_of(self.patience)
        for option in ("threshold", "divergence"):
            value = getattr(self, option)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"early_stop.{option}={value} must be a finite number, or null")
        if not self.stop_at_nan and self.patience is self.threshold is self.divergence is None:
            raise ValueError("early_stop has nothing to do: give patience, threshold, divergence or stop_at_nan")
        hidden = "get_watched_metrics" if self._watched.of_training else "on_log"
        setattr(self, hidden, None)

    @hookimpl
    def on_setup(self) -> None:
        """Begin anew: an object may have been another trainer's before."""
        self._watched = Watched("early_stop", self.metric, self.mode, self.min_delta)
        self._values = 0  # so far
        self._since: dict[str, float] | None = None  # the counters at the best value, or where patience began
        self._best_step: int | None = None
        self._stopped: str | None = None  # the reason

    @hookimpl
    def on_begin_train(self, trainer: Trainer) -> None:
        """Begin to be patient; end a run that was stopped before it was resumed.

        Raises:
            ValueError: nobody knows which value of the metric is the best.
        """
        self._watched.begin(trainer)
        if self._stopped is not None and not self.resume_stopped:
            if trainer.rank == 0:
                log.warning(
                    "stopped before, and it stays so: %s; early_stop.resume_stopped=true goes on", self._stopped
                )
            trainer.stop(self._stopped, alone=False)
        elif self._stopped is not None or self._since is None:
            self._stopped, self._since = None, self._counters(trainer)

    @hookimpl(wrapper=True)
    def get_watched_metrics(self) -> Generator[None, dict[str, str], dict[str, str]]:
        return (yield) | self._watched.wanted()

    @hookimpl
    def on_log(self, metrics: Mapping[str, float]) -> None:
        self._watched.hear(metrics)

    @hookimpl
    def on_boundary(self, trainer: Trainer, global_step: int) -> None:
        value = self._watched.take(trainer)
        if value is None:
            return
        self._values += 1
        if self._watched.improves(value):
            self._since, self._best_step = self._counters(trainer), global_step
        why = self._why(value, self._counters(trainer))
        if why:
            best = "none was finite" if self._watched.best is None else f"{self._watched.best:.6g}"
            at = "" if self._best_step is None else f" at step {self._best_step}"
            self._stopped = f"early_stop: {self.metric}={value:.6g} at step {global_step} {why}; the best: {best}{at}"
            trainer.stop(self._stopped, alone=False)  # the value is the same on all ranks

    def _why(self, value: float, counters: Mapping[str, float]) -> str:
        """Return why a value ends training, or ""."""
        smallest = self._watched.mode == "min"
        if self.stop_at_nan and not math.isfinite(value):
            return "is not finite"
        if self.threshold is not None and (value <= self.threshold if smallest else value >= self.threshold):
            return f"reaches threshold={self.threshold}"
        if self.divergence is not None and (value > self.divergence if smallest else value < self.divergence):
            return f"is worse than divergence={self.divergence}"
        assert self._since is not None
        if self._number is not None and counters[self._counter] - self._since[self._counter] >= self._number:
            return f"has not improved within patience={self.patience}"
        return ""

    def _counters(self, trainer: Trainer) -> dict[str, float]:
        return dataclasses.asdict(trainer.counters) | {"values": self._values}

    @hookimpl
    def on_end_train(self, trainer: Trainer) -> None:  # type: ignore[override]
        """Say where it had nothing to decide by."""
        if not self._values and trainer.rank == 0:
            log.warning("early_stop has decided nothing: no value of %r came after a step", self.metric)

    def get_state(self) -> dict[str, Any]:
        """Return the best value, since when there was none, and why training was stopped."""
        return {
            "best": self._watched.best,
            "best_step": self._best_step,
            "since": self._since,
            "values": self._values,
            "stopped": self._stopped,
        }

    def update_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._watched.best, self._best_step = state["best"], state["best_step"]
        self._since, self._values, self._stopped = state["since"], state["values"], state["stopped"]


def patience_of(given: Any) -> tuple[int | None, str]:
    """Return how many of which counter patience lasts.

    Raises:
        ValueError: it is neither a number nor a cadence.
    """
    if given is None:
        return None, ""
    if type(given) is int and given > 0:
        return given, "values"
    try:
        number, unit = every(given)
        if not isinstance(number, int):
            raise ValueError("it is a fraction, and counters are whole numbers")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"early_stop.patience={given!r} must be a number of values from 1, a cadence, or null: {error}"
        ) from None
    return number, {"steps": "global_step"}.get(unit, unit)
