"""Observers: plugins that only watch, whose failures are told and end nothing."""

from __future__ import annotations

import logging
from typing import Any

from hookline.marks import PROJECT

FAILURES_ALLOWED = 3  # of an observer in one hook, in a row, before it is switched off there

log = logging.getLogger(f"{PROJECT}.plugins")


def is_observer(plugin: Any) -> bool:
    """Tell whether a plugin says that it only watches."""
    return getattr(plugin, "observer", False) is True


class Failures:
    """Counts the failures of observers by hook and plugin, and says them."""

    def __init__(self) -> None:
        self.in_a_row: dict[tuple[str, str], int] = {}
        self.switched_off: dict[tuple[str, str], str] = {}
        """Who is no longer called where, and the last error there."""
        self._lost: dict[tuple[str, str], int] = {}  # calls of this run

    def take(self, hook: str, name: str, error: Exception) -> bool:
        """Take a failure in; return whether it was one too many, and the observer is switched off in this hook."""
        last = self.say(hook, name, error)
        count = self.in_a_row[hook, name] = self.in_a_row.get((hook, name), 0) + 1
        if count != FAILURES_ALLOWED:
            return False
        log.warning("plugin %r is switched off in %s after %d failures in a row: %s", name, hook, count, last)
        self.switched_off[hook, name] = last
        return True

    def say(self, hook: str, name: str, error: Exception) -> str:
        """Say the first failure of an observer in a hook in this run, and count it; return what it was."""
        said = f"{type(error).__name__}: {error}"
        if (hook, name) not in self._lost:
            log.warning("plugin %r failed in %s, and the run goes on: %s", name, hook, said, exc_info=error)
        self.lose(hook, name)
        return said

    def lose(self, hook: str, name: str) -> None:
        """Count a call that an observer has missed."""
        self._lost[hook, name] = self._lost.get((hook, name), 0) + 1

    def report(self) -> None:
        """Say how many calls of each observer were lost in this run, by hook."""
        for (hook, name), lost in self._lost.items():
            last = self.switched_off.get((hook, name))
            off = "" if last is None else f"; it is switched off there since {last}"
            log.warning("plugin %r lost %d call(s) of %s%s", name, lost, hook, off)
        self._lost.clear()
