"""The curve of a sweep: in the terminal by plotext, in a picture by matplotlib. Both are imported when they draw."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PLOTS = "pip install hookline-lr-find[plots]"


def draw(points: Sequence[Any], suggestion: float | None, width: int = 78, height: int = 18) -> list[str]:
    """Return lines of text with the smoothed loss by the rate, or what they need."""
    try:
        plotext = importlib.import_module("plotext")
    except ImportError:
        return [f"curve: `{PLOTS}` has it drawn here"]
    if not points:
        return []
    plotext.clear_figure()
    plotext.limit_size(False, False)
    plotext.plotsize(width, height)
    logarithms = [math.log10(point.rate) for point in points]
    plotext.plot(logarithms, [point.smoothed for point in points], marker="braille")
    if suggestion is not None:
        plotext.vline(math.log10(suggestion))
    ticks = [logarithms[0] + (logarithms[-1] - logarithms[0]) * part / 4 for part in range(5)]
    plotext.xticks(ticks, [f"{10**tick:.1e}" for tick in ticks])
    plotext.title("smoothed loss by learning rate")
    lines: list[str] = plotext.uncolorize(plotext.build()).splitlines()
    plotext.clear_figure()
    return lines


def save_picture(path: Path, points: Sequence[Any], suggestion: float | None) -> None:
    """Draw the losses by the rate into a file; its suffix says the format.

    Raises:
        ValueError: there is no matplotlib, or it cannot write the file.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ValueError(f"a picture of the curve needs matplotlib: {PLOTS}") from error
    figure = figures.Figure(layout="constrained")
    axes = figure.subplots()
    axes.plot([point.rate for point in points], [point.loss for point in points], alpha=0.4, label="loss")
    axes.plot([point.rate for point in points], [point.smoothed for point in points], label="smoothed")
    if suggestion is not None:
        axes.axvline(suggestion, linestyle="--", color="black", label=f"suggestion {suggestion:.3g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ValueError(f"the picture {path} cannot be written: {error}") from error
