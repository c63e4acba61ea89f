"""Clip gradients by their norm, by value, or by their ratio to the weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

LEAST = 1e-3  # norm of the weights of a unit: else what begins at zero could never move


@dataclass(eq=False)
class Clip(CallbackInterface):
    """Clip the gradients of the optimizers that are about to step, once per optimizer step.

    Happens when the gradients are complete: after accumulation and after unscaling.
    """

    max_norm: float | None = 1.0
    """Scale all gradients down to this total norm; null to leave the norm alone."""
    norm_type: float = 2.0
    """The p of the norm; `inf` for the largest absolute value."""
    max_value: float | None = None
    """Clamp each gradient element to [-max_value, max_value]; done first."""
    max_ratio: float | None = None
    """Scale the gradient of each unit (a row of a matrix, a bias) down to this share of the norm of its weights.

    Adaptive gradient clipping; done before the norm is taken.
    """
    per_parameter: bool = False
    """Let `max_norm` be that of each parameter by itself."""
    log_norm: bool = False
    """Log the norm of all gradients before they are clipped, as `grad_norm_before_clip`."""

    def __post_init__(self) -> None:
        for name in ("max_norm", "max_value", "max_ratio"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"clip.{name}={value} must be above 0, or null to clip no {name.removeprefix('max_')}")
        if not self.norm_type > 0:
            raise ValueError(
                f"clip.norm_type={self.norm_type} must be above 0; 2 is the Euclidean norm, inf the largest value"
            )
        if self.max_norm is None and self.max_value is None and self.max_ratio is None:
            raise ValueError("clip has nothing to do: give max_norm, max_value, max_ratio, or several of them")
        if self.per_parameter and self.max_norm is None:
            raise ValueError("clip.per_parameter=true needs clip.max_norm, the norm of each parameter")
        self._clip = clip

    @hookimpl
    def on_begin_train(self, trainer: Trainer) -> None:
        """Let a plugin compile what each step computes."""
        if not exchanged(trainer):
            self._clip = trainer.hook.compile_function(trainer=trainer, function=clip)
        elif trainer.plugins.heard["compile_function"]:
            trainer.say_once("clip is not compiled: ranks exchange their norms within it (get_total_norm)")

    @hookimpl
    def on_begin_optimizer_step(self, trainer: Trainer, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        ways, exchange = by_sharing(optimizers), None
        if not ways and trainer.world_size == 1:  # else other ranks may have gradients, and ask for the norm of all
            return
        if exchanged(trainer):
            exchange = functools.partial(trainer.hook.get_total_norm, trainer=trainer)
        norm = self._clip(self, ways, exchange)
        if norm is not None:
            trainer.log(grad_norm_before_clip=norm, weighted_by=1.0)


def clip(options: Clip, ways: list[list[torch.nn.Parameter]], exchange: Callable[..., Any] | None) -> Any:
    """Clip gradients; return the norm of all of them before, if it is to be logged.

    Args:
        options: the limits.
        ways: parameters, those together whose gradients ranks share in one way.
        exchange: makes the norm of this rank's gradients that of all ranks; None if they are all the same.
    """
    before = norm = whole(norm_of_all(ways, options.norm_type, exchange)) if options.log_norm else None
    if options.max_value is not None or options.max_ratio is not None or options.per_parameter:
        norm = None
    for way in ways:
        if options.max_value is not None:
            torch.nn.utils.clip_grad_value_(way, options.max_value)
        if options.max_ratio is not None:
            clip_units(way, options.max_ratio)
        for parameter in way if options.per_parameter else ():
            own = total_norm([parameter.grad], options.norm_type)
            torch.nn.utils.clip_grads_with_norm_([parameter], options.max_norm, own)  # type: ignore[arg-type]
    if options.max_norm is not None and not options.per_parameter:
        if norm is None:
            norm = norm_of_all(ways, options.norm_type, exchange)
        for way in ways:
            torch.nn.utils.clip_grads_with_norm_(way, options.max_norm, norm)
    return before


def exchanged(trainer: Trainer) -> bool:
    """Tell whether a plugin makes the norm of this rank's gradients that of all ranks."""
    return trainer.world_size > 1 and trainer.plugins.heard["get_total_norm"]


def by_sharing(optimizers: Sequence[torch.optim.Optimizer]) -> list[list[torch.nn.Parameter]]:
    """Return the parameters with gradients, by the way in which ranks share them: torch clips one way at a time."""
    ways: dict[Any, list[torch.nn.Parameter]] = {}
    for parameter in (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]):
        if parameter.grad is not None:
            mesh = getattr(parameter.grad, "device_mesh", None)
            ways.setdefault(mesh, []).append(rows_of(parameter) if parameter.grad.is_sparse else parameter)
    return list(ways.values())


def clip_units(parameters: list[torch.nn.Parameter], max_ratio: float) -> None:
    """Scale the gradient of each unit down to a share of the norm of its weights."""
    for parameter in parameters:
        assert parameter.grad is not None
        dims = tuple(range(1, parameter.ndim)) or None  # of a vector: one number for all of it
        weights, gradient = (
            torch.linalg.vector_norm(tensor, dim=dims, keepdim=dims is not None)
            for tensor in (parameter.detach(), parameter.grad)
        )
        parameter.grad.mul_((max_ratio * weights.clamp(min=LEAST) / gradient.clamp(min=1e-12)).clamp(max=1.0))


def rows_of(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """Return the rows of a parameter that a sparse gradient has, with its values as their gradient, which change it."""
    assert parameter.grad is not None
    parameter.grad = parameter.grad.coalesce()  # sums up rows that come several times: no element is known before
    indices = tuple(parameter.grad.indices())
    rows = torch.nn.Parameter(parameter.detach()[indices], requires_grad=False)
    rows.grad = parameter.grad.values().detach()  # their memory, but no view of what a compiler does not know
    return rows


def whole(norm: Any) -> Any:
    """Return a norm of which each rank may have a part."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def norm_of_all(ways: list[list[torch.nn.Parameter]], norm_type: float, exchange: Callable[..., Any] | None) -> Any:
    """Return the norm of all gradients together, in whatever ways ranks share them."""
    norms = [total_norm([parameter.grad for parameter in way], norm_type) for way in ways]
    norm = norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm([whole(norm) for norm in norms], norm_type)
    return norm if exchange is None else exchange(norm=norm, norm_type=norm_type)


def total_norm(gradients: list[Any], norm_type: float) -> Any:
    """Return the norm of gradients that ranks share in one way; torch knows no largest value of an empty share."""
    if norm_type != math.inf:
        return torch.nn.utils.get_total_norm(gradients, norm_type)
    here: list[Any] = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in gradients]
    full = [grad for grad in here if grad.numel()]
    norm = torch.nn.utils.get_total_norm(full, math.inf) if full else here[0].new_zeros(())
    mesh = getattr(gradients[0], "device_mesh", None)
    if mesh is None:
        return norm
    from torch.distributed.tensor import DTensor, Shard  # who shares weights has imported it

    norms = DTensor.from_local(norm.reshape(1), mesh, [Shard(0)] * mesh.ndim, run_check=False)
    return torch.linalg.vector_norm(norms.full_tensor(), math.inf)  # not a maximum by the ranks, which may lose NaN
