"""The figures as JSON, as tables, as a plot, and beside the targets."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
"""Of a framework in a row."""

BEGIN, END = "<!-- peers: what follows is written by the command -->", "<!-- peers: end -->"
STEP = {
    "python_calls": "Python calls", "c_calls": "C calls", "operators": "operators", "allocations": "allocations",
    "syncs": "syncs", "collectives": "collectives", "bytes_sent": "bytes sent", "ratio": "time", "extra_us": "us",
}  # fmt: skip
COLUMNS: dict[str, dict[str, str]] = {
    "start": {"extra_s": "seconds to the first step, beyond by hand", "extra_modules": "modules, beyond by hand"},
    "memory": {"growth_kb": "growth from step 1,000 to 10,000, kB", "peak_mb": "peak, MB"},
    "plugins": {"growth_kb": "growth over nine tenths of the steps, kB", "peak_mb": "peak, MB", "steps": "steps"},
    "checkpoint": {
        "save_ratio": "save / `torch.save`", "on_disk_ratio": "till it is on the disk / the same",
        "restore_ratio": "restore / `torch.load`", "save_s": "save, s", "restore_s": "restore, s", "bytes": "bytes",
    },
    "resume": {
        "fresh_s": "first batch, s", "resumed_s": "at 90 %, s", "computed": "samples computed", "peak_mb": "peak, MB",
    },
    "instructions": {"instructions": "instructions a step", "beyond": "beyond by hand"},
}  # fmt: skip
"""Of the rows that are not steps."""


def merge(file: Path, about: Mapping[str, Any], found: Mapping[str, Mapping[str, Figures]]) -> dict[str, Any]:
    """Put figures into a file of earlier ones, of which those of other rows, frameworks and kinds stay; return all.

    A figure that has failed, or that a loud machine has kept from being taken, takes nothing away.
    """
    whole: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    whole |= about
    for row, frameworks in found.items():
        before = whole["rows"].setdefault(row, {})
        for name, figures in frameworks.items():
            if "without" in figures or ("failed" in figures and name not in before):
                before[name] = dict(figures)
            elif "failed" not in figures:
                kept = {key: value for key, value in before.get(name, {}).items() if key not in ("failed", "without")}
                new = {key: value for key, value in figures.items() if key != "loud"}
                before[name] = {**kept, **new, "dates": {**kept.get("dates", {}), **new.get("dates", {})}}
    file.write_text(json.dumps(whole, indent=1) + "\n")
    return whole


def table(row: str, found: Mapping[str, Figures]) -> str:
    """Return a row of works as a table of frameworks."""
    columns = COLUMNS.get(row, STEP)
    lines = [f"| {row} | {' | '.join(columns.values())} |", f"|---|{'---|' * len(columns)}"]
    for name, figures in found.items():
        values = {**figures.get("beyond_by_hand", {}), **figures}
        reason = figures.get("without") or figures.get("failed")
        shown = (
            [reason, *[""] * (len(columns) - 1)] if reason else [_cell(values.get(column, "")) for column in columns]
        )
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:,}".removesuffix(".0") if isinstance(value, float | int) else str(value)


def page(whole: Mapping[str, Any], rows: Mapping[str, str], plot: str) -> str:
    """Return the section of the page: what was measured with, the targets, the plot, the tables of rows."""
    versions = ", ".join(f"{name} {version}" for name, version in whole["versions"].items())
    parts = [
        f"{versions}; {whole['machine']}. {_dated(whole)}",
        targets(whole["rows"]),
        f"![Python calls a step beyond the loop by hand]({plot})",
        *(f"**{row}**: {rows[row]}\n\n{table(row, whole['rows'][row])}" for row in rows if row in whole["rows"]),
    ]
    return "\n\n".join(parts)


def _dated(whole: Mapping[str, Any]) -> str:
    cells = [figures for frameworks in whole["rows"].values() for figures in frameworks.values()]
    said = []
    for kind in ("counts", "times"):
        dates = sorted({figures["dates"][kind] for figures in cells if kind in figures.get("dates", {})})
        said.append(f"{kind} of {' to '.join(dict.fromkeys((dates[0], dates[-1])))}" if dates else f"no {kind} yet")
    return f"{', '.join(said).capitalize()}."


def put(file: Path, section: str) -> None:
    """Write a section between the marks of a page.

    Raises:
        ValueError: the page has no marks.
    """
    before, begin, rest = file.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{file} has no place for the tables: write the lines\n{BEGIN}\n{END}\nwhere they belong")
    file.write_text(f"{before}{BEGIN}\n\n{section}\n\n{END}{after}")


def targets(rows: Mapping[str, Mapping[str, Figures]]) -> str:
    """Return what was aimed at beside what was measured; what was not measured is said so."""
    lines = ["| target | measured | met |", "|---|---|---|"]
    for said, measure, most in TARGETS:
        try:
            value = measure(rows)
        except (KeyError, ValueError):
            lines.append(f"| {said} | not measured | |")
        else:
            measured = "the next peer costs nothing" if math.isinf(value) else f"{value:,.3g}"
            lines.append(f"| {said} | {measured} | {'yes' if value <= most else '**no**'} |")
    return "\n".join(lines)


def _beyond(rows: Mapping[str, Mapping[str, Figures]], row: str, framework: str, figure: str = "python_calls") -> float:
    return float(rows[row][framework]["beyond_by_hand"][figure])


def _instructions(rows: Mapping[str, Mapping[str, Figures]], framework: str) -> float:
    return float(rows["instructions"][framework]["instructions"])


def _against_peers(row: str) -> Callable[[Any], float]:
    """Return the share of hookline in what the next peer costs."""

    def share(rows: Mapping[str, Mapping[str, Figures]]) -> float:
        def cost(figures: Figures) -> float:
            found = figures.get("extra_s") if row == "start" else figures.get("beyond_by_hand", {}).get("python_calls")
            return float("inf") if found is None else float(found)

        peers = [cost(figures) for name, figures in rows[row].items() if name not in ("hookline", "contract")]
        return cost(rows[row]["hookline"]) / min(peers) if min(peers) > 0 else math.inf

    return share


def _waits(rows: Mapping[str, Mapping[str, Figures]]) -> float:
    of = [rows[row]["hookline"] for row in ("mlp", "cnn", "transformer", "accumulate", "callbacks", "features")]
    return max(found["beyond_by_hand"][what] for found in of for what in ("syncs", "collectives"))


TARGETS: tuple[tuple[str, Callable[[Any], float], float], ...] = (
    (
        "mlp: Python calls a step beyond the contract's loop, at most 15",
        lambda rows: _beyond(rows, "mlp", "hookline") - _beyond(rows, "mlp", "contract"),
        15,
    ),
    (
        "mlp: time of a step beside the contract's loop, at most 1.05",
        lambda rows: rows["mlp"]["hookline"]["ratio"] / rows["mlp"]["contract"]["ratio"],
        1.05,
    ),
    (
        "instructions: those of a step beside the contract's loop, at most 1.05",
        lambda rows: _instructions(rows, "hookline") / _instructions(rows, "contract"),
        1.05,
    ),
    ("features: us a step beyond by hand, at most 10", lambda rows: rows["features"]["hookline"]["extra_us"], 10),
    (
        "features: Python calls a step beyond by hand, at most 45",
        lambda rows: _beyond(rows, "features", "hookline"),
        45,
    ),
    ("validate: time beside by hand, at most 1.03", lambda rows: rows["validate"]["hookline"]["ratio"], 1.03),
    ("syncs and collectives of an ordinary step on one rank beyond by hand: 0", _waits, 0),
    *(
        (f"{row}: {what} beside those of the next peer, at most a third", _against_peers(row), 1 / 3)
        for row, what in {
            "mlp": "Python calls beyond by hand", "features": "Python calls beyond by hand",
            "ranks": "Python calls beyond by hand", "start": "seconds beyond by hand",
        }.items()
    ),
)  # fmt: skip
"""What is aimed at, how it is found in the rows, and the most that it may be."""


def plot(found: Mapping[str, Mapping[str, Figures]], file: Path) -> None:
    """Draw the Python calls of a step beyond the loop by hand, one group of bars a row, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "peers"  # the same figures make the same file
    import matplotlib.pyplot as plt

    rows = [row for row in found if any("beyond_by_hand" in figures for figures in found[row].values())]
    names = list(dict.fromkeys(name for row in rows for name in found[row]))
    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        heights = [found[row].get(name, {}).get("beyond_by_hand", {}).get("python_calls", 0) for row in rows]
        axes.bar([place + number * width for place in range(len(rows))], heights, width, label=name)
    axes.set_yscale("log")
    axes.set_xticks([place + 0.4 for place in range(len(rows))], rows)
    axes.set_ylabel("Python calls a batch beyond the loop by hand")
    axes.legend(ncols=2)
    figure.savefig(file, metadata={"Date": None})
