"""Texts of a width, numbers and commands as people read them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path


def shorten(text: str, width: int) -> str:
    """Return a text on one line of at most so many columns."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def number(value: float) -> str:
    """Return a number as people read it: five digits, integers whole."""
    return str(value) if isinstance(value, int) else format(value, ".5g")


def typed(command: Sequence[str]) -> str:
    """Return a command as it was typed: without the path of the interpreter, and of `hookline`."""
    words = list(command)
    if words[1:3] == ["-m", "hookline"]:
        words = words[2:]
    elif [Path(word).name for word in words[1:2]] == ["hookline"]:
        words = ["hookline", *words[2:]]
    elif words:
        words[0] = Path(words[0]).name
    return shlex.join(words) or "-"
