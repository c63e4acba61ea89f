"""Checkpoints on disk: their names, and how they are read, only when whole.

A checkpoint is a folder `step-000000000042` that holds files and, as the last one written, a
`manifest.json` with the size and the SHA-256 of each, and of itself. It is made under another
name in the same folder and renamed when everything is on the disk, so the rename is the commit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

FORMAT = "hookline-checkpoint/1"
FOLDER = "checkpoints"  # of a run folder
MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{12})(?:-\d{6})?")  # sorts by step, and within it by what is done of the next
PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
PIECE = 8 << 20  # bytes that are written and hashed at a time

T = TypeVar("T")
Buffer = bytes | memoryview

log = logging.getLogger("hookline.checkpoint")


class CheckpointError(ValueError):
    """What is raised for checkpoints that cannot be used."""


def name_of(step: int, part: int) -> str:
    """Return the name of the checkpoint of a step, within which `part` micro-batches of the next are done."""
    return f"step-{step:012d}" + (f"-{part:06d}" if part else "")


def step_of(path: Path) -> int:
    """Return the optimizer step that the name of a checkpoint says."""
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


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
        if path.name != name_of(about["step"], about["part"]):
            raise CheckpointError(f"{MANIFEST} is of {name_of(about['step'], about['part'])}")
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

    def check(name: str) -> None:
        with _reading(name), open(path / name, "rb", opener=_no_link) as file:
            _compare(name, about["files"][name], hashlib.file_digest(file, "sha256").hexdigest())

    _for_each(check, about["files"])
    return about


def is_good(path: Path) -> bool:
    """Tell whether a checkpoint is what was written."""
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


class Reader:
    """The content of a file from its beginning; what is read is hashed."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file = file
        self.left = size
        """Bytes that are to come."""
        self.hasher = hashlib.sha256()

    def fill(self, buffer: memoryview | bytearray) -> None:
        """Read as many bytes as the buffer has."""
        got = self.file.readinto(buffer)  # type: ignore[attr-defined]
        if got != len(buffer):
            raise CheckpointError("it ends too early")
        self.left -= got
        self.hasher.update(buffer)

    def take(self, count: int) -> bytearray:
        """Return the next bytes."""
        if count > self.left:
            raise CheckpointError("it ends too early")
        taken = bytearray(count)
        self.fill(taken)
        return taken

    def skip(self, count: int) -> None:
        """Read the next bytes and keep none."""
        while count:
            count -= len(self.take(min(PIECE, count)))

    def digest(self) -> str:
        """Read what is left; return the SHA-256 of the whole."""
        self.skip(self.left)
        return self.hasher.hexdigest()


def read(path: Path, uses: Mapping[str, Callable[[Reader], Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the manifest says, and by name what was made of files: of the very bytes that were checked.

    Args:
        path: the checkpoint.
        uses: what makes something of a file, by its name.

    Raises:
        CheckpointError: a file is not what was written, or cannot be understood, or is not listed.
    """
    about = read_manifest(path)
    _check_sizes(path, about)

    def take(name: str) -> Any:
        if name not in about["files"]:
            raise CheckpointError(f"{MANIFEST} lists no {name}; it was written by {about.get('world_size')} rank(s)")
        made, puzzle = None, None
        with _reading(name), open(path / name, "rb", opener=_no_link) as file:
            reader = Reader(file, about["files"][name]["size"])
            try:
                made = uses[name](reader)
            except (RecursionError, ValueError) as error:
                puzzle = error
            _compare(name, about["files"][name], reader.digest())  # first: damage may be why it is a puzzle
        if puzzle is not None:
            raise CheckpointError(f"{name} cannot be understood: {puzzle}") from puzzle
        return made

    return about, dict(zip(uses, _for_each(take, uses), strict=True))


def read_tree(file: Reader) -> Any:
    """Return what a JSON file holds."""
    return json.loads(file.take(file.left))


def _for_each(use: Callable[[str], T], names: Collection[str]) -> list[T]:
    """Read files two at a time: hashing is what takes its time, and does not need the interpreter."""
    with ThreadPoolExecutor(2, "hookline-hashing") as pool:
        return list(pool.map(use, names))


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
        raise CheckpointError(
            f"{name} cannot be understood: it has no head ({type(error).__name__}: {error})"
        ) from error
    return head


def newest_good(
    folder: Path, use: Callable[[Path], T], find: Callable[[Path], list[Path]] | None = None
) -> tuple[Path, T]:
    """Return the newest checkpoint that can be used, and what `use` made of it.

    Says in a warning which ones were passed over, and why.

    Args:
        folder: where checkpoints are.
        use: reads one, and raises `CheckpointError` if it is damaged.
        find: lists them, the newest first, as `listed` does.

    Raises:
        CheckpointError: none can; the reason of each.
    """
    damaged: dict[Path, str] = {}
    # Looked for until there is none that was not tried: a run that is under way adds some, and removes some.
    while untried := [path for path in (find or listed)(folder) if path not in damaged]:
        for path in untried:
            try:
                made = use(path)
            except CheckpointError as error:
                damaged[path] = f"\n  {path}: {error}"
                continue
            newer = "".join(said for other, said in damaged.items() if other.name > path.name and other.exists())
            if newer:
                log.warning("going back to %s, because newer checkpoints are damaged:%s", path, newer)
            return path, made
    raise CheckpointError(
        "no checkpoint can be used, and starting from scratch would hide that; remove them, or bring back a good one:"
        + ("".join(damaged.values()) or f"\n  {folder}: there is none")
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


@contextlib.contextmanager
def understanding() -> Iterator[None]:
    """Make what comes of a file that was not written by this plugin a reason not to use its checkpoint."""
    try:
        yield
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"it cannot be understood: {error}") from error


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


def changeable_by_others(path: Path) -> list[str]:
    """Tell what of a checkpoint another user may change.

    Raises:
        OSError: it cannot be looked at.
    """
    said = []
    for each in (path.parent, path, *sorted(path.iterdir())):
        found = os.lstat(each)
        if found.st_uid not in (0, os.geteuid()):
            said.append(f"{each.name} belongs to user {found.st_uid}")
        shared = 0 if found.st_mode & stat.S_ISVTX else found.st_mode & 0o022
        if shared:
            said.append(f"{each.name} may be written by {'everybody' if shared & 0o002 else 'its group'}")
    return said
