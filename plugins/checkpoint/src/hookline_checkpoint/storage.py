"""Checkpoints on disk: written so that a kill or a power cut leaves the old or the new, read only when whole.

A checkpoint is a folder `step-000000000042` that holds files and, as the last one written, a
`manifest.json` with the size and the SHA-256 of each, and of itself. It is made under another
name in the same folder and renamed when everything is on the disk, so the rename is the commit.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import json
import logging
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

FORMAT = "hookline-checkpoint/1"
FOLDER = "checkpoints"  # of a run folder
MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{12})")
LEFTOVER = re.compile(r"\.(tmp|trash)-\d+-(\d+)-[0-9a-f]+")
PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

T = TypeVar("T")

log = logging.getLogger("hookline")


class CheckpointError(ValueError):
    """What is raised for checkpoints that cannot be used."""


# Write --------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Make a folder of checkpoints where there is none, safe from power cuts, and sweep it, before the first save."""
    folder.mkdir(parents=True, exist_ok=True)
    for parent in folder.absolute().parents[:3]:  # the run folder and those of all runs may be as new
        with contextlib.suppress(PermissionError):  # a folder that may be entered need not be readable
            _sync(parent)
    sweep(folder)


def write(folder: Path, step: int, contents: Iterable[tuple[str, bytes]], about: Mapping[str, Any]) -> Path:
    """Write a checkpoint; return its folder when all of it is on the disk.

    A good one of the same step stays as it is; a damaged one is replaced.

    Args:
        folder: where checkpoints are; `prepare` has made it.
        step: the optimizer step.
        contents: names and contents of the files, taken one at a time.
        about: what else the manifest shall say.

    Raises:
        OSError: it could not be written; nothing else has changed.
    """
    final = folder / f"step-{step:012d}"
    if os.path.lexists(final):
        with contextlib.suppress(CheckpointError):
            verify(final)
            return final
    temporary = leftover(folder, "tmp", step)
    temporary.mkdir()
    try:
        files = {name: _write_file(temporary / name, content) for name, content in contents}
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        body = json.dumps({"format": FORMAT, "step": step, "created": created, **about, "files": files})
        # The body is text within the manifest, so its hash needs no canonical JSON.
        manifest = {"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body}
        _write_file(temporary / MANIFEST, json.dumps(manifest).encode())
        _sync(temporary)
        if os.path.lexists(final):
            remove(final, step)
        temporary.rename(final)
        _sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def leftover(folder: Path, kind: str, step: int = 0) -> Path:
    """Return a new name in a folder for what is "tmp" or "trash": `sweep` removes it when this process is dead."""
    return folder / f".{kind}-{step:012d}-{os.getpid()}-{secrets.token_hex(4)}"


def _write_file(path: Path, content: bytes) -> dict[str, Any]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    with open(descriptor, "wb", buffering=0) as file:
        left = memoryview(content)
        while left:
            left = left[file.write(left) :]
        os.fsync(descriptor)
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Read ---------------------------------------------------------------------------------


def listed(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, good or not, the newest first; none where there is no folder.

    Raises:
        OSError: the folder is there and cannot be read.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [folder / name for name in sorted(filter(NAME.fullmatch, names), reverse=True)]


def read_manifest(path: Path) -> dict[str, Any]:
    """Return what the manifest of a checkpoint says, when its hash, its format and its names are right.

    Raises:
        CheckpointError: they are not.
    """
    if path.is_symlink():
        raise CheckpointError("it is a link")
    _size(path, MANIFEST)
    content = _read(path, MANIFEST)
    try:
        manifest = json.loads(content)
        body = manifest["body"]
        if hashlib.sha256(body.encode()).hexdigest() != manifest["sha256"]:
            raise CheckpointError(f"{MANIFEST} has not the SHA-256 that it was written with")
        about: dict[str, Any] = json.loads(body)
        if about["format"] != FORMAT:
            raise CheckpointError(f"its format is {about['format']!r}, and this version reads {FORMAT!r}")
        if path.name != f"step-{about['step']:012d}":
            raise CheckpointError(f"{MANIFEST} is of step {about['step']}")
        for name, entry in about["files"].items():
            if not PLAIN.fullmatch(name) or type(entry["size"]) is not int or type(entry["sha256"]) is not str:
                raise CheckpointError(f"{MANIFEST} lists {name!r}, which is no plain file name with size and SHA-256")
    except CheckpointError:
        raise
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged: {type(error).__name__}: {error}") from error
    return about


def verify(path: Path) -> dict[str, Any]:
    """Check everything of a checkpoint, and return what its manifest says.

    Raises:
        CheckpointError: which file is not what was written.
    """
    about = read_manifest(path)
    _check_sizes(path, about)
    for name, entry in about["files"].items():
        with _reading(name), open(path / name, "rb", opener=_no_link) as file:
            _compare(name, entry, hashlib.file_digest(file, "sha256").hexdigest())
    return about


def read(path: Path, names: Iterable[str]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return what the manifest says, and the files of these names: the very bytes that were checked.

    Raises:
        CheckpointError: a file is not what was written, or not listed.
    """
    about = read_manifest(path)
    _check_sizes(path, about)
    contents = {}
    for name in names:
        if name not in about["files"]:
            raise CheckpointError(f"{MANIFEST} lists no {name}; it was written by {about.get('world_size')} rank(s)")
        contents[name] = _read(path, name)
        _compare(name, about["files"][name], hashlib.sha256(contents[name]).hexdigest())
    return about, contents


def read_head(path: Path, name: str) -> dict[str, Any]:
    """Return what a safetensors file says of its tensors, by name, without reading them.

    Raises:
        CheckpointError: it is none.
    """
    size = _size(path, name)
    with _reading(name), open(path / name, "rb", opener=_no_link) as file:
        length = int.from_bytes(file.read(8), "little")
        content = file.read(length) if length <= size else b""
    try:
        head: dict[str, Any] = json.loads(content)
        head.pop("__metadata__", None)
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name} has no head: {type(error).__name__}: {error}") from error
    return head


def newest_good(folder: Path, use: Callable[[Path], T]) -> tuple[Path, T]:
    """Return the newest checkpoint that can be used, and what `use` made of it.

    Says in a warning which ones were passed over, and why.

    Args:
        folder: where checkpoints are.
        use: reads one, and raises `CheckpointError` if it is damaged.

    Raises:
        CheckpointError: none can; the reason of each.
    """
    damaged: list[str] = []
    for path in listed(folder):
        try:
            made = use(path)
        except CheckpointError as error:
            damaged.append(f"{path}: {error}")
            continue
        if damaged:
            log.warning("going back to %s, because newer checkpoints are damaged:\n  %s", path, "\n  ".join(damaged))
        return path, made
    raise CheckpointError(
        "no checkpoint can be used, and starting from scratch would hide that; remove them, or bring back a good one:"
        + "".join(f"\n  {line}" for line in damaged or [f"{folder}: there is none"])
    )


def _read(path: Path, name: str) -> bytes:
    with _reading(name), open(path / name, "rb", opener=_no_link) as file:
        return file.read()


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Make an error of the system a reason not to use this checkpoint; another may be whole."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror}") from error


def _size(path: Path, name: str) -> int:
    with _reading(name):
        found = os.lstat(path / name)
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{name} is no regular file")
    return found.st_size


def _check_sizes(path: Path, about: Mapping[str, Any]) -> None:
    """Compare the sizes of all files, which costs nothing, before any is read."""
    for name, entry in about["files"].items():
        found = _size(path, name)
        if found != entry["size"]:
            raise CheckpointError(f"{name} has {found} bytes, and was written with {entry['size']}")


def _compare(name: str, entry: Mapping[str, Any], digest: str) -> None:
    if digest != entry["sha256"]:
        raise CheckpointError(f"{name} has not the SHA-256 that it was written with")


# Remove -------------------------------------------------------------------------------


def remove(path: Path, step: int) -> None:
    """Remove a checkpoint: first its name, so that a half-deleted one is never listed."""
    trash = leftover(path.parent, "trash", step)
    path.rename(trash)
    _delete(trash)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay, besides the newest: all that one of these rules keeps."""

    last: int
    """This many good ones."""
    every: tuple[int, str] | None
    """Those whose step, or whose complete epochs, are a multiple: (number, "steps" or "epochs")."""
    best: int
    """This many good ones by the value of `monitor` in their evaluation."""
    monitor: str
    mode: str


def retain(newest: Path, rules: Retention, good: set[Path]) -> None:
    """Remove what is older than `newest` and kept by no rule; a failure is a warning.

    Args:
        newest: the one just written, which stays; those of later steps, which a run that was
            resumed from an earlier one can find, are none of its business.
        rules: which stay. A damaged one does not count; it stays while it is newer than the
            good ones that `last` keeps.
        good: those known to be good, which need not be read again; more are added.
    """
    older = [path for path in listed(newest.parent) if path.name <= newest.name]
    kept, found = set(), 0
    for path in older:
        if found >= rules.last:
            break
        kept.add(path)
        found += _known_good(path, good)
    if rules.every is not None or rules.best:
        abouts = {path: about for path in older if (about := _manifest_of(path))}
        kept.update(path for path, about in abouts.items() if rules.every and _is_multiple(about, rules.every))
        ranked = (path for path in _ranked(abouts, rules.monitor, rules.mode) if _known_good(path, good))
        kept.update(itertools.islice(ranked, rules.best))
    for path in reversed(older):  # the oldest first: if this is cut, the newer ones are there
        if path not in kept:
            try:
                remove(path, int(path.name.removeprefix("step-")))
            except OSError as error:
                log.warning("checkpoint %s is not needed any more and cannot be removed: %s", path, error)


def _known_good(path: Path, good: set[Path]) -> bool:
    if path not in good and is_good(path):
        good.add(path)
    return path in good


def _manifest_of(path: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(path)
    except CheckpointError:
        return None


def _is_multiple(about: Mapping[str, Any], every: tuple[int, str]) -> bool:
    number, unit = every
    if unit == "epochs":  # an epoch is complete where the next one has not begun
        return about.get("position") == 0 and about["epoch"] % number == 0
    return bool(about["step"] % number == 0)


def _ranked(abouts: Mapping[Path, Mapping[str, Any]], monitor: str, mode: str) -> list[Path]:
    """Return the checkpoints that have a value, the best first; of each evaluation the one next to it."""
    first: dict[int, tuple[float, int, Path]] = {}
    for path, about in abouts.items():
        value, at = about.get("metrics", {}).get(monitor), about.get("evaluated_at")
        if isinstance(value, (int, float)) and math.isfinite(value) and isinstance(at, int):
            entry = (value if mode == "min" else -value, about["step"], path)
            first[at] = min(first.get(at, entry), entry, key=lambda entry: entry[1])
    return [path for _, _, path in sorted(first.values())]


def is_good(path: Path) -> bool:
    """Tell whether a checkpoint is what was written."""
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def sweep(folder: Path) -> None:
    """Remove what writers that were killed have left; those that are alive keep theirs."""
    for path in folder.glob(".t*"):
        match = LEFTOVER.fullmatch(path.name)
        if match and (match[1] == "trash" or int(match[2]) == os.getpid() or not _alive(int(match[2]))):
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
