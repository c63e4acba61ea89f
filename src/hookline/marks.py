"""The three marks of the hook API: `event` and `verb` specify a hook, `hookimpl` implements one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

from pluggy import HookimplMarker, HookspecMarker

PROJECT = "hookline"

F = TypeVar("F", bound=Callable[..., Any])

hookimpl = HookimplMarker(PROJECT)
event = HookspecMarker(PROJECT)


@overload
def verb(function: F) -> F: ...
@overload
def verb(**deprecated: Any) -> Callable[[F], F]: ...
def verb(function: Any = None, **deprecated: Any) -> Any:
    """Specify a hook that happens once and returns a result; the function is the core's way to do it.

    The function is both the specification (`firstresult`) and the last implementation (`trylast`), so the
    documented behavior is what happens without plugins.

    Args:
        function: the hook.
        deprecated: `warn_on_impl`, the warning for plugins that implement it, or `warn_on_impl_args`, those for
            arguments by name, as `event` takes them too.
    """

    def mark(marked: Any) -> Any:
        return event(firstresult=True, **deprecated)(hookimpl(trylast=True)(marked))

    return mark if function is None else mark(function)
