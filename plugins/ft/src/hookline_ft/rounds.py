"""Rounds of steps that each replica does on its own, and the synchronization of weights after each (torchft)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from hookline import copy_state, instantiate

if TYPE_CHECKING:
    from hookline import Trainer

ROUND = 2**32  # more than the steps of a run: a place in the run is rounds * ROUND + steps


class Meeting:
    """What is mixed into torchft's manager, so that the plugin says when replicas meet, and can keep all states."""

    def __init__(self, **options: Any) -> None:
        self.parts: dict[str, tuple[Callable[[Any], None], Callable[[], Any]]] = {}
        super().__init__(**options)

    def register_state_dict_fn(
        self, key: str, load_state_dict: Callable[[Any], None], state_dict: Callable[[], Any]
    ) -> None:
        """Register a state that a newcomer takes; keep those of torchft's own classes for checkpoints."""
        if key != "default":
            self.parts[key] = (load_state_dict, state_dict)
        super().register_state_dict_fn(key, load_state_dict, state_dict)  # type: ignore[misc]

    def start_quorum(self) -> None:
        """Do nothing: when torchft's classes call it, the replicas have met."""

    def meet(self) -> None:
        """Agree on who takes part; one who is behind takes the state of another."""
        super().start_quorum()  # type: ignore[misc]


class Rounds:
    """Count rounds, and let torchft synchronize the weights after each."""

    def __init__(self, every: int, outer: Mapping[str, Any] | None) -> None:
        self.every, self.outer = every, outer
        self.done = 0
        """Rounds after which the weights were synchronized."""
        self.met: int | None = None
        """The step after which the replicas met last; the run begins as if they had."""
        self.parts: dict[str, Any] = {}
        self.manager: Any = None

    def begin(self, manager: Any, trainer: Trainer) -> None:
        """Let torchft synchronize the weights that are trained."""
        self.manager = manager
        self.trained = [parameter for parameter in trainer.module.parameters() if parameter.requires_grad]
        weights = torch.nn.ParameterList(self.trained)
        # torchft counts the steps of an optimizer. This one steps once a round, when the step of the run is complete.
        self.clock = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        local_sgd = importlib.import_module("torchft.local_sgd")
        if self.outer is None:
            self.engine = local_sgd.LocalSGD(manager, weights, self.clock, sync_every=1)
        else:
            outer = instantiate({**self.outer, "params": self.trained}, "ft.outer")
            if not isinstance(outer, torch.optim.Optimizer):
                raise ValueError(f"ft.outer._target_={self.outer['_target_']} is no torch.optim.Optimizer")
            self.engine = local_sgd.DiLoCo(manager, [weights], self.clock, outer, sync_every=1)
        self.engine.__enter__()
        self._set_parts()
        self.met = trainer.global_step if self.met is None else self.met

    def due(self, step: int) -> bool:
        """Tell whether a round ends with this step, and the replicas have not met after it."""
        return step % self.every == 0 and step != self.met

    def arrive(self, step: int) -> None:
        """Tell the others how far this replica is: who has synchronized less often, or done fewer steps, is behind."""
        self.manager.load_state_dict({**self.manager.state_dict(), "step": self.done * ROUND + step})

    def synchronize(self, trainer: Trainer) -> bool:
        """Average with the others, when all have met; return whether all went well."""
        if {*map(id, self.trained)} != {id(one) for one in trainer.module.parameters() if one.requires_grad}:
            raise ValueError(
                "ft.sync_every: other parameters are trained now than when training began; freeze or thaw them "
                "between runs"
            )
        before = self.manager.current_step()
        self.done, self.met = divmod(before, ROUND)  # of another, if this replica was behind
        self.clock.step()
        fine: bool = self.manager.current_step() > before
        self.done += fine
        return fine

    def get_state(self) -> dict[str, Any]:
        """Return the rounds, the last synchronized weights, and the state of the outer optimizer."""
        if self.manager is not None:
            self.parts = {key: copy_state(state()) for key, (_, state) in self.manager.parts.items()}
        return {"step": self.done, "met": self.met, "parts": self.parts}

    def update_state(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.done, self.met, self.parts = state["step"], state.get("met"), state.get("parts", {})
        if self.manager is not None:
            self._set_parts()

    def _set_parts(self) -> None:
        for key, (load, _) in self.manager.parts.items():
            if key in self.parts:
                load(copy_state(self.parts[key]))
