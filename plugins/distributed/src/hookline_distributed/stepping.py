"""Optimizers of weights that ranks share in several ways."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from hookline import CallbackInterface, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer


class Stepping(CallbackInterface):
    """Has weights on different meshes stepped apart: torch does not step a list of both at once."""

    def __init__(self) -> None:
        self._several = False

    @hookimpl(trylast=True)  # behind those who add weights
    def on_begin_train(self, trainer: Trainer) -> None:
        self._several = len(list(by_mesh(list(trainer.module.parameters())))) > 1

    @hookimpl(wrapper=True)
    def step_optimizer(self, optimizer: torch.optim.Optimizer) -> Generator[None, bool, bool]:
        groups = optimizer.param_groups
        if not self._several or not all("foreach" in group for group in groups):  # such as step each weight by itself
            return (yield)
        finer = [{**group, "params": weights} for group in groups for weights in by_mesh(group["params"])]
        optimizer.param_groups = finer
        try:
            return (yield)
        finally:
            optimizer.param_groups = groups


def by_mesh(weights: Sequence[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """Return weights with those together that are on the same mesh, or on none."""
    together: dict[Any, list[torch.Tensor]] = {}
    for weight in weights:
        together.setdefault(weight.device_mesh if isinstance(weight, DTensor) else None, []).append(weight)
    return together.values()
