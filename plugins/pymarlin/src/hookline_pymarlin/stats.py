"""PyMarlin's stats, which go to the log bus of a run, and writers of the user's own, which are told of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hookline import tracking

if TYPE_CHECKING:
    from hookline import Trainer as Core


class Stats:
    """Values by name on their way to whoever shows them; those of the run that is under way in this process."""

    def __init__(self) -> None:
        self._trainers: list[Core] = []

    def update(self, k: str, v: Any, frequent: bool = False) -> None:
        """Log the value of a name; of several before a flush the last counts.

        In an evaluation it is one of its metrics. Both kinds of values are flushed by `log_steps` and at the end of
        an epoch, so `frequent` makes no difference any more.

        Raises:
            RuntimeError: no run is under way.
            TypeError: it is not one number.
        """
        values: dict[str, Any] = {k: v}
        self._trainer.log(reduce="last", **values)

    def update_multi(self, d: Mapping[str, Any], frequent: bool = False) -> None:
        """Log several values."""
        for name, value in d.items():
            self.update(name, value, frequent)

    def image(self, k: str, v: Any) -> None:
        """Log an image: an array or a tensor, (height, width), (height, width, 3) or (3, height, width)."""
        self._trainer.log_object(k, tracking.Image(v))

    def figure(self, k: str, v: Any) -> None:
        """Log a figure of matplotlib."""
        self._trainer.log_object(k, v)

    def histogram(self, k: str, vals: Any) -> None:
        """Log the distribution of numbers."""
        self._trainer.log_object(k, tracking.Histogram(vals))

    def pr(self, k: str, preds: Any, labels: Any) -> None:
        """Log predictions beside their labels, as a table."""
        self._trainer.log_object(k, tracking.Table(["prediction", "label"], list(zip(preds, labels, strict=True))))

    def embedding(self, k: str, feats: Any, labels: Any) -> None:
        """Log vectors beside their labels, as a table."""
        rows = [[label, *vector] for vector, label in zip(feats, labels, strict=True)]
        self._trainer.log_object(k, tracking.Table(["label", *map(str, range(len(feats[0])))], rows))

    @property
    def _trainer(self) -> Core:
        under_way = [trainer for trainer in self._trainers if trainer.status == "running"]
        if not under_way:
            raise RuntimeError("stats are logged in a run: there is none under way in this process")
        return under_way[-1]


global_stats = Stats()


class Writer:
    """A writer of your own: override what it can keep."""

    def log_scalar(self, k: str, v: float, step: int) -> None:
        """Keep a value."""

    def log_image(self, k: str, v: Any, step: int) -> None:
        """Keep an image: an array of numpy (height, width, 3) of uint8."""

    def log_histogram(self, k: str, v: Any, step: int) -> None:
        """Keep numbers: an array of numpy (n,)."""

    def flush(self) -> None:
        """Write what has been kept back."""

    def finalize(self) -> None:
        """Hear that the run is over."""
