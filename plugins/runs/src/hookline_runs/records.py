"""The record of a run: its format, which the plugin `jsonl` writes, and what reads it back. Imports nothing heavy."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hookline_runs.notes import Notes, read_notes

if TYPE_CHECKING:
    from hookline import Trainer

FILE = "metrics.jsonl"
BEFORE = ("config", "command", "versions", "revision", "plan", "cost", "totals", "step")
"""What a session that trains no step does not change of a run."""
COUNTERS = ("step", "epoch", "batches", "samples", "seconds")
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
"""What a line raises that is torn, or not of this format."""


def plain(value: Any) -> Any:
    """Return a value as strict JSON can hold it: numbers that JSON lacks and strange objects as strings."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else as_text(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return str(value)


def as_text(value: float) -> str:
    """Return the word for a number that JSON lacks; `float` reads it back."""
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


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
    begun: int | None = None
    """The step at which its training began."""
    before: Mapping[str, Any] = field(default_factory=dict)
    """What was known of the run before it, which stands where it does nothing."""


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
    batches: dict[int, dict[str, float | int]] = field(default_factory=dict)
    """What was told within validations (`report_loss_after_eval: false`), by batch of them: metrics, and `step`."""
    objects: list[dict[str, Any]] = field(default_factory=list)
    """What was logged and is no number, by `step` and `name`: a `text`, or the `type`, and the `file` that was kept."""
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    """`step`, `path` inside the folder and `kind` of those that are still there, for each path of the last save."""
    sessions: list[Session] = field(default_factory=list)
    began: float | None = None
    """Seconds since 1970."""
    seconds: float = 0.0
    """Time spent in all sessions."""
    totals: dict[str, int | None] = field(default_factory=dict)
    plan: list[dict[str, Any]] = field(default_factory=list)
    """Of the last training, for each hook that a plugin takes part in: `hook`, `kind`, `wrapped_by`, `done_by`."""
    cost: dict[str, float] = field(default_factory=dict)
    """Seconds that each plugin that only watches took in the last training session, as told last."""
    notes: Notes = field(default_factory=Notes)
    """What people wrote on it, as it was when it was read."""
    unreadable: int = 0
    """Lines that could not be read: torn by a kill, or not of this format."""

    @property
    def val_loss(self) -> str:
        """The name under which this run logs the loss that its best values follow."""
        trainer = self.config.get("trainer")
        return str(trainer.get("val_loss_metric_name", "val_loss") if isinstance(trainer, Mapping) else "val_loss")

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
            "add `plugins: {jsonl: {}}` (from the distribution hookline-runs)"
        )
    run, sessions, rows = Run(folder), dict[str, Session](), _RowsByStep()
    for line in (folder / FILE).read_bytes().splitlines():
        try:
            take(run, sessions, rows, json.loads(line))
        except UNREADABLE:
            run.unreadable += 1
    run.rows = [rows[step] for step in sorted(rows)]
    sum_up(run, sessions)
    run.notes = read_notes(folder)
    return run


class Rows(Protocol):
    """Takes what a training logs, by step."""

    def drop_behind(self, step: int) -> None:
        """Forget the steps behind one: they are done again."""

    def put(self, step: int, counters: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Keep values; later ones of the same step and name stand."""


class _RowsByStep(dict[int, dict[str, float | int]]):
    def drop_behind(self, step: int) -> None:
        for behind in [known for known in self if known > step]:
            del self[behind]

    def put(self, step: int, counters: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        self[step] = {**self.get(step, {}), **metrics, **counters}


def sum_up(run: Run, sessions: Mapping[str, Session]) -> None:
    """Tell of a run what its sessions say together."""
    run.sessions = list(sessions.values())
    saved = {kept["path"]: kept for kept in run.checkpoints}
    run.checkpoints = [kept for path, kept in saved.items() if (run.folder / path).exists()]
    run.seconds = sum(session.ended - session.began for session in run.sessions)
    if run.sessions:
        last = last_training(run.sessions)
        run.began = min(session.began for session in run.sessions)
        run.status, run.reason = last.status or _status_without_end(last), last.reason


def last_training(sessions: Sequence[Session]) -> Session:
    """Return the last session that trained; where none did, the last."""
    return ([session for session in sessions if session.stage == "train"] or sessions)[-1]


def touch(run: Run, sessions: dict[str, Session], record: Mapping[str, Any]) -> Session:
    """Take of a line only when it was and how far its training was, and return its session."""
    moment = float(record["time"])
    # Its first line may be unreadable.
    session = sessions.setdefault(record["session"], Session("train", moment, moment, "", 0))
    session.ended = moment
    if "step" in record:
        if not isinstance(record["step"], int):
            raise TypeError("a step is a whole number")
        if session.stage == "train":
            run.step = record["step"]
    return session


def take(run: Run, sessions: dict[str, Session], rows: Rows, record: Mapping[str, Any]) -> None:
    """Take in one line: what it tells of its session and of the run.

    Raises:
        UNREADABLE: it is not of this format.
    """
    event = record["event"]
    if event == "begin":
        sessions[record["session"]] = _begin(run, record)
    session = touch(run, sessions, record)
    if event == "train":
        begun = record["step"]
        rows.drop_behind(begun)
        run.plan, run.cost = [_planned(row) for row in record.get("plan", ())], {}
        run.objects = [kept for kept in run.objects if kept["step"] <= begun]
        run.checkpoints = [kept for kept in run.checkpoints if kept["step"] <= begun]
        run.batches = {batch: kept for batch, kept in run.batches.items() if kept["step"] <= begun}
        run.totals = dict(record["totals"])
        session.begun = begun
    elif event == "batch":
        run.batches[int(record["batch"])] = {**_metrics(record), "step": record["step"]}
    elif event == "log":
        metrics = _metrics(record)
        if session.stage == "train":
            counters = {name: record[name] for name in COUNTERS}
            rows.put(record["step"], counters, metrics)
        else:
            run.evaluations.append((session.stage, {"step": record["step"], **metrics}))
    elif event == "object":
        told = {key: str(record[key]) for key in ("name", "text", "type", "file") if key in record}
        run.objects.append({"step": record["step"], **told})
    elif event == "checkpoint":
        run.checkpoints.append({key: record[key] for key in ("step", "path", "kind")})
    elif event == "end":
        session.status, session.reason = str(record["status"]), str(record["reason"])
    if "cost" in record and session.stage == "train":
        run.cost = {str(name): float(seconds) for name, seconds in record["cost"].items()}
    if event == "end" and session.begun in (None, record["step"]):  # a resume that had nothing to do, or that failed
        for name, value in session.before.items():
            setattr(run, name, value)


def _metrics(record: Mapping[str, Any]) -> dict[str, float | int]:
    return {name: float(value) if isinstance(value, str) else value for name, value in record["metrics"].items()}


def _begin(run: Run, record: Mapping[str, Any]) -> Session:
    """Take in the first line of a session; a later evaluation does not hide how the run was trained."""
    moment, revision = float(record["time"]), record["revision"]
    session = Session(str(record["stage"]), moment, moment, str(record["host"]), int(record["pid"]))
    if session.stage == "train" and run.step:
        session.before = {name: getattr(run, name) for name in BEFORE}
    if session.stage == "train" or (not run.sessions and not run.config):
        run.config, run.command = dict(record["config"]), [str(word) for word in record["command"]]
        run.versions = {str(name): str(version) for name, version in record["versions"].items()}
        run.revision = None if revision is None else str(revision)
    return session


def _planned(row: Mapping[str, Any]) -> dict[str, Any]:
    names = {name: [str(plugin) for plugin in row[name]] for name in ("wrapped_by", "done_by")}
    return {"hook": str(row["hook"]), "kind": str(row["kind"]), **names}


def _status_without_end(session: Session) -> str:
    if session.host != socket.gethostname() or os.name != "posix":
        return "unknown"
    try:
        os.kill(session.pid, 0)
    except (ProcessLookupError, OverflowError):  # it is gone, or was never one
        return "crashed"
    except PermissionError:
        pass  # it lives, under another user
    return "running"


def is_alive(run: Run) -> bool:
    """Tell whether a process of a run lives on this host, be it the training or an evaluation beside it."""
    return any(not session.status and _status_without_end(session) == "running" for session in run.sessions)


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


def history(trainer: Trainer) -> list[dict[str, float | int]]:
    """Return what a trainer's run has logged so far: for each step its metrics by name and `COUNTERS`.

    Read from the run's record, on rank 0; `pandas.DataFrame(history(trainer))` is a table of it. What an evaluation on
    its own logs is not among it.

    Raises:
        ValueError: nobody keeps a record of this run; says who does.
    """
    return read_run(trainer.run_dir).rows
