"""How long frameworks take from the command line to the first step, and what stays in memory after many steps.

    python -m benchmarks.peers.start first lightning     # the first step of a process; prints the time of day
    python -m benchmarks.peers.start memory lightning    # 10,000 steps

`python -m benchmarks.peers` calls both, each in a process of its own.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.peers.work import WORKS

STEPS = 10_000
PAGE = resource.getpagesize() // 1024


def first(name: str) -> None:
    """Take one step; print when the network was called, and how many modules Python had loaded."""
    times: list[float] = []
    framework = importlib.import_module(f"benchmarks.peers.frameworks.{name}")
    _run(framework, replace(WORKS["mlp"], steps=1, heard=lambda _: times.append(time.time())))
    print(json.dumps({"at": times[0], "modules": len(sys.modules)}))


def memory(name: str) -> None:
    """Take many steps; print how much the process grew after the first thousand, and its peak, in kB."""
    seen: list[int] = []
    count = 0

    def heard(_: float) -> None:
        nonlocal count
        count += 1
        if count in (STEPS // 10, STEPS):
            seen.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE)

    framework = importlib.import_module(f"benchmarks.peers.frameworks.{name}")
    _run(framework, replace(WORKS["mlp"], steps=STEPS, heard=heard))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"growth_kb": seen[1] - seen[0], "peak_mb": round(peak / 1024)}))


def _run(framework: Any, work: Any) -> None:
    from benchmarks.peers.measure import run  # imported late: it is no part of a start

    run(framework, work)


def starts(name: str, turns: int) -> dict[str, float]:
    """Return how long it takes to the first step beside the loop by hand, in turns, each in a new process."""
    pairs = [(_start("by_hand"), _start(name)) for _ in range(turns + 1)][1:]
    hand, other = ([pair[number] for pair in pairs] for number in (0, 1))
    return {
        "by_hand_s": round(statistics.median(seconds for seconds, _ in hand), 2),
        "extra_s": round(statistics.median(b - a for (a, _), (b, _) in pairs), 2),
        "extra_modules": other[0][1] - hand[0][1],
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
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr[-600:]}")
    return done.stdout.splitlines()[-1]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    {"first": first, "memory": memory}[sys.argv[1]](sys.argv[2])
