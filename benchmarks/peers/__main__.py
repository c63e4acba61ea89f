"""One step through each framework, beside the loop that an expert writes.

    python -m benchmarks.peers [--only hookline lightning] [--rows mlp features] [--what counts] [--write]

Every framework is given the same network, batches, loss, optimizer and seed; the weights that come out must be those of
the loop by hand. *Counts* do not depend on the machine. *Times* are ratios: the loop by hand and the framework take
turns in one process, until the loop by hand varies by less than --noise for some turns in a row; on a machine that is
louder all the time, none is given. `--write` puts the figures into benchmarks/peers.json, and from there into
benchmarks/results.md and benchmarks/peers.svg; figures of other rows, frameworks and kinds stay as they are.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import ranks, report, resuming, saving
from benchmarks.peers.start import child, starts
from benchmarks.peers.work import WORKS

HERE = Path(__file__).resolve().parents[1]
FRAMEWORKS = {
    "hookline": "hookline", "contract": "hookline", "fabric": "lightning", "accelerate": "accelerate",
    "lightning": "lightning", "transformers": "transformers", "ignite": "pytorch-ignite", "torchtnt": "torchtnt",
    "skorch": "skorch", "pytorch_accelerated": "pytorch-accelerated", "keras": "keras", "dcp": "torch",
    "torchdata": "torchdata",
}  # fmt: skip
"""Their distributions."""
ROWS = {
    "mlp": "the perceptron 32-64-10 on batches of 32, SGD",
    "stream": "the same, with batches of an iterator in place of a list",
    "cnn": "a small network of convolutions, with a DataLoader of images 8x8",
    "cnn-workers": "the same with two workers",
    "transformer": "ten million parameters, four sequences of 64 tokens",
    "features": "with an accuracy, clipping, a progress bar, a line in a file every 50 steps, a checkpoint at the end",
    "accumulate": "the perceptron, an optimizer step each four batches; of one batch",
    "validate": "evaluation alone",
    "callbacks": "100 callbacks, or plugins, that do nothing at the end of a step",
    "ranks": "two processes that average gradients by gloo; of rank 0",
    "start": "from the command line to the first step",
    "memory": "10,000 steps of the perceptron",
    "plugins": "the same with one plugin of hookline at a time; a thousand steps where a step takes over 2 ms",
    "checkpoint": "a module and Adam's state of it, saved and restored",
    "resume": "a shuffled epoch of computed samples, in batches of 100",
    "instructions": "instructions that a step of the perceptron retires, as valgrind counts them",
}
WAYS = {"checkpoint": saving, "resume": resuming}
KINDS = dict.fromkeys(WORKS, ("counts", "times")) | {
    "ranks": ("counts",), "start": ("times",), "memory": ("counts",), "plugins": ("counts",), "checkpoint": ("times",),
    "resume": ("times",), "instructions": ("counts",),
}  # fmt: skip
"""What each row is measured in."""
CLOSE = 1e-4
"""Weights may differ by this: some average gradients or weigh batches in another order of additions."""
TIMES = ("by_hand_us", "noise", "ratio", "ratio_spread", "extra_us", "extra_s", "by_hand_s")
START_TURNS = 5

Found = Iterator[tuple[str, str, dict[str, Any]]]
"""Rows, frameworks and their figures."""


def measured(names: Sequence[str], arguments: argparse.Namespace) -> Found:
    """Give the figures of each framework in each row, or why there are none."""
    wanted = [row for row in arguments.rows if set(KINDS[row]) & set(arguments.what)]
    frameworks = [name for name in names if name not in ("dcp", "torchdata")]
    stepping = [row for row in wanted if row in WORKS and row != "ranks"]
    for name in frameworks:
        if stepping:
            yield from steps(name, stepping, arguments)
        if "ranks" in wanted and name != "contract":
            yield "ranks", name, on_ranks(name)
        if "instructions" in wanted:
            yield "instructions", name, tried("benchmarks.peers.instructions", name)
    for name in ["by_hand", *frameworks] if "memory" in wanted else ():
        yield "memory", name, tried("benchmarks.peers.start", "memory", name)
    if "start" in wanted:
        for name, figures in starts(frameworks, START_TURNS).items():
            yield "start", name, figures
    for name in plugins(arguments.plugins) if "plugins" in wanted and "hookline" in names else ():
        yield "plugins", name, tried("benchmarks.peers.start", "plugin", name)
    for row in (row for row in WAYS if row in wanted):
        yield from ways(row, ["by_hand", *names], arguments)


def tried(module: str, *words: str) -> dict[str, Any]:
    """Return what a process of its own prints, or why it failed."""
    try:
        return dict(json.loads(child(module, *words).splitlines()[-1]))
    except RuntimeError as error:
        return {"failed": str(error).strip().splitlines()[-1]}


def steps(name: str, rows: Sequence[str], arguments: argparse.Namespace) -> Found:
    """Give the figures of the rows that are steps, from one process: it imports the framework once."""
    try:
        options = ("--noise", str(arguments.noise), "--what", *arguments.what)
        said = child("benchmarks.peers.measure", name, *rows, *options)
    except RuntimeError as error:
        yield from ((row, name, {"failed": str(error).strip().splitlines()[-1]}) for row in rows)
        return
    for line in said.splitlines():
        if line.startswith("{"):
            found = json.loads(line)
            yield found.pop("row"), name, found


def on_ranks(name: str) -> dict[str, Any]:
    try:
        found = dict(json.loads(ranks.start(name).splitlines()[-1]))
    except RuntimeError as error:
        return {"failed": str(error).strip().splitlines()[-1]}
    return {key: value for key, value in found.items() if key != "row"}


def plugins(chosen: Sequence[str] | None) -> list[str]:
    return list(chosen or sorted({point.name for point in importlib.metadata.entry_points(group="hookline.plugins")}))


def ways(row: str, names: Sequence[str], arguments: argparse.Namespace) -> Found:
    """Give what it costs those that do it to save and restore, or to go on within an epoch."""
    module = WAYS[row]
    for name in names:
        if name in module.WITHOUT:
            yield row, name, {"without": module.WITHOUT[name]}
        elif name in module.WAYS and row == "checkpoint":
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                yield row, name, tried(module.__name__, name, str(arguments.megabytes), folder)
        elif name in module.WAYS:
            fresh, late = (tried(module.__name__, name, str(arguments.samples), *said) for said in ((), ("--resumed",)))
            if "failed" in fresh | late:
                yield row, name, {"failed": (fresh | late)["failed"]}
            else:
                yield row, name, {"fresh_s": fresh["seconds"], "resumed_s": late.pop("seconds"), **late}


def judged(found: dict[str, Any], noise: float, kinds: Sequence[str]) -> dict[str, Any]:
    """Return figures with their date: without times where the loop by hand varied, failed where weights differ."""
    if found.get("difference", 0.0) > CLOSE:
        return {"failed": f"other weights than by hand: {found['difference']:.1g}"}
    if found.get("noise", 0.0) > noise:
        loud = f"too loud: the loop by hand varies by {found['noise']:.0%}, more than {noise:.0%}"
        found = {name: value for name, value in found.items() if name not in TIMES} | {"loud": loud}
        kinds = [kind for kind in kinds if kind != "times"]
    if "failed" in found or "without" in found:
        return found
    return {**found, "dates": {kind: datetime.date.today().isoformat() for kind in kinds}}


def absent(names: Sequence[str], distributions: Mapping[str, str] = FRAMEWORKS) -> dict[str, str]:
    """Return what is to be said of the frameworks that are not installed."""
    missing = {}
    for name in names:
        try:
            importlib.metadata.version(distributions[name])
        except importlib.metadata.PackageNotFoundError:
            missing[name] = f"{distributions[name]} is not installed: `nox -s peers` installs it"
    return missing


def about() -> dict[str, Any]:
    """Return the machine and what is installed on it."""
    found = {"python": platform.python_version()}
    for distribution in ("torch", *dict.fromkeys(FRAMEWORKS.values())):
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    return {"date": datetime.date.today().isoformat(), "machine": machine, "versions": found}


def write(whole: dict[str, Any], folder: Path) -> None:
    report.plot(whole["rows"], folder / "peers.svg")
    report.put(folder / "results.md", report.page(whole, ROWS, "peers.svg"))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[row for row in ROWS if row != "instructions"])
    parser.add_argument("--what", nargs="+", choices=("counts", "times"), default=("counts", "times"))
    parser.add_argument("--noise", type=float, default=0.1, help="the most that the loop by hand may vary (0.1)")
    parser.add_argument("--plugins", nargs="+", help="of the row plugins; all that are installed unless said")
    parser.add_argument("--megabytes", type=int, default=1000, help="of the row checkpoint (1000)")
    parser.add_argument("--samples", type=int, default=10**8, help="of the row resume (100000000)")
    parser.add_argument("--folder", type=Path, help="where the row checkpoint writes: on a disk, not in memory")
    parser.add_argument("--write", action="store_true", help="put the figures into the JSON, the page and the plot")
    parser.add_argument("--into", type=Path, default=HERE, help="the folder of the three (benchmarks)")
    return parser.parse_args()


def main() -> int:
    arguments = parsed()
    missing = absent(arguments.only)
    for said in dict.fromkeys(missing.values()):
        print(said, file=sys.stderr)
    found: dict[str, dict[str, dict[str, Any]]] = {row: {} for row in arguments.rows}
    for row, name, figures in measured([name for name in arguments.only if name not in missing], arguments):
        kinds = [kind for kind in KINDS[row] if kind in arguments.what]
        found[row][name] = made = judged(figures, arguments.noise, kinds)
        print(f"{row}, {name}: {made.get('failed') or made.get('loud') or 'done'}", file=sys.stderr, flush=True)
        if arguments.write:  # at once: what was measured stays if the rest is broken off
            report.merge(arguments.into / "peers.json", about(), {row: {name: made}})
    for row, frameworks in found.items():
        if frameworks:
            print(report.table(row, frameworks), end="\n\n")
    if arguments.write:
        write(json.loads((arguments.into / "peers.json").read_text()), arguments.into)
    return 3 if any("loud" in figures for row in found.values() for figures in row.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
