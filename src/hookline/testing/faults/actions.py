"""What a fault does, and where in a run or among its file operations it happens."""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hookline import hookspecs
from hookline.interfaces import CallbackInterface
from hookline.marks import hookimpl

OPERATIONS = ("mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir")


def kill() -> None:
    """End this process at once, as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def failing(error: BaseException) -> Callable[[], None]:
    """Return an action that raises."""

    def fail() -> None:
        raise error

    return fail


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
