"""Save the whole state of a run, and go on with it exactly where it was."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import hookline
from hookline import CallbackInterface, Stage, hookimpl
from hookline import every as cadence
from hookline_checkpoint import storage
from hookline_checkpoint.codec import join, split, tree_to_bytes
from hookline_checkpoint.layout import pack, unpack
from hookline_checkpoint.storage import CheckpointError as CheckpointError

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

FOLDER = "checkpoints"

log = logging.getLogger("hookline")


def cadences(given: Any) -> list[str]:
    """Return the cadences of `checkpoint.every`, each of them checked.

    Raises:
        ValueError: one is none, with examples.
    """
    if given is None:
        return []
    texts = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not texts:
        raise ValueError("checkpoint.every=[] names no cadence; write null to save nothing")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(
                f'checkpoint.every={given!r}: a cadence is a text such as "epoch", "500 steps" or "10 min", '
                "or a list of them, or null to save nothing"
            )
        try:
            cadence(text)
        except ValueError as error:
            raise ValueError(f"checkpoint.every={given!r}: {error}") from None
    return texts


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

    def __post_init__(self) -> None:
        self._cadences = cadences(self.every)
        if self.keep_last is not None and not self.keep_last >= 1:
            raise ValueError(f"checkpoint.keep_last={self.keep_last} must be at least 1, or null to keep all")
        self._prepared: Path | None = None
        self._good: set[Path] = set()

    @hookimpl
    def restore(self, trainer: Trainer, stage: Stage) -> bool:
        resume = trainer.options.resume
        if not resume:
            return False
        named = Path(str(resume))
        folder = trainer.run_dir / FOLDER
        if storage.NAME.fullmatch(named.name):
            path, state = named, self._read_named(named, trainer.rank)
            newer = [other.name for other in storage.listed(named.parent) if other.name > named.name]
            if newer:
                log.warning(
                    "going on with %s, while newer checkpoints stay: %s. They are not replaced when this run comes "
                    "to their steps, and resume=true would take the newest; remove them if they are not wanted",
                    named, ", ".join(newer),
                )  # fmt: skip
        elif storage.listed(folder):
            path, state = storage.newest_good(folder, lambda path: unpack(path, trainer.rank))
        elif stage is Stage.TRAIN:
            log.warning("no checkpoint yet in %s: starting from scratch", folder)
            return False
        else:
            raise ValueError(
                f"resume={resume!r}: there is no checkpoint in {folder} to {stage.value} with; name a run or a "
                "checkpoint folder that has one, or leave resume away"
            )
        trainer.hook.set_run_state(trainer=trainer, state=state, stage=stage)
        log.info("resumed from %s", path)
        return True

    @staticmethod
    def _read_named(path: Path, rank: int) -> dict[str, Any]:
        try:
            return unpack(path, rank)
        except CheckpointError as error:
            raise CheckpointError(
                f"resume={str(path)!r} cannot be used: {error}; name another one, "
                "or the run folder to take its newest good one"
            ) from error

    @hookimpl(trylast=True)
    def on_begin_train(self, trainer: Trainer) -> None:
        """Refuse now what could not be stored later, when the other plugins have made what they keep."""
        if self._cadences:
            for name, plugin in trainer.plugins.stateful():
                tensors, tree = split(plugin.get_state(), f"plugins.{name}")
                join(tensors, json.loads(tree_to_bytes(tree)))

    @hookimpl
    def on_boundary(self, trainer: Trainer) -> None:
        for text in self._cadences:
            if trainer.due(text):
                trainer.save(f"every {text}")

    @hookimpl
    def save(self, trainer: Trainer, reason: str) -> bool:
        if not self._cadences:
            return False
        state = trainer.hook.get_run_state(trainer=trainer)
        rngs = trainer.hook.all_gather(trainer=trainer, value=state["rng"])
        if trainer.rank != 0:
            return True
        folder = trainer.run_dir / FOLDER
        if self._prepared != folder:
            storage.prepare(folder)
            self._prepared = folder
        path = storage.write(folder, trainer.global_step, pack(state, rngs), describe(trainer, reason))
        self._good.add(path)
        trainer.hook.on_checkpoint(trainer=trainer, path=path, kind="checkpoint")
        if self.keep_last is not None:
            storage.retain(path, self.keep_last, self._good)
        log.info("saved %s (%s)", path, reason)
        return True


def describe(trainer: Trainer, reason: str) -> dict[str, Any]:
    """Return what a manifest says of the run besides its files."""
    return {
        "reason": reason,
        "epoch": trainer.epoch,
        "world_size": trainer.world_size,
        "versions": {
            "hookline": hookline.__version__,
            "hookline-checkpoint": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "plugins": [name for name, _ in trainer.plugins.listed()],
    }
