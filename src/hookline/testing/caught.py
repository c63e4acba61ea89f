"""Warnings that plugins or trackers cause, collected for a check."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def warnings_of(area: str) -> Iterator[list[str]]:
    """Collect the warnings of the logger `hookline.<area>`."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(f"hookline.{area}")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
