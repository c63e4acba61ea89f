"""The thread of a tracker: it makes one call after the other, and survives their failures."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable

WAITING = 1000  # calls that may wait for the thread; more are dropped
FAILURES_ALLOWED = 3  # in a row, of one method, before it is switched off

log = logging.getLogger("hookline.tracking")


class Clerk:
    """Makes calls in a thread of its own, one after the other, and survives their failures."""

    def __init__(self, name: str, start: Callable[[], None]) -> None:
        self.name = name
        # Each with the name of its method; None is the end.
        self._calls: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue(WAITING)
        self._finish: Callable[[], None] | None = None
        self._lost: Counter[str] = Counter()  # calls by method; only the thread writes it
        self._dropped: Counter[str] = Counter()  # calls by method that found the queue full
        self._failing: Counter[str] = Counter()  # failures in a row, by method
        self._thread = threading.Thread(target=self._work, args=[start], name=f"hookline-{name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many calls have not begun."""
        return self._calls.qsize()

    def tell(self, what: str, call: Callable[[], None]) -> None:
        """Queue a call; drop it if too many wait."""
        try:
            self._calls.put_nowait((what, call))
        except queue.Full:
            if not self._dropped:
                log.warning(
                    "%s is slower than training, or hangs: %d calls wait for it, and more are dropped until there is "
                    "room", self.name, WAITING,
                )  # fmt: skip
            self._dropped[what] += 1

    def wait(self, patience: float) -> None:
        """Wait until all queued calls are done, for at most `patience` seconds."""
        with self._calls.all_tasks_done:
            self._calls.all_tasks_done.wait_for(lambda: not self._calls.unfinished_tasks, patience)

    def close(self, finish: Callable[[], None], patience: float) -> None:
        """Queue the last call, and wait for all calls, for at most `patience` seconds."""
        deadline = time.monotonic() + patience
        self._finish = finish
        with contextlib.suppress(queue.Full):
            self._calls.put(None, timeout=patience)
        self._thread.join(max(deadline - time.monotonic(), 0))
        lost = Counter(dict(self._lost)) + self._dropped
        if self._thread.is_alive():
            log.warning("%s has not taken all within %g s (close_timeout): the run ends without", self.name, patience)
            with self._calls.mutex:
                lost.update(told[0] for told in self._calls.queue if told is not None)
        if lost:
            said = ", ".join(f"{count} of {what}" for what, count in lost.items())
            log.warning("calls of %s failed or were dropped, and may be missing in its run: %s", self.name, said)

    def _work(self, start: Callable[[], None]) -> None:
        started = self._try(start, "it could not start")
        while (told := self._calls.get()) is not None:
            what, call = told
            if started and self._failing[what] < FAILURES_ALLOWED:
                self._do(what, call)
            else:
                self._lost[what] += 1
            self._calls.task_done()
        if started and self._finish is not None:
            self._try(self._finish, "it could not end its run")

    def _do(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            if not self._lost[what]:
                log.warning("%s of %s failed, and training goes on: %s", what, self.name, said)
            self._lost[what] += 1
            self._failing[what] += 1
            if self._failing[what] == FAILURES_ALLOWED:
                log.warning(
                    "%s of %s is switched off, and training goes on without it: %d failures in a row, the last: %s",
                    what, self.name, FAILURES_ALLOWED, said,
                )  # fmt: skip
        else:
            self._failing[what] = 0

    def _try(self, call: Callable[[], None], why: str) -> bool:
        """Make the first or the last call; return whether it succeeded, and log a failure."""
        try:
            call()
        except Exception as error:
            log.warning(
                "%s is switched off, and training goes on without it: %s: %s: %s",
                self.name, why, type(error).__name__, error,
            )  # fmt: skip
            return False
        return True
