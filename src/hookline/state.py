"""The state of a run as data: copies, shards, and the state of optimizers by parameter names."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hookline.interfaces import plain_name

# Copies and shares --------------------------------------------------------------------


def copy_state(state: Any) -> Any:
    """Return an independent copy of a state with its tensors on the CPU; tied tensors stay tied.

    Args:
        state: nested containers of tensors and plain data, as `get_run_state` returns them.
    """
    return _copy(state, {})


def _copy(value: Any, copied: dict[tuple[Any, ...], torch.Tensor]) -> Any:
    """Copy a value; `copied` has the copy of each memory seen so far."""
    if isinstance(value, torch.Tensor):
        memory: tuple[Any, ...] = (id(value),)  # of what has none: the object, which the state keeps alive
        # Of a sharded tensor, the local shard; as it is: `detach` may give parts whose memory others have in a moment.
        here = value.to_local() if hasattr(value, "to_local") else value
        if here.layout is torch.strided and here.numel():
            if hasattr(here, "__tensor_flatten__"):
                return _copy_parts(value, here, copied)
            memory = here.data_ptr(), here.device, here.dtype, value.shape, here.stride()
        if memory not in copied:
            copied[memory] = value.detach().to("cpu", copy=True)
        return copied[memory]
    if isinstance(value, dict):
        other = copy.copy(value)  # keeps its kind, and what is attached to a state dict
        for key, kept in value.items():  # a Counter's `update` would count the pairs
            other[key] = _copy(kept, copied)
        return other
    if type(value) in (list, tuple):
        return type(value)([_copy(kept, copied) for kept in value])
    return copy.deepcopy(value)


def _copy_parts(value: Any, here: Any, copied: dict[tuple[Any, ...], torch.Tensor]) -> Any:
    """Copy a tensor that is made of others and has no memory of its own; `here` is the local shard of a sharded one."""
    names, about = here.__tensor_flatten__()
    parts = {name: _copy(getattr(here, name), copied) for name in names}
    made = here.__tensor_unflatten__(parts, about, here.shape, here.stride())
    form = {"shape": value.shape, "stride": value.stride()}
    return made if here is value else value.from_local(made, value.device_mesh, value.placements, **form)


def get_named(module: torch.nn.Module, name: Any) -> torch.Tensor | None:
    """Return the parameter or buffer of this name in a module, or None."""
    for find in (module.get_parameter, module.get_buffer):
        with contextlib.suppress(AttributeError):
            if isinstance(name, str):
                return find(plain_name(name))
    return None


def take_shares(module: torch.nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a run's state with each whole tensor of a sharded weight replaced by this rank's shard.

    States that were saved before the ranks sharded the model hold whole tensors.
    """
    weights = {name: weight for name, weight in module.state_dict().items() if hasattr(weight, "device_mesh")}
    if not weights:
        return state
    return {**state, **{section: _share(state[section], weights) for section in ("module", "optimizers", "plugins")}}


def _share(value: Any, weights: Mapping[str, Any], like: Any = None) -> Any:
    from torch.distributed.tensor import distribute_tensor  # a plugin that shards weights has imported it

    if isinstance(value, dict):
        other = copy.copy(value)  # keeps its kind, and what is attached to a state dict
        for key, kept in value.items():
            name = plain_name(key) if isinstance(key, str) else key
            other[key] = _share(kept, weights, weights.get(name, like))
        return other
    if type(value) in (list, tuple):
        return type(value)([_share(kept, weights, like) for kept in value])
    whole = isinstance(value, torch.Tensor) and like is not None and not hasattr(value, "device_mesh")
    if whole and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


# Gradients ----------------------------------------------------------------------------


def get_gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of a module by parameter name."""
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def set_gradients(module: torch.nn.Module, gradients: Mapping[str, torch.Tensor]) -> None:
    """Set the gradients of a module; a parameter without one here gets None."""
    by_name = {plain_name(name): gradient for name, gradient in gradients.items()}
    for name, parameter in module.named_parameters():
        gradient = by_name.get(name)
        parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)


FRESH = "trainer.reset_optimizers_schedulers=true begins with those of the run"

# Optimizers ---------------------------------------------------------------------------


def get_optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """Return an optimizer's state by parameter names instead of numbers.

    Args:
        optimizer: the optimizer.
        names: parameter name by `id` of the parameter.
    """
    state = optimizer.state_dict()
    name_of = _names_in(optimizer, names)
    return {
        **state,
        "class": type(optimizer).__name__,
        "state": {name_of[number]: kept for number, kept in state["state"].items()},
        "param_groups": [
            {**group, "params": [name_of[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


def refuse_others(optimizers: Sequence[torch.optim.Optimizer], saved: Sequence[Mapping[str, Any]]) -> None:
    """Refuse saved states of another number or other classes of optimizers.

    Raises:
        ValueError: the optimizers of both, and what to do.
    """
    names = [type(optimizer).__name__ for optimizer in optimizers]
    were = [kept.get("class", name) for kept, name in zip(saved, [*names, *["one more"] * len(saved)], strict=False)]
    if names != were:
        raise ValueError(
            f"the optimizers of the checkpoint are {', '.join(were)}, the run's {', '.join(names)}; {FRESH}"
        )


def join_late_groups(optimizer: torch.optim.Optimizer, module: torch.nn.Module, state: Mapping[str, Any]) -> None:
    """Add parameters to an optimizer in the groups that, by a saved state, joined it during training."""
    parameters = dict(module.named_parameters())
    here = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for group in state["param_groups"][len(optimizer.param_groups) :]:
        late = [parameters.get(name) for name in group["params"]]
        if not any(parameter is None or id(parameter) in here for parameter in late):
            optimizer.add_param_group({**group, "params": late})


def other_options(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> str:
    """Return a note if options of an optimizer are not those of its saved state, which count; else ""."""
    said = [
        f"{name} {saved[name]} (not {value})"
        for built, saved in zip(optimizer.param_groups, state["param_groups"], strict=False)
        for name, value in built.items()
        if isinstance(value, (int, float, str, tuple)) and saved.get(name, value) != value
    ]
    options = ", ".join(dict.fromkeys(said))
    return f"{type(optimizer).__name__} goes on with the options of the checkpoint: {options}; {FRESH}" if said else ""


def set_optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str], state: Mapping[str, Any]) -> None:
    """Load a state by parameter names into an optimizer.

    Raises:
        ValueError: the state has other parameters, or the same in other groups.
    """
    here = _names_in(optimizer, names)
    numbers = iter(range(len(here)))
    groups = [[next(numbers) for _ in group["params"]] for group in optimizer.param_groups]
    of_groups = [[plain_name(name) for name in group["params"]] for group in state["param_groups"]]
    saved = [name for group in of_groups for name in group]
    if [{here[number] for number in group} for group in groups] != [set(group) for group in of_groups]:
        raise ValueError(
            f"the saved {type(optimizer).__name__} is over other parameters than this one, or groups them otherwise: "
            f"only saved {sorted(set(saved) - set(here))}, only here {sorted(set(here) - set(saved))}; parameters by "
            f"group: saved {[len(group) for group in of_groups]}, here {[len(group) for group in groups]}; {FRESH}"
        )
    number_of = {name: number for number, name in enumerate(here)}
    optimizer.load_state_dict(
        {
            **state,
            "state": {number_of[plain_name(name)]: kept for name, kept in state["state"].items()},
            "param_groups": [
                {**group, "params": params} for group, params in zip(state["param_groups"], groups, strict=True)
            ],
        }
    )


def _names_in(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> list[str]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [names.get(id(parameter), f"parameter {number}") for number, parameter in enumerate(parameters)]


def lost_with_ranks(state: Mapping[str, Any], world_size: int) -> str:
    """Return a warning if no rank takes some saved state, because there are fewer ranks now; else ""."""
    ranks, plugins = state["trainer"].get("ranks", 1), state.get("own_plugins")
    if ranks <= world_size or not plugins:
        return ""
    return (
        f"this run has {world_size} rank(s), and had {ranks} before: what ranks from {world_size} on kept for "
        f"themselves ({', '.join(plugins)}) is lost"
    )
