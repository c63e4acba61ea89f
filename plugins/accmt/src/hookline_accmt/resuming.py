"""Which run a training goes on with."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

OFFERED = (
    "give True to go on with the newest run of {0}-1, {0}-2 …, None to do so where there is one, False to begin anew, "
    "or the path of a run or of a checkpoint that was written here"
)


def check_resume(given: Any, checkpoint: Path) -> bool | str | None:
    """Return what `resume` says: yes, no, None for "where there is one", or the path of a run or a checkpoint.

    Raises:
        TypeError, ValueError: anything else, with what is offered.
    """
    if given is None or isinstance(given, bool):
        return given
    offered = OFFERED.format(checkpoint)
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(f"resume={given!r} is a {type(given).__name__}: {offered}")
    path = Path(given)
    if any((path / of_accmt).exists() for of_accmt in ("status.json", "pytorch_model.bin", "checkpoint/optimizer.bin")):
        raise ValueError(
            f"resume={str(given)!r} is a checkpoint of ACCMT, whose files are pickles that can run code: load its "
            "weights into self.model yourself (torch.load(…, weights_only=True)), and begin anew with resume=False"
        )
    if not path.is_dir():
        raise ValueError(f"resume={str(given)!r} is no folder: {offered}")
    if not (is_checkpoint(path) or holds_checkpoint(path) or holds_checkpoint(path / "checkpoints")):
        raise ValueError(f"resume={str(given)!r} holds no checkpoint: {offered}")
    return str(given)


def choose_resume(given: bool | str | None, checkpoint: Path) -> bool | str:
    """Return `trainer.resume` for what `check_resume` returned.

    Raises:
        FileNotFoundError: `resume=True`, and no run has a checkpoint.
    """
    if isinstance(given, str):
        return given
    pattern = re.compile(re.escape(checkpoint.name) + r"-\d+")
    runs = [run for run in checkpoint.parent.glob(f"{checkpoint.name}-*") if pattern.fullmatch(run.name)]
    there = any(holds_checkpoint(run / "checkpoints") for run in runs)
    if given and not there:
        raise FileNotFoundError(
            f"resume=True, and there is no run {checkpoint}-1, -2 … with a checkpoint to go on with; "
            "resume=None begins where there is none"
        )
    return there if given is None else given


def is_checkpoint(folder: Path) -> bool:
    """Tell whether a folder is a checkpoint."""
    return folder.name.startswith("step-") and (folder / "manifest.json").is_file()


def holds_checkpoint(folder: Path) -> bool:
    """Tell whether a folder has a checkpoint in it."""
    return any(folder.glob("step-*/manifest.json"))
