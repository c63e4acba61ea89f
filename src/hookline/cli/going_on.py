"""Going on with a run that ended early: which one is resumed, how the user goes on, and what a failed start leaves."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hookline.cli import launch
from hookline.commands import UserError
from hookline.options import CHECKPOINTS, run_folder


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a run; says how to go on."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Let a command go on with a run; `resume_of` reads what was given."""
    parser.add_argument(
        "--resume", nargs="?", const=True, default=None, metavar="RUN",
        help="go on with the newest run of this name; or with another run, by its name or path; or with one "
        "checkpoint: its path, its step, best or last",
    )  # fmt: skip
    parser.add_argument(
        "--resume-or-start", action="store_true",
        help="as --resume, and begin a run where there is none yet; for jobs that a scheduler starts again",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", metavar="WHICH",
        help="which checkpoint of the run: best, last, its step, or a path; with --resume RUN of that run",
    )  # fmt: skip


def resume_of(options: Any) -> str | bool | None:
    """Return what the options of the command line say for `trainer.resume`; None where they say nothing.

    Raises:
        UserError: they contradict each other.
    """
    which = options.checkpoint
    if options.resume_or_start:
        if options.resume or which:
            raise UserError("--resume-or-start takes the newest run of this name; leave --resume and --checkpoint away")
        return True
    if which is None:
        return options.resume  # type: ignore[no-any-return]
    if isinstance(options.resume, str):
        return str(Path(options.resume, CHECKPOINTS, which))
    return which  # type: ignore[no-any-return]


def refuse_nothing_to_resume(options: Any, trainer: Any) -> None:
    """Refuse a resume where there is no such run; only `trainer.resume=true` and `--resume-or-start` begin one.

    Raises:
        ValueError: there is none.
    """
    asked = options.resume or options.checkpoint or (options.door != "train" and trainer.options.resume)
    if asked and trainer.rank == 0:
        try:
            run_folder(trainer.options, training=False)
        except ValueError as error:
            starts = options.door == "train" and options.resume is True
            raise ValueError(f"{error}{'. --resume-or-start begins one' if starts else ''}") from None


def command(words: Sequence[str], folder: Path) -> str:
    """Return the command that goes on with the run in a folder."""
    started_by = os.environ.get(launch.COMMAND)
    given = shlex.split(started_by) if started_by else list(words)
    kept, skipped = [], False
    for at, word in enumerate(given):
        takes = word == "--checkpoint" or (word == "--resume" and "=" not in "".join(given[at + 1 : at + 2]))
        if not skipped and not word.startswith(("--resume", "--checkpoint", "trainer.resume=")):
            kept.append(word)
        skipped = not skipped and takes and at > 1 and not "".join(given[at + 1 : at + 2]).startswith("-")
    line = shlex.join(["hookline", *kept, "--resume", str(folder)])
    return (
        line if started_by or "RANK" not in os.environ else f"the same command with --resume {shlex.quote(str(folder))}"
    )


def how(words: Sequence[str], trainer: Any) -> str:
    """Return how the user goes on with a training that ended early."""
    if not trainer.plugins.performers("restore"):
        return "nothing is saved, so nothing can go on: `-p checkpoint` saves"
    if not any(one[:1] != "." for one in _names(trainer.run_dir / CHECKPOINTS)):
        return "no checkpoint was saved yet, so there is nothing to go on with"
    return f"go on with: {command(words, trainer.run_dir)}"


@contextlib.contextmanager
def no_folder_left(loaded: Any) -> Iterator[list[Any]]:
    """Remove the folder of a new run where a mistake of the user ends it before its first step.

    The trainer is put into the list when there is one.
    """
    runs = Path(loaded.trainer.runs_folder)
    there, before = runs.exists(), set(_names(runs))
    trainers: list[Any] = []
    try:
        yield trainers
    except UserError:
        for trainer in trainers:
            folder = vars(trainer).get("run_dir")
            new = folder is not None and folder.parent == runs and folder.name not in before
            if new and trainer.rank == 0 and trainer.global_step == 0 and not _names(folder / CHECKPOINTS):
                shutil.rmtree(folder, ignore_errors=True)
                if not there:
                    with contextlib.suppress(OSError):
                        runs.rmdir()
        raise


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []
