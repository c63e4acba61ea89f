"""End a run that shows no sign of life, with the stacks of all threads of all its processes."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from hookline import CallbackInterface, Stage, hookimpl, seconds
from hookline_watchdog import timer
from hookline_watchdog.processes import Process, end_stopped, this_process
from hookline_watchdog.timer import STDERR

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

EXIT_CODE = 124
"""Of a process that the watchdog ends, as of the command `timeout`."""

KILLED = "killed rank {rank} (process {pid} on {host}), which was stopped and could not have ended itself"
MISSING = "no stacks came from rank {rank} (process {pid} on {host}): it is gone, or cannot run or reach this folder"

log = logging.getLogger("hookline.watchdog")


class Phase(NamedTuple):
    """What a run is doing."""

    name: str
    option: str
    """Which option says how long it may be silent."""


START = Phase("the start", "start_timeout")
RESTORE = Phase("restore", "start_timeout")
TRAINING = Phase("training", "timeout")
PREDICTING = Phase("prediction", "timeout")
BETWEEN_EPOCHS = Phase("the end of an epoch", "timeout")
SAVE = Phase("save", "save_timeout")
END = Phase("the end of training", "save_timeout")
ERROR = Phase("what follows an error", "save_timeout")
TEARDOWN = Phase("teardown", "save_timeout")


@dataclass(eq=False)
class Watchdog(CallbackInterface):
    """End this process when its run has shown no sign of life for too long, and those of the other ranks with it.

    Before that the stacks of all threads are written to stderr and into the run folder.
    """

    timeout: str = "10 min"
    """How long a training step, an evaluation batch or the end of an epoch may take."""
    start_timeout: str = "30 min"
    """How long restoring, and the first step or evaluation batch with its loading and compiling, may take, each."""
    save_timeout: str = "30 min"
    """How long a save may take; also what comes after training, where saves in the background are waited for."""

    def __post_init__(self) -> None:
        options = ("timeout", "start_timeout", "save_timeout")
        self._limits = {option: seconds(getattr(self, option), f"watchdog.{option}") for option in options}
        self._tick = min(min(self._limits.values()) / 20, 5.0)
        self._signs = 0  # of life, so far
        self._phase = START
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._ranks: dict[int, Process] = {}
        self._folder: Path | None = None  # of this run's dumps; that it is there asks every rank for its own

    # Signs of life --------------------------------------------------------------------

    @hookimpl(tryfirst=True)
    def on_begin_run(self, trainer: Trainer) -> None:
        self._enter(START)
        self._ranks, self._folder = {}, None
        self._over.clear()
        self._thread = threading.Thread(
            target=self._watch, args=[weakref.ref(trainer)], name="hookline-watchdog", daemon=True
        )
        self._thread.start()

    @hookimpl(wrapper=True)
    def run(self, trainer: Trainer, stage: Stage) -> Generator[None, bool, bool]:
        self._meet(trainer)
        listener = "the watchdog's ear for predictions"
        if stage is Stage.PREDICT:
            trainer.plugins.register(_Predictions(self), listener)
        try:
            return (yield)
        finally:
            if stage is Stage.PREDICT:
                trainer.plugins.unregister(name=listener)
            self._enter(TEARDOWN)

    @hookimpl(wrapper=True, tryfirst=True)
    def restore(self) -> Generator[None, bool, bool]:
        with self._during(RESTORE):
            return (yield)

    @hookimpl
    def on_end_train_step(self) -> None:  # type: ignore[override]
        self._signs += 1
        if self._phase is not TRAINING:
            self._enter(TRAINING)

    @hookimpl(wrapper=True, tryfirst=True)
    def evaluate(self, stage: Stage) -> Generator[None, Any, Any]:
        with self._during(Phase(f"the start of an evaluation ({stage.value})", "start_timeout")):
            return (yield)

    @hookimpl
    def on_end_val_step(self) -> None:
        self._enter(Phase("evaluation (val)", "timeout"))

    @hookimpl
    def on_end_test_step(self) -> None:
        self._enter(Phase("evaluation (test)", "timeout"))

    @hookimpl(tryfirst=True)
    def on_end_train_epoch(self) -> None:  # type: ignore[override]
        self._enter(BETWEEN_EPOCHS)

    @hookimpl(wrapper=True, tryfirst=True)
    def save(self) -> Generator[None, bool, bool]:
        with self._during(SAVE):
            return (yield)

    @hookimpl(tryfirst=True)
    def on_end_train(self) -> None:  # type: ignore[override]
        self._enter(END)

    @hookimpl(tryfirst=True)
    def on_exception(self, trainer: Trainer) -> None:
        self._enter(ERROR)
        others = self._others(trainer)
        for rank in end_stopped(others):
            log.warning("watchdog: %s", KILLED.format(rank=rank, **others[rank]._asdict()))

    @hookimpl(trylast=True)
    def on_end_run(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _enter(self, phase: Phase) -> None:
        former, self._phase = self._phase, phase
        self._signs += 1
        if former.option != phase.option and self._thread is not None:
            self._set_timer(phase)  # the thread looks only now and then, and may find the interpreter held

    def _set_timer(self, phase: Phase) -> None:
        timer.set_to(self._limits[phase.option] + self._tick)

    @contextlib.contextmanager
    def _during(self, phase: Phase) -> Iterator[None]:
        outer = self._phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(outer)

    def _meet(self, trainer: Trainer) -> None:
        """Let all ranks know the processes of all, and agree on a folder."""
        if trainer.world_size > 1:
            told = trainer.hook.all_gather(trainer=trainer, value=(this_process(), time.strftime("%Y%m%d-%H%M%S")))
            self._ranks = {rank: process for rank, (process, _) in enumerate(told)}
            process, now = told[0]
            self._folder = trainer.run_dir / f"watchdog-{now}-{process.pid}"

    def _others(self, trainer: Trainer) -> dict[int, Process]:
        return {rank: process for rank, process in self._ranks.items() if rank != trainer.rank}

    # The thread -----------------------------------------------------------------------

    def _watch(self, trainer_ref: weakref.ref[Trainer]) -> None:
        """Measure the silence. Nothing of this waits for another rank."""
        signs, silence, before, warned = -1, 0.0, time.monotonic(), set[str]()
        try:
            while True:
                phase, seen, now = self._phase, self._signs, time.monotonic()
                # Of a tick that took long no more is counted: the process was stopped, or its machine too busy.
                silence = silence + min(now - before, 2 * self._tick) if seen == signs else 0.0
                signs, before, limit = seen, now, self._limits[phase.option]
                self._set_timer(phase)  # for what keeps this thread from running: the interpreter is held
                trainer = trainer_ref()
                if trainer is None:
                    return
                asked = self._folder is not None and os.path.isdir(self._folder)
                if silence >= limit:
                    self._end(trainer, phase, f"no sign of life for {self._allowed(phase)}")
                elif asked:
                    self._end(trainer, phase, "ended by the silence of another rank")
                elif silence >= limit / 2 and phase.name not in warned:
                    warned.add(phase.name)
                    what = f"no sign of life for half of {self._allowed(phase)}"
                    log.warning("watchdog: %s", self._told(trainer, phase, what))
                del trainer
                if self._over.wait(self._tick):
                    return
        finally:
            timer.clear()

    def _told(self, trainer: Trainer, phase: Phase, what: str) -> str:
        who = f"rank {trainer.rank} of {trainer.world_size} (process {os.getpid()})"
        return f"{who}: {what}; phase: {phase.name}, after step {trainer.global_step}"

    def _allowed(self, phase: Phase) -> str:
        return f"{getattr(self, phase.option)} (watchdog.{phase.option})"

    def _end(self, trainer: Trainer, phase: Phase, what: str) -> NoReturn:
        """Write the stacks, have other ranks do so too, and end this process at once, whatever its threads do."""
        patience = 2 * self._tick + 1  # in which every other rank has looked for the folder
        timer.set_to(patience + 10)  # a file system that hangs must not hold this up
        told = f"watchdog: {self._told(trainer, phase, what)}; the stacks of its threads:\n"
        with contextlib.suppress(OSError):
            _write_stacks(STDERR, told)
        with contextlib.suppress(OSError):
            if self._folder is None and trainer.world_size == 1:
                self._folder = trainer.run_dir / f"watchdog-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
            if self._folder is not None:
                _write_file(self._folder, trainer.rank, told)
                _write_collectives(self._folder, trainer.rank)
                _say(f"watchdog: the stacks are in {self._folder}")
        self._await_others(trainer, patience)
        _say(f"watchdog: rank {trainer.rank} ends with exit code {EXIT_CODE}")
        os._exit(EXIT_CODE)

    def _await_others(self, trainer: Trainer, patience: float) -> None:
        """Wait for the stacks of other ranks, not for ever; say who is missing, and kill those that are stopped."""
        deadline, missing = time.monotonic() + patience, self._others(trainer)
        while missing and time.monotonic() < deadline:
            time.sleep(self._tick / 10)
            missing = {rank: process for rank, process in missing.items() if not self._has_written(rank)}
        killed = end_stopped(missing)
        for rank, process in missing.items():
            _say("watchdog: " + (KILLED if rank in killed else MISSING).format(rank=rank, **process._asdict()))

    def _has_written(self, rank: int) -> bool:
        return self._folder is not None and _file(self._folder, rank).exists()


class _Predictions(CallbackInterface):
    """Hears predictions: not the plugin itself, since who predicts is warned where nobody else takes them."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog

    @hookimpl
    def on_end_predict_step(self) -> None:
        self.watchdog._enter(PREDICTING)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:04d}.txt"


def _write_file(folder: Path, rank: int, told: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = _file(folder, rank)
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        _write_stacks(file.fileno(), told)
    part.rename(path)  # so that one that is there is whole


def _write_collectives(folder: Path, rank: int) -> None:
    """Write what torch's flight recorder, where there is one, has kept of this rank's last collectives."""
    recorder = getattr(sys.modules.get("torch._C._distributed_c10d"), "_dump_fr_trace_json", None)
    if recorder is not None:  # it is not public, so it may be gone in another version
        _file(folder, rank).with_suffix(".json").write_bytes(recorder())


def _write_stacks(descriptor: int, told: str) -> None:
    os.write(descriptor, told.encode())
    faulthandler.dump_traceback(descriptor, all_threads=True)


def _say(line: str) -> None:
    """Write to stderr past all objects of Python, whose locks somebody may hold."""
    with contextlib.suppress(OSError):
        os.write(STDERR, f"{line}\n".encode())
