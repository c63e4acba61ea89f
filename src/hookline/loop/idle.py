"""Restores a module after a pass that does not count."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch

log = logging.getLogger("hookline.loop.idle")

LISTS = (list, collections.deque)
CONTAINERS = (*LISTS, dict, set, collections.Counter, collections.defaultdict, collections.OrderedDict)
OF_TORCH = frozenset(vars(torch.nn.Module()))  # attributes of every module


@contextlib.contextmanager
def untouched(module: torch.nn.Module) -> Iterator[None]:
    """Restore a module at the end of the block, except for parameters and their gradients.

    For the module and each submodule this restores buffers, the states of a metric of torchmetrics, and which object
    each other attribute is; for lists, dictionaries and sets also their items. A tensor that is neither buffer nor
    state is not copied, since it may be a whole data set: if it was changed in place, a warning says so.
    """
    attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
    contents: dict[int, tuple[Any, Any]] = {}
    copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    versions: list[tuple[str, torch.Tensor, int]] = []
    for path, part in module.named_modules():
        own = {name: value for name, value in vars(part).items() if name not in OF_TORCH}
        attributes.append((vars(part), own))
        states = [own.get(name) for name in getattr(part, "_defaults", ())]  # of a torchmetrics metric
        for tensor in (*_tensors(part._buffers, contents), *(state for state in states if torch.is_tensor(state))):
            copies[id(tensor)] = tensor, tensor.detach().clone()
        for name, value in own.items():
            full_name = f"{path}.{name}".removeprefix(".")
            versions += [(full_name, tensor, tensor._version) for tensor in _tensors(value, contents)]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in copies.values():
                tensor.copy_(before)
        for here, own in attributes:
            for name in [name for name in here if name not in OF_TORCH and name not in own]:
                del here[name]
            here.update(own)
        for container, before in contents.values():
            container.clear()
            container.extend(before) if type(container) in LISTS else container.update(before)
        for name, tensor, version in versions:
            if tensor._version != version and id(tensor) not in copies:
                warn_of_change(name)


def _tensors(value: Any, contents: dict[int, tuple[Any, Any]]) -> Iterator[torch.Tensor]:
    """Yield the tensors of an attribute at any depth, without parameters; remember the items of each container."""
    if isinstance(value, torch.Tensor):
        if not isinstance(value, torch.nn.Parameter) and not value.is_inference():
            yield value
    elif type(value) in CONTAINERS and id(value) not in contents:
        contents[id(value)] = value, copy.copy(value)
        for inner in list(value.values()) if isinstance(value, dict) else value:
            if isinstance(inner, torch.Tensor) or type(inner) in CONTAINERS:  # a list may hold many numbers
                yield from _tensors(inner, contents)


@functools.cache
def warn_of_change(name: str) -> None:
    """Warn, once, that a pass which must not count has changed a tensor."""
    log.warning(
        "a pass that must not count has changed the tensor %s of the module in place, so it counts there: "
        "make it a buffer (register_buffer), or leave it alone while self.trainer.idle",
        name,
    )
