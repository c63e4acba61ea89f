"""Clip gradients by their total norm or by value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hookline import CallbackInterface, hookimpl

__version__ = "0.1.0"


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
    """Clamp each gradient element to [-max_value, max_value]; done before the norm is taken."""

    def __post_init__(self) -> None:
        for name in ("max_norm", "max_value"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"clip.{name}={value} must be above 0, or null to clip no {name.removeprefix('max_')}")
        if not self.norm_type > 0:
            raise ValueError(
                f"clip.norm_type={self.norm_type} must be above 0; 2 is the Euclidean norm, inf the largest value"
            )
        if self.max_norm is None and self.max_value is None:
            raise ValueError("clip has nothing to do: give max_norm, max_value or both")

    @hookimpl
    def on_begin_optimizer_step(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        ways: dict[Any, list[torch.nn.Parameter]] = {}  # in which ranks share them; torch clips one way at a time
        gradients: dict[Any, list[torch.Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                if parameter.grad.is_sparse:
                    parameter = rows_of(parameter)
                mesh = getattr(parameter.grad, "device_mesh", None)
                ways.setdefault(mesh, []).append(parameter)
                gradients.setdefault(mesh, []).append(parameter.grad)
        if self.max_value is not None:
            for way in ways.values():
                torch.nn.utils.clip_grad_value_(way, self.max_value)
        if self.max_norm is not None and ways:
            norms: list[Any] = [total_norm(way, self.norm_type) for way in gradients.values()]
            if len(norms) > 1:
                whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
                norms = [torch.nn.utils.get_total_norm(whole, self.norm_type)]
            for way in ways.values():
                torch.nn.utils.clip_grads_with_norm_(way, self.max_norm, norms[0])


def rows_of(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """Return a parameter whose gradient is what a sparse one holds; both change together."""
    assert parameter.grad is not None
    parameter.grad = parameter.grad.coalesce()  # sums up rows that come several times: no element is known before
    rows = torch.nn.Parameter(parameter.grad.values(), requires_grad=False)
    rows.grad = parameter.grad.values()
    return rows


def total_norm(gradients: list[torch.Tensor], norm_type: float) -> Any:
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
