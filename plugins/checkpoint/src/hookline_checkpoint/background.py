"""One job at a time in a thread of its own, whose end and whose error are the caller's business."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from typing import Generic, TypeVar

from hookline_checkpoint.storage import CheckpointError

T = TypeVar("T")

log = logging.getLogger("hookline.checkpoint")


class Background(Generic[T]):
    """Does jobs, one after the other.

    Args:
        timeout: seconds after its start at which a job is taken to hang. Its thread cannot be ended, but it does not
            keep the process from ending.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._job: Future[T] | None = None
        self._deadline = 0.0

    def start(self, job: Callable[[], T]) -> None:
        """Begin a job; the one before has been taken."""
        assert self._job is None
        future: Future[T] = Future()
        self._job, self._deadline = future, time.monotonic() + self.timeout

        def work() -> None:
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, name="hookline-checkpoint", daemon=True).start()

    def take(self, wait: bool = True) -> T | None:
        """Return what the job answered, once; None where there is none, or none that is done and `wait` is off.

        Raises:
            CheckpointError: it hangs.
            Exception: whatever it raised, once.
        """
        job, began = self._job, time.monotonic()
        if job is None or not (wait or job.done() or began >= self._deadline):
            return None
        wait_for([job], max(self._deadline - began, 0))  # if this is interrupted, the job can be taken once more
        self._job = None
        if not job.done():
            raise CheckpointError(
                f"the save under way has not come to its end within {self.timeout:g} s (checkpoint.timeout); "
                "the checkpoints before it are as they were. Is the disk there, and quick enough?"
            )
        waited = time.monotonic() - began
        if waited > 1:
            log.info("waited %.1f s for the save under way", waited)
        return job.result()
