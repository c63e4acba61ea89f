"""What a checkpoint cannot hold, in words, and what to give in its place."""

from __future__ import annotations

import datetime
import enum
import inspect
from dataclasses import is_dataclass
from typing import Any

import torch


def describe(value: Any) -> str:
    """Return what kind of thing a value is."""
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    if inspect.isroutine(value):
        return f"a function ({getattr(value, '__qualname__', name)})"
    if isinstance(value, torch.nn.Module):
        return f"a module ({kind.__qualname__})"
    if isinstance(value, enum.Enum):
        return f"the enum member {kind.__qualname__}.{value.name}"
    if isinstance(value, torch.Tensor):
        if kind not in (torch.Tensor, torch.nn.Parameter):
            return f"a tensor of the subclass {name}"
        form = "quantized" if value.is_quantized else "nested" if value.is_nested else "meta" if value.is_meta else ""
        return f"a {form or str(value.layout).removeprefix('torch.')} tensor"
    if name == "numpy.ndarray":
        return f"a numpy array of dtype {value.dtype}"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"a namedtuple ({kind.__qualname__})"
    return f"an object of {name}"


def cure(value: Any) -> str:
    """Return what to give in place of a value."""
    if isinstance(value, (torch.nn.Module, torch.optim.Optimizer)):
        return "give its state_dict()"
    if isinstance(value, torch.Generator):
        return "give its get_state()"
    if isinstance(value, torch.Tensor):
        return "give its parts as dense tensors"
    if isinstance(value, enum.Enum):
        return "give its name or its value"
    if isinstance(value, datetime.datetime):
        return "give it with a fixed offset, as by astimezone(datetime.UTC)"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "give tuple(…), or its _asdict()"
    if is_dataclass(value) and not isinstance(value, type):
        return "give dataclasses.asdict(…)"
    return "leave it out of get_state, and make it anew in update_state"
