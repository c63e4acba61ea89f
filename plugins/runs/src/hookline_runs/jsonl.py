"""Keep the record of a run in its folder: one JSON line for each thing worth keeping."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import hookline
from hookline import CallbackInterface, Stage, hookimpl, tracking
from hookline_runs import objects
from hookline_runs.records import FILE, plain

if TYPE_CHECKING:
    from hookline import Trainer


def is_torn(descriptor: int) -> bool:
    """Tell whether a file ends in the middle of a line, as a kill or a full disk may leave it."""
    if os.fstat(descriptor).st_size == 0:
        return False
    os.lseek(descriptor, -1, os.SEEK_END)
    return os.read(descriptor, 1) != b"\n"


def command_line(arguments: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Return the arguments with the value of each `key=value` that the configuration masks as it has it."""
    command = []
    for argument in arguments:
        argument = os.fsencode(argument).decode(errors="replace")
        path, equals, _ = argument.partition("=")
        shown: Any = config if equals else None
        for name in re.split(r"[.\[\]]+", path.lstrip("+").rstrip("]")):
            if isinstance(shown, list):
                shown = {str(index): one for index, one in enumerate(shown)}
            shown = shown.get(name) if isinstance(shown, Mapping) else None
        text = shown if isinstance(shown, str) else json.dumps(shown, default=str)
        command.append(f"{path}={text}" if "***" in text or "${" in text else argument)
    return command


def git_revision(folder: Path) -> str | None:
    """Return the commit that is checked out where a folder lies, read from `.git` itself; None if there is none."""
    git = next((parent / ".git" for parent in (folder, *folder.parents) if (parent / ".git").exists()), None)
    if git is None:
        return None
    try:
        if git.is_file():  # a worktree or a submodule: "gitdir: <folder>"
            git = git.parent / git.read_text().removeprefix("gitdir:").strip()
        kind, _, reference = (git / "HEAD").read_text().strip().partition("ref: ")
        if not reference:
            return kind
        common = git / "commondir"
        shared = git / common.read_text().strip() if common.exists() else git
        if (shared / reference).exists():
            return (shared / reference).read_text().strip()
        packed = [line.split() for line in (shared / "packed-refs").read_text().splitlines()]
        return next((pair[0] for pair in packed if len(pair) == 2 and pair[1] == reference), None)
    except OSError:  # a branch without a commit, or a folder that may not be read
        return None


@dataclass(eq=False)
class Jsonl(CallbackInterface):
    """Append what happens in a run to `metrics.jsonl` in its folder, one whole line at a time.

    The format stands in the README. Only rank 0 writes.
    """

    keep_objects: int = 100
    """Keep so many files of each logged picture or table, those of the last steps; 0 for none."""

    observer = True

    def __post_init__(self) -> None:
        if self.keep_objects < 0:
            raise ValueError(f"jsonl.keep_objects={self.keep_objects} must be at least 0, which keeps no files")
        self._path: Path | None = None
        self._session = ""
        self._descriptor: int | None = None

    @hookimpl
    def on_setup(self, trainer: Trainer) -> None:
        if trainer.rank != 0:
            trainer.plugins.unregister(self)

    @hookimpl
    def on_begin_run(self, trainer: Trainer, stage: Stage, config: Mapping[str, Any]) -> None:
        self._path, self._stage = trainer.run_dir / FILE, stage
        self._began = self._cost_due = time.monotonic()
        self._session = os.urandom(4).hex()  # an evaluation may write to the file of a training that still runs
        versions = {"hookline": hookline.__version__, "torch": torch.__version__, "python": platform.python_version()}
        self._write(
            "begin",
            format=1,
            stage=stage.value,
            command=command_line(sys.orig_argv, config),
            revision=git_revision(Path.cwd()),
            host=socket.gethostname(),
            pid=os.getpid(),
            versions=versions,
            config=plain(config),
        )

    @hookimpl
    def on_begin_train(self, trainer: Trainer, global_step: int) -> None:
        plan = [row for row in trainer.plugins.plan() if row["wrapped_by"] or row["done_by"] not in ([], ["core"])]
        objects.drop_behind(trainer.run_dir, global_step)
        self._write("train", step=global_step, epoch=trainer.epoch, totals=trainer.totals._asdict(), plan=plan)

    @hookimpl
    def on_log(self, trainer: Trainer, metrics: Mapping[str, float], global_step: int) -> None:
        counters = trainer.counters
        if trainer.stage is not self._stage:  # within a validation of a training
            step, stage = counters.global_step, trainer.stage.value
            self._write("batch", step=step, stage=stage, batch=global_step, metrics=plain(metrics))
            return
        self._write(
            "log",
            step=global_step,
            epoch=counters.epochs,
            batches=counters.batches,
            samples=counters.samples,
            seconds=round(counters.seconds, 3),
            metrics=plain(metrics),
            **(self._cost(trainer) if time.monotonic() >= self._cost_due else {}),
        )

    @hookimpl
    def on_log_object(self, trainer: Trainer, name: str, value: Any, global_step: int) -> None:
        if isinstance(value, str):
            self._write("object", step=global_step, name=name, text=value)
            return
        told = {"type": f"{type(value).__module__}.{type(value).__name__}"}
        kind, form = (self.keep_objects and tracking.prepared(value)) or ("", None)
        if kind in ("image", "table"):
            told["file"] = objects.keep(trainer.run_dir, name, kind, form, global_step, self.keep_objects)
        self._write("object", step=global_step, name=name, **told)

    @hookimpl
    def on_checkpoint(self, trainer: Trainer, path: Path, kind: str) -> None:
        inside = os.path.relpath(path, trainer.run_dir)
        self._write("checkpoint", step=trainer.global_step, path=Path(inside).as_posix(), kind=kind)

    @hookimpl(trylast=True)
    def on_end_run(self, trainer: Trainer, status: str, reason: str) -> None:
        if self._path is not None:
            self._write("end", step=trainer.global_step, status=status, reason=reason, **self._cost(trainer))
            self._close()
            self._path = None

    def _cost(self, trainer: Trainer) -> dict[str, dict[str, float]]:
        """Return what observers have cost, and put off the next time: a longer run must not tell it ever more often."""
        now = time.monotonic()
        self._cost_due = now + (now - self._began) / 10
        return {"cost": {name: round(seconds, 6) for name, seconds in trainer.plugins.cost.items()}}

    def _write(self, event: str, **fields: Any) -> None:
        """Append one line by one system call, so that a kill can tear no line but the last."""
        assert self._path is not None
        record = {"event": event, "session": self._session, "time": round(time.time(), 3), **fields}
        line = json.dumps(record, allow_nan=False) + "\n"
        if self._descriptor is None:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
            self._descriptor = os.open(self._path, flags, 0o666)
            if is_torn(self._descriptor):
                line = "\n" + line
        try:
            written = os.write(self._descriptor, line.encode())
            if written < len(line):
                raise OSError(f"only {written} of {len(line)} bytes went into {self._path}; is the disk full?")
        except OSError:
            self._close()  # so that the next line finds this one torn
            raise

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
