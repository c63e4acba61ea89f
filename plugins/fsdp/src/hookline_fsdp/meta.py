"""A module that was made on the meta device: memory and first values for its blocks, one at a time."""

from __future__ import annotations

import math
import zlib

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from hookline import kept_rng


def refuse_values(module: torch.nn.Module) -> None:
    """Refuse a module that was not made on the meta device, or has made other things there than its weights.

    Raises:
        ValueError: what is wrong, and what to do.
    """
    name = type(module).__name__
    weights = list(module.parameters())
    if weights and not any(weight.is_meta for weight in weights):
        raise ValueError(
            f"fsdp.meta=true, and {name} has its weights already: give Trainer a function that makes it, such as "
            f"functools.partial({name}, …)"
        )
    for path, part in module.named_modules():
        for attribute, value in vars(part).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                where = f"{path}.{attribute}" if path else attribute
                raise ValueError(
                    f"fsdp.meta=true, and {name}.{where} is a tensor without values that is neither a parameter nor a "
                    "buffer: make data where it is loaded (get_train_dataloader), or under torch.device('cpu')"
                )


def give_values(model: torch.nn.Module, block: torch.nn.Module, device: torch.device, seed: int) -> None:
    """Give a block of a model memory, and first values by the `reset_parameters` of its modules.

    The values depend on the seed and on the names of modules alone, hence not on the number of ranks.

    Raises:
        ValueError: what nobody has given a value, or what belongs to another block and was changed.
    """
    names = {module: name for name, module in model.named_modules()}
    inner = {name: weight for name, weight in block.named_parameters() if is_shared(weight)}
    places = [(module, *own) for module in block.modules() for own in own_tensors(module) if not is_shared(own[1])]
    made: dict[int, torch.Tensor] = {}  # a tensor that two modules have stays one
    for module, name, tensor in places:
        if id(tensor) not in made:
            made[id(tensor)] = placed(tensor, device)
        setattr(module, name, made[id(tensor)])
    fresh = {id(made[id(tensor)]) for _, _, tensor in places if tensor.is_meta}
    with torch.no_grad(), kept_rng():
        # torch counts here alone how often a tensor was written to
        versions = {name: weight._version for name, weight in inner.items()}
        for module in reversed(list(block.modules())):  # what is within before what it is in, as they are made
            if any(id(tensor) in fresh for tensor in (*module.parameters(), *module.buffers())):
                torch.manual_seed(zlib.crc32(f"{seed} {names[module]}".encode()))
                # torch's own attention and transformers have it with an underscore
                getattr(module, "reset_parameters", getattr(module, "_reset_parameters", nothing))()
        changed = [name for name, weight in inner.items() if weight._version != versions[name]]
    if changed:
        raise ValueError(
            f"fsdp.meta: {type(block).__name__}.reset_parameters() changes {changed[0]}, which is in a block of its "
            "own, and of which each rank has a share by now: that block's class must set it"
        )
    empty = [
        f"{f'{names[module]}.{name}'.removeprefix('.')} ({type(module).__name__})"
        for module, name, tensor in places
        if tensor.is_meta and not has_values(made[id(tensor)], module)
    ]
    if empty:
        raise ValueError(
            f"fsdp.meta: nobody gives first values to {', '.join(empty)}: the class of each must have a method "
            "reset_parameters() that sets all its parameters and buffers"
        )
    for module, name, tensor in places:
        if isinstance(tensor, DTensor):  # a layer that was split over ranks before
            share_of_rank = distribute_tensor(made[id(tensor)].detach(), tensor.device_mesh, tensor.placements)
            setattr(module, name, torch.nn.Parameter(share_of_rank, tensor.requires_grad))


def own_tensors(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return the parameters and buffers of a module itself by name."""
    kinds = module.named_parameters, module.named_buffers
    return [pair for named in kinds for pair in named(recurse=False, remove_duplicate=False)]


def is_shared(tensor: torch.Tensor) -> bool:
    """Tell whether ranks have their shares of a tensor already."""
    return isinstance(tensor, DTensor) and not tensor.is_meta


def placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; one without values is whole, and filled with what stands for none."""
    if tensor.is_meta:
        data = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if data.dtype != torch.bool:
            number = data.is_floating_point() or data.is_complex()
            data.fill_(math.nan if number else torch.iinfo(data.dtype).max)
    else:
        data = tensor.detach().to(device)
    return torch.nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else data


def has_values(tensor: torch.Tensor, owner: torch.nn.Module) -> bool:
    """Tell whether no part of a tensor is as `placed` has left it; of bools nobody knows but their owner."""
    if tensor.dtype == torch.bool:
        return hasattr(owner, "reset_parameters")
    if tensor.is_floating_point() or tensor.is_complex():
        return bool((~tensor.isnan()).all())
    return bool((tensor != torch.iinfo(tensor.dtype).max).all())


def nothing() -> None:
    """Do nothing."""
