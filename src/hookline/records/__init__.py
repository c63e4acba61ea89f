"""Read back what the plugin `jsonl` keeps of runs. Imports nothing heavy."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"
COUNTERS = ("step", "epoch", "batches", "samples", "seconds")


@dataclass
class Session:
    """One process's part of a run: a training, one resumed, or an evaluation on its own."""

    stage: str
    began: float
    """Seconds since 1970."""
    ended: float
    """When its last line was written."""
    host: str
    pid: int
    status: str = ""
    """As told at the end; empty where nothing was."""
    reason: str = ""


@dataclass
class Run:
    """What is known of a run. Where a resumed training did steps again, only the later values stand."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    """Of the last training; secrets are masked, and numbers that JSON lacks are words."""
    command: list[str] = field(default_factory=list)
    revision: str | None = None
    """The git commit that the working folder had checked out, whatever else was changed there."""
    versions: dict[str, str] = field(default_factory=dict)
    status: str = "crashed"
    """finished, stopped, preempted or failed; without an end: running, or crashed, or "unknown" on another host."""
    reason: str = ""
    step: int = 0
    """The last step of training that left a trace."""
    rows: list[dict[str, float | int]] = field(default_factory=list)
    """One per step of training that logged, in order: its metrics by name, and `COUNTERS`."""
    evaluations: list[tuple[str, dict[str, float | int]]] = field(default_factory=list)
    """Stage and values of evaluations on their own."""
    objects: list[dict[str, Any]] = field(default_factory=list)
    """What was logged and is no number, by `step` and `name`: a `text`, or the `type` of what was no text."""
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    """`step`, `path` inside the folder and `kind`."""
    sessions: list[Session] = field(default_factory=list)
    began: float | None = None
    """Seconds since 1970."""
    seconds: float = 0.0
    """Time spent in all sessions."""
    totals: dict[str, int | None] = field(default_factory=dict)
    unreadable: int = 0
    """Lines that could not be read: torn by a kill, or not of this format."""

    @property
    def val_loss(self) -> str:
        """The name under which this run logs the loss that its best values follow."""
        return str((self.config.get("trainer") or {}).get("val_loss_metric_name", "val_loss"))

    @property
    def best(self) -> dict[str, float | int] | None:
        """The row of the lowest validation loss; NaN never is."""
        name = self.val_loss
        return min(
            (row for row in self.rows if row.get(name, math.nan) <= math.inf), key=lambda r: r[name], default=None
        )


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read a run's folder.

    Raises:
        ValueError: there is no such folder, or no record in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        siblings = sorted(path.parent.name for path in folder.parent.glob(f"*/{FILE}"))
        beside = f"; {folder.parent} has {', '.join(siblings)}" if siblings else ""
        raise ValueError(f"there is no run folder {str(folder)!r}{beside}")
    if not (folder / FILE).is_file():
        raise ValueError(
            f"{str(folder)!r} holds no {FILE}: a run leaves a record only with the plugin jsonl; "
            "add `plugins: {jsonl: {}}` (from the distribution hookline-jsonl)"
        )
    run, sessions, rows = Run(folder), dict[str, Session](), dict[int, dict[str, float | int]]()
    for line in (folder / FILE).read_bytes().splitlines():
        try:
            _take(run, sessions, rows, json.loads(line))
        except (ValueError, TypeError, KeyError):
            run.unreadable += 1
    run.rows = [rows[step] for step in sorted(rows)]
    run.sessions = list(sessions.values())
    run.seconds = sum(session.ended - session.began for session in run.sessions)
    if run.sessions:
        trainings = [session for session in run.sessions if session.stage == "train"]
        last = (trainings or run.sessions)[-1]
        run.began = min(session.began for session in run.sessions)
        run.status, run.reason = last.status or _status_without_end(last), last.reason
    return run


def _take(
    run: Run, sessions: dict[str, Session], rows: dict[int, dict[str, float | int]], record: Mapping[str, Any]
) -> None:
    """Take in one line: what it tells of its session and of the run."""
    event, name, moment = record["event"], record["session"], float(record["time"])
    if event == "begin":
        sessions[name] = _begin(run, record)
    session = sessions.setdefault(name, Session("train", moment, moment, "", 0))  # its first line may be unreadable
    session.ended = moment
    if event == "train":
        begun = record["step"]
        for step in [step for step in rows if step > begun]:
            del rows[step]
        run.objects = [kept for kept in run.objects if kept["step"] <= begun]
        run.checkpoints = [kept for kept in run.checkpoints if kept["step"] <= begun]
        run.totals = record["totals"]
    elif event == "log":
        metrics = {name: float(value) if isinstance(value, str) else value for name, value in record["metrics"].items()}
        if session.stage == "train":
            counters = {name: record[name] for name in COUNTERS}
            rows[record["step"]] = rows.get(record["step"], {}) | metrics | counters
        else:
            run.evaluations.append((session.stage, {"step": record["step"], **metrics}))
    elif event == "object":
        run.objects.append({key: record[key] for key in ("step", "name", "text", "type") if key in record})
    elif event == "checkpoint":
        run.checkpoints.append({key: record[key] for key in ("step", "path", "kind")})
    elif event == "end":
        session.status, session.reason = record["status"], record["reason"]
    if session.stage == "train" and "step" in record:
        run.step = record["step"]


def _begin(run: Run, record: Mapping[str, Any]) -> Session:
    """Take in the first line of a session; a later evaluation does not hide how the run was trained."""
    if record["stage"] == "train" or (not run.sessions and not run.config):
        run.config, run.command, run.revision = record["config"], record["command"], record["revision"]
        run.versions = record["versions"]
    return Session(record["stage"], record["time"], record["time"], record["host"], record["pid"])


def _status_without_end(session: Session) -> str:
    if session.host != socket.gethostname() or os.name != "posix":
        return "unknown"
    try:
        os.kill(session.pid, 0)
    except ProcessLookupError:
        return "crashed"
    except PermissionError:
        pass  # it lives, under another user
    return "running"


def list_runs(root: str | os.PathLike[str]) -> list[Run]:
    """Read every run in a folder of runs, the oldest first; folders without a record are passed over.

    Raises:
        ValueError: there is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"there is no folder of runs {str(root)!r}; training makes it (trainer.runs_folder)")
    runs = [read_run(path.parent) for path in sorted(root.glob(f"*/{FILE}"))]
    return sorted(runs, key=lambda run: (run.began or 0.0, run.folder.name))
