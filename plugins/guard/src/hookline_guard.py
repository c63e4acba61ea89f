"""Keep the last whole state in memory, and have it saved when training raises."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, copy_state, hookimpl
from hookline import every as cadence

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

log = logging.getLogger("hookline.guard")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, of a device or of the host."""
    told = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in told)
    )


KINDS: dict[str, Callable[[BaseException], bool]] = {
    "keyboard": lambda error: isinstance(error, KeyboardInterrupt),
    "out_of_memory": is_out_of_memory,
    "error": lambda error: isinstance(error, Exception),
    "any": lambda error: True,
}


@dataclass(eq=False)
class Guard(CallbackInterface):
    """Keep the state of the last boundary of a cadence in memory, and have it saved before an error ends the run.

    In the middle of an update nothing whole can be saved, so what is saved is that copy. The
    error is raised in any case.
    """

    errors: list[str] = field(default_factory=lambda: ["any"])
    """Which errors lead to a save: "keyboard", "out_of_memory", "error" (all but an interrupt or exit) or "any"."""
    every: str = "10 min"
    """Cadence of the copy: how much work an error may cost."""

    def __post_init__(self) -> None:
        if not self.errors or not {*self.errors} <= {*KINDS}:
            raise ValueError(
                f"guard.errors={[*self.errors]} must name at least one of {', '.join(KINDS)}, and no other"
            )
        try:
            cadence(self.every)
        except ValueError as error:
            raise ValueError(f"guard.every={self.every!r}: {error}") from None
        self._copy: Any = None

    @hookimpl
    def on_begin_run(self) -> None:
        self._copy = None

    @hookimpl(trylast=True)
    def on_boundary(self, trainer: Trainer) -> None:
        if trainer.due(self.every):
            self._copy = copy_state(trainer.hook.get_run_state(trainer=trainer))

    @hookimpl(wrapper=True)
    def save(self) -> Generator[None, bool, bool]:
        stored = yield
        if stored:
            self._copy = None  # what is on disk is as new
        return stored

    @hookimpl
    def on_exception(self, trainer: Trainer, exception: BaseException) -> None:
        if not any(KINDS[kind](exception) for kind in self.errors):
            return
        if self._copy is None:
            log.warning("guard has nothing to save: it holds no state that is newer than what is saved")
            return
        if trainer.world_size > 1:
            log.warning("guard saves nothing: other ranks may still be training, and would be waited for without end")
            return
        step, now = self._copy["trainer"]["counters"]["global_step"], trainer.global_step
        if trainer.hook.save(trainer=trainer, reason=f"{type(exception).__name__} after step {now}", state=self._copy):
            log.warning("guard had the state of step %d saved; the run raised after step %d", step, now)
        else:
            log.warning("guard has the state of step %d, but nobody saves it: name a plugin that does, "
                        "e.g. `plugins: {checkpoint: {}}`", step)  # fmt: skip
