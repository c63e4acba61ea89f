"""Plain data: what can be read from a file without running code."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Mapping
from typing import Any

import torch

PLAIN = (str, int, float, bool, complex, bytes, type(None), torch.Tensor, torch.dtype, torch.device, torch.Size)


def plain(value: Any, left_out: list[str], name: str = "") -> Any:
    """Return a value of tensors and plain data alone, as it can be read without running code.

    Args:
        value: with paths, namespaces and the numbers of numpy in it, too.
        left_out: takes the names of what is none of these; it is left out.
        name: of the value.
    """
    inner = functools.partial(_inner, left_out, name)
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: one for key in value if (one := inner(key, value[key])) is not LEFT_OUT}
    if isinstance(value, (list, tuple, set)):
        items = [one for place, item in enumerate(value) if (one := inner(place, item)) is not LEFT_OUT]
        return items if isinstance(value, list) else type(value)(items) if type(value) in (tuple, set) else tuple(items)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value) in PLAIN or isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (str, int, float)):  # of an enumeration or a numpy scalar
        kind: Any = next(kind for kind in (str, int, float) if isinstance(value, kind))
        return kind.__new__(kind, value)
    if hasattr(value, "dtype") and hasattr(value, "item") and not getattr(value, "shape", None):
        return value.item()
    left_out.append(name or type(value).__name__)
    return LEFT_OUT


def _inner(left_out: list[str], name: str, key: Any, value: Any) -> Any:
    return plain(value, left_out, f"{name}.{key}" if name else str(key))


class LeftOut:
    """Stands for what is left out."""


LEFT_OUT = LeftOut()


def hparams_of(thing: Any) -> dict[str, Any]:
    """Return the parameters that a module or a data module has saved, as plain data."""
    logged = getattr(thing, "_log_hyperparams", True)  # save_hyperparameters(logger=False)
    found = getattr(thing, "hparams", None) if thing is not None and logged else None
    return plain(found, []) if isinstance(found, Mapping) else {}


class AttributeDict(dict[str, Any]):
    """Parameters, as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"hparams have no {name!r}; they have {', '.join(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value
