"""How long frameworks take from the command line to the first step, and what stays in memory after many steps.

    python -m benchmarks.peers.start first lightning     # the first step of a process; prints the time of day
    python -m benchmarks.peers.start memory lightning    # 10,000 steps
    python -m benchmarks.peers.start plugin clip         # the same with one plugin of hookline

`python -m benchmarks.peers` calls them, each in a process of its own.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.peers.work import WORKS, Work, done

STEPS = 10_000
SLOW = 0.002
"""Seconds a step from which a plugin is given a tenth of the steps."""
PAGE = resource.getpagesize() // 1024
OPTIONS: dict[str, Any] = {
    "accumulate": {"steps": 2},
    "backend": {"gc_every": 100},
    "clip": {"max_norm": 1.0},
    "freeze": {"patterns": "model.net.0"},
    "metrics": {"train": {"accuracy": {"_target_": "torchmetrics.Accuracy", "task": "multiclass", "num_classes": 10}}},
    "mix": {"mixup": 0.2},
    "monitor": {"grad_norm": True},
}
"""Of plugins that need some, or do nothing without."""


def first(name: str) -> None:
    """Take one step; print when the network was called, and how many modules Python had loaded."""
    times: list[float] = []
    framework = importlib.import_module(f"benchmarks.peers.frameworks.{name}")
    done(framework.train, replace(WORKS["mlp"], steps=1, heard=lambda _: times.append(time.time())))
    print(json.dumps({"at": times[0], "modules": len(sys.modules)}))


def memory(name: str) -> None:
    """Take many steps; print how much the process grew after the first tenth, and its peak."""
    print(json.dumps(_grown(importlib.import_module(f"benchmarks.peers.frameworks.{name}").train, STEPS)))


def plugin(name: str) -> None:
    """Take many steps with one plugin of hookline; print the same, and how many they were."""
    from benchmarks.peers.frameworks.hookline import Module

    from hookline import Trainer

    def train(work: Work) -> None:
        module = Module(replace(work, features=True))  # gives outputs too
        options: dict[str, Any] = {"train_batch_size": 32, "device": "cpu", "runs_folder": str(work.folder)}
        Trainer(module, {name: OPTIONS.get(name, {})}, **options).train()

    for _ in range(2):  # the first run imports
        begin = time.perf_counter()
        done(train, replace(WORKS["mlp"], steps=100))
    steps = STEPS // 10 if time.perf_counter() - begin > 100 * SLOW else STEPS
    print(json.dumps({**_grown(train, steps), "steps": steps}))


def _grown(train: Callable[[Work], Any], steps: int) -> dict[str, int]:
    seen: list[int] = []
    count = 0

    def heard(_: float) -> None:
        nonlocal count
        count += 1
        if count in (steps // 10, steps):
            seen.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE)

    done(train, replace(WORKS["mlp"], steps=steps, heard=heard))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"growth_kb": seen[1] - seen[0], "peak_mb": round(peak / 1024)}


def starts(names: Sequence[str], turns: int) -> dict[str, dict[str, Any]]:
    """Return how long each takes to the first step beside the loop by hand: the quickest of some turns, each in a new
    process. Others on the machine only ever add.
    """
    found: dict[str, Any] = {name: [] for name in ("by_hand", *names)}
    failed: dict[str, dict[str, Any]] = {}
    for _ in range(turns + 1):
        for name in found.keys() - failed.keys():
            try:
                found[name].append(_start(name))
            except RuntimeError as error:
                failed[name] = {"failed": str(error).strip().splitlines()[-1]}
    hand = found["by_hand"][1:]
    return failed | {name: _beside(hand, found[name][1:]) for name in names if name not in failed}


def _beside(hand: list[tuple[float, int]], own: list[tuple[float, int]]) -> dict[str, Any]:
    plain, seconds = (sorted(seconds for seconds, _ in turns) for turns in (hand, own))
    return {
        "by_hand_s": round(plain[0], 2),
        "noise": round(max(turns[1] / turns[0] for turns in (plain, seconds)) - 1, 3),
        "extra_s": round(seconds[0] - plain[0], 2),
        "extra_modules": own[0][1] - hand[0][1],
    }


def _start(name: str) -> tuple[float, int]:
    began = time.time()
    found = json.loads(child("benchmarks.peers.start", "first", name))
    return found["at"] - began, found["modules"]


def child(module: str, *words: str) -> str:
    """Return what a module prints, run in a process of its own.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    command = [sys.executable, "-m", module, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr[-600:]}")
    return done.stdout


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    {"first": first, "memory": memory, "plugin": plugin}[sys.argv[1]](sys.argv[2])
