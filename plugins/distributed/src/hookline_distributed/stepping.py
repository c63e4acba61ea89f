"""Optimizers of weights that ranks share in several ways."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from hookline import CallbackInterface, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer


class Stepping(CallbackInterface):
    """Has `Apart` join where weights are on different meshes: elsewhere it would cost calls in each step."""

    @hookimpl(trylast=True)  # behind those who add weights
    def on_begin_train(self, trainer: Trainer) -> None:
        name = f"{trainer.plugins.get_name(self)}.apart"
        if len(by_mesh(list(trainer.module.parameters()))) > 1 and not trainer.plugins.has_plugin(name):
            trainer.plugins.register(Apart(), name)


class Apart(CallbackInterface):
    """Has weights on different meshes stepped apart: torch does not step a list of both at once."""

    @hookimpl(wrapper=True)
    def step_optimizer(self, optimizer: torch.optim.Optimizer) -> Generator[None, bool, bool]:
        groups = optimizer.param_groups
        if not all("foreach" in group for group in groups):  # such as step each weight by itself
            return (yield)
        finer = [{**group, "params": weights} for group in groups for weights in by_mesh(group["params"])]
        optimizer.param_groups = finer
        try:
            return (yield)
        finally:
            optimizer.param_groups = groups


def by_mesh(weights: Sequence[torch.Tensor]) -> Collection[list[torch.Tensor]]:
    """Return weights with those together that are on the same mesh, or on none."""
    together: dict[Any, list[torch.Tensor]] = {}
    for weight in weights:
        together.setdefault(weight.device_mesh if isinstance(weight, DTensor) else None, []).append(weight)
    return together.values()
