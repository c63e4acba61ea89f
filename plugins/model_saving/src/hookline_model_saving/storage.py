"""Folders that are replaced as a whole: whoever looks finds the old one or the new one, after a kill too."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

NEW, OLD = ".new-", ".old-"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux


def prepare(folder: Path) -> None:
    """Make the folder of models, safe from power cuts, and clear away what a writer that was killed has left."""
    folder.mkdir(parents=True, exist_ok=True)
    for parent in folder.absolute().parents[:3]:  # the run folder and those of all runs may be as new
        with contextlib.suppress(PermissionError):  # a folder that may be entered need not be readable
            _sync(parent)
    for old in folder.glob(f"{OLD}*"):
        final = folder / old.name.removeprefix(OLD)
        if not final.exists():  # killed between the two renames of a system that cannot exchange
            old.rename(final)
    for left in (*folder.glob(f"{OLD}*"), *folder.glob(f"{NEW}*")):
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """Give an empty folder; what has been put into it then takes the place of `final`, when all is on the disk.

    Where it cannot be filled `final` stays as it is.
    """
    new = final.parent / f"{NEW}{final.name}-{secrets.token_hex(4)}"
    new.mkdir()
    try:
        yield new
        for path in new.iterdir():
            _sync(path)
        _sync(new)
        _put(new, final)
        _sync(final.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # unfinished, or by now the old one


def _put(new: Path, final: Path) -> None:
    if not final.exists():
        new.rename(final)
    elif not _exchange(new, final):
        old = final.with_name(OLD + final.name)
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        new.rename(final)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change their names in one step; answer False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # not of Linux
        return False
    paths = os.fsencode(one), os.fsencode(other)
    return bool(renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
