"""Instructions that a step of the perceptron retires, as valgrind's callgrind counts them.

    python -m benchmarks.peers.instructions fabric

Needs `valgrind`. torch's `Timer.collect_callgrind` runs it; the difference of a short and a long run is what steps
cost. Three minutes of CPU time for each framework, under `python` of the path. Prints one object of JSON.
"""

from __future__ import annotations

import json
import shutil
import sys

from torch.utils.benchmark import Timer

FEW, MANY = 20, 120
SETUP = """
import sys, warnings, logging, importlib, itertools
from dataclasses import replace
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import torch
torch.set_num_threads(1)
from benchmarks.peers.measure import path_of, run
from benchmarks.peers.work import WORKS
sys.path[:] = path_of({name!r})
runs = []
for name in ("by_hand", {name!r}):
    framework = importlib.import_module(f"benchmarks.peers.frameworks.{{name}}")
    for steps in ({few}, {many}):
        runs.append((framework, replace(WORKS["mlp"], steps=steps)))
for framework, work in runs:
    run(framework, work)
runs = [runs[0], *runs][::-1]  # the Timer runs once before it counts
"""


def instructions(name: str) -> dict[str, float]:
    """Return the instructions of a step, and those beyond the loop by hand."""
    timer = Timer("run(*runs.pop())", SETUP.format(name=name, few=FEW, many=MANY))
    less, more, own_less, own_more = (
        one.counts(denoise=False) for one in timer.collect_callgrind(number=1, repeats=4, collect_baseline=False)
    )
    hand, own = (more - less) / (MANY - FEW), (own_more - own_less) / (MANY - FEW)
    return {"instructions": round(own), "beyond": round(own - hand)}


if __name__ == "__main__":
    if shutil.which("valgrind") is None:
        sys.exit("valgrind is not installed; instructions cannot be counted without it")
    print(json.dumps(instructions(sys.argv[1])))
