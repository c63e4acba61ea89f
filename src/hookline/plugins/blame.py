"""Blame: the plugin that raised an exception, what of it was called, and the line."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from pluggy._callers import _multicall

from hookline.installed import distribution_of
from hookline.plugins.routes import ANSWER, TELL

Blamed = tuple[str, str, Any]
"""A hook or a method, the name of a plugin, and the plugin."""


def blame(error: BaseException, specs: Mapping[str, Any], plugins: Mapping[int, tuple[str, Any]]) -> None:
    """Add a note to an exception, once: the hook or the method, the plugin, its distribution and the line.

    Walks the traceback to the innermost implementation: a frame of `tell_all` holds it; after a frame of `answered`, or
    of pluggy in a historic event, it is the one whose code the next frame runs. A method that another plugin or the
    core calls, such as `get_state`, is known by its `self`. Costs nothing until an exception is raised.

    Args:
        error: the exception.
        specs: hook specifications by name, whose bodies are not plugins.
        plugins: name and object of each plugin by its `id`.
    """
    blamed: Blamed | None = None
    for frame, below in _frames(error.__traceback__):
        code, names = frame.f_code, frame.f_code.co_varnames
        if code.co_qualname in TELL and (impl := _local(frame, "impl")) is not None:
            blamed = _local(frame, "hook"), impl.plugin_name, impl.plugin
        elif (code.co_qualname == ANSWER or code is _multicall.__code__) and below is not None:
            hook = _local(frame, "hook_name")
            for impl in _local(frame, "hook_impls"):
                function = inspect.unwrap(impl.function)
                mine = _local(below.tb_frame, "self", impl.plugin) is impl.plugin
                if not mine or getattr(function, "__code__", None) is not below.tb_frame.f_code:
                    continue
                if impl.plugin_name not in specs:
                    blamed = hook, impl.plugin_name, impl.plugin
                elif blamed is not None and blamed[0] == hook:  # it only passed through the wrapper
                    blamed = None
        elif names[:1] == ("self",) and (found := plugins.get(id(_local(frame, "self")))) is not None:
            if blamed is None or blamed[2] is not found[1]:
                blamed = code.co_name, *found
    if blamed is not None:
        _add_note(error, *blamed)


def _add_note(error: BaseException, called: str, name: str, plugin: Any) -> None:
    """Add the note to an exception of a plugin, unless there is one: that one is of the innermost call."""
    if any(said.startswith("raised in ") and " by plugin " in said for said in getattr(error, "__notes__", ())):
        return
    home, place = _package(type(plugin).__module__), ""
    for frame, _ in _frames(error.__traceback__):
        if _package(frame.f_globals.get("__name__", "")) == home:
            place = f", {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
    error.add_note(f"raised in {called} by plugin {name!r} ({distribution_of(type(plugin))}){place}")


def _frames(traceback: TracebackType | None) -> Iterator[tuple[FrameType, TracebackType | None]]:
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_next
        traceback = traceback.tb_next


def _local(frame: FrameType, name: str, otherwise: Any = None) -> Any:
    """Return a local of a frame; Python before 3.13 keeps all that were read, so the error would hold itself alive."""
    found = frame.f_locals
    value = found.get(name, otherwise)
    if isinstance(found, dict):
        found.clear()
    return value


def _package(module: str) -> str:
    return module.partition(".")[0]
