"""Write and remove checkpoints: a kill or a power cut at any moment leaves the old or the new."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hookline.files import flush
from hookline_checkpoint.storage import FORMAT, MANIFEST, PIECE, Buffer, CheckpointError, name_of, verify

LEFTOVER = re.compile(r"\.(?:tmp|trash)-(\d+)-[0-9a-f]+")
FOLDER_MODE, FILE_MODE = 0o755, 0o644  # at most: nobody else may change a checkpoint, whatever the umask

log = logging.getLogger("hookline.checkpoint")


def write(
    folder: Path,
    step: int,
    contents: Iterable[tuple[str, Iterable[Buffer]]],
    about: Mapping[str, Any],
    part: int = 0,
    shares: Callable[[Path], Mapping[str, Any]] | None = None,
) -> Path:
    """Write a checkpoint; return its folder when all of it is on the disk and has been read back.

    A good one of the same place stays as it is; a damaged one is replaced.

    Args:
        folder: where checkpoints are; `make_folder` has made it. What killed writers left in it is swept.
        step: the optimizer step.
        contents: names and contents of the files, in parts, each taken when it is written.
        about: what else the manifest shall say.
        part: micro-batches of the next step that are done; 0 at a boundary.
        shares: has more files written into a folder, and returns by name what `put` said of each.

    Raises:
        OSError: it could not be written, or what was read back is something else; nothing else has changed.
    """
    final = folder / name_of(step, part)
    if os.path.lexists(final):
        with contextlib.suppress(CheckpointError):
            verify(final)
            flush(folder)  # its writer may have ended between the rename and this
            return final
    sweep(folder)
    temporary = leftover(folder, "tmp")
    try:
        temporary.mkdir(mode=FOLDER_MODE)
        files = {} if shares is None else dict(shares(temporary))
        with ThreadPoolExecutor(1, "hookline-hashing") as hashing:
            files |= {name: _write_file(temporary / name, content, hashing) for name, content in contents}
            created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            body = json.dumps(
                {"format": FORMAT, "step": step, "part": part, "created": created, **about, "files": files}
            )
            # The body is text within the manifest, so its hash needs no canonical JSON.
            manifest = {"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body}
            _write_file(temporary / MANIFEST, [json.dumps(manifest).encode()], hashing)
        flush(temporary)
        if os.path.lexists(final):
            remove(final)
        temporary.rename(final)
        flush(folder)
        _read_back(final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        error.add_note(f"while saving {final}; the checkpoints before it are as they were")
        raise
    return final


def _read_back(path: Path) -> None:
    """Check a checkpoint that was just written: by what the disk gives, where the system lets go of its own copy.

    Raises:
        OSError: a file is not what was written.
    """
    for file in path.iterdir():
        forget(file)
    try:
        verify(path)
    except CheckpointError as error:
        raise OSError(f"{path} reads back as something else than was written: {error}; look at the disk") from error


def forget(file: Path) -> None:
    """Have the system let go of its own copy of a file, where it can."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def leftover(folder: Path, kind: str) -> Path:
    """Return a new name in a folder for what is "tmp" or "trash": `sweep` removes it when this process is dead."""
    return folder / f".{kind}-{os.getpid()}-{secrets.token_hex(4)}"


def put(path: Path, content: Iterable[Buffer]) -> dict[str, Any]:
    """Write a file of a checkpoint and flush it; return its size and SHA-256, as a manifest lists them."""
    with ThreadPoolExecutor(1, "hookline-hashing") as hashing:
        return _write_file(path, content, hashing)


def _write_file(path: Path, content: Iterable[Buffer], hashing: ThreadPoolExecutor) -> dict[str, Any]:
    """Write a file and flush it; each piece is hashed in the other thread while it is written in this one."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, FILE_MODE)
    try:
        hasher, size = hashlib.sha256(), 0
        for piece in _pieces(content):
            hashed = hashing.submit(hasher.update, piece)
            left = memoryview(piece)
            while left:
                left = left[os.write(descriptor, left) :]
            hashed.result()
            size += len(piece)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"size": size, "sha256": hasher.hexdigest()}


def _pieces(content: Iterable[Buffer]) -> Iterator[Buffer]:
    """Bring a content into pieces of a good size: small parts are put together, large ones cut."""
    small = bytearray()
    for part in content:
        if len(small) + len(part) <= PIECE:
            small += part
            continue
        yield bytes(small)
        small = bytearray()
        for begin in range(0, len(part), PIECE):
            yield part[begin : begin + PIECE]
    yield bytes(small)


# Remove -------------------------------------------------------------------------------


def remove(path: Path) -> None:
    """Remove a checkpoint: first its name, so that a half-deleted one is never listed."""
    trash = leftover(path.parent, "trash")
    path.rename(trash)
    _delete(trash)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sweep(folder: Path) -> None:
    """Remove what writers that were killed have left; those that are alive keep theirs."""
    for path in folder.glob(".t*"):
        match = LEFTOVER.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not _alive(int(match[1]))):
            try:
                _delete(path)
            except OSError as error:
                log.warning("%s is left of a writer that was killed, and cannot be removed: %s", path, error)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
