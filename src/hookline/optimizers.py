"""What a module returns as its optimizers: the forms that it may have, and whether it trains the module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch


def as_lists(returned: Any, module: torch.nn.Module) -> tuple[list[torch.optim.Optimizer], list[Any]]:
    """Return what `get_optimizers_schedulers` returned as a list of optimizers and a list of schedulers.

    Raises:
        TypeError: it holds something else.
        ValueError: an optimizer is over tensors that are not the module's, or a scheduler over another optimizer.
    """
    items, where = listed(returned), f"{type(module).__name__}.get_optimizers_schedulers"
    optimizers, schedulers = items, []
    if len(items) == 2 and not all(map(is_optimizer, items)):
        timed = isinstance(items[1], tuple) and str in map(type, items[1])
        optimizers = listed(items[0])
        schedulers = [] if items[1] is None else [items[1]] if timed else listed(items[1])
    for wrong in optimizers:
        if not is_optimizer(wrong):
            said = f"a dict with keys {[*wrong]}" if isinstance(wrong, Mapping) else f"{wrong!r:.80}"
            raise TypeError(
                f"{where} returned {said} where an optimizer is meant: return an optimizer, (optimizer, scheduler), a "
                "list of optimizers, or ([optimizers], [schedulers]); a tuple says when a scheduler moves: "
                '(scheduler, "epoch"), (scheduler, "validation", "val_accuracy")'
            )
    own, groups = {id(parameter) for parameter in module.parameters()}, set()
    for optimizer in optimizers:
        groups |= {id(group) for group in optimizer.param_groups}
        given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        foreign = [tuple(parameter.shape) for parameter in given if id(parameter) not in own]
        if foreign:
            raise ValueError(
                f"{where}: {len(foreign)} of the {len(given)} tensors of {type(optimizer).__name__} are no parameters "
                f"of the module (the first has shape {foreign[0]}), so it would not be trained, or not as it is moved "
                "and saved. Make the optimizer in this method, of self.parameters(), not of a copy; what it trains is "
                "an attribute of the module: a network, a torch.nn.ModuleList, a torch.nn.Parameter"
            )
    for entry in schedulers:
        scheduler = entry[0] if isinstance(entry, tuple) and entry else entry
        moved = getattr(getattr(scheduler, "optimizer", None), "param_groups", ())
        if moved and not any(id(group) in groups for group in moved):
            raise ValueError(
                f"{where}: {type(scheduler).__name__} moves the rates of an optimizer that is not returned"
            )
    return optimizers, schedulers


def is_optimizer(value: Any) -> bool:
    """Tell whether a value has groups of parameters."""
    return hasattr(value, "param_groups")


def listed(value: Any) -> list[Any]:
    """Return the items of a list or another iterable, and what is none as the only one."""
    return [value] if isinstance(value, (Mapping, str)) or not isinstance(value, Iterable) else list(value)
