"""What Lightning's trainer does around a run and no plugin of hookline does, each only where it is asked for."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch

import hookline
from hookline import CallbackInterface, Stage, hookimpl


@dataclass(eq=False)
class Whole(CallbackInterface):
    """Have weights, batches and new tensors in one number format: `precision="64-true"` and its kind."""

    dtype: str = "float64"
    """The format: float64, float16 or bfloat16."""

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @hookimpl(wrapper=True)
    def convert_model(self) -> Generator[None, torch.nn.Module, torch.nn.Module]:
        return (yield).to(self._dtype)

    @hookimpl(wrapper=True)
    def prepare_batch(self) -> Generator[None, Any, Any]:
        return self._converted((yield))

    @hookimpl(wrapper=True)
    def call_model(self) -> Generator[None, Any, Any]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)
        try:
            return (yield)
        finally:
            torch.set_default_dtype(before)

    def _converted(self, batch: Any) -> Any:
        if isinstance(batch, torch.Tensor):
            return batch.to(self._dtype) if batch.is_floating_point() else batch
        if isinstance(batch, dict):
            return type(batch)({key: self._converted(value) for key, value in batch.items()})
        if type(batch) in (list, tuple):
            return type(batch)([self._converted(value) for value in batch])
        if isinstance(batch, tuple) and hasattr(batch, "_fields"):
            return type(batch)(*[self._converted(value) for value in batch])
        return batch


@dataclass(eq=False)
class Anomaly(CallbackInterface):
    """Have autograd raise where a gradient is NaN, with the line of the forward that made it."""

    @hookimpl(wrapper=True)
    def run(self) -> Generator[None, bool, bool]:
        with torch.autograd.detect_anomaly():
            return (yield)


@dataclass(eq=False)
class Unshuffled(CallbackInterface):
    """Train in the data set's order: `overfit_batches` sees the same batches in every epoch."""

    @hookimpl(wrapper=True)
    def get_sampler(self, stage: Stage) -> Generator[None, type, type]:
        sampler = yield
        return type(sampler.__name__, (sampler,), {"shuffle": False}) if stage is Stage.TRAIN else sampler


@dataclass(eq=False)
class ShortWindows(CallbackInterface):
    """Divide the losses of a short last window as those of all others, as Lightning does."""

    @hookimpl(wrapper=True)
    def scale_loss(self, trainer: hookline.Trainer, size: int) -> Generator[None, torch.Tensor, torch.Tensor]:
        loss, whole = (yield), trainer.window_size
        return loss if size == whole else loss * (size / whole)


@dataclass(eq=False)
class Averaged(CallbackInterface):
    """Leave the average of the weights in the module when training has ended, as Lightning's callbacks do."""

    @hookimpl(wrapper=True, tryfirst=True)
    def run(self, trainer: hookline.Trainer, stage: Stage) -> Generator[None, bool, bool]:
        done = yield
        if stage is Stage.TRAIN:
            module: Any = trainer.module.module
            module.load_state_dict(trainer.export_model())
        return done


@dataclass(eq=False)
class AtLeast(CallbackInterface):
    """Hold `should_stop` back until so many epochs and steps are done."""

    epochs: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        self._waiting = False

    def ask(self, trainer: hookline.Trainer) -> None:
        """End training, now or when the least is done."""
        self._waiting = True
        self._end(trainer)

    @hookimpl
    def on_boundary(self, trainer: hookline.Trainer) -> None:
        if self._waiting:
            self._end(trainer)

    def _end(self, trainer: hookline.Trainer) -> None:
        if trainer.epoch >= (self.epochs or 0) and trainer.global_step >= (self.steps or 0):
            trainer.stop("trainer.should_stop was set")

    def get_state(self) -> dict[str, Any]:
        """Return whether an end is waited for."""
        return {"waiting": True} if self._waiting else {}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._waiting = bool(state)
