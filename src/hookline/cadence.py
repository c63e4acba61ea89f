"""One syntax for every cadence: "epoch", "0.25 epoch", "50 steps", "eval", "10 min" …."""

from __future__ import annotations

import functools
import re
from fractions import Fraction
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
_EXAMPLES = '"epoch", "2 epochs", "0.25 epoch", "50 steps", "100 batches", "eval", "3 evaluations", "10 min", "1.5h"'


class Every(NamedTuple):
    """A cadence: every `number` of a counter of the run (of `seconds` for a time).

    The number is a `Fraction` for a fraction of epochs, a float for a fraction of a second, and else an int.
    """

    number: float | Fraction
    unit: str

    def crossed(self, before: float, after: float) -> bool:
        """Tell whether a multiple of `number` lies in (before, after]."""
        return bool(after // self.number > before // self.number)

    def passed(self, epoch: int, batch: int, batches: int | None) -> int:
        """Return how many multiples of a number of epochs lie up to a place in the run.

        Args:
            epoch: the index of the epoch.
            batch: how many of its batches are trained.
            batches: of the epoch; None if unknown.

        Raises:
            ValueError: a fraction of an epoch of unknown length.
        """
        above, below = self.number.as_integer_ratio()  # 0.1 has no exact float
        if below == 1:
            return epoch // above
        if batches is None:
            raise ValueError(
                f'"{float(self.number):g} epochs" needs the length of an epoch, which the training loader does not '
                'tell: count steps ("500 steps"), give the loader a __len__, or set max_train_steps_per_epoch'
            )
        return (epoch * batches + min(batch, batches)) * below // ((batches or 1) * above)


@functools.cache
def every(text: str) -> Every:
    """Read a cadence: a number (1 if left out) and a unit, in upper or lower case.

    Epochs and times may be fractions.

    Raises:
        ValueError: any other text; the message has examples.
    """
    match = re.fullmatch(r"\s*(\d*\.?\d+)?\s*([a-z]+)\s*", text.lower()) if isinstance(text, str) else None
    word = match[2] if match else ""
    unit, factor = _UNIT_OF.get(word) or _UNIT_OF.get(word.removesuffix("s")) or ("", 1)
    number = Fraction((match and match[1]) or 1) * factor
    whole = number.denominator == 1
    if not (unit and number and (whole or unit in ("epochs", "seconds"))):
        raise ValueError(f"{text!r} is not a cadence; write one like {_EXAMPLES}; only epochs and times have fractions")
    return Every(int(number) if whole else number if unit == "epochs" else float(number), unit)


def seconds(text: str, option: str = "") -> float:
    """Read a duration such as "10 min" or "1.5h"; return its seconds.

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
    return duration.number if isinstance(duration.number, int) else float(duration.number)
