"""PyMarlin's loggers."""

from __future__ import annotations

import logging
import sys
from typing import TextIO


class ToStderr(logging.StreamHandler[TextIO]):
    """Writes to the stderr of the moment, which bars of progress replace while they are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s:%(levelname)s : %(name)s : %(lineno)d : %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        self.stream = sys.stderr
        super().emit(record)


HANDLER = ToStderr()


def getlogger(name: str, log_level: int | str = "INFO") -> logging.Logger:
    """Return a logger that writes to stderr from a level on."""
    logger = logging.getLogger(name)
    if HANDLER not in logger.handlers:
        logger.addHandler(HANDLER)
    logger.setLevel(log_level)
    return logger
