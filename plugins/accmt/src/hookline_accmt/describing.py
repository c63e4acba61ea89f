"""What a configuration says of objects: by which path they are imported, and with what they are made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any


def path_of(name: str, given: Callable[..., Any]) -> str:
    """Return by which path something can be imported.

    Raises:
        TypeError: by none.
    """
    home, own = getattr(given, "__module__", None), getattr(given, "__qualname__", "<locals>")
    if home in (None, "__main__") or "<" in own:
        raise TypeError(f"{name}: {given!r} cannot be imported from a file; move it into one, at its top level")
    return f"{home}.{own}"


def described_by(name: str, given: Any) -> dict[str, Any]:
    """Return `_target_` and arguments of what makes an object."""
    if isinstance(given, Mapping) and "_target_" in given:
        return dict(given)
    if isinstance(given, type) or inspect.isroutine(given):
        return {"_target_": path_of(name, given)}
    raise TypeError(
        f"to_yaml: {name} is a {type(given).__name__}, and nobody can know how it was made; give its class, a function "
        "that makes it, or a mapping of _target_ and arguments"
    )


def paths(name: str, given: Any) -> Any:
    """Return the path of a function, or of several."""
    if isinstance(given, (list, tuple)):
        return [paths(name, one) for one in given]
    if isinstance(given, type) or inspect.isroutine(given):
        return path_of(name, given)
    raise TypeError(f"to_yaml: {name} is a {type(given).__name__}; give a function or a class, which has a path")
