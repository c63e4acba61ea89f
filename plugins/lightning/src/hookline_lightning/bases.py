"""What the bases of Lightning have for every hook, so that `super().…` works; where none is written, none is called."""

from __future__ import annotations

from typing import Any

import torch

from hookline import hookspecs
from hookline_lightning.run.view import View


def nothing(self: Any, *arguments: Any, **options: Any) -> None:
    """Do nothing, as in Lightning."""


def _same(self: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
    """Return the batch, as in Lightning."""
    return batch


class DataHooks:
    """Hooks that modules and data modules have."""

    prepare_data_per_node = True
    """Whether one process of each machine prepares data; else one of all."""
    prepare_data = setup = teardown = on_save_checkpoint = on_load_checkpoint = nothing
    on_before_batch_transfer = on_after_batch_transfer = _same

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int = 0) -> Any:
        """Return the batch on the device of the run.

        Raises:
            ValueError: another device is asked for.
        """
        view: View | None = getattr(self, "_trainer", None) or getattr(self, "trainer", None)
        if view is None:
            raise RuntimeError(f"{type(self).__name__} is with no trainer yet, which knows how batches are moved")
        core = view.core
        if torch.device(device) != core.device:
            raise ValueError(f"super().transfer_batch_to_device moves to the run's {core.device}, not to {device}")
        return hookspecs.prepare_batch(core, batch, core.stage)


class Events:
    """Events that modules and callbacks have."""

    on_fit_start = on_fit_end = on_train_start = on_train_end = nothing
    on_train_epoch_start = on_train_epoch_end = on_train_batch_start = on_train_batch_end = nothing
    on_validation_start = on_validation_end = on_validation_epoch_start = on_validation_epoch_end = nothing
    on_validation_batch_start = on_validation_batch_end = on_test_start = on_test_end = nothing
    on_test_epoch_start = on_test_epoch_end = on_test_batch_start = on_test_batch_end = nothing
    on_predict_start = on_predict_end = on_predict_epoch_start = on_predict_epoch_end = nothing
    on_predict_batch_start = on_predict_batch_end = on_before_backward = on_after_backward = nothing
    on_before_optimizer_step = on_before_zero_grad = nothing


class ModuleHooks(DataHooks, Events):
    """Hooks that modules have, and what the run does in their place."""

    configure_model = configure_optimizers = nothing

    def training_step(self, *arguments: Any) -> Any:
        """Compute the loss of a batch."""
        raise NotImplementedError(f"{type(self).__name__} has no training_step")

    validation_step = test_step = nothing

    def predict_step(self, batch: Any, *arguments: Any) -> Any:
        """Return what the module answers to a batch."""
        return self(batch)  # type: ignore[operator]

    def configure_callbacks(self) -> Any:
        """Return callbacks of the module's own."""
        return []

    def backward(self, loss: torch.Tensor, *arguments: Any, **options: Any) -> None:
        """Compute gradients."""
        loss.backward(*arguments, **options)  # type: ignore[no-untyped-call]

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step an optimizer."""
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Clear the gradients of an optimizer."""
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: Any, metric: Any = None) -> None:
        """Move a scheduler."""
        scheduler.step() if metric is None else scheduler.step(metric)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients of an optimizer."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)  # type: ignore[attr-defined]
