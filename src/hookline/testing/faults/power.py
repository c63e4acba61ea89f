"""What a folder may be after a power cut."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hookline.testing.faults.actions import Operation, watching


class Recorder:
    """Records what is done to the files below a folder, and what was promised in between."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log: list[Operation | str] = []
        """Operations, and promises in the order in which they were given."""

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Record."""
        with watching(self.folder, lambda operation: None, self.log.append):
            yield self

    def promise(self, word: str) -> None:
        """Note that from here on something was said to be safe."""
        self.log.append(word)


class Cut(NamedTuple):
    """A state in which a disk may be found after a power cut."""

    after: int
    """How many entries of the log had happened."""
    promises: tuple[str, ...]
    """What had been said to be safe."""
    files: dict[str, bytes | None]
    """Content by path; None for a folder."""

    def write(self, folder: Path) -> None:
        """Make it, in an empty folder."""
        for path, content in sorted(self.files.items()):
            if content is None:
                (folder / path).mkdir(parents=True, exist_ok=True)
            else:
                (folder / path).write_bytes(content)


class _Node:
    """A file or a folder of the simulated disk: what programs see, and what is safe."""

    def __init__(self, is_folder: bool) -> None:
        self.is_folder = is_folder
        self.content, self.safe = b"", b""
        self.entries: dict[str, _Node] = {}
        self.safe_entries: dict[str, _Node] = {}
        self.pending: list[list[tuple[str, _Node | None]]] = []
        """Changes of names since the folder was flushed; those of one rename happen together."""

    def change(self, *names: tuple[str, _Node | None]) -> None:
        for name, node in names:
            self.entries.pop(name, None) if node is None else self.entries.__setitem__(name, node)
        self.pending.append(list(names))


def power_cuts(recorder: Recorder, chance: random.Random, variants: int = 4) -> Iterator[Cut]:
    """Yield states in which the disk may be found when the power fails at any place of a log, each once.

    What POSIX says: without `fsync` of a file its new content may be missing or there in part; without `fsync` of a
    folder each name that was made, removed or renamed in it may still be as before, independent of the others.

    Args:
        recorder: what was done.
        chance: draws the variants besides the two extremes (nothing that is not safe is there, all is there).
        variants: how many to draw at each place.
    """
    root, promises, seen = _Node(True), [], set()
    for after, entry in enumerate([None, *recorder.log]):
        if isinstance(entry, str):
            promises.append(entry)
        elif entry is not None:
            _apply(root, entry)
        for variant in range(variants + 2):
            share = (0.0, 1.0)[variant] if variant < 2 else chance.random()
            files: dict[str, bytes | None] = {}
            _survivors(root, "", files, chance, share)
            key = (tuple(promises), tuple(sorted(files.items(), key=lambda pair: pair[0])))
            if key not in seen:
                seen.add(key)
                yield Cut(after, tuple(promises), files)


def _apply(root: _Node, operation: Operation) -> None:
    parent, name = _find(root, os.path.dirname(operation.path)), os.path.basename(operation.path)
    node = root if operation.path == "." else parent.entries.get(name)
    if operation.kind in ("mkdir", "open"):
        if node is None:
            parent.change((name, _Node(operation.kind == "mkdir")))
    elif operation.kind == "write":
        assert node is not None
        node.content += operation.content
    elif operation.kind == "fsync":
        assert node is not None
        node.safe, node.safe_entries, node.pending = node.content, dict(node.entries), []
    elif operation.kind == "rename":
        old = _find(root, os.path.dirname(operation.source))
        assert old is parent, "renames from folder to folder are not simulated"
        moved = os.path.basename(operation.source)
        parent.change((moved, None), (name, parent.entries[moved]))
    else:
        parent.change((name, None))


def _find(root: _Node, path: str) -> _Node:
    node = root
    for part in Path(path).parts:
        node = node.entries[part]
    return node


def _survivors(node: _Node, path: str, files: dict[str, bytes | None], chance: random.Random, share: float) -> None:
    """Gather what is found of a folder: what is safe, and `share` of what is not."""
    entries = dict(node.safe_entries)
    for change in node.pending:
        if chance.random() < share:
            for name, moved in change:
                entries.pop(name, None) if moved is None else entries.__setitem__(name, moved)
    for name, kept in entries.items():
        here = os.path.join(path, name)
        if kept.is_folder:
            files[here] = None
            _survivors(kept, here, files, chance, share)
        elif kept.content != kept.safe and chance.random() >= share:
            files[here] = chance.choice([kept.safe, kept.content[: len(kept.content) // 2], bytes(len(kept.content))])
        else:
            files[here] = kept.content
