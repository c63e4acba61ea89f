"""Saving and resuming without a disk, for tests of a resume."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hookline.interfaces import CallbackInterface, Stage
from hookline.marks import hookimpl
from hookline.state import copy_state

if TYPE_CHECKING:
    from hookline.trainer import Trainer


@dataclass(eq=False)
class Memory(CallbackInterface):
    """Keep a run's states in this process, and begin a run from one of them."""

    state: Any = None
    """The state to restore; later the last saved one."""
    every: str | None = None
    """Cadence of saving; the end of training saves too."""

    def __post_init__(self) -> None:
        self.states: dict[int, Any] = {}
        """The states by optimizer step."""

    @hookimpl
    def on_boundary(self, trainer: Trainer) -> None:
        if trainer.due(self.every):
            trainer.save(f"every {self.every}")

    @hookimpl
    def save(self, trainer: Trainer, state: Any) -> bool:
        if state is None:
            state = trainer.hook.get_run_state(trainer=trainer)
        self.state = self.states[state["trainer"]["counters"]["global_step"]] = copy_state(state)
        return True

    @hookimpl
    def find_state(self) -> Any:
        return {} if self.state is None else self.state["trainer"]

    @hookimpl
    def restore(self, trainer: Trainer, stage: Stage) -> bool:
        if self.state is None:
            return False
        state = copy_state(self.state)
        return bool(trainer.hook.set_run_state(trainer=trainer, state=state, stage=stage))
