"""The plugins that make up what PyMarlin's trainer does beyond those of the house."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hookline
from hookline import CallbackInterface, Stage, hookimpl, tracking
from hookline_pymarlin.stats import Writer, global_stats


@dataclass(eq=False)
class Pymarlin(CallbackInterface):
    """Lead PyMarlin's `global_stats` to the run that is under way, and train in train mode."""

    @hookimpl(tryfirst=True)
    def on_begin_run(self, trainer: hookline.Trainer, stage: Stage) -> None:
        global_stats._trainers.append(trainer)
        if stage is Stage.TRAIN:
            trainer.module.train()

    @hookimpl(wrapper=True, tryfirst=True)
    def train_epoch(self, trainer: hookline.Trainer) -> Generator[None, bool, bool]:
        trainer.module.train()  # as PyMarlin does at each epoch, whatever the modes were
        return (yield)

    @hookimpl(trylast=True)
    def on_end_run(self, trainer: hookline.Trainer) -> None:
        if trainer in global_stats._trainers:
            global_stats._trainers.remove(trainer)


@dataclass(eq=False)
class BatchSizeLimit(CallbackInterface):
    """Make as few micro-batches of a step as keep each within a limit; the batch of a step stays what it is."""

    limit: int = 512
    """Samples of one micro-batch on one rank, at most."""

    @hookimpl
    def get_window_size(self, trainer: hookline.Trainer) -> int:
        total, shares = trainer.options.train_batch_size, trainer.shares
        if total % shares:
            raise ValueError(f"train_batch_size={total} cannot be shared equally by {shares} ranks")
        of_rank = total // shares
        return next(parts for parts in range(1, of_rank + 1) if of_rank % parts == 0 and of_rank // parts <= self.limit)


class Outputs(CallbackInterface):
    """Keeps the collated outputs of the last validation loader."""

    outputs: Sequence[Any] = ()

    @hookimpl
    def on_end_val_epoch(self, val_step_collated_outputs: Sequence[Any]) -> None:  # type: ignore[override]
        self.outputs = val_step_collated_outputs


class Written(tracking.Tracker):
    """Hands what is logged to a `Writer`."""

    def __init__(self, writer: Any) -> None:
        if not isinstance(writer, Writer):
            raise TypeError(
                f"writers: a {type(writer).__name__} is no writer: subclass hookline_pymarlin.Writer, or give 'stdout' "
                "or 'tensorboard'"
            )
        super().__init__()
        self.writer = writer

    def start(self, run: tracking.Run) -> None:
        """Do nothing: a writer stands already."""

    def log_metrics(self, metrics: Mapping[str, float], place: float) -> None:
        """Hand values over."""
        for name, value in metrics.items():
            self.writer.log_scalar(name, value, int(place))
        self.writer.flush()

    def log_image(self, name: str, pixels: Any, place: float) -> None:
        """Hand an image over."""
        self.writer.log_image(name, pixels, int(place))

    def log_histogram(self, name: str, values: Any, place: float) -> None:
        """Hand numbers over."""
        self.writer.log_histogram(name, values, int(place))

    def finish(self, status: str) -> None:
        """End."""
        self.writer.flush()
        self.writer.finalize()
