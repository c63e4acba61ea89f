"""Checkpointers in place of the plugin checkpoint: one of the user's own, or PyMarlin's with its files."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, Stage, hookimpl
from hookline.files import make_folder, replacing

if TYPE_CHECKING:
    from hookline import Trainer as Core
    from hookline_pymarlin.arguments import DefaultCheckpointerArguments

log = logging.getLogger("hookline.pymarlin")


@dataclass
class Checkpoint:
    """What a checkpointer stores, and gives back. Each part may be None: then there is nothing to load of it."""

    module_interface_state: Any = None
    """What the module's `get_state` answers. Alone, training begins with these weights."""
    trainer_state: dict[str, Any] | None = None
    """`last_epoch`, `seed`, and all else of the run by sections, among them `optimizers` and `schedulers`."""
    trainer_backend_state: dict[str, Any] | None = None
    """The steps and the micro-batches completed."""


class AbstractCheckpointer(ABC):
    """Stores checkpoints in a way of the user's own. Rank 0 saves, every rank loads."""

    @abstractmethod
    def save(self, checkpoint_state: Checkpoint, index: int, force: bool = False) -> Any:
        """Store a checkpoint: after each epoch, `index` from 0, and once more with `force` at the end of training."""

    @abstractmethod
    def load(self) -> Checkpoint:
        """Return the checkpoint to go on with; `Checkpoint()` where there is none."""

    def save_model(self, model_state: Any, index: int) -> Any:
        """Store the state of the module alone, at the end of training."""


class DefaultCheckpointer(AbstractCheckpointer):
    """Stores checkpoints in PyMarlin's files: `<save_dir>/<file_prefix>_<epoch>.<file_ext>`, by `torch.save`.

    They are read by `torch.load(…, weights_only=True)` alone, which runs no code of a file.
    """

    def __init__(self, args: DefaultCheckpointerArguments) -> None:
        self.args = args

    def save(self, checkpoint_state: Checkpoint, index: int, force: bool = False) -> str | None:
        """Store a checkpoint where `period` says so, or by `force`; return its path."""
        args = self.args
        if not args.checkpoint or not (force or index % args.period == 0):
            return None
        return self._write(vars(checkpoint_state), f"{args.save_dir}/{args.file_prefix}_{index}.{args.file_ext}")

    def save_model(self, model_state: Any, index: int) -> str | None:
        """Store the state of the module in `model_state_save_dir`; return its path."""
        if not self.args.checkpoint or not self.args.model_state_save_dir:
            return None
        return self._write(model_state, self.args.model_path.format(index))

    def load(self) -> Checkpoint:
        """Return the checkpoint of `load_dir`, the newest one unless `load_filename` names one.

        Raises:
            ValueError: it is not there; but if `load_dir` is `save_dir`, and it is empty, training begins anew.
        """
        args = self.args
        if not args.load_dir:
            return Checkpoint()
        folder = Path(args.load_dir)
        if args.load_filename is not None:
            path = folder / args.load_filename
        else:
            found = self.get_latest_file(args.load_dir, args.file_prefix, args.file_ext)
            if not found and folder.resolve() == Path(args.save_dir).resolve():
                log.warning("load_dir=%r is save_dir, and has no checkpoint: begin anew", args.load_dir)
                return Checkpoint()
            path = Path(found or folder / f"{args.file_prefix}_0.{args.file_ext}")
        if not path.is_file():
            raise ValueError(f"load_dir={args.load_dir!r} has no {path.name}")
        return Checkpoint(**torch.load(path, map_location="cpu", weights_only=True))

    @staticmethod
    def get_latest_file(load_dir: str, file_prefix: str, file_ext: str = "pt", logger: Any = None) -> str:
        """Return the checkpoint of the last epoch in a folder, at any depth; "" where there is none."""
        name = re.compile(rf"{re.escape(file_prefix)}_(\d+)\.{re.escape(file_ext)}")
        found = {path: name.fullmatch(path.name) for path in sorted(Path(load_dir).rglob(f"{file_prefix}_*"))}
        epochs = {path: int(match[1]) for path, match in found.items() if match}
        return str(max(epochs, key=epochs.__getitem__)) if epochs else ""

    @staticmethod
    def _write(value: Any, path: str) -> str:
        make_folder(Path(path).parent)
        with replacing(Path(path)) as new:
            torch.save(value, new)
        return path


class Checkpointed(CallbackInterface):
    """Saves and restores by a checkpointer, which loads at once.

    Raises:
        TypeError, ValueError: it loads nothing that can be gone on with.
    """

    def __init__(self, checkpointer: AbstractCheckpointer) -> None:
        self.checkpointer = checkpointer
        self._loaded = loaded(checkpointer)
        self.seed: int | None = (self._loaded.trainer_state or {}).get("seed")
        """Of the run that goes on."""

    @hookimpl
    def on_boundary(self, trainer: Core) -> None:
        if trainer.due("epoch"):
            trainer.save("epoch")

    @hookimpl
    def save(self, trainer: Core, state: Mapping[str, Any] | None) -> bool:
        whole = dict(trainer.hook.get_run_state(trainer=trainer) if state is None else state)
        module, index = whole.pop("module"), trainer.epoch - 1
        counters = {"global_step_completed": trainer.global_step, "batches_completed": trainer.counters.batches}
        ended = trainer.stop_reason is not None or trainer.epoch == trainer.totals.epochs
        if trainer.rank == 0:
            saved = Checkpoint(module, {"last_epoch": index, "seed": trainer.options.seed, **whole}, counters)
            if trainer.due("epoch"):
                self.checkpointer.save(saved, index, False)
            if ended:
                self.checkpointer.save(saved, max(index, 0), True)
                self.checkpointer.save_model(module, max(index, 0))
        return True

    @hookimpl
    def find_state(self, trainer: Core, stage: Stage) -> Mapping[str, Any]:
        return (self._loaded.trainer_state or {}).get("trainer", {})  # type: ignore[no-any-return]

    @hookimpl
    def restore(self, trainer: Core, stage: Stage) -> bool:
        given = self._loaded
        if stage is Stage.TRAIN:  # else training, if it follows, needs it again
            self._loaded = Checkpoint()
        if given.trainer_state:
            state = {**given.trainer_state, "module": given.module_interface_state}
            return bool(trainer.hook.set_run_state(trainer=trainer, state=state, stage=stage))
        if given.module_interface_state is not None:
            trainer.module.update_state(given.module_interface_state)
        return given.module_interface_state is not None


def loaded(checkpointer: AbstractCheckpointer) -> Checkpoint:
    """Return what a checkpointer loads.

    Raises:
        TypeError, ValueError: nothing that can be gone on with.
    """
    given, name = checkpointer.load(), f"{type(checkpointer).__name__}.load()"
    if not isinstance(given, Checkpoint):
        raise TypeError(f"{name} must return a Checkpoint, Checkpoint() where there is none; it is {given!r}")
    if given.trainer_state and "trainer" not in given.trainer_state:
        raise ValueError(
            f"{name} returns a trainer_state of PyMarlin's own, with {', '.join(given.trainer_state)}: such a run "
            "cannot go on here. Return Checkpoint(module_interface_state=…) alone, and training begins with its weights"
        )
    return given
