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
    """Specify a hook that is done once and answers; the function is how the core does it.

    The mark makes one function two things at once: the specification (`firstresult`) and
    the last implementation in line (`trylast`), so what is documented is what happens
    when nobody plugs in.
    """
    return event(firstresult=True)(hookimpl(trylast=True)(function))
