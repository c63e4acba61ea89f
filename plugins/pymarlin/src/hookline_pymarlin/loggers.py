"""PyMarlin's loggers."""

from __future__ import annotations

import logging

HANDLER = logging.StreamHandler()
HANDLER.setFormatter(logging.Formatter("%(asctime)s:%(levelname)s : %(name)s : %(lineno)d : %(message)s"))


def getlogger(name: str, log_level: int | str = "INFO") -> logging.Logger:
    """Return a logger that writes to stderr from a level on."""
    logger = logging.getLogger(name)
    if HANDLER not in logger.handlers:
        logger.addHandler(HANDLER)
    logger.setLevel(log_level)
    return logger
