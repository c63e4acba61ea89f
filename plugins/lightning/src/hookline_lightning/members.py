"""Attributes of the user's objects, so that an error in a property is an error and no absence."""

from __future__ import annotations

import functools
import inspect
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
