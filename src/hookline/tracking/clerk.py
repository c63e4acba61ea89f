"""The thread of a tracker: it does one call after the other, whatever becomes of them."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable

WAITING = 1000  # calls that may wait for the thread; more are dropped
FAILURES_ALLOWED = 3  # of one method in a row, before it is switched off

log = logging.getLogger("hookline.tracking")


class Clerk:
    """Does calls in a thread of its own, one after the other, whatever becomes of them."""

    def __init__(self, name: str, start: Callable[[], None]) -> None:
        self.name = name
        # By the name of the method; None is the end.
        self._calls: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue(WAITING)
        self._finish: Callable[[], None] | None = None
        self._lost: Counter[str] = Counter()  # calls by method: of the thread, which alone counts here
        self._dropped: Counter[str] = Counter()  # and where there was no room
        self._failing: Counter[str] = Counter()  # how many failed in a row
        self._thread = threading.Thread(target=self._work, args=[start], name=f"hookline-{name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many calls have not begun."""
        return self._calls.qsize()

    def tell(self, what: str, call: Callable[[], None]) -> None:
        """Have something done soon; it is dropped where too much waits."""
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
        """Wait until nothing waits any more, not for ever."""
        with self._calls.all_tasks_done:
            self._calls.all_tasks_done.wait_for(lambda: not self._calls.unfinished_tasks, patience)

    def close(self, finish: Callable[[], None], patience: float) -> None:
        """Have the last thing done, and wait for all of it, not for ever."""
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
        """Do the first or the last call and return whether it has not failed; else say so."""
        try:
            call()
        except Exception as error:
            log.warning(
                "%s is switched off, and training goes on without it: %s: %s: %s",
                self.name, why, type(error).__name__, error,
            )  # fmt: skip
            return False
        return True
