"""Durable files: after a kill or a power cut a file or folder is the old one or the new one, never half of it; sizes.

This module imports only the standard library. `hookline.files.weights` is about the tensors of a model in files.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

NEW, OLD = ".new-", ".old-"  # what the names of replacements under way begin with
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Make a folder if it does not exist, and flush the folders that contain it, any of which may be new too.

    Args:
        folder: missing parents are made too.
        mode: permissions of the folder itself, before the umask.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=mode, exist_ok=True)
    device = os.stat(folder).st_dev
    for parent in folder.absolute().parents:
        if os.stat(parent).st_dev != device:
            break
        with contextlib.suppress(PermissionError):  # a folder that may be entered need not be readable
            flush(parent)


@contextlib.contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """Yield a new path beside `final`; the file or folder made there replaces `final` once it is on the disk.

    A reader finds the old one or the new one, after a kill too. The old one stays if the block raises. `clear` removes
    what a kill left.
    """
    new = final.with_name(f"{NEW}{final.name}-{secrets.token_hex(4)}")
    try:
        yield new
        for path in (*new.rglob("*"), new):
            flush(path)
        _put(new, final)
        flush(final.parent)
    finally:
        delete(new)  # unfinished, or by now the old one


def clear(folder: Path) -> None:
    """Remove what killed writers left in a folder; no other process may replace files there at the same time."""
    for old in folder.glob(f"{OLD}*"):
        final = folder / old.name.removeprefix(OLD)
        if not final.exists():  # killed between the two renames of a system that cannot exchange
            old.rename(final)
    for left in (*folder.glob(f"{OLD}*"), *folder.glob(f"{NEW}*")):
        delete(left)


def delete(path: Path) -> None:
    """Remove a file or a folder, as far as possible; a missing one is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _put(new: Path, final: Path) -> None:
    if not new.is_dir() or not final.exists():
        new.rename(final)
    elif not _exchange(new, final):
        old = final.with_name(OLD + final.name)
        delete(old)
        final.rename(old)
        new.rename(final)
        delete(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; return False if the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # not of Linux
        return False
    paths = os.fsencode(one), os.fsencode(other)
    return bool(renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0)


def bytes_of(text: str, option: str = "") -> int:
    """Read a size such as "10GB", "500 MB" or "2GiB" (1024³ bytes).

    Args:
        text: the size, in upper or lower case.
        option: its name in messages: `plugin.option`.

    Raises:
        ValueError: the text is no size; the message has examples.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b", str(text).strip().lower())
    number = float(match[1]) * UNITS[match[2] or ""] if match else 0
    if number < 1:
        given = f"{option}={text!r}" if option else repr(text)
        raise ValueError(f'{given} is no size; write one like "10GB", "500MB" or "2GiB" (1024³ bytes)')
    return int(number)
