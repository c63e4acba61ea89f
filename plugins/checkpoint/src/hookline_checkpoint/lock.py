"""One writer for a run folder: a lock that names its owner, and that a dead owner does not hold.

The lock is a folder with a file in it: renaming a folder onto one that is not empty fails, so of
two that take it at once one gets it, and it is never there without its owner's name.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from hookline_checkpoint.storage import leftover

NAME = ".lock"
OWNER = "owner.json"
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)

log = logging.getLogger("hookline")


class LockedError(ValueError):
    """What is raised where another job writes into the run folder."""


class Lock:
    """The right to write checkpoints into a run folder, until it is released.

    Raises:
        LockedError: another job has it, by process, host and boot, and nothing says that it is dead.
        OSError: the folder cannot be written.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / NAME
        self.owner = _me()
        while not self._take():
            self._clear_stale()

    def _take(self) -> bool:
        temporary = leftover(self.path.parent, "tmp")
        temporary.mkdir()
        try:
            (temporary / OWNER).write_text(json.dumps(self.owner))
            temporary.rename(self.path)
        except OSError as error:
            if error.errno in TAKEN:
                return False
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return True

    def _clear_stale(self) -> None:
        """Put the lock of a dead owner aside; one that lives, or may live, is an error."""
        owner = _read(self.path)
        if owner is None:  # released meanwhile
            return
        if not _is_dead(owner, self.owner):
            raise LockedError(
                f"{self.path.parent} belongs to another job: process {owner.get('pid')} on {owner.get('host')} "
                f"(boot {owner.get('boot')}), since {owner.get('since')}. Two jobs must not save into one run folder: "
                f"end that one, or start without resume to get a run folder of your own. If it is surely gone, remove "
                f"{self.path}"
            )
        aside = leftover(self.path.parent, "trash")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        if _read_owner(aside) != owner:  # somebody was faster, and this lock is alive: it goes back
            with contextlib.suppress(OSError):
                aside.rename(self.path)
            return
        shutil.rmtree(aside, ignore_errors=True)
        log.info("%s was left by process %s, which is dead; took it over", self.path, owner.get("pid"))

    def release(self) -> None:
        """Give the lock back, if it is still ours."""
        if _read_owner(self.path) != self.owner:
            log.warning("%s is not ours any more: somebody has removed it, and another job may have written", self.path)
            return
        aside = leftover(self.path.parent, "trash")
        self.path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _me() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": _line("/proc/sys/kernel/random/boot_id"),
        "started": _started(os.getpid()),
        "since": datetime.datetime.now(datetime.UTC).isoformat(),
    }


def _is_dead(owner: dict[str, Any], me: dict[str, Any]) -> bool:
    """Tell whether an owner is dead for sure: of this host, and of an earlier boot or no process of this one."""
    if not owner.get("host") or owner["host"] != me["host"]:
        return False
    if owner.get("boot") != me["boot"]:
        return bool(owner.get("boot") and me["boot"])
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (KeyError, TypeError, ValueError, OSError):
        return False
    # The number of a process that has ended is given again, in containers at every start.
    return bool(owner.get("started")) and _started(owner["pid"]) != owner["started"]


def _started(pid: int) -> str:
    """Return when a process began, in the kernel's ticks since its boot, or nothing where that is not known."""
    stat = _line(f"/proc/{pid}/stat")
    return stat.rpartition(")")[2].split()[19] if stat else ""


def _line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _read(path: Path) -> dict[str, Any] | None:
    """Return the owner of a lock; None where there is no lock, and nothing about him where he cannot be read."""
    if not os.path.lexists(path):
        return None
    return _read_owner(path) or {}


def _read_owner(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads((path / OWNER).read_text())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}
