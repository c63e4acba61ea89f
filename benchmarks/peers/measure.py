"""Counts and times of one framework beside the loop written by hand, in this process.

    python -m benchmarks.peers.measure lightning mlp features [--what counts times]

prints a line of JSON for each row. `python -m benchmarks.peers` calls this for each framework, in a process of its own.
"""

from __future__ import annotations

import argparse
import collections
import gc
import importlib
import itertools
import json
import logging
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.peers.frameworks import by_hand
from benchmarks.peers.work import WORKS, Work, done
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 50
"""Batches that are timed together, so that what is done every 50 steps is in each; fewer where a run has not four."""

PATIENCE = 4
"""Times the turns of a work: so long a quiet time is waited for."""


def run(framework: Any, work: Work) -> Any:
    """Do a work; return the network that was trained, or the loss of an evaluation."""
    return done(framework.validate if work.name == "validate" else framework.train, work)


def counts(framework: Any, work: Work) -> dict[str, float]:
    """Return what one batch costs: the difference of two runs, so that setting up does not count."""
    few, many = (replace(work, steps=steps) for steps in work.counted)
    for _ in range(2):  # the first run imports, the second fills caches
        run(framework, few)
    found: dict[str, float] = {}
    for counter in (calls, operators, allocations):
        less, more = (counter(lambda sized=sized: run(framework, sized)) for sized in (few, many))
        found |= {name: round((more[name] - less[name]) / (many.steps - few.steps), 2) for name in more}
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
    """Return operators, waits for the device, collectives, and the bytes of the tensors that collectives are given."""

    class Counter(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.found = {"operators": 0, "syncs": 0, "collectives": 0, "bytes_sent": 0}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.found["operators"] += 1
            self.found["syncs"] += func.name() == "aten::_local_scalar_dense"
            if func.namespace in ("c10d", "_c10d_functional"):
                self.found["collectives"] += 1
                given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
                self.found["bytes_sent"] += sum(tensor.nbytes for tensor in given)
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
    """Return what a batch takes in the quickest block of one run: others on the machine only ever add.

    The first block, and what comes before it, does not count.
    """
    times: list[float] = []
    run(framework, replace(work, heard=times.append))
    block = min(BLOCK, len(times) // 4)
    ends = times[block::block]
    return min(after - before for before, after in itertools.pairwise(ends)) / block


def times(framework: Any, work: Work, noise: float, hand: Any = by_hand) -> dict[str, float]:
    """Return what a batch takes beside the loop by hand, in turns: of the first ones in a row among which that varies
    no more than a noise, else of the last ones.
    """
    pairs: collections.deque[tuple[float, float]] = collections.deque(maxlen=work.turns)
    for turn in range(PATIENCE * work.turns + 1):
        pair = seconds_per_batch(hand, work), seconds_per_batch(framework, work)
        if turn:  # the first one warms up
            pairs.append(pair)
        if len(pairs) == work.turns and spread([plain for plain, _ in pairs]) <= noise:
            break
    plain, ratios, extra = [a for a, _ in pairs], [b / a for a, b in pairs], [(b - a) * 1e6 for a, b in pairs]
    return {
        "by_hand_us": round(statistics.median(plain) * 1e6, 1),
        "noise": round(spread(plain), 3),
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
    return max((a - b).detach().abs().max().item() for a, b in pairs)


def measured(framework: Any, work: Work, what: Sequence[str], noise: float) -> dict[str, Any]:
    """Return the figures of one row, or the reason why a framework has none."""
    reason = getattr(framework, "WITHOUT", {}).get(work.name)
    if reason is not None:
        return {"without": reason}
    found: dict[str, Any] = {"difference": difference(framework, work)}
    if "counts" in what:
        hand, own = counts(by_hand, work), counts(framework, work)
        found |= {"counts": own, "beyond_by_hand": {name: round(own[name] - hand[name], 2) for name in own}}
    if "times" in what:
        found |= times(framework, work, noise)
    return found


def path_of(framework: str) -> list[str]:
    """Return where Python looks for modules in the environment of a framework's user: not among hookline's sources.

    Some try an import that fails at each step, and each place that Python then looks at costs calls.
    """
    if framework in ("hookline", "contract"):
        return sys.path
    return [place for place in sys.path if not _has_hookline_alone(Path(place))]


def _has_hookline_alone(place: Path) -> bool:
    names = {file.name for file in place.iterdir()} - {"__pycache__"} if place.is_dir() else set()
    return bool(names) and all(name.startswith("hookline") for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("framework")
    parser.add_argument("rows", nargs="+", choices=WORKS)
    parser.add_argument("--what", nargs="+", choices=("counts", "times"), default=("counts", "times"))
    parser.add_argument("--noise", type=float, default=0.1)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    sys.path[:] = path_of(arguments.framework)
    framework = importlib.import_module(f"benchmarks.peers.frameworks.{arguments.framework}")
    for row in arguments.rows:
        try:
            found = measured(framework, WORKS[row], arguments.what, arguments.noise)
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
        print(json.dumps({"row": row, **found}), flush=True)


if __name__ == "__main__":
    main()
