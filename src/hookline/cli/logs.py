"""Log messages of hookline on standard error, unless the user has configured logging."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from hookline.masking import redact

LEVELS = ("debug", "info", "warning", "error")
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


@contextlib.contextmanager
def shown(level: str | None, rank: str) -> Iterator[None]:
    """Write log messages of `hookline` to standard error within the block.

    If the root logger has handlers, only these write. Ranks other than 0 write only warnings and errors, with the rank
    in front, unless the level is debug.

    Args:
        level: one of `LEVELS`; None for info, or for the level that the logger already has.
        rank: the rank of this process, from its launcher; empty for a single process.
    """
    logger, handler = logging.getLogger("hookline"), logging.StreamHandler()
    before = logger.level
    if level is not None or before == logging.NOTSET:
        logger.setLevel((level or "info").upper())
    another = rank not in ("", "0")
    if another and logger.level > logging.DEBUG:
        handler.setLevel(logging.WARNING)
    named = FORMAT.replace("%(message)s", f"rank {rank}: %(message)s") if another else FORMAT
    handler.setFormatter(_Redacting(named, datefmt="%Y-%m-%d %H:%M:%S"))
    handler.addFilter(lambda record: not logging.root.handlers)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
