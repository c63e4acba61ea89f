"""Which checkpoints are the best by a metric, as their manifests tell. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hookline_checkpoint.storage import CheckpointError, is_good, read_manifest

Manifests = dict[Path, dict[str, Any]]


def manifests(paths: Iterable[Path]) -> Manifests:
    """Return the manifests of checkpoints, without those that cannot be read."""
    found = {}
    for path in paths:
        try:
            found[path] = read_manifest(path)
        except CheckpointError:
            continue
    return found


def value_of(about: Mapping[str, Any], monitor: str) -> float | None:
    """Return the finite value of a metric in the evaluation of a checkpoint; None where there is none."""
    value = about.get("metrics", {}).get(monitor)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def best_of(paths: Iterable[Path], monitor: str, mode: str) -> Path | None:
    """Return the good checkpoint with the best value of a metric; None where none has one."""
    return next((path for path in ranked(manifests(paths), monitor, mode) if is_good(path)), None)


def ranked(abouts: Mapping[Path, Mapping[str, Any]], monitor: str, mode: str) -> list[Path]:
    """Return the checkpoints that have a value, the best first; of each evaluation the one next to it."""
    first: dict[int, tuple[float, int, Path]] = {}
    for path, about in abouts.items():
        value, at = value_of(about, monitor), about.get("evaluated_at")
        if value is not None and isinstance(at, int):
            entry = (value if mode == "min" else -value, about["step"], path)
            first[at] = min(first.get(at, entry), entry, key=lambda entry: entry[1])
    return [path for _, _, path in sorted(first.values())]
