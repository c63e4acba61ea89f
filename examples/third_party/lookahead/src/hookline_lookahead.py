"""Lookahead: slow weights follow the fast ones every few steps (Zhang, Lucas, Hinton, Ba, 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hookline import CallbackInterface, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"


@dataclass(eq=False)
class Lookahead(CallbackInterface):
    """Let slow weights follow the optimizer's every few steps, and train on from them.

    Each optimizer, of any class, takes `every` steps; then slow += alpha * (weights - slow), and weights = slow.
    """

    every: int = 5
    """Steps of an optimizer between two updates of the slow weights."""
    alpha: float = 0.5
    """How far the slow weights go towards the trained ones: 1 is the optimizer alone."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"lookahead.every={self.every} must be a number of steps from 1")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"lookahead.alpha={self.alpha} must be above 0 and at most 1")
        self._steps: dict[str, int] = {}  # of each optimizer, by its place
        self._slow: dict[str, torch.Tensor] = {}  # by the names of parameters
        self._names: dict[int, str] = {}  # by the `id` of parameters

    @hookimpl
    def on_begin_train(self, trainer: Trainer) -> None:
        """Begin with the weights as they are, or with what a checkpoint has."""
        self._look(trainer)

    @hookimpl
    def on_end_optimizer_step(
        self, trainer: Trainer, optimizers: Sequence[torch.optim.Optimizer], stepped: bool
    ) -> None:
        """Count the step; a step that another plugin refused is none."""
        for optimizer in optimizers if stepped else ():
            place = str(trainer.optimizers.index(optimizer))
            self._steps[place] = self._steps.get(place, 0) + 1
            if self._steps[place] % self.every == 0:
                self._follow(trainer, optimizer)

    @torch.no_grad()
    def _follow(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if id(weight) not in self._names:  # it has joined since
                    self._look(trainer)
                slow = self._slow[self._names[id(weight)]]
                slow.lerp_(weight, self.alpha)
                weight.copy_(slow)

    def _look(self, trainer: Trainer) -> None:
        """Take the names of the weights, and slow weights of those that have none."""
        for name, weight in trainer.module.named_parameters():
            self._names[id(weight)] = name
            kept = self._slow.get(name)
            self._slow[name] = weight.detach().clone() if kept is None else kept.to(weight.device)
        own = [
            weight for optimizer in trainer.optimizers for group in optimizer.param_groups for weight in group["params"]
        ]
        if others := sum(id(weight) not in self._names for weight in own):
            raise ValueError(
                f"lookahead: {others} parameter(s) of the optimizers are not of the module; register them in it"
            )

    def get_state(self) -> dict[str, Any]:
        """Return the slow weights, and how far each optimizer is."""
        return {"steps": dict(self._steps), "slow": {name: slow.clone() for name, slow in self._slow.items()}}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._steps = dict(state["steps"])
        self._slow = {name: slow.clone() for name, slow in state["slow"].items()}
