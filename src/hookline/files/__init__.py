"""Files and folders of which a kill or a power cut leaves the old or the new, never half; and how large files may be.

Imports nothing heavy. What tensors of a model have to do with files is in `hookline.files.weights`.
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
    """Make a folder where there is none, and flush the names of it and of all that it is in: any of them may be as new.

    Args:
        folder: is made with the folders that it is in.
        mode: rights of the folder itself, less the umask.
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
    """Give a new path beside `final`; the file or folder that is made there takes its place when all is on the disk.

    Whoever looks finds the old one or the new one, after a kill too. Where the new one cannot be made the old one
    stays. What a kill has left is removed by `clear`.
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
    """Remove what writers that were killed have left in a folder; nobody else may replace anything there meanwhile."""
    for old in folder.glob(f"{OLD}*"):
        final = folder / old.name.removeprefix(OLD)
        if not final.exists():  # killed between the two renames of a system that cannot exchange
            old.rename(final)
    for left in (*folder.glob(f"{OLD}*"), *folder.glob(f"{NEW}*")):
        delete(left)


def delete(path: Path) -> None:
    """Remove a file or a folder, as far as that can be done; one that is not there is removed already."""
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
    """Let two folders change their names in one step; answer False where the system cannot."""
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
        option: where it stands, for messages: `plugin.option`.

    Raises:
        ValueError: it is none, with examples.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b", str(text).strip().lower())
    number = float(match[1]) * UNITS[match[2] or ""] if match else 0
    if number < 1:
        given = f"{option}={text!r}" if option else repr(text)
        raise ValueError(f'{given} is no size; write one like "10GB", "500MB" or "2GiB" (1024³ bytes)')
    return int(number)
