"""Text in columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Return lines of aligned columns below their heads, to the left unless they are among `right`."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    aligned = [
        [cell.rjust(w) if c in right else cell.ljust(w) for c, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return ["  ".join(line).rstrip() for line in aligned]


def shorten(text: str, width: int) -> str:
    """Return a text on one line of at most so many columns."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def number(value: float) -> str:
    """Return a number as people read it: five digits, integers whole."""
    return str(value) if isinstance(value, int) else format(value, ".5g")


def strict(value: Any) -> Any:
    """Return a value as strict JSON can hold it: the record's words for NaN and infinity, names that are text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(name): strict(inner) for name, inner in value.items()}
    return [strict(inner) for inner in value] if isinstance(value, (list, tuple)) else value
