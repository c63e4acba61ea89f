"""Observers: plugins that only watch; their failures cause warnings and do not end the run."""

from __future__ import annotations

import logging
from typing import Any

from hookline.marks import PROJECT

FAILURES_ALLOWED = 3  # in a row, of an observer in one hook, before it is switched off there

log = logging.getLogger(f"{PROJECT}.plugins")


def is_observer(plugin: Any) -> bool:
    """Tell whether a plugin is an observer."""
    return getattr(plugin, "observer", False) is True


class Failures:
    """Counts and logs the failures of observers, by hook and plugin."""

    def __init__(self) -> None:
        self.in_a_row: dict[tuple[str, str], int] = {}
        self.switched_off: dict[tuple[str, str], str] = {}
        """Switched-off observers by hook, with the last error."""
        self._lost: dict[tuple[str, str], int] = {}  # calls of this run

    def take(self, hook: str, name: str, error: Exception) -> bool:
        """Count a failure; return whether the observer is now switched off in this hook."""
        last = self.say(hook, name, error)
        count = self.in_a_row[hook, name] = self.in_a_row.get((hook, name), 0) + 1
        if count != FAILURES_ALLOWED:
            return False
        log.warning("plugin %r is switched off in %s after %d failures in a row: %s", name, hook, count, last)
        self.switched_off[hook, name] = last
        return True

    def say(self, hook: str, name: str, error: Exception) -> str:
        """Log the first failure of an observer in a hook in this run, and count it; return its text."""
        said = f"{type(error).__name__}: {error}"
        if (hook, name) not in self._lost:
            log.warning("plugin %r failed in %s, and the run goes on: %s", name, hook, said, exc_info=error)
        self.lose(hook, name)
        return said

    def lose(self, hook: str, name: str) -> None:
        """Count a call that an observer missed."""
        self._lost[hook, name] = self._lost.get((hook, name), 0) + 1

    def report(self) -> None:
        """Log how many calls of each observer were lost in this run, by hook."""
        for (hook, name), lost in self._lost.items():
            last = self.switched_off.get((hook, name))
            off = "" if last is None else f"; it is switched off there since {last}"
            log.warning("plugin %r lost %d call(s) of %s%s", name, lost, hook, off)
        self._lost.clear()
