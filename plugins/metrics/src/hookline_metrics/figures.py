"""What a metric has computed as a figure of matplotlib."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torchmetrics import Metric
from torchmetrics.classification import BinaryConfusionMatrix, MulticlassConfusionMatrix, MultilabelConfusionMatrix

READABLE = 20  # curves or matrices in one figure, and classes of a matrix that is written out
CONFUSION = (BinaryConfusionMatrix, MulticlassConfusionMatrix, MultilabelConfusionMatrix)


def draw(metric: Metric, value: Any) -> Any:
    """Return what a metric has computed as a figure of matplotlib.

    Raises:
        ImportError: there is no matplotlib.
        ValueError: there is too much to see.
    """
    from matplotlib.figure import Figure  # one that pyplot knows nothing of, so that nobody has to close it

    figure = Figure(layout="constrained")
    if isinstance(metric, CONFUSION):
        several = value.ndim == 3
        draw_matrices(figure, {f"Label {label}": one for label, one in enumerate(value)} if several else {"": value})
        return figure
    if isinstance(value, tuple) and (isinstance(value[0], list) or value[0].ndim == 2):
        check_readable(len(value[0]), "curves")
    metric.plot(value, ax=figure.subplots())
    return figure


def draw_matrices(figure: Any, matrices: Mapping[str, torch.Tensor]) -> None:
    """Draw confusion matrices by title: colours, and where there are few classes also the numbers."""
    check_readable(len(matrices), "matrices")
    columns = math.ceil(math.sqrt(len(matrices)))
    rows = math.ceil(len(matrices) / columns)
    classes = len(next(iter(matrices.values())))
    side = max(4.0, 0.6 * min(classes, READABLE))
    figure.set_size_inches(side * columns, side * rows)
    for place, (title, matrix) in enumerate(matrices.items(), 1):
        numbers = matrix.cpu().numpy()
        axes = figure.add_subplot(rows, columns, place, title=title, xlabel="predicted class", ylabel="true class")
        image = axes.imshow(numbers)
        if classes > READABLE:
            figure.colorbar(image)
            continue
        axes.set(xticks=range(classes), yticks=range(classes))
        for row, column in itertools.product(range(classes), repeat=2):
            number = numbers[row, column]
            dark = image.norm(number) < 0.5
            text = f"{number:.2f}" if matrix.is_floating_point() else str(number)
            axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black")


def check_readable(number: int, things: str) -> None:
    """Refuse to draw what takes long and nobody can read.

    Raises:
        ValueError: how many there are, and how many may be.
    """
    if number > READABLE:
        raise ValueError(f"{number} {things} in one figure are more than anybody can read; up to {READABLE} are drawn")
