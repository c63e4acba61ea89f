"""The three marks of the hook API: `event` and `verb` specify a hook, `hookimpl` implements one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pluggy import HookimplMarker, HookspecMarker

PROJECT = "hookline"

F = TypeVar("F", bound=Callable[..., Any])

hookimpl = HookimplMarker(PROJECT)
event = HookspecMarker(PROJECT)


def verb(function: F) -> F:
    """Specify a hook that happens once and returns a result; the function is the core's way to do it.

    The function is both the specification (`firstresult`) and the last implementation (`trylast`), so the
    documented behavior is what happens without plugins.
    """
    return event(firstresult=True)(hookimpl(trylast=True)(function))
