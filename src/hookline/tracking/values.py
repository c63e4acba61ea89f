"""Objects that can be logged besides numbers, and their form for trackers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Image:
    """An image: an array or a tensor (height, width), (height, width, 3) or (3, height, width).

    Whole numbers range from 0 to 255, others from 0 to 1.
    """

    pixels: Any


@dataclass(frozen=True)
class Histogram:
    """The distribution of the numbers in an array or a tensor."""

    values: Any


@dataclass(frozen=True)
class Table:
    """Rows with named columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    @property
    def plain_rows(self) -> list[list[Any]]:
        """The rows, with the text of each cell that is not a number, text, truth value or None."""
        return [
            [cell if isinstance(cell, bool | int | float | str | None) else str(cell) for cell in row]
            for row in self.rows
        ]

    @property
    def markdown(self) -> str:
        """The table as Markdown."""
        rows = [self.columns, ["---"] * len(self.columns), *self.rows]
        lines = (" | ".join(str(cell).replace("|", r"\|").replace("\n", " ") for cell in row) for row in rows)
        return "\n".join(f"| {line} |" for line in lines)


def flat(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a configuration by dotted names; an empty mapping is a leaf."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def below(name: str) -> str:
    """Return a name that, as a path, cannot leave the folder in which it is used."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", "..")) or "_"


def prepared(value: Any) -> tuple[str, Any] | None:
    """Return the kind of a value and an independent copy in the form for trackers; None if it has no kind."""
    if isinstance(value, str):
        return "text", value
    if isinstance(value, Path):
        return "file", value
    if isinstance(value, Table):
        return "table", Table(list(value.columns), [list(row) for row in value.rows])
    if isinstance(value, Histogram):
        numbers = as_array(value.values).astype("float64").ravel()
        numbers = numbers[abs(numbers) < float("inf")]
        return ("histogram", numbers) if len(numbers) else None
    if isinstance(value, Image):
        return "image", as_pixels(as_array(value.pixels))
    if hasattr(value, "canvas") and hasattr(value, "savefig"):
        return "image", drawn(value)
    if hasattr(value, "convert") and hasattr(value, "getbands"):  # an image of PIL
        return "image", as_array(value.convert("RGB")).copy()
    return None


def drawn(figure: Any) -> Any:
    """Return the pixels of a matplotlib figure, whatever its backend."""
    agg = importlib.import_module("matplotlib.backends.backend_agg")  # a figure implies that it exists
    shown = figure.canvas
    canvas = agg.FigureCanvasAgg(figure)
    canvas.draw()
    figure.set_canvas(shown)
    return as_array(canvas.buffer_rgba())[..., :3].copy()


def as_array(value: Any) -> Any:
    """Return a copy of the numbers of a tensor, an array or nested lists as a numpy array."""
    import numpy  # needed only to log images

    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    return numpy.array(value)


def as_pixels(array: Any) -> Any:
    """Return an image as (height, width, 3) of uint8.

    Raises:
        ValueError: an array of another shape.
    """
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        raise ValueError(
            "an image has the shape (height, width), (height, width, channels) or (channels, height, width), with 1, 3 "
            f"or 4 channels; this one has {array.shape}"
        )
    array = array[..., :3].repeat(3, axis=-1) if array.shape[-1] == 1 else array[..., :3]
    return (array.clip(0, 1) * 255).round().astype("uint8") if array.dtype.kind == "f" else array.astype("uint8")
