"""The curves of runs: in the terminal by plotext, in files by matplotlib. Both are imported when they draw."""

from __future__ import annotations

import importlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hookline import nearest
from hookline_runs.layout import number, shorten
from hookline_runs.records import COUNTERS, Run

AXES = ("step", "samples", "epoch", "seconds")
SUFFIXES = (".png", ".svg", ".pdf")
PLOTS = "`pip install 'hookline-runs[plots]'`"
DRAWN = 8
"""How many panels the terminal shows; the losses and what is validated come first."""

HEIGHT = 12
STYLES = ("x", "blue"), ("x", "orange"), ("o", "green"), ("+", "magenta"), ("*", "red")

Points = list[tuple[float, float]]


def panels(run: Run) -> dict[str, list[str]]:
    """Return the names of a run's metrics, those of training and validation of the same thing together.

    Losses come first, then what is validated, then the rest; in a panel training comes first.
    """
    names = [name for name in dict.fromkeys(name for row in run.rows for name in row) if name not in COUNTERS]
    together: dict[str, list[str]] = {}
    for name in names:
        together.setdefault(panel_of(name, run), []).append(name)
    for listed in together.values():
        listed.sort(key=lambda name: is_validated(name, run))
    ranks = {
        panel: 0 if "loss" in panel else 1 if any(is_validated(name, run) for name in listed) else 2
        for panel, listed in together.items()
    }
    return {panel: together[panel] for panel in sorted(together, key=ranks.__getitem__)}


def panel_of(name: str, run: Run) -> str:
    """Return what a metric is of: `loss` of train_loss, val_loss and val_loss/<loader>."""
    trainer = run.config.get("trainer")
    training = (trainer if isinstance(trainer, Mapping) else {}).get("train_loss_metric_name", "train_loss")
    if {name, name.partition("/")[0]} & {training, f"{training}_epoch", run.val_loss}:
        return "loss"
    match = re.fullmatch(r"(?:train|val)[_/]([^/]+)(/.*)?", name)
    return match[1] if match else name


def is_validated(name: str, run: Run) -> bool:
    return name.startswith(("val_", "val/")) or name.partition("/")[0] == run.val_loss


def is_epoch_mean(name: str, run: Run) -> bool:
    """Tell whether a metric is the mean over an epoch of another that is logged, as train_loss_epoch is."""
    return name.endswith("_epoch") and not is_validated(name, run)


def points(run: Run, name: str, by: str = "step") -> Points:
    """Return where a metric was logged and what it was; NaN for what is not finite.

    Epochs are counted by their batches where their number is known.
    """
    batches = run.totals.get("batches_per_epoch") if by == "epoch" else None
    return [
        (row["batches"] / batches if batches else row[by], row[name] if math.isfinite(row[name]) else math.nan)
        for row in run.rows
        if name in row
    ]


# In the terminal ------------------------------------------------------------------------


def draw(run: Run, width: int, coloured: bool, encoding: str) -> list[str]:
    """Return lines of text with curves of a run's metrics, or what they need; nothing of a run without any."""
    shown = {panel: {name: points(run, name) for name in names} for panel, names in panels(run).items()}
    if not shown:
        return []
    try:
        plotext = importlib.import_module("plotext")
    except ImportError:
        return [f"curves: {PLOTS} has them drawn here"]
    try:
        "⣿┤".encode(encoding)
    except UnicodeEncodeError:
        return [f"curves: they are drawn here where the output is UTF-8 (PYTHONUTF8=1), which {encoding} is not"]
    columns = 2 if width >= 100 and len(shown) > 1 else 1
    each = (width - 2 * (columns - 1)) // columns
    drawn = [_draw_panel(plotext, *item, each, coloured) for item in itertools.islice(shown.items(), DRAWN)]
    lines = ["curves, by step"]
    for start in range(0, len(drawn), columns):
        lines += ["", *("  ".join(parts).rstrip() for parts in zip(*drawn[start : start + columns], strict=True))]
    if left_out := list(shown)[DRAWN:]:
        lines += ["", f"and {', '.join(left_out)}: `hookline runs plot {run.folder} --out curves.png` draws all"]
    return lines


def _draw_panel(plotext: Any, panel: str, curves: Mapping[str, Points], width: int, coloured: bool) -> list[str]:
    """Draw the first curve as a line and the others as marks, so that they can be told apart without colours."""
    plotext.clear_figure()
    plotext.limit_size(False, False)
    plotext.plotsize(width, HEIGHT)
    plotext.canvas_color("default")
    plotext.axes_color("default")
    plotext.ticks_color("default")
    told: list[tuple[str, str]] = []  # of each curve: its colour, and what the heading says of it
    for (name, curve), (mark, colour) in zip(curves.items(), itertools.cycle(STYLES), strict=False):
        finite = [point for point in curve if not math.isnan(point[1])]
        line = not told and len(finite) > 1
        if finite:
            steps, values = zip(*thin(curve if line else finite, width), strict=True)
            draw_it = plotext.plot if line else plotext.scatter
            draw_it(list(steps), list(values), marker="braille" if line else mark, color=colour)
        told.append((colour, f"{name} " + ("(line)" if line else f"({mark})" if finite else "(never finite)")))
    for ticks, place in ((plotext.xticks, 0), (plotext.yticks, 1)):
        there = [point[place] for curve in curves.values() for point in curve if not math.isnan(point[1])]
        if there:
            low, high = min(there), max(there)
            marks = [low + (high - low) * part / 4 for part in range(5)]
            marks = sorted({round(mark) for mark in marks} if ticks == plotext.xticks else {*marks})
            ticks(marks, [number(mark) for mark in marks])
    text = plotext.build()
    heading = shorten(", ".join(words for _, words in told), width).ljust(width)
    if coloured:
        for colour, words in told:
            heading = heading.replace(words, plotext.colorize(words, colour))
    else:
        text = plotext.uncolorize(text)
    plotext.clear_figure()
    return [heading, *text.splitlines()]


def thin(curve: Points, width: int) -> Points:
    """Return a curve with no more points than so many columns can show: the lowest and the highest of neighbours."""
    size = math.ceil(len(curve) / (2 * width))
    if size <= 2:
        return curve
    thinned = []
    for start in range(0, len(curve), size):
        near = sorted((p for p in curve[start : start + size] if not math.isnan(p[1])), key=lambda point: point[1])
        thinned += sorted({near[0], near[-1]}) if near else curve[start : start + 1]
    return thinned


# In files -------------------------------------------------------------------------------


def plot(runs: Mapping[str, Run], out: Path, metrics: Sequence[str], by: str) -> Path:
    """Draw the curves of runs, which stand by their labels, into a file; return its path.

    Raises:
        ValueError: a suffix that is not offered, a metric that was not logged, a run without rows, no matplotlib,
            or a file that cannot be written.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"--out {out}: the suffix says the format, and {out.suffix or 'none'} is not among {', '.join(SUFFIXES)}"
        )
    for label, run in runs.items():
        if not run.rows:
            raise ValueError(f"the run {label} has logged no metric yet, so there is no curve to draw")
    drawn = _chosen(runs, metrics)
    try:
        matplotlib, figures = map(importlib.import_module, ("matplotlib", "matplotlib.figure"))
    except ImportError as error:
        raise ValueError(f"curves in files need matplotlib: {PLOTS}") from error
    # Names are no formulas, and a long noisy path is drawn in parts, since Agg has no room for all of it.
    with matplotlib.rc_context({"text.parse_math": False, "agg.path.chunksize": 10_000}):
        figure = figures.Figure(layout="constrained")
        shades = matplotlib.colormaps["tab10" if len(runs) <= 10 else "turbo"]
        places = range(len(runs)) if len(runs) <= 10 else (index / (len(runs) - 1) for index in range(len(runs)))
        _draw_panels(figure, runs, drawn, by, [shades(place) for place in places])
        try:
            figure.savefig(out, dpi=150)
        except OSError as error:
            raise ValueError(f"--out {out} cannot be written: {error.strerror or error}") from error
    return out


def _chosen(runs: Mapping[str, Run], metrics: Sequence[str]) -> dict[str, list[str]]:
    """Return the names to draw by panel: of all metrics, or of those that are named, or whose panel is."""
    together: dict[str, list[str]] = {}
    for run in runs.values():
        for panel, names in panels(run).items():
            known = together.setdefault(panel, [])
            known += [name for name in names if name not in known]
    offered = [*dict.fromkeys([*together, *(name for names in together.values() for name in names)])]
    for metric in metrics:
        if metric not in offered:
            logged = ", ".join(name for names in together.values() for name in names)
            raise ValueError(f"no metric {metric!r} was logged{nearest(metric, offered)}; there are {logged}")
    if not metrics:
        return together
    wanted = {panel: [name for name in names if {panel, name} & {*metrics}] for panel, names in together.items()}
    return {panel: names for panel, names in wanted.items() if names}


def _draw_panels(
    figure: Any, runs: Mapping[str, Run], drawn: Mapping[str, list[str]], by: str, colours: Sequence[Any]
) -> None:
    """Draw a panel for each metric: of one run in a colour for each curve, of several in one for each run."""
    across = math.ceil(math.sqrt(len(drawn))) if len(drawn) < 7 else 3
    down = math.ceil(len(drawn) / across)
    figure.set_size_inches(5 * across, 3.4 * down + 0.4)
    lines: dict[str, Any] = {}
    for place, (panel, names) in enumerate(drawn.items(), 1):
        axes = figure.add_subplot(down, across, place)
        axes.set_title(names[0] if len(names) == 1 else panel)
        axes.set_xlabel(by)
        axes.grid(alpha=0.3)
        styles: dict[str, Any] = {}
        for (label, run), colour in zip(runs.items(), colours, strict=True):
            for index, (name, style) in enumerate(zip(names, itertools.cycle(("-", "--", ":", "-.")), strict=False)):
                if curve := points(run, name, by):
                    own = f"C{index % 10}" if len(runs) == 1 else colour
                    mark = "." if len(curve) <= 100 else ""
                    (line,) = axes.plot(*zip(*curve, strict=True), color=own, linestyle=style, marker=mark)
                    lines.setdefault(label, line)
                    (styles[name],) = axes.plot([], color=own if len(runs) == 1 else "black", linestyle=style)
        if len(names) > 1:
            axes.legend(styles.values(), styles)
    if len(runs) == 1:
        figure.suptitle(next(iter(runs)))
    else:
        figure.legend(lines.values(), lines, loc="outside upper center", ncols=min(len(lines), 2 * across))
