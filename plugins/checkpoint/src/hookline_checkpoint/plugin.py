"""The plugin: when to save, what to take, what to tell of it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookline import CallbackInterface, Stage, copy_state, hookimpl, seconds
from hookline.files import make_folder
from hookline_checkpoint import hf, writing
from hookline_checkpoint.background import Background
from hookline_checkpoint.codec import join, split, tree_to_bytes
from hookline_checkpoint.fingerprint import describe
from hookline_checkpoint.headers import HF
from hookline_checkpoint.layout import contents, own, pack, shares
from hookline_checkpoint.lock import Lock, refuse_locked
from hookline_checkpoint.resuming import Rule, find_state, restore
from hookline_checkpoint.retention import cadences, refuse_no_evaluations, retain, rules_of
from hookline_checkpoint.storage import FOLDER

if TYPE_CHECKING:
    from hookline import Trainer

log = logging.getLogger("hookline.checkpoint")


@dataclass(eq=False)
class Checkpoint(CallbackInterface):
    """Save the run's state into `<run folder>/checkpoints`, and bring it back when `trainer.resume` says so.

    A run that was killed and resumed ends with the bits of one that was not. Reading a
    checkpoint runs no code: its files are safetensors and JSON, and each is checked first.
    """

    every: Any = "epoch"
    """Cadence, or a list of them; null to save nothing and only resume. The end of training is saved as well."""
    keep_last: int | None = 3
    """How many checkpoints stay; null to keep all."""
    keep_every: str | None = None
    """Cadence in steps or epochs: checkpoints at a multiple of it stay for ever."""
    keep_best: int = 0
    """How many checkpoints stay as the best by `monitor`."""
    monitor: str = "val_loss"
    """Metric of the evaluation by which they are the best."""
    mode: str | None = None
    """Whether the smallest ("min") or the largest ("max") is the best; null: what the verb get_mode answers."""
    strict: bool = False
    """Refuse, instead of warning, to resume a run that cannot go on exactly, or what others may have changed."""
    on_error: str = "stop"
    """What to do where a checkpoint cannot be written: "stop" raises; "go_on" warns, and the next save tries again."""
    asynchronous: bool = False
    """Write in the background; training waits only while the state is copied. Takes memory for one more state."""
    timeout: str = "10 min"
    """How long a save in the background may take before the run ends, or a rank wait for another in any save."""
    initial: str | None = None
    """A folder in Hugging Face's format, or a safetensors file, with whose weights a run begins that is not resumed."""
    initial_strict: bool = True
    """Refuse an `initial` that lacks tensors of the module, or has others; false warns of it."""

    def __post_init__(self) -> None:
        self._cadences = cadences(self.every)
        self._retention = rules_of(self.keep_last, self.keep_every, self.keep_best, self.monitor, self.mode)
        self._monitored = False  # whether an evaluation has had the value of `monitor`
        self._finite = False  # and whether one had a finite one
        self._known_mode: str | None = None  # which of its values is the best, where that is known
        self._prepared: Path | None = None
        self._good: set[Path] = set()
        self._lock: Lock | None = None
        self._hf: dict[str, list[bytes]] = {}  # the file, if the module says what it is in Hugging Face's format
        self._group: Any = None  # of all ranks; where they have shares of the model, each writes its own
        if self.on_error not in ("stop", "go_on"):
            raise ValueError(f"checkpoint.on_error={self.on_error!r} must be stop or go_on")
        self._timeout = seconds(self.timeout, "checkpoint.timeout")
        self._background: Background[Path | None] | None = None
        if not self.asynchronous:
            self.run = None  # type: ignore[assignment,method-assign]  # hides the wrapper: nothing is to be waited for
        if self.initial is None:
            self.setup_optimizers = None  # type: ignore[assignment,method-assign]
        if not (self.keep_best and self._cadences):
            for hook in ("get_watched_metrics", "on_end_train"):
                setattr(self, hook, None)  # hides it

    @hookimpl
    def find_state(self, trainer: Trainer, stage: Stage) -> Mapping[str, Any]:
        return find_state(trainer, self._rule(trainer))

    @hookimpl
    def restore(self, trainer: Trainer, stage: Stage) -> bool:
        if stage is not Stage.TRAIN and self.initial is not None and trainer.resuming is None:
            self._begin_with(trainer, self.initial)
        if not trainer.options.resume:
            return False
        if stage is Stage.TRAIN and self._cadences and trainer.rank == 0:
            refuse_locked(trainer.run_dir)  # before reading, since whoever has it removes what is read
        return restore(trainer, stage, self.strict, self._rule(trainer))

    @hookimpl(wrapper=True, tryfirst=True)  # who makes optimizers may keep weights of its own
    def setup_optimizers(self, trainer: Trainer) -> Generator[None, Any, Any]:
        if self.initial is not None and trainer.resuming is None:
            self._begin_with(trainer, self.initial)
        return (yield)

    def _begin_with(self, trainer: Trainer, source: str) -> None:
        from hookline_checkpoint.initial import begin_with  # needs torch.distributed, which is slow to import

        begin_with(trainer, source, self.initial_strict)

    def _rule(self, trainer: Trainer) -> Rule:
        return self.monitor, functools.partial(self._mode_of, trainer)

    def _mode_of(self, trainer: Trainer) -> str:
        """Return whether the best by `monitor` is where it is the least ("min") or the largest ("max")."""
        try:
            return self.mode or str(trainer.hook.get_mode(trainer=trainer, metric=self.monitor))
        except ValueError as error:
            raise ValueError(f"checkpoint.monitor={self.monitor!r}: {error}") from None

    @hookimpl(trylast=True)
    def on_begin_train(self, trainer: Trainer) -> None:
        """Refuse now what could not be stored later, when the other plugins have made what they keep.

        Raises:
            LockedError: another job saves into this run folder.
            ValueError: nobody knows which value of `monitor` is the best; or `every` counts evaluations, and there
                are none.
        """
        refuse_no_evaluations(trainer, self._cadences)
        try:
            self._known_mode = self._mode_of(trainer)
        except ValueError:
            if self.keep_best:
                raise
        if self._retention is not None and self._known_mode:
            self._retention = dataclasses.replace(self._retention, mode=self._known_mode)
        self._finite = math.isfinite(trainer.metrics.get(self.monitor, math.nan))  # of what is resumed
        if self._cadences:
            for name, plugin in trainer.plugins.stateful():
                tensors, tree = split(plugin.get_state(), f"plugins.{name}")
                join(tensors, json.loads(tree_to_bytes(tree)))
            if trainer.rank == 0:
                said = hf.described(trainer.module)
                self._hf = {} if said is None else {HF: [tree_to_bytes(split(said, hf.METHOD)[1])]}
                self._lock = Lock(trainer.run_dir)
                writing.sweep(trainer.run_dir)

    @hookimpl(wrapper=True)
    def run(self, trainer: Trainer) -> Generator[None, bool, bool]:
        background = self._background = Background(self._timeout)
        try:
            answer = yield
        except BaseException as error:
            self._background = None  # what is saved from here on is saved in the foreground
            try:
                self._finish(trainer, background.take)
            except Exception as another:
                error.add_note(f"and the save under way failed: {type(another).__name__}: {another}")
            raise
        self._background = None
        self._finish(trainer, background.take)
        return answer

    @hookimpl(trylast=True)
    def on_end_run(self) -> None:
        self._group = None  # as it is left with the others of this process
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    @hookimpl(wrapper=True)
    def get_watched_metrics(self) -> Generator[None, dict[str, str], dict[str, str]]:
        return (yield) | {self.monitor: f"checkpoint.monitor={self.monitor!r}"}

    @hookimpl
    def on_end_train(self, trainer: Trainer) -> None:  # type: ignore[override]
        """Say why no checkpoint could be kept as the best."""
        if not self._finite and trainer.rank == 0:
            why = f"gave a finite {self.monitor}" if self._monitored else "came after a step"
            log.warning("checkpoint.keep_best=%d has kept none as the best: no evaluation %s", self.keep_best, why)

    @hookimpl
    def on_boundary(self, trainer: Trainer) -> None:
        if self._background is not None:
            self._finish(trainer, functools.partial(self._background.take, wait=False))
        if self.keep_best and trainer.due("eval"):
            self._monitored = True
            self._finite = self._finite or math.isfinite(trainer.metrics.get(self.monitor, math.nan))
        for text in self._cadences:
            if trainer.due(text):
                trainer.save(f"every {text}")

    @hookimpl
    def save(self, trainer: Trainer, reason: str, state: Mapping[str, Any] | None) -> bool:
        if not self._cadences:
            return False
        if state is None:
            state = trainer.hook.get_run_state(trainer=trainer)
        owned = trainer.hook.all_gather(trainer=trainer, value=own(state))
        parts = pack(state, owned)
        shared = shares(parts)
        if trainer.rank != 0 and not shared:
            return True
        background = self._background
        if background is not None:
            self._finish(trainer, background.take)  # before the copy: one state more in memory, not two
            if trainer.rank == 0:
                parts = copy_state(parts)
                shared = shares(parts)
            else:
                shared = copy_state(shared)
        if shared and self._group is None:
            self._group = sharded().meet(self._timeout)
        write: Callable[[], Path | None]
        if trainer.rank != 0:
            write = functools.partial(sharded().follow, self._group, shared)
        else:
            about = describe(trainer, reason, state["trainer"]) | {"monitor": self.monitor, "mode": self._known_mode}
            begun = len(state.get("window", {}).get("outputs", ()))
            step = state["trainer"]["counters"]["global_step"]
            files = itertools.chain(contents(parts), self._hf.items())
            put = functools.partial(self._put, trainer.run_dir / FOLDER, step, files, about, begun)
            if shared:
                put = functools.partial(sharded().lead, self._group, shared, put)
            write = functools.partial(self._write, put, reason)
        if background is None:
            return self._finish(trainer, write)
        background.start(write)
        return True

    def _put(self, folder: Path, *what: Any) -> Path:
        """Write a checkpoint into its folder, which is made before the first."""
        if self._prepared != folder:
            make_folder(folder, writing.FOLDER_MODE)
            self._prepared = folder
        return writing.write(folder, *what)

    def _write(self, put: Callable[[], Path], reason: str) -> Path:
        """Write a checkpoint and remove what is not needed any more; in the background too, so ask nobody else."""
        began = time.monotonic()
        path = put()
        took = time.monotonic() - began
        self._good.add(path)
        if self._retention is not None:
            retain(path, self._retention, self._good)
        log.info("saved %s in %.2f s (%s)", path, took, reason)
        return path

    def _finish(self, trainer: Trainer, write: Callable[[], Path | None]) -> bool:
        """Bring a save to its end and tell of it; answer whether it did not fail."""
        try:
            path = write()
        except OSError as error:
            if self.on_error == "stop":
                raise
            said = "; ".join([str(error), *getattr(error, "__notes__", ())])
            log.warning("no checkpoint could be written: %s; training goes on, and the next save tries it again", said)
            return False
        if path is not None:
            trainer.hook.on_checkpoint(trainer=trainer, path=path, kind="checkpoint")
        return True


Checkpoint.__module__ = "hookline_checkpoint"  # its public home, by which it is known as that distribution's plugin


def sharded() -> Any:
    """Return the module for what ranks have shares of, which needs torch.distributed and is slow to import."""
    return importlib.import_module("hookline_checkpoint.sharded")
