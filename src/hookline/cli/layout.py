"""Text in columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


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
