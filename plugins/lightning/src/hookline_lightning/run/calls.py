"""What users have written, and how it is called."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from hookline_lightning.run.members import member

BASES = (  # what stands in classes of these modules is nobody's override
    "torch.nn", "hookline_lightning.module", "hookline_lightning.bases", "hookline_lightning.early",
    "lightning.pytorch.core", "lightning.fabric", "pytorch_lightning.core",
    "lightning.pytorch.callbacks.callback", "pytorch_lightning.callbacks.callback", "lightning_fabric",
)  # fmt: skip


def overridden(thing: Any, name: str) -> Callable[..., Any] | None:
    """Return a method that the user has written, or None."""
    if name in vars(thing):
        return getattr(thing, name)  # type: ignore[no-any-return]
    for kind in type(thing).__mro__:
        if name in vars(kind):
            return None if kind is object or kind.__module__.startswith(BASES) else member(thing, name)
    return None


@functools.cache
def room(function: Callable[..., Any]) -> int:
    """Return how many positional arguments a plain function or method takes."""
    parameters = inspect.signature(function).parameters.values()
    if any(one.kind is one.VAR_POSITIONAL for one in parameters):
        return sys.maxsize
    return sum(one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in parameters)


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call with as many of the arguments as the function takes."""
    plain = getattr(function, "__func__", None)
    taken = room(function) if plain is None else room(plain) - 1
    return function(*arguments[:taken])
