"""Turn signals into a save and an orderly end of training."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Generator
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from hookline import CallbackInterface, Stage, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

UNCATCHABLE = ("SIGKILL", "SIGSTOP")


@dataclass(eq=False)
class Signals(CallbackInterface):
    """End training at the next boundary when a signal asks for it, saved and to be gone on with, or only save.

    A second signal of those that stop does at once what it would do without this plugin.
    """

    stop_on: list[str] = field(default_factory=lambda: ["SIGTERM", "SIGINT"])
    """Signals that save and end training, as preempted."""
    save_on: list[str] = field(default_factory=lambda: ["SIGUSR1"])
    """Signals that save and let training go on."""
    exit_codes: dict[str, int] = field(default_factory=dict)
    """Exit code of the command line by signal; 128 + its number where it is not named."""
    within_window: bool = False
    """Save and end behind the micro-batch under way, not the optimizer step: for a short notice and long windows."""

    def __post_init__(self) -> None:
        for option in ("stop_on", "save_on"):
            for name in getattr(self, option):
                if name not in signal.Signals.__members__ or name in UNCATCHABLE:
                    raise ValueError(
                        f"signals.{option}: {name!r} is no signal that a program can catch; write names such as "
                        "SIGTERM, SIGINT, SIGUSR1 or SIGUSR2"
                    )
        if both := sorted({*self.stop_on} & {*self.save_on}):
            raise ValueError(
                f"signals.stop_on and signals.save_on both name {', '.join(both)}; leave it in one of them"
            )
        for name, code in self.exit_codes.items():
            if name not in self.stop_on:
                raise ValueError(
                    f"signals.exit_codes.{name}={code}: only signals of stop_on end a run: {', '.join(self.stop_on)}"
                )
            if not 0 < code < 256:
                raise ValueError(
                    f"signals.exit_codes.{name}={code} must be from 1 to 255; 0 would say that the run is done"
                )
        if not self.within_window:
            self.on_end_backward = None  # type: ignore[assignment,method-assign]  # costs nothing where it is not asked for
        self._former: dict[int, Any] = {}
        self._stop = self._save = 0

    @hookimpl(wrapper=True)
    def run(self, stage: Stage) -> Generator[None, bool, bool]:
        self._stop = self._save = 0
        if stage is not Stage.TRAIN:
            return (yield)
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                "signals: training runs outside of the main thread, which alone can handle signals; they do what "
                "they do without this plugin",
                stacklevel=2,
            )
            return (yield)
        try:
            for name in self.stop_on:
                self._install(name, self._on_stop)
            for name in self.save_on:
                self._install(name, self._on_save)
            return (yield)
        finally:
            self._put_back()

    def _install(self, name: str, handler: Any) -> None:
        """Handle a signal, unless whoever started this process has it ignored (`nohup`, `&` in a script)."""
        number = signal.Signals[name]
        former = signal.getsignal(number)
        if former not in (None, signal.SIG_IGN):  # None is a handler that is not Python's: it could not be put back
            self._former[number] = former
            signal.signal(number, handler)

    def _put_back(self) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former.clear()

    # A handler comes in the middle of anything, a write or a held lock: it notes the signal, and no more.

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop = number
        for each in self._former:
            if signal.Signals(each).name in self.stop_on:
                signal.signal(each, self._former[each])

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._save = number

    @hookimpl
    def on_boundary(self, trainer: Trainer) -> None:
        if self._save:
            number, self._save = self._save, 0
            trainer.save(f"received {signal.Signals(number).name}", alone=True)
        self._end(trainer)

    @hookimpl
    def on_end_backward(self, trainer: Trainer) -> None:  # type: ignore[override]
        self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        if self._stop:
            name = signal.Signals(self._stop).name
            code = self.exit_codes.get(name, 128 + self._stop)
            trainer.stop(f"received {name}", "preempted", code, within_window=self.within_window)
