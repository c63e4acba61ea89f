"""When validation comes in training, in Lightning's words."""

from __future__ import annotations

from typing import Any

import hookline
from hookline import CallbackInterface, hookimpl
from hookline_lightning.run.bridge import Bridge


def check(interval: Any, epochs: int | None) -> None:
    """Check `val_check_interval` and `check_val_every_n_epoch`.

    Raises:
        ValueError: a value that cannot be.
    """
    if isinstance(interval, float) and not 0 < interval <= 1:
        raise ValueError(
            f"lightning.val_check_interval={interval} must be above 0 and at most 1; a number of batches is an int"
        )
    if isinstance(interval, int) and interval < 1:
        raise ValueError(f"lightning.val_check_interval={interval} must be at least 1; limit_val_batches=0 is for none")
    if epochs is None and isinstance(interval, float):
        raise ValueError(
            f"val_check_interval={interval} is a part of an epoch, and check_val_every_n_epoch=None counts batches "
            "across epochs: say a number of batches"
        )
    if epochs is not None and epochs < 1:
        raise ValueError(f"lightning.check_val_every_n_epoch={epochs} must be at least 1")


def is_whole(interval: Any) -> bool:
    """Tell whether it is a whole epoch, which 1.0 is, and not one batch."""
    return isinstance(interval, float) and interval == 1.0


def cadence(interval: Any, epochs: int | None) -> str:
    """Return it in the run's own words, as far as these go."""
    if is_whole(interval):
        return f"{epochs} epochs"
    if isinstance(interval, int):
        return f"{interval} batches"
    return f"{interval:f} epoch" if isinstance(interval, float) else str(interval)


class Intervals(CallbackInterface):
    """Validates when Lightning does: after every so many batches, counted anew in each epoch, or at its end.

    Args:
        bridge: around the module.
        interval: batches, or as a float a part of an epoch, or a time.
        epochs: only in each so many epochs; None counts batches across epochs.
    """

    def __init__(self, bridge: Bridge, interval: Any, epochs: int | None) -> None:
        self.bridge, self.interval, self.epochs = bridge, interval, epochs
        self._batches: int | None = None  # None where the run itself knows when

    @property
    def counts(self) -> bool:
        """Whether it counts batches, which is not so at the end of an epoch, or for a time."""
        return isinstance(self.interval, (int, float)) and not is_whole(self.interval)

    def set_cadence(self, options: hookline.Options, loader: Any) -> None:
        """Say it in the run's own words, as far as these go.

        Raises:
            ValueError: a part of an epoch whose length nobody knows.
        """
        if isinstance(self.interval, float) and self.counts:
            try:
                len(loader)
            except TypeError:
                raise ValueError(
                    f"lightning.val_check_interval={self.interval} is a fraction, but the training loader does not "
                    "know how many batches it has; say a number of batches"
                ) from None
        options.evaluate_every = cadence(self.interval, self.epochs)

    @hookimpl
    def on_begin_train(self, trainer: hookline.Trainer) -> None:
        if not self.counts:
            return
        batches = trainer.totals.batches_per_epoch
        if isinstance(self.interval, float):
            self._batches = max(int((batches or 0) * self.interval), 1)
        else:
            self._batches = self.interval
            if self.epochs is not None and batches is not None and self.interval > batches:
                raise ValueError(
                    f"val_check_interval={self.interval} is more than the {batches} training batches of an epoch, so "
                    "there would be no validation; say check_val_every_n_epoch=None to count batches across epochs, or "
                    "limit_val_batches=0 for none"
                )
        trainer.evaluation.plan(None)  # the moments are those below

    @hookimpl(trylast=True)
    def on_end_train_step(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        if self.epochs is not None and (trainer.epoch + 1) % self.epochs:
            return
        asked = self.bridge.view.stop_asked and trainer.world_size == 1  # Lightning validates before it ends
        if asked or (self._batches is not None and self._due(trainer, self._batches)):
            trainer.evaluation.validate()

    def _due(self, trainer: hookline.Trainer, batches: int) -> bool:
        done = trainer.counters.batches if self.epochs is None else trainer.position
        return bool(done // batches > (done - self.bridge.now.index - 1) // batches)
