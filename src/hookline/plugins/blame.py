"""Blame: the hook and the plugin that raised an exception."""

from __future__ import annotations

import inspect
from collections.abc import Collection

from pluggy import HookImpl
from pluggy._callers import _multicall

from hookline.installed import distribution_of
from hookline.plugins.routes import TELL


def blame(error: BaseException, specs: Collection[str]) -> None:
    """Add a note to an exception: the hook, the plugin and the distribution that raised it.

    Walks the traceback to the innermost implementation: a frame of `tell_all` holds it; after a frame of pluggy it is
    the one whose code the next frame runs. Costs nothing until an exception is raised.

    Args:
        error: the exception.
        specs: names of the hook specifications, whose bodies are not plugins.
    """
    blamed: tuple[str, HookImpl] | None = None
    traceback = error.__traceback__
    while traceback is not None:
        frame, below = traceback.tb_frame, traceback.tb_next
        if frame.f_code.co_qualname == TELL and "impl" in frame.f_locals:
            blamed = frame.f_locals["name"], frame.f_locals["impl"]
        elif frame.f_code is _multicall.__code__ and below is not None:
            hook = frame.f_locals["hook_name"]
            for impl in frame.f_locals["hook_impls"]:
                function = inspect.unwrap(impl.function)
                if getattr(function, "__code__", None) is not below.tb_frame.f_code:
                    continue
                if impl.plugin_name not in specs:
                    blamed = hook, impl
                elif blamed is not None and blamed[0] == hook:  # it only passed through the wrapper
                    blamed = None
        traceback = below
    text = note(*blamed) if blamed is not None else None
    if text is not None and text not in getattr(error, "__notes__", ()):
        error.add_note(text)


def note(hook: str, impl: HookImpl) -> str:
    """Return the note for an exception of a plugin."""
    return f"raised in {hook} by plugin {impl.plugin_name!r} ({distribution_of(type(impl.plugin))})"
