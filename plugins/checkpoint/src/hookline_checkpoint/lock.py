"""One writer for a run folder: a lock that names its owner, and that a dead owner does not hold.

The lock is a folder with a file in it, whose name is the owner's alone. Renaming a folder onto one that is
not empty fails, so of two that take it at once one gets it; and who takes it from a dead owner removes
that owner's file and no other.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import secrets
import shutil
import socket
from pathlib import Path
from typing import Any, NamedTuple

from hookline_checkpoint.writing import leftover

NAME = ".lock"
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)

log = logging.getLogger("hookline.checkpoint")


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
        self.file = f"owner-{secrets.token_hex(8)}.json"
        while not self._take():
            stale = refuse_locked(run)
            if stale is not None:
                for name in stale.files:  # by their own names: the lock of who was faster stays
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(self.path / name)
                log.info("%s was left by process %s, which is dead; took it over", self.path, stale.owner.get("pid"))

    def _take(self) -> bool:
        """Rename a folder with our name in it to the lock: that fails where one is that is not empty."""
        temporary = leftover(self.path.parent, "tmp")
        temporary.mkdir()
        try:
            (temporary / self.file).write_text(json.dumps(self.owner))
            temporary.rename(self.path)
        except OSError as error:
            if error.errno in TAKEN:
                return False
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return True

    def release(self) -> None:
        """Give the lock back, if it is still ours."""
        try:
            os.unlink(self.path / self.file)
        except OSError:
            log.warning("%s is not ours any more: somebody has removed it, and another job may have written", self.path)
            return
        with contextlib.suppress(OSError):  # somebody was quick, and has it
            self.path.rmdir()


class Left(NamedTuple):
    """A lock whose owner is dead."""

    owner: dict[str, Any]
    files: list[str]


def refuse_locked(run: Path) -> Left | None:
    """Return the lock that a dead owner has left in a run folder; None where there is none.

    Raises:
        LockedError: its owner lives, or may live.
    """
    path = run / NAME
    try:
        files = os.listdir(path)
    except FileNotFoundError:
        return None
    owners = []
    for name in files:
        owners.append(owner := _read(path / name))
        released = not owner and not os.path.lexists(path / name)
        if not released and not _is_dead(owner, _me()):
            raise LockedError(
                f"{run} belongs to another job: process {owner.get('pid')} on {owner.get('host')} "
                f"(boot {owner.get('boot')}), since {owner.get('since')}. Two jobs must not save into one run folder: "
                f"end that one, or start without resume to get a run folder of your own. If it is surely gone, remove "
                f"{path}"
            )
    return Left(owners[0], files) if owners else None


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


def _read(path: Path) -> dict[str, Any]:
    """Return what a file says of an owner; nothing about him where it cannot be read."""
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}
