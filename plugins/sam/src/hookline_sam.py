"""Sharpness-aware minimization: step by the gradients at the weights where the loss of the window is worst nearby."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, hookimpl, hookspecs, kept_rng

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"


@dataclass(eq=False)
class Sam(CallbackInterface):
    """Step by the gradients at slightly worse weights, which leads to flat minima (SAM).

    Each window passes the model twice. The first pass counts; its gradients tell where the loss rises most. The second
    pass gives the gradients at the weights moved there, for the optimizer's step from the weights themselves.
    """

    rho: float = 0.05
    """How far the weights are moved for the second pass: the Euclidean norm of the move."""
    adaptive: bool = False
    """Move each weight in proportion to its square (ASAM); `rho` is then usually 0.5 to 2."""

    def __post_init__(self) -> None:
        if not 0 < self.rho < float("inf"):
            raise ValueError(
                f"sam.rho={self.rho} must be above 0 and finite, such as 0.05; to train without sam turn it off "
                "(`plugins.sam: null`)"
            )

    @hookimpl
    def run_window(self, trainer: Trainer, window: Sequence[Any]) -> list[tuple[Any, ...]]:
        with kept_rng():  # so that the second pass draws the same numbers: dropout leaves out the same
            outputs = hookspecs.run_window(trainer=trainer, window=window)
        trained = self._move(trainer)
        trainer.zero_grad()
        try:
            with trainer.idling():
                hookspecs.run_window(trainer=trainer, window=window)
        finally:
            with torch.no_grad():
                for weight, before in trained:
                    weight.copy_(before)
        return outputs

    @torch.no_grad()
    def _move(self, trainer: Trainer) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Move the weights to where the loss rises most; return each with a copy of what it was.

        A scale of the gradients, such as that of fp16, has no effect. Gradients that are not finite make weights that
        are not, so the gradients of the second pass are not either.

        Raises:
            ValueError: no weight has a gradient, or one has a sparse one.
        """
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        weights = {id(weight): weight for group in groups for weight in group["params"] if weight.grad is not None}
        if not weights:
            raise ValueError(
                "sam: no weight of the optimizers has a gradient after the first pass; it needs a loss that depends on "
                "them, and gradients in `weight.grad`, not in an engine of their own"
            )
        for name, weight in trainer.module.named_parameters():
            if weight.grad is not None and weight.grad.is_sparse:
                raise ValueError(f"sam takes no sparse gradients, as {name} has; make its layer with sparse=False")
        rises = [weight.abs() * weight.grad if self.adaptive else weight.grad for weight in weights.values()]
        scale = self.rho / (norm_of(rises) + 1e-12)  # where all gradients are zero nothing moves
        trained = [(weight, weight.detach().clone()) for weight in weights.values()]
        for weight, before in trained:
            rise = before.square() * weight.grad if self.adaptive else weight.grad
            weight.add_(rise * scale.to(weight.device))
        return trained


def norm_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the norm of all tensors together, also of those of which this rank has a share."""
    ways: dict[Any, list[torch.Tensor]] = {}  # in which ranks share them
    for tensor in tensors:
        ways.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    norms: list[Any] = [torch.nn.utils.get_total_norm(way) for way in ways.values()]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return torch.nn.utils.get_total_norm(whole)
