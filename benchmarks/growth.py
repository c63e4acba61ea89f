"""How the time of a step grows, as ratios to the smallest of each row; tests/test_growth.py holds the counts.

    python benchmarks/growth.py [--json] [--turns 5]

The runs of a row take turns, and the least time of each is its own. Set-up and the first steps do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.test_growth import Deaf, Hears, Layers, Records, trainer_of

from hookline import hookimpl

WARM, TIMED = 20, 200


class Clock(Deaf):
    """Reads the time at the beginning of training and at two of its steps."""

    @hookimpl
    def on_begin_train(self) -> None:
        self.began = time.perf_counter()

    @hookimpl
    def on_boundary(self, global_step: int) -> None:
        now = time.perf_counter()
        if global_step == 1:
            self.first = now - self.began
        elif global_step == WARM:
            self.warm = now
        elif global_step == WARM + TIMED:
            self.seconds = (now - self.warm) / TIMED


def run(plugins: dict[str, Any], evaluate_every: str | None = None, steps: int = WARM + TIMED, **module: Any) -> Clock:
    """Train, and return what the clock has read."""
    clock = Clock()
    made = Layers(**{"samples": 8 * (WARM + TIMED + 1), **module})
    options = {"max_steps": steps, "evaluate_every": evaluate_every}
    trainer_of(made, {"clock": clock, **plugins}, **options).train()
    return clock


def many(kind: type, number: int) -> dict[str, Any]:
    """Return as many plugins."""
    return {f"plugin_{index}": kind() for index in range(number)}


Row = dict[str, Callable[[], float]]


def rows() -> Iterator[tuple[str, Row]]:
    """Yield the rows of the table: what grows, and by size what is timed."""
    yield "plugins that hear nothing in a step", {str(n): lambda n=n: run(many(Deaf, n)).seconds for n in (0, 10, 100)}
    yield "plugins that hear each step", {str(n): lambda n=n: run(many(Hears, n)).seconds for n in (0, 10, 100)}
    yield (
        "parameters in four tensors",
        {f"{n:.0e}": lambda n=n: run({}, size=n // 4).seconds for n in (10**4, 10**5, 10**6)},
    )
    yield "tensors of 8 parameters", {str(n): lambda n=n: run({}, tensors=n).seconds for n in (4, 40, 400)}
    yield "logged values", {str(n): lambda n=n: run(many(Records, 1), values=n).seconds for n in (0, 10, 100)}
    yield (
        "samples of the data set",
        {f"{n:.0e}": lambda n=n: run({}, samples=n).seconds for n in (10**4, 10**6, 10**7)},
    )
    yield (
        "samples of the data set, seconds until the first step is done",
        {f"{n:.0e}": lambda n=n: run({}, steps=1, samples=n).first for n in (10**4, 10**6, 10**8)},
    )
    yield (
        "validation loaders, validated after each step",
        {str(n): lambda n=n: run({}, "1 steps", loaders=n).seconds for n in (1, 2, 8)},
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print figures for machines")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"load": os.getloadavg()}
    for name, row in rows():
        least = dict.fromkeys(row, float("inf"))
        for _ in range(arguments.turns):
            least = {size: min(least[size], measure()) for size, measure in row.items()}
        smallest = next(iter(least.values()))
        figures[name] = {size: (f"{seconds:.3g} s", round(seconds / smallest, 2)) for size, seconds in least.items()}
        if not arguments.json:
            print(name, figures[name], flush=True)
    if arguments.json:
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
