"""Look at something again and again in a thread of its own; where a training is, above all."""

from __future__ import annotations

import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from types import CodeType, FrameType
from typing import Any

log = logging.getLogger("hookline.monitor")

SHARED = {"hookline", "__main__"}  # packages that are no plugin's own


class Sampler:
    """Calls a function every so many seconds, until it is stopped or the function raises."""

    def __init__(self, look: Callable[[], None], period: float) -> None:
        self._look, self._period = look, period
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="hookline-monitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Call it no more."""
        self._over.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._over.wait(self._period):
            try:
                self._look()
            except Exception as error:
                log.warning("monitor no longer sees some figures: %s: %s", type(error).__name__, error)
                return


class Stacks:
    """Counts in whose code a thread is, each time it looks.

    A moment belongs to the plugin whose module the innermost frame is of, to "module" where that is the user's, else to
    "loop". Of several that stand in one file each has the methods of its class.
    """

    PERIOD = 0.05
    """Seconds from one look to the next."""

    def __init__(self, plugins: Mapping[str, Any], thread: int) -> None:
        self._thread = thread
        self._counts: Counter[str] = Counter()
        self._classes: dict[str, list[tuple[str, str]]] = {}  # of a file: the beginnings of names, and whose they are
        self._homes: dict[str, set[str]] = {}
        self._known: dict[CodeType, str | None] = {}
        for name, plugin in plugins.items():
            for kind in type(plugin).__mro__ if name == "module" else [type(plugin)]:
                home = kind.__module__
                package = home.partition(".")[0]
                if home == "hookline.interfaces" or package in ("torch", "abc", "builtins", "typing"):
                    continue
                self._classes.setdefault(home, []).append((f"{kind.__qualname__}.", name))
                for place in {home, *({package} - SHARED)}:
                    self._homes.setdefault(place, set()).add(name)

    def look(self) -> None:
        """Look once."""
        frame = sys._current_frames().get(self._thread)
        owner = None
        while frame is not None and owner is None:
            owner = self._owner(frame)
            frame = frame.f_back
        self._counts[owner or "loop"] += 1

    def _owner(self, frame: FrameType) -> str | None:
        code = frame.f_code
        if code not in self._known:
            self._known[code] = self._find(frame.f_globals.get("__name__") or "", code.co_qualname)
        return self._known[code]

    def _find(self, home: str, function: str) -> str | None:
        for beginning, name in self._classes.get(home, ()):
            if function.startswith(beginning):
                return name
        while home and home not in self._homes:
            home = home.rpartition(".")[0]
        names = self._homes.get(home, set())
        return next(iter(names)) if len(names) == 1 else None

    def shares(self) -> dict[str, float]:
        """Return by name which share of the looks since the last call it had; 0 where it had one before."""
        counts, self._counts = self._counts, Counter(dict.fromkeys(self._counts, 0))
        total = counts.total()
        return {name: count / total for name, count in sorted(counts.items())} if total else {}
