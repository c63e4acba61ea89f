"""Manual optimisation: the module steps its optimizers itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import hookline
from hookline import CallbackInterface, Stage, hookimpl
from hookline_lightning.run.bridge import Bridge


class Manual(CallbackInterface):
    """Lets the module step its optimizers itself; one batch is one step of the run."""

    state_of_rank = True

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self._gradients: dict[str, torch.Tensor] = {}  # that came back and wait for the next batch

    @hookimpl
    def on_begin_train(self, trainer: hookline.Trainer) -> None:
        if any(hasattr(weight, "device_mesh") for weight in self.bridge.parameters()):
            raise ValueError(
                "automatic_optimization = False and a model that ranks share (fsdp): backward would run within the "
                "forward that gathers it; take ddp"
            )
        self._limit(trainer)

    @hookimpl
    def on_end_train_step(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        self._limit(trainer)

    def _limit(self, trainer: hookline.Trainer) -> None:
        """Have `max_steps` count steps of each optimizer, where the run counts batches."""
        options = trainer.options
        if options.max_steps is not None:
            last = trainer.global_step if self.bridge.steps >= options.max_steps else None
            seconds = None if options.max_time is None else hookline.seconds(options.max_time)
            trainer.ends.limit(last, options.epochs, seconds)

    @hookimpl
    def update(self, trainer: hookline.Trainer, window: Sequence[Any]) -> list[tuple[Any, ...]]:
        if len(window) > 1:
            raise ValueError(
                f"a window of {len(window)} micro-batches and automatic_optimization = False: accumulate gradients "
                "yourself, by stepping and clearing only every so many batches"
            )
        if trainer.padding:
            raise ValueError(
                "this rank has no batch left while others have, and with automatic_optimization = False it cannot "
                "keep them company; let distributed.uneven be drop"
            )
        bridge, hook = self.bridge, trainer.hook
        bridge.now.index = 0
        for name, gradient in self._gradients.items():
            parameter = bridge.get_parameter(name)
            parameter.grad = gradient.to(parameter.device, copy=True)
        self._gradients = {}
        for optimizer in bridge.wrapped():
            optimizer.stepped = False
        batch = hook.prepare_batch(trainer=trainer, batch=window[0], stage=Stage.TRAIN)
        model = trainer.model
        trainer.built.use_model(trainer.module)  # what averages gradients in backward must not see this
        try:
            outputs = hook.call_model(trainer=trainer, batch=batch, stage=Stage.TRAIN)
        finally:
            trainer.built.use_model(model)
        if not bridge.hears_behind:
            bridge.values.begin_batch(None)
        bridge.lossless = not isinstance(outputs, torch.Tensor)
        return [() if bridge.lossless else (outputs.detach(),)]

    def get_state(self) -> dict[str, Any]:
        """Return how many steps there were, and gradients that wait for one to come."""
        waiting = {
            id(parameter)
            for optimizer in self.bridge.wrapped()
            if not optimizer.stepped
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        named = self.bridge.named_parameters()
        gradients = {name: one.grad for name, one in named if id(one) in waiting and one.grad is not None}
        return {"steps": self.bridge.steps, "gradients": gradients}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take them back; the run clears all gradients after this."""
        self._gradients = state.get("gradients", {})
        self.bridge.steps = state.get("steps", 0)
