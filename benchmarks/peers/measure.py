"""Counts and times of one framework beside the loop written by hand, in this process.

    python -m benchmarks.peers.measure lightning mlp [--counts]

prints one object of JSON. `python -m benchmarks.peers` calls this for each framework and row, in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import logging
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.peers.frameworks import by_hand
from benchmarks.peers.work import WORKS, Work
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

WARM = 50
"""Calls of the network before the clock counts, at most a quarter of a run."""
FEW, MANY = 24, 64
"""Batches of the two runs whose difference is what steps cost."""


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Send what frameworks say to nowhere, but let them say it: that is a part of the cost."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def run(framework: Any, work: Work) -> Any:
    """Do a work; return the network that was trained, or the loss of an evaluation."""
    with tempfile.TemporaryDirectory() as folder, silence():
        here = replace(work, folder=Path(folder))
        return framework.validate(here) if work.name == "validate" else framework.train(here)


def counts(framework: Any, work: Work) -> dict[str, float]:
    """Return what one batch costs in calls of Python and C functions, operators, syncs and allocations."""
    sized = {number: replace(work, steps=number) for number in (FEW, MANY)}
    for _ in range(2):  # the first run imports, the second fills caches
        run(framework, sized[FEW])
    found: dict[str, float] = {}
    for counter in (calls, operators, allocations):
        less, more = (counter(lambda number=number: run(framework, sized[number])) for number in (FEW, MANY))
        found |= {name: round((more[name] - less[name]) / (MANY - FEW), 2) for name in more}
    return found


def calls(function: Callable[[], Any]) -> dict[str, int]:
    number = {"call": 0, "c_call": 0}

    def seen(frame: Any, happening: str, argument: Any) -> None:
        if happening in number:
            number[happening] += 1

    gc.collect()
    gc.disable()
    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return {"python_calls": number["call"], "c_calls": number["c_call"]}


def operators(function: Callable[[], Any]) -> dict[str, int]:
    class Counter(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.found = {"operators": 0, "syncs": 0, "collectives": 0}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.found["operators"] += 1
            self.found["syncs"] += func.name() == "aten::_local_scalar_dense"
            self.found["collectives"] += func.namespace in ("c10d", "_c10d_functional")
            return func(*args, **(kwargs or {}))

    with Counter() as counter:
        function()
    return counter.found


def allocations(function: Callable[[], Any]) -> dict[str, int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    found = profiler.profiler.kineto_results.events()
    return {"allocations": sum(event.name() == "[memory]" and event.nbytes() > 0 for event in found)}


def seconds_per_batch(framework: Any, work: Work) -> float:
    """Return what a batch takes, from inside one run: setting up does not count."""
    times: list[float] = []
    run(framework, replace(work, heard=times.append))
    warm = min(WARM, len(times) // 4)
    return (times[-1] - times[warm]) / (len(times) - 1 - warm)


def times(framework: Any, work: Work) -> dict[str, float]:
    """Return what a batch takes beside the loop by hand, in turns."""
    pairs = []
    for turn in range(work.turns + 1):
        pair = seconds_per_batch(by_hand, work), seconds_per_batch(framework, work)
        if turn:  # the first one warms up
            pairs.append(pair)
    hand, ratios, extra = [a for a, _ in pairs], [b / a for a, b in pairs], [(b - a) * 1e6 for a, b in pairs]
    return {
        "by_hand_us": round(statistics.median(hand) * 1e6, 1),
        "noise": round(spread(hand), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_spread": round(spread(ratios), 3),
        "extra_us": round(statistics.median(extra), 1),
    }


def spread(values: list[float]) -> float:
    """Return the distance of the quartiles, as a share of the median."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def difference(framework: Any, work: Work) -> float:
    """Return by how much the result differs from that of the loop by hand."""
    here = replace(work, steps=8)
    hand, other = run(by_hand, here), run(framework, here)
    if work.name == "validate":
        return abs(float(hand - other))
    pairs = zip(hand.parameters(), other.parameters(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("framework")
    parser.add_argument("row", choices=WORKS)
    parser.add_argument("--counts", action="store_true", help="counts alone, which a loud machine cannot touch")
    parser.add_argument("--times", action="store_true", help="times alone")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    framework, work = (
        importlib.import_module(f"benchmarks.peers.frameworks.{arguments.framework}"),
        WORKS[arguments.row],
    )
    reason = getattr(framework, "WITHOUT", {}).get(work.name)
    if reason is not None:
        print(json.dumps({"without": reason}))
        return
    found: dict[str, Any] = {"difference": difference(framework, work)}
    if not arguments.times:
        hand, own = counts(by_hand, work), counts(framework, work)
        found |= {"counts": own, "beyond_by_hand": {name: round(own[name] - hand[name], 2) for name in own}}
    if not arguments.counts:
        found |= times(framework, work)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
