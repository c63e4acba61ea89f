"""Tensors of other stages: DTensors in a mesh of ranks to which this one does not belong, so without memory here.

Who walks over parameters, states or checkpoints finds all names, shapes and types on every rank; torch computes
nothing with such a tensor here, and its checkpoints write and read it on the ranks of its stage alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate


def is_absent(tensor: Any) -> bool:
    """Tell whether a tensor is that of other ranks alone."""
    return isinstance(tensor, DTensor) and tensor.device_mesh.get_coordinate() is None


def held(tensor: torch.Tensor, mesh: Any) -> torch.Tensor:
    """Return a whole tensor as one that all ranks of a mesh have, this one among them; shares memory."""
    if isinstance(tensor, DTensor):
        return tensor
    return DTensor.from_local(tensor.detach(), mesh, [Replicate()], run_check=False)


def absent(shape: torch.Size, dtype: torch.dtype, mesh: Any) -> DTensor:
    """Return a tensor that the ranks of a mesh have, and not this one."""
    stride = torch.empty(shape, device="meta").stride()
    nothing = torch.empty(0, dtype=dtype)
    return DTensor.from_local(nothing, mesh, [Replicate()], run_check=False, shape=shape, stride=stride)


def give_up(module: torch.nn.Module, meshes: Mapping[str, Any]) -> None:
    """Replace parameters by absent ones; those that are one stay one.

    Args:
        module: changed in place.
        meshes: by the names of the parameters that go, the ranks that keep them.
    """
    made: dict[int, torch.nn.Parameter] = {}
    for name, mesh in meshes.items():
        owner, _, attribute = name.rpartition(".")
        weight = module.get_parameter(name)
        if id(weight) not in made:
            gone = absent(weight.shape, weight.dtype, mesh)
            made[id(weight)] = torch.nn.Parameter(gone, requires_grad=weight.requires_grad)
        setattr(module.get_submodule(owner), attribute, made[id(weight)])


def hidden(module: torch.nn.Module) -> Hidden:
    """Return a context in which a module has no absent parameters at all."""
    return Hidden(module)


class Hidden:
    """Takes absent parameters out of a module for a while, and puts them back in their places."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.found: list[tuple[torch.nn.Module, str, torch.nn.Parameter, list[str]]] = []
        for part in self.module.modules():
            named = dict(part.named_parameters(recurse=False, remove_duplicate=False))
            for name, weight in named.items():
                if is_absent(weight):
                    self.found.append((part, name, weight, [*named]))
                    delattr(part, name)

    def __exit__(self, *_: Any) -> None:
        orders = {id(part): (part, order) for part, _, _, order in self.found}
        for part, name, weight, __ in self.found:
            part.register_parameter(name, weight)
        for part, names in orders.values():
            for name in names:  # in the order in which other ranks have them
                weight = part.get_parameter(name)
                delattr(part, name)
                part.register_parameter(name, weight)
