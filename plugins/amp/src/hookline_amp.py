"""Mixed precision: the steps of a module under autocast, and the loss scaler that float16 needs."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SCALER_HOOKS = ("run_backward", "on_begin_optimizer_step", "step_optimizer", "on_end_optimizer_step")


@dataclass(eq=False)
class Amp(CallbackInterface):
    """Run `train_step`, `val_step`, `test_step` and `predict_step` under autocast.

    Weights, gradients and optimizer states stay as they are, in float32. With fp16 the loss is
    scaled before backward and the gradients are unscaled before anyone looks at them; a
    step whose gradients are not finite is skipped, and schedulers do not move.
    """

    precision: str = "bf16"
    """bf16 needs no scaler; fp16 is for devices without bf16."""
    init_scale: float = 65536.0
    """fp16: the scale of the first step."""
    growth_factor: float = 2.0
    """fp16: what the scale is multiplied by after `growth_interval` good steps in a row."""
    backoff_factor: float = 0.5
    """fp16: what the scale is multiplied by after a step that was skipped."""
    growth_interval: int = 2000
    """fp16: good steps in a row after which the scale grows."""

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise ValueError(
                f"amp.precision={self.precision!r} must be one of {', '.join(DTYPES)}; for full precision turn amp "
                "off (`plugins.amp: null`)"
            )
        if not self.init_scale > 0:
            raise ValueError(f"amp.init_scale={self.init_scale} must be above 0")
        if not self.growth_factor > 1:
            raise ValueError(f"amp.growth_factor={self.growth_factor} must be above 1: the scale grows by it")
        if not 0 < self.backoff_factor < 1:
            raise ValueError(
                f"amp.backoff_factor={self.backoff_factor} must be between 0 and 1: the scale shrinks by it"
            )
        if self.growth_interval < 1:
            raise ValueError(f"amp.growth_interval={self.growth_interval} must be at least 1")
        if self.precision == "bf16":
            # An instance's attribute hides the method from the plugin manager: without a scaler these
            # hooks cost nothing, and another plugin may perform the two verbs among them.
            for hook in SCALER_HOOKS:
                setattr(self, hook, None)

    @hookimpl(tryfirst=True)
    def on_setup(self, trainer: Trainer) -> None:
        self._autocast = self._autocast_on(trainer.device)
        if self.precision == "fp16":
            self.scaler = torch.amp.GradScaler(
                trainer.device.type,
                init_scale=self.init_scale,
                growth_factor=self.growth_factor,
                backoff_factor=self.backoff_factor,
                growth_interval=self.growth_interval,
            )

    def _autocast_on(self, device: torch.device) -> torch.autocast:
        """Return autocast on a device.

        Raises:
            ValueError: the device does not have it in this precision, where torch would warn and compute in float32.
        """
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ".*but the target dtype is not supported")
                return torch.autocast(device.type, DTYPES[self.precision])
        except (RuntimeError, AssertionError, UserWarning) as error:
            raise ValueError(
                f"amp.precision={self.precision!r} cannot be had on {device}: take another precision or another "
                f"trainer.device, or turn amp off (`plugins.amp: null`). torch says: {' '.join(str(error).split())}"
            ) from None

    @hookimpl(wrapper=True)
    def call_model(self) -> Generator[None, Any, Any]:
        with self._autocast:
            return (yield)

    @hookimpl
    def run_backward(self, loss: torch.Tensor) -> bool:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return True

    @hookimpl(tryfirst=True)
    def on_begin_optimizer_step(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)

    @hookimpl
    def step_optimizer(self, optimizer: torch.optim.Optimizer, closure: Any) -> bool:
        if closure is not None:
            raise ValueError(
                f"amp.precision='fp16' cannot step {type(optimizer).__name__} with a closure: the scaler decides on "
                "gradients that are already there; take precision bf16, or an optimizer without a closure"
            )
        stepped: list[bool] = []

        def note(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            # A fused optimizer is always stepped and skips by itself, on the device; the scaler then hands it
            # `found_inf`. Reading that is a sync, but no more of them than the scaler does for any other optimizer.
            stepped.append(not getattr(optimizer, "found_inf", False))

        handle = optimizer.register_step_post_hook(note)
        try:
            self.scaler.step(optimizer)
        finally:
            handle.remove()
        return any(stepped)

    @hookimpl(tryfirst=True)
    def on_end_optimizer_step(self) -> None:
        self.scaler.update()

    def get_state(self) -> dict[str, Any]:
        """Return the scale and how many good steps it has seen; nothing where there is no scaler."""
        if self.precision == "bf16":
            return {}
        state = self.scaler.state_dict()
        return {"scale": state["scale"], "growth_tracker": state["_growth_tracker"]}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take the scale back; the other options are configuration, and those of today hold."""
        if self.precision == "fp16":
            scale, tracker = state["scale"], state["growth_tracker"]
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "_growth_tracker": tracker})
