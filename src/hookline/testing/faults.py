"""Faults, placed instead of raced: at a hook, at a file operation, in a file, in a power cut; and processes for them.

A fault point is something that has a name anyway, so nothing has to be put into the code that is tested:
a hook of the loop (`at_hook("on_boundary", kill, nth=3)` is a plugin), or an operation on a file
(`with at_file(folder, "rename step-*", kill):`, where the operation is one of `OPERATIONS`, done through `os`).
"""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

from hookline import hookspecs
from hookline.interfaces import CallbackInterface
from hookline.marks import hookimpl

OPERATIONS = ("mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir")

# Actions ------------------------------------------------------------------------------


def kill() -> None:
    """End this process at once, as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def failing(error: BaseException) -> Callable[[], None]:
    """Return an action that raises."""

    def fail() -> None:
        raise error

    return fail


# At a hook ----------------------------------------------------------------------------


def at_hook(hook: str, action: Callable[[], Any], nth: int = 1) -> CallbackInterface:
    """Return a plugin that acts when a hook is reached for the `nth` time: a verb before it is done."""
    calls = itertools.count(1)

    def act() -> None:
        if next(calls) == nth:
            action()

    def wrap(self: Any, trainer: Any) -> Any:
        act()
        return (yield)

    def hear(self: Any, trainer: Any) -> None:
        act()

    is_event = hook.startswith("on_")
    implementation = hookimpl(hear) if is_event else hookimpl(wrapper=True)(wrap)
    if not hasattr(hookspecs, hook):
        raise ValueError(f"there is no hook {hook!r}")
    return type("Fault", (CallbackInterface,), {hook: implementation})()  # type: ignore[no-any-return]


# At a file ----------------------------------------------------------------------------


class Operation(NamedTuple):
    """Something that is done to the files below a folder; paths are relative to it."""

    kind: str
    path: str
    """Of a rename: the new one."""
    content: bytes = b""
    """What is written."""
    source: str = ""
    """Of a rename: the old path."""


@contextlib.contextmanager
def watching(folder: Path, before: Callable[[Operation], Any], after: Callable[[Operation], Any]) -> Iterator[None]:
    """Have each file operation below a folder announced before it is done and after it was, in any thread."""
    root = os.path.realpath(folder)
    real = {kind: getattr(os, kind) for kind in OPERATIONS}

    def below(path: Any, dir_fd: int | None) -> str | None:
        if isinstance(path, int):
            full = os.readlink(f"/proc/self/fd/{path}")
        else:
            home = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            parent, name = os.path.split(os.path.join(home, os.fspath(path)))
            full = os.path.join(os.path.realpath(parent), name)
        inside = os.path.relpath(full, root)
        return None if inside.startswith("..") else inside

    def replaced(kind: str) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **more: Any) -> Any:
            inside = below(path, more.get("dir_fd"))
            if inside is None or (kind == "open" and not rest[0] & os.O_CREAT):
                return real[kind](path, *rest, **more)
            operation = Operation(kind, inside)
            if kind == "rename":
                operation = Operation(kind, below(rest[0], None) or os.fspath(rest[0]), source=inside)
            before(operation)
            done = real[kind](path, *rest, **more)
            after(operation if kind != "write" else Operation(kind, inside, bytes(rest[0][:done])))
            return done

        return call

    for kind in OPERATIONS:
        setattr(os, kind, replaced(kind))
    try:
        yield
    finally:
        for kind in OPERATIONS:
            setattr(os, kind, real[kind])


@contextlib.contextmanager
def at_file(folder: Path, point: str, action: Callable[[], Any], nth: int = 1) -> Iterator[None]:
    """Act just before the `nth` operation that a point names: an operation and a pattern of file names.

    Args:
        folder: only what is below it counts.
        point: such as "fsync manifest.json", "rename step-*", "write *" or "* *".
        action: `kill`, or what `failing` returns, or anything else.
        nth: counted from 1.
    """
    kind, pattern = point.split()
    calls = itertools.count(1)

    def act(operation: Operation) -> None:
        named = fnmatch.fnmatch(os.path.basename(operation.path), pattern)
        if named and kind in ("*", operation.kind) and next(calls) == nth:
            action()

    with watching(folder, act, lambda operation: None):
        yield


# Power cuts ---------------------------------------------------------------------------


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


# Damage -------------------------------------------------------------------------------


def flip_bit(path: Path, chance: random.Random) -> str:
    """Flip one bit of a file; return where."""
    content = bytearray(path.read_bytes())
    place, bit = chance.randrange(len(content)), chance.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} of {path.name}"


def zero_page(path: Path, chance: random.Random, size: int = 4096) -> str:
    """Overwrite one page of a file with zeros; return where."""
    content = bytearray(path.read_bytes())
    page = chance.randrange(-(-len(content) // size))
    part = slice(page * size, min((page + 1) * size, len(content)))
    content[part] = bytes(part.stop - part.start)
    path.write_bytes(content)
    return f"page {page} of {path.name}"


def cut_off(path: Path, keep: float | int) -> None:
    """Keep only the beginning of a file: a share of it, or a number of bytes."""
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if isinstance(keep, float) else keep)


# Processes ----------------------------------------------------------------------------

PRELOADED = ["torch", "torch._dynamo", "hookline.trainer", "hookline.testing.faults"]  # optimizers import dynamo
"""Modules that every `Child` finds imported; what is appended before the first one is, too."""


class Outcome(NamedTuple):
    """How a process ended."""

    code: int
    """Its exit code, or minus the signal that killed it."""
    value: Any
    """What the function returned; None where it did not."""
    output: str
    """What it wrote to stdout and stderr."""


class Child:
    """A function that runs in a process of its own, in its own session; forked where torch is imported already.

    Args:
        function: importable by its name.
        args: its arguments, which can be pickled.
    """

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._output = tempfile.NamedTemporaryFile("r", prefix="hookline-child-")  # noqa: SIM115 - closed in wait
        self._ours, theirs = context.Pipe(duplex=False)
        method = multiprocessing.get_start_method(allow_none=True)
        given = theirs, self._output.name, method, function, args
        self._process = context.Process(target=_run, args=given, daemon=False)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The number of the process."""
        pid = self._process.pid
        assert pid is not None
        return pid

    @property
    def output(self) -> str:
        """What it has written so far."""
        return Path(self._output.name).read_text(errors="replace")

    def signal(self, number: int) -> None:
        """Send it a signal; one that has ended by itself gets none."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float = 60.0) -> Outcome:
        """Return how it ended.

        Raises:
            TimeoutError: it did not, and was killed with all that it had started.
        """
        deadline, value = time.monotonic() + timeout, None
        connection.wait([self._ours, self._process.sentinel], timeout)  # what it has started may keep the pipe open
        with contextlib.suppress(EOFError):
            value = pickle.loads(self._ours.recv_bytes()) if self._ours.poll() else None
        self._process.join(max(deadline - time.monotonic(), 0))
        hangs = self._process.is_alive()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # what it has started and left
        self._process.kill()
        self._process.join()
        output, code = self.output, self._process.exitcode
        self._ours.close()
        self._output.close()
        self._process.close()
        if hangs:
            raise TimeoutError(f"it was still running after {timeout} s; it wrote:\n{output}")
        assert code is not None
        return Outcome(code, value, output)


def run(function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> Outcome:
    """Run a function in a process of its own and return how that ended; see `Child`."""
    return Child(function, *args).wait(timeout)


def _run(pipe: Any, output: str, method: str | None, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    multiprocessing.set_start_method(method, force=True)  # it would hand its own on to loading workers, say
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - the process ends with it
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    pipe.send_bytes(pickle.dumps(function(*args)))  # by value: torch would share tensors with a process that has ended
