"""Attributes of the user's objects, so that an error in a property is an error and no absence."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any


def member(thing: Any, name: str, default: Any = None) -> Any:
    """Return an attribute of a user's object, or a default where it has none.

    An AttributeError that a property raises comes out as it is: `getattr` would take it for an absence, and
    `torch.nn.Module` would raise another one in its place.
    """
    written = inspect.getattr_static(type(thing), name, None)
    if isinstance(written, (property, functools.cached_property)) and name not in vars(thing):
        return written.__get__(thing, type(thing))
    return getattr(thing, name, default)


def calls_itself(thing: Any, name: str) -> bool:
    """Tell whether the class of an object, or one that it derives from, has code that speaks of a method by name."""
    return any(
        name in _names(code)
        for kind in type(thing).__mro__
        for other, written in vars(kind).items()
        if other != name
        for code in _codes(written)
    )


def _codes(written: Any) -> Iterator[CodeType]:
    for part in ("__func__", "fget", "func"):
        written = getattr(written, part, written)
    code = getattr(inspect.unwrap(written) if callable(written) else written, "__code__", None)
    if isinstance(code, CodeType):
        yield code


def _names(code: CodeType) -> set[str]:
    inner = [part for part in code.co_consts if isinstance(part, CodeType)]
    return {*code.co_names}.union(*map(_names, inner))
