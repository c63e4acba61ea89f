"""What hookline logs, on standard error, for who has configured no logging of his own."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

LEVELS = ("debug", "info", "warning", "error")
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextlib.contextmanager
def shown(level: str | None, rank: str) -> Iterator[None]:
    """Have what is logged below `hookline` written to standard error.

    Left to the handlers of the root logger as soon as it has any. Of ranks other than 0 only warnings and
    errors are written, with the rank before them, unless everything is asked for.

    Args:
        level: one of `LEVELS`; None for info, or for the level that the logger has been given before.
        rank: of this process, as what has started it says; empty where there is but one.
    """
    logger, handler = logging.getLogger("hookline"), logging.StreamHandler()
    before = logger.level
    if level is not None or before == logging.NOTSET:
        logger.setLevel((level or "info").upper())
    another = rank not in ("", "0")
    if another and logger.level > logging.DEBUG:
        handler.setLevel(logging.WARNING)
    named = FORMAT.replace("%(message)s", f"rank {rank}: %(message)s") if another else FORMAT
    handler.setFormatter(logging.Formatter(named, datefmt="%Y-%m-%d %H:%M:%S"))
    handler.addFilter(lambda record: not logging.root.handlers)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
