"""A timer that no Python code can hold up: it needs no interpreter lock to dump the stacks and end the process.

It is faulthandler's, of which a process has one. A process that is forked while it runs would inherit it without
its thread, and hang for ever where it sets or clears it, so it does not run while a process is forked.
"""

from __future__ import annotations

import faulthandler
import os
import threading

STDERR = 2

_lock = threading.Lock()
_set_to: float | None = None


def set_to(seconds: float) -> None:
    """Have the stacks of all threads dumped to stderr and the process ended with code 1, so many seconds from now."""
    global _set_to
    with _lock:
        _set_to = seconds
        faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)


def clear() -> None:
    """Have nothing happen."""
    global _set_to
    with _lock:
        _set_to = None
        faulthandler.cancel_dump_traceback_later()


def _before_fork() -> None:
    _lock.acquire()
    if _set_to is not None:
        faulthandler.cancel_dump_traceback_later()


def _after_in_parent() -> None:
    if _set_to is not None:
        faulthandler.dump_traceback_later(_set_to, exit=True, file=STDERR)
    _lock.release()


def _after_in_child() -> None:
    global _set_to
    _set_to = None
    _lock.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
