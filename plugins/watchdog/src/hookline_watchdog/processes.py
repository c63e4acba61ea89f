"""The processes of a run, as their machine shows them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

STOPPED = "T"  # by SIGSTOP or Ctrl-Z; under a debugger it is another letter


class Process(NamedTuple):
    """A process, told apart from a later one of the same number."""

    host: str
    pid: int
    began: str
    """When it began, in the kernel's own measure; empty where the system does not tell."""


def this_process() -> Process:
    """Return the process that asks."""
    _, began = _look(os.getpid())
    return Process(socket.gethostname(), os.getpid(), began)


def end_stopped(ranks: Mapping[int, Process]) -> list[int]:
    """Kill those that are stopped on this machine: they could not end themselves. Return their ranks."""
    ended = []
    for rank, process in ranks.items():
        here = process.began and process.host == socket.gethostname()
        if here and _look(process.pid) == (STOPPED, process.began):
            with contextlib.suppress(OSError):
                os.kill(process.pid, signal.SIGKILL)
                ended.append(rank)
    return ended


def _look(pid: int) -> tuple[str, str]:
    """Return state and beginning of a process; empty where there is none, or on a system that is not Linux."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]
