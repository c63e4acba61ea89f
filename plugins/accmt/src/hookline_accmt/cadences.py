"""Arguments of the trainer that are read: when to save, which errors to handle."""

from __future__ import annotations

from typing import Any

import hookline
from hookline_accmt.names import Handler


def batches(every: str | None) -> str | None:
    """Return a cadence in which steps are batches.

    Raises:
        ValueError: it is none, with examples.
    """
    if every is None:
        return None
    try:
        number, unit = hookline.every(every)
    except ValueError as error:
        raise ValueError(f"checkpoint_every={every!r}: {error}") from None
    if unit == "epochs" and not isinstance(number, int):
        raise ValueError(f'checkpoint_every={every!r}: ACCMT has whole epochs alone; write "epoch", or "50 steps"')
    return f"{number} batches" if unit == "steps" else every


def handlers_of(given: Any) -> list[Handler]:
    """Return the handlers of one or a list.

    Raises:
        TypeError: something else.
    """
    handlers = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    for handler in handlers:
        if not isinstance(handler, Handler):
            raise TypeError(f"handlers: {handler!r} is none of {', '.join(map(str, Handler))}")
    return handlers
