"""What is shown of runs: tables and pages of text, and facts for machines. Imports nothing heavy."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hookline.commands import table
from hookline_runs.compare import flatten
from hookline_runs.layout import number, shorten, typed
from hookline_runs.records import COUNTERS, FILE, Run

PIPED = 120
"""Columns of text where the output is no terminal."""


def facts(run: Run) -> dict[str, Any]:
    """Return what stands in the list of runs, for machines."""
    best = run.best
    return {
        "run": run.folder.name,
        "folder": str(run.folder),
        "status": run.status,
        "reason": run.reason,
        "step": run.step,
        "totals": run.totals,
        "best": None if best is None else {"metric": run.val_loss, "value": best[run.val_loss], "step": best["step"]},
        "seconds": run.seconds,
        "began": run.began,
        "revision": run.revision,
        "command": run.command,
        **{name: getattr(run.notes, name) for name in ("title", "tags", "note", "archived")},
    }


def render_runs(runs: Sequence[Run], width: int = PIPED) -> str:
    """Return a table of runs; the command takes what is left of the width."""
    if not runs:
        return "no runs with a record yet (the plugin jsonl keeps one: `plugins: {jsonl: {}}`)"
    header = ["run", "status", "step", "best val loss", "at step", "duration", "revision", "started"]
    lines = table(header, [_summary(run) for run in runs], right=(2, 3, 4, 5))
    used = max(map(len, lines)) + 2
    commands = ["command", *(shorten(typed(run.command), max(width - used, 20)) for run in runs)]
    return "\n".join(line.ljust(used) + command for line, command in zip(lines, commands, strict=True))


def _name(run: Run) -> str:
    title, tags = run.notes.title, ", ".join(run.notes.tags)
    return run.folder.name + (f" ({shorten(title, 40)})" if title else "") + (f" [{shorten(tags, 40)}]" if tags else "")


def _summary(run: Run) -> list[str]:
    best = run.best
    total = run.totals.get("steps")
    return [
        _name(run),
        run.status,
        f"{run.step}/{total}" if total is not None else f"{run.step}",
        "-" if best is None else number(best[run.val_loss]),
        "-" if best is None else str(best["step"]),
        _duration(run.seconds),
        (run.revision or "-")[:8],
        _moment(run.began),
    ]


def render_run(run: Run, rows: int | None = 20, width: int = 120) -> str:
    """Return a page on one run.

    Args:
        run: which.
        rows: how many of the last logged steps to show, 0 for none; None for all.
        width: columns of text; a wider table goes on below itself.
    """
    best = run.best
    noted = {"title": run.notes.title, "tags": ", ".join(run.notes.tags), "note": run.notes.note}
    noted |= {"archived": "yes" if run.notes.archived else "", "notes": run.notes.problem}
    facts = {
        "folder": str(run.folder),
        **{name: text for name, text in noted.items() if text},
        "status": f"{run.status}: {run.reason}" if run.reason else run.status,
        "step": f"{run.step} of {run.totals['steps']}" if run.totals.get("steps") is not None else str(run.step),
        f"best {run.val_loss}": "-" if best is None else f"{number(best[run.val_loss])} at step {best['step']}",
        "started": _moment(run.began),
        "duration": _duration(run.seconds) + (f" in {len(run.sessions)} sessions" if len(run.sessions) > 1 else ""),
        "command": shlex.join(run.command) or "-",
        "revision": run.revision or "-",
        "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items()) or "-",
    }
    if run.unreadable:
        facts["unreadable"] = f"{run.unreadable} line(s) of {FILE}"
    parts = [_pairs(facts.items())]
    if run.config:
        parts.append(["hyper-parameters", *_pairs(flatten(run.config))])
    for title, kept in (("checkpoints", run.checkpoints), ("objects", run.objects)):
        if kept:
            parts.append([title, *(_kept(run.folder, one) for one in kept)])
    for stage, values in run.evaluations:
        parts.append(
            [f"{stage} at step {values['step']}", *_pairs((n, number(v)) for n, v in values.items() if n != "step")]
        )
    if run.rows and rows != 0:
        shown = run.rows if rows is None else run.rows[len(run.rows) - min(rows, len(run.rows)) :]
        left_out = f" (the last {len(shown)} of {len(run.rows)})" if len(shown) < len(run.rows) else ""
        parts.append([f"logged{left_out}", *_rows(shown, width)])
    return "\n\n".join("\n".join(lines) for lines in parts)


def _kept(folder: Path, one: Mapping[str, Any]) -> str:
    step = f"  step {one['step']}: "
    if "path" in one:
        return f"{step}{one['path']} ({one['kind']})"
    if "text" in one:
        return f"{step}{one['name']} = {one['text']}"
    if "file" in one:
        return f"{step}{one['name']}: {one['file']}" + ("" if (folder / one["file"]).is_file() else " (removed)")
    return f"{step}{one['name']} ({one['type']}, not kept)"


def _rows(rows: Sequence[Mapping[str, float | int]], width: int) -> list[str]:
    """Lay rows out under the names of their metrics, in as many tables as the width asks for."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in COUNTERS]
    columns = {name: [number(row[name]) if name in row else "" for row in rows] for name in ("step", "epoch", *names)}
    widths = {name: max(len(name), *map(len, cells)) + 2 for name, cells in columns.items()}
    lines: list[str] = []
    while names or not lines:
        block, used = ["step", "epoch"], widths["step"] + widths["epoch"]
        while names and (len(block) == 2 or used + widths[names[0]] <= width):
            used += widths[names[0]]
            block.append(names.pop(0))
        cells = [list(row) for row in zip(*(columns[name] for name in block), strict=True)]
        lines += [*([""] if lines else []), *table(block, cells, right=range(len(block)))]
    return lines


def _pairs(pairs: Iterable[tuple[str, str]]) -> list[str]:
    listed = list(pairs)
    width = max((len(name) for name, _ in listed), default=0)
    return [f"  {name.ljust(width)}  {value}".rstrip() for name, value in listed]


def _moment(seconds: float | None) -> str:
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"
