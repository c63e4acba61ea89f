"""Processes that may be killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

PRELOADED = ["torch", "torch._dynamo", "hookline.trainer", "hookline.testing.faults"]  # optimizers import dynamo
"""Modules that every `Child` finds imported; what is appended before the first one is, too."""


class Outcome(NamedTuple):
    """How a process ended."""

    code: int
    """Its exit code, or minus the signal that killed it."""
    value: Any
    """What the function returned; None where it did not."""
    output: str
    """What it wrote to stdout and stderr."""


class Child:
    """A function that runs in a process of its own, in its own session; forked where torch is imported already.

    Args:
        function: importable by its name.
        args: its arguments, which can be pickled.
    """

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._output = tempfile.NamedTemporaryFile("r", prefix="hookline-child-")  # noqa: SIM115 - closed in wait
        self._ours, theirs = context.Pipe(duplex=False)
        method = multiprocessing.get_start_method(allow_none=True)
        given = theirs, self._output.name, method, function, args
        self._process = context.Process(target=_run, args=given, daemon=False)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The number of the process."""
        pid = self._process.pid
        assert pid is not None
        return pid

    @property
    def output(self) -> str:
        """What it has written so far."""
        return Path(self._output.name).read_text(errors="replace")

    def signal(self, number: int) -> None:
        """Send it a signal; one that has ended by itself gets none."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float = 60.0) -> Outcome:
        """Return how it ended.

        Raises:
            TimeoutError: it did not, and was killed with all that it had started.
        """
        deadline, value = time.monotonic() + timeout, None
        connection.wait([self._ours, self._process.sentinel], timeout)  # what it has started may keep the pipe open
        with contextlib.suppress(EOFError):
            value = pickle.loads(self._ours.recv_bytes()) if self._ours.poll() else None
        self._process.join(max(deadline - time.monotonic(), 0))
        hangs = self._process.is_alive()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # what it has started and left
        self._process.kill()
        self._process.join()
        output, code = self.output, self._process.exitcode
        self._ours.close()
        self._output.close()
        self._process.close()
        if hangs:
            raise TimeoutError(f"it was still running after {timeout} s; it wrote:\n{output}")
        assert code is not None
        return Outcome(code, value, output)


def run(function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> Outcome:
    """Run a function in a process of its own and return how that ended; see `Child`."""
    return Child(function, *args).wait(timeout)


def _run(pipe: Any, output: str, method: str | None, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    multiprocessing.set_start_method(method, force=True)  # it would hand its own on to loading workers, say
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - the process ends with it
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    pipe.send_bytes(pickle.dumps(function(*args)))  # by value: torch would share tensors with a process that has ended
