"""Stop at, or skip, an update whose loss or gradients are not finite, and never let such a state be saved."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, every, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

POLICIES = ("stop", "skip")
SKIPPING, STOPPING = ("should_step",), ("on_end_optimizer_step", "on_boundary", "save")


@dataclass(eq=False)
class Finite(CallbackInterface):
    """Look at the loss and the total norm of the gradients of every update.

    With "stop" the verdict stays on the device and is read before each save and at a
    cadence: nothing waits on an ordinary step, and no state that was updated with NaN or inf
    is ever stored. With "skip" it is read before each step, which is then refused.
    """

    policy: str = "stop"
    """stop ends the run by a `FloatingPointError`; skip refuses the update and goes on."""
    every: str = "50 steps"
    """stop: the cadence at which the verdict is read, besides before each save."""
    max_skips: int = 10
    """skip: updates refused in a row after which the run ends as with stop."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"finite.policy={self.policy!r} must be one of {', '.join(POLICIES)}")
        if self.max_skips < 0:
            raise ValueError(f"finite.max_skips={self.max_skips} must be at least 0")
        try:
            every(self.every)
        except ValueError as error:
            raise ValueError(f"finite.every: {error}") from None
        for hook in SKIPPING if self.policy == "stop" else STOPPING:
            setattr(self, hook, None)  # hides the method: a hook of the other policy costs nothing
        self._losses: list[torch.Tensor] = []
        self._sum: torch.Tensor | None = None
        self._first: torch.Tensor | None = None
        self._skipped = 0

    @hookimpl
    def on_end_backward(self, loss_tensor: torch.Tensor) -> None:  # type: ignore[override]
        self._losses.append(loss_tensor.detach())

    @hookimpl(trylast=True)
    def on_begin_optimizer_step(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Add up what must be finite: whatever is not makes the sum so."""
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._sum = torch.stack([norm, *(loss.reshape(()).to(norm) for loss in self._losses)]).sum()
        self._losses = []

    # stop -----------------------------------------------------------------------------

    @hookimpl
    def on_end_optimizer_step(self, trainer: Trainer, stepped: bool) -> None:
        if not stepped or self._sum is None:  # a step that was refused, by a scaler say, did no harm
            return
        if self._first is None:
            self._first = torch.full((), math.inf, dtype=torch.float64, device=self._sum.device)
        step = torch.where(torch.isfinite(self._sum), math.inf, float(trainer.global_step + 1))
        self._first = torch.minimum(self._first, step)

    @hookimpl(tryfirst=True)
    def on_boundary(self, trainer: Trainer) -> None:
        if trainer.due(self.every):
            self._read(trainer)

    @hookimpl(wrapper=True, tryfirst=True)
    def save(self, trainer: Trainer) -> Generator[None, Any, Any]:
        self._read(trainer)
        return (yield)

    def _read(self, trainer: Trainer) -> None:
        """Read the verdict of all ranks; one copy off the device."""
        if self._first is None:
            return
        first = trainer.hook.all_reduce(trainer=trainer, value=self._first, op="min").item()
        if first < math.inf:
            self._raise(trainer, int(first))

    # skip -----------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def should_step(self, trainer: Trainer) -> Generator[None, bool, bool]:
        others = yield
        assert self._sum is not None
        if math.isfinite(trainer.hook.all_reduce(trainer=trainer, value=self._sum, op="sum").item()):
            self._skipped = 0
            return others
        self._skipped += 1
        if self._skipped > self.max_skips:
            self._raise(trainer, trainer.global_step + 1)
        return False

    def _raise(self, trainer: Trainer, step: int) -> None:
        in_a_row = f", after {self._skipped - 1} in a row that were skipped," if self._skipped else ""
        raise FloatingPointError(
            f"the loss or the gradients of optimizer step {step}{in_a_row} are not finite (rank {trainer.rank}, now at "
            f"step {trainer.global_step}); no state since then was saved. Look at its batch, the learning rate and the "
            "precision, and go on from the last checkpoint (`--resume`)"
        )

    def get_state(self) -> dict[str, Any]:
        """Return how many updates have been refused in a row."""
        return {"skipped": self._skipped} if self._skipped else {}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._skipped = state["skipped"]
