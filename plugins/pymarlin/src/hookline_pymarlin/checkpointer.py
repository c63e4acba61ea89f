"""A checkpointer of the user's own, in place of the plugin checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hookline import CallbackInterface, Stage, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer as Core


@dataclass
class Checkpoint:
    """What a checkpointer stores, and gives back."""

    module_interface_state: Any = None
    """What the module's `get_state` answers."""
    trainer_state: dict[str, Any] = field(default_factory=dict)
    """All else of the run, by sections; None was stored of a run that has not begun."""
    trainer_backend_state: dict[str, Any] = field(default_factory=dict)
    """What there was of a backend; empty, since its counters are those of the run."""


class AbstractCheckpointer(ABC):
    """Stores checkpoints in a way of the user's own. Rank 0 saves, every rank loads."""

    @abstractmethod
    def save(self, state: Checkpoint, index: int, force: bool = False) -> None:
        """Store a checkpoint: after each epoch, `index` from 0, and with `force` at the end of training."""

    @abstractmethod
    def load(self) -> Checkpoint:
        """Return the checkpoint to go on with; one without `trainer_state` where there is none."""

    def save_model(self, state: Any, index: int) -> None:
        """Store the state of the module alone."""


class Checkpointed(CallbackInterface):
    """Saves and restores by a checkpointer of the user's own."""

    def __init__(self, checkpointer: AbstractCheckpointer) -> None:
        self.checkpointer = checkpointer

    @hookimpl
    def on_boundary(self, trainer: Core) -> None:
        if trainer.due("epoch"):
            trainer.save("epoch")

    @hookimpl
    def save(self, trainer: Core, state: Mapping[str, Any] | None) -> bool:
        whole = dict(trainer.hook.get_run_state(trainer=trainer) if state is None else state)
        module = whole.pop("module")
        if trainer.rank == 0:
            index = max(trainer.epoch - 1, 0)
            ended = trainer.epoch == trainer.totals.epochs or trainer.stop_reason is not None
            self.checkpointer.save(Checkpoint(module, whole), index, force=ended)
            self.checkpointer.save_model(module, index)
        return True

    @hookimpl
    def restore(self, trainer: Core, stage: Stage) -> bool:
        loaded = self.checkpointer.load()
        if not loaded.trainer_state:
            return False
        state = {**loaded.trainer_state, "module": loaded.module_interface_state}
        return bool(trainer.hook.set_run_state(trainer=trainer, state=state, stage=stage))
