"""What the page is told of one run, in the words of its record. Imports nothing heavy."""

from __future__ import annotations

import os
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hookline_runs.compare import flatten
from hookline_runs.curves import is_epoch_mean, is_validated, panel_of
from hookline_runs.follow import Curves, Follower, Glance, averaged, thinned
from hookline_runs.layout import typed
from hookline_runs.objects import FOLDER
from hookline_runs.records import Run, last_training

OBJECTS, STEPS, EXCERPT = 60, 1000, 2000  # objects of a run, steps of one of them, and characters of a text
SHARES, LATELY = "time/", 100  # metrics of how time goes to plugins, and over how many of them the page takes the mean


def summary(glance: Glance) -> dict[str, Any]:
    """Return what the list shows of a run."""
    run, best = glance.shown, glance.best
    steps = run.totals.get("steps")
    return {
        "name": run.folder.name,
        "status": run.status,
        "reason": run.reason,
        "step": run.step,
        "steps": steps if isinstance(steps, int) else None,
        "best": None if best is None else {"name": run.val_loss, "value": best[0], "step": best[1]},
        "seconds": run.seconds,
        "began": run.began,
        "revision": run.revision,
        "command": typed(run.command),
        "complete": glance.complete,
    }


def facts(follower: Follower) -> dict[str, Any]:
    """Return what stays while a session lasts."""
    run = follower.run
    return {
        "folder": str(run.folder),
        "versions": run.versions,
        "sessions": len(run.sessions),
        "config": list(flatten(run.config)),
        "plan": run.plan,
    }


def live(follower: Follower) -> dict[str, Any]:
    """Return what changes while a run goes on, without its curves."""
    run = follower.run
    last = last_training(run.sessions) if run.sessions else None
    return {
        "metrics": [
            {
                "name": name,
                "panel": panel_of(name, run),
                "val": is_validated(name, run),
                "epoch": is_epoch_mean(name, run),
                "step": series.steps[-1],
                "value": short(series.columns[0][-1]),
            }
            for name, series in follower.curves.by_name.items()
            if series.steps
        ],
        "shares": {
            name.removeprefix(SHARES): short(statistics.fmean(series.columns[0][-LATELY:]))
            for name, series in follower.curves.by_name.items()
            if name.startswith(SHARES) and series.steps
        },
        "cost": run.cost,
        "session": 0.0 if last is None else last.ended - last.began,
        "checkpoints": [kept["path"] for kept in run.checkpoints[-3:]],
        "objects": objects(run),
        "unreadable": run.unreadable,
    }


def objects(run: Run) -> list[dict[str, Any]]:
    """Return the objects that were logged: of each its name, its kind, and where it was logged.

    Of pictures and tables the steps are those whose files are still there; of what was not kept, the type is told.
    """
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for one in run.objects:
        by_name.setdefault(one["name"], {})[one["step"]] = one
    there = _files(run.folder) if any("file" in one for one in run.objects) else set()
    listed = []
    for name, logged in list(by_name.items())[:OBJECTS]:
        last = logged[max(logged)]
        if "file" in last or "text" in last:
            steps = [step for step, one in sorted(logged.items()) if "text" in one or one.get("file") in there]
            told: dict[str, Any] = {"steps": steps[-STEPS:], "logged": len(logged)}
            if "file" in last:
                told["files"] = [logged[step].get("file") for step in steps[-STEPS:]]
            listed.append({"name": name, "kind": "file" if "file" in last else "text", **told})
        else:
            listed.append({"name": name, "kind": "none", "type": last.get("type", ""), "logged": len(logged)})
    return listed


def _files(folder: Path) -> set[str]:
    """Return the names of an object's files that are there, as records say them."""
    if (folder / FOLDER).is_symlink():
        return set()
    try:
        with os.scandir(folder / FOLDER) as entries:
            return {f"{FOLDER}/{entry.name}" for entry in entries if entry.is_file(follow_symlinks=False)}
    except OSError:
        return set()


def points(follower: Follower, metric: str, axis: str, since: int | None, mean: bool = False) -> dict[str, Any]:
    """Return where a curve goes on and with which points.

    Args:
        follower: of the run.
        metric: its name.
        axis: what goes to the right.
        since: the last step of which some were told.
        mean: give the mean of each stretch of a long curve, not its lowest and its highest value.
    """
    series = follower.curves.by_name[metric]
    seen = 0 if since is None else bisect_left(series.steps, since)
    begin, steps, values = (averaged if mean else thinned)(series, seen)
    return {
        "from": begin,
        "x": places(follower.curves, follower.run.totals.get("batches_per_epoch"), axis, steps),
        "y": [None if value is None else short(value) for value in values],
    }


def places(curves: Curves, batches: Any, axis: str, steps: Sequence[int]) -> Sequence[float]:
    """Return what goes to the right at steps that have logged."""
    if axis == "step":
        return steps
    if axis == "epoch" and isinstance(batches, int) and batches > 0:  # in an epoch
        return [round(done / batches, 6) for done in curves.at("batches", steps)]
    return curves.at(axis, steps)


def short(value: float) -> float:
    """Return a number in seven digits."""
    return float(f"{value:.7g}")
