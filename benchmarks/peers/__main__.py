"""One step through each framework, beside the loop that an expert writes.

    python -m benchmarks.peers [--only hookline lightning] [--rows mlp features] [--counts] [--json FILE] [--plot FILE]

Every framework is given the same network, batches, loss, optimizer and seed; the weights that come out must be those of
the loop by hand. *Counts* do not depend on the machine. *Times* are ratios: the loop by hand and the framework take
turns in one process. Where the loop by hand itself varies by more than --noise, the machine is too loud for times, and
none is given.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers import ranks
from benchmarks.peers.start import child, starts
from benchmarks.peers.work import WORKS

FRAMEWORKS = {
    "hookline": "hookline", "fabric": "lightning", "accelerate": "accelerate", "lightning": "lightning",
    "transformers": "transformers", "ignite": "pytorch-ignite", "torchtnt": "torchtnt", "skorch": "skorch",
    "pytorch_accelerated": "pytorch-accelerated", "keras": "keras",
}  # fmt: skip
"""Their distributions."""
ROWS = (*WORKS, "start", "memory")
CLOSE = 1e-4
"""Weights may differ by this: some average gradients or weigh batches in another order of additions."""


def measured(framework: str, row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one framework in one row, or why there are none."""
    try:
        if row == "start":
            return {} if arguments.counts else starts(framework, 5)
        if row == "memory":
            return dict(json.loads(child("benchmarks.peers.start", "memory", framework)))
        words = [framework, row, *(["--counts"] if arguments.counts else [])]
        said = ranks.start(framework) if row == "ranks" else child("benchmarks.peers.measure", *words)
        found = dict(json.loads(said.splitlines()[-1]))
    except RuntimeError as error:
        return {"failed": str(error).strip().splitlines()[-1]}
    if found.get("noise", 0.0) > arguments.noise:
        loud = f"too loud: the loop by hand varies by {found['noise']:.0%}, more than {arguments.noise:.0%}"
        found = {name: value for name, value in found.items() if name not in TIMES} | {"loud": loud}
    return found


TIMES = ("by_hand_us", "noise", "ratio", "ratio_spread", "extra_us")


def table(row: str, found: dict[str, dict[str, Any]]) -> str:
    """Return a row of works as a table of frameworks."""
    if row == "start":
        head, cells = ["to the first step, beyond by hand", "modules beyond"], ["extra_s", "extra_modules"]
    elif row == "memory":
        head, cells = ["growth from step 1,000 to 10,000, kB", "peak, MB"], ["growth_kb", "peak_mb"]
    else:
        head = ["Python calls", "C calls", "operators", "syncs", "collectives", "allocations", "time", "us"]
        cells = ["python_calls", "c_calls", "operators", "syncs", "collectives", "allocations", "ratio", "extra_us"]
    lines = [f"| {row} | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for name, figures in found.items():
        reason = figures.get("without") or figures.get("failed")
        values = {**figures.get("beyond_by_hand", {}), **figures}
        shown = [str(values.get(cell, "")) for cell in cells] if not reason else [reason, *[""] * (len(cells) - 1)]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Return what is installed; what is not is left out of the table by name."""
    found = {"torch": importlib.metadata.version("torch"), "python": platform.python_version()}
    for distribution in dict.fromkeys(FRAMEWORKS.values()):
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[distribution] = "not installed"
    return found


def plot(found: dict[str, dict[str, dict[str, Any]]], file: Path) -> None:
    """Draw the Python calls of a step beyond the loop by hand, one group of bars a row, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    rows = [row for row in found if any("beyond_by_hand" in figures for figures in found[row].values())]
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    width = 0.8 / len(FRAMEWORKS)
    for number, name in enumerate(FRAMEWORKS):
        heights = [found[row].get(name, {}).get("beyond_by_hand", {}).get("python_calls", 0) for row in rows]
        places = [place + number * width for place in range(len(rows))]
        axes.bar(places, heights, width, label=name)
    axes.set_yscale("log")
    axes.set_xticks([place + 0.4 for place in range(len(rows))], rows)
    axes.set_ylabel("Python calls a batch beyond the loop by hand")
    axes.legend(ncols=2)
    figure.savefig(file)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--counts", action="store_true", help="counts alone: quick, and the same on any machine")
    parser.add_argument("--noise", type=float, default=0.1, help="the most that the loop by hand may vary (0.1)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw the Python calls here")
    arguments = parser.parse_args()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in arguments.rows:
        found[row] = {}
        for framework in arguments.only:
            found[row][framework] = figures = measured(framework, row, arguments)
            if figures.get("difference", 0.0) > CLOSE:
                figures["failed"] = f"other weights than by hand: {figures['difference']:.1g}"
        print(table(row, found[row]), end="\n\n", flush=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    about = {"date": datetime.date.today().isoformat(), "machine": machine, "versions": versions()}
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "rows": found}, indent=1) + "\n")
    if arguments.plot:
        plot(found, arguments.plot)
    loud = {figures["loud"] for row in found.values() for figures in row.values() if "loud" in figures}
    for said in sorted(loud):
        print(said, file=sys.stderr)
    return 3 if loud else 0


if __name__ == "__main__":
    sys.exit(main())
