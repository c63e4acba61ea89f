"""One syntax for every cadence: "epoch", "2 epochs", "50 steps", "eval", "10 min" …."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

_UNITS = {
    "epochs": ("epoch", "ep"),
    "steps": ("step", "st"),
    "batches": ("batch", "batches", "ba"),
    "samples": ("sample", "sa"),
    "evaluations": ("evaluation", "eval"),
}
_SECONDS = {
    1: ("second", "sec", "s"),
    60: ("minute", "min", "m"),
    3600: ("hour", "h"),
    86400: ("day", "d"),
}
_UNIT_OF = {word: (unit, 1) for unit, words in _UNITS.items() for word in words} | {
    word: ("seconds", factor) for factor, words in _SECONDS.items() for word in words
}
_EXAMPLES = '"epoch", "2 epochs", "30ep", "50 steps", "100 batches", "eval", "3 evaluations", "10 min", "1h"'


class Every(NamedTuple):
    """A cadence: every `number` of a counter of the run (of `seconds` for a time)."""

    number: int
    unit: str

    def crossed(self, before: float, after: float) -> bool:
        """Tell whether a multiple of `number` lies in (before, after]."""
        return after // self.number > before // self.number


@functools.cache
def every(text: str) -> Every:
    """Read a cadence: a number (1 if left out) and a unit, in upper or lower case.

    Raises:
        ValueError: any other text; the message has examples.
    """
    match = re.fullmatch(r"\s*(\d+)?\s*([a-z]+)\s*", text.lower()) if isinstance(text, str) else None
    word = match[2] if match else ""
    known = _UNIT_OF.get(word) or _UNIT_OF.get(word.removesuffix("s"))
    if match is None or known is None or (match[1] is not None and int(match[1]) == 0):
        raise ValueError(f"{text!r} is not a cadence; write one like {_EXAMPLES}")
    unit, factor = known
    return Every(int(match[1] or 1) * factor, unit)


def seconds(text: str, option: str = "") -> int:
    """Read a duration such as "10 min" or "1h"; return its seconds.

    Args:
        text: the duration.
        option: its option, for messages: `plugin.option`.

    Raises:
        ValueError: the text is not a duration.
    """
    try:
        duration = every(text)
        if duration.unit != "seconds":
            raise ValueError(f'{text!r} is not a duration; write one like "90 s", "10 min" or "1h"')
    except ValueError as error:
        raise ValueError(f"{option}={error}" if option else str(error)) from None
    return duration.number
