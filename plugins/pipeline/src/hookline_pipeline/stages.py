"""Where the stages of a model begin, and which stage each of its tensors belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def refuse_names(names: Sequence[str], module: torch.nn.Module) -> None:
    """Refuse names at which no stage can begin.

    Raises:
        ValueError: a name is that of no module, or comes before the one ahead of it in the model.
    """
    order = [name for name, _ in module.named_modules()]
    for name in names:
        if name not in order or not name:
            near = ", ".join([one for one in order if one][:6])
            raise ValueError(f"pipeline.split names {name!r}, and the model has no such module; it has {near} …")
    wanted = sorted(names, key=order.index)
    if list(names) != wanted or len(set(names)) != len(names):
        raise ValueError(
            f"pipeline.split={list(names)} must name modules in the order in which the model has them: {wanted}"
        )


def cost(module: torch.nn.Module) -> dict[str, int]:
    """Return how many numbers of each parameter take part in arithmetic; an embedding only looks some of its up."""
    tables = {id(one.weight) for one in module.modules() if isinstance(one, torch.nn.Embedding)}
    return {name: 0 if id(weight) in tables else weight.numel() for name, weight in module.named_parameters()}


def split_evenly(module: torch.nn.Module, blocks: Mapping[str, torch.nn.Module], stages: int) -> list[str]:
    """Return the names of the blocks at which stages begin, so that the costliest stage costs as little as can be.

    What stands ahead of the first block is of the first stage, what stands behind the last of the last.

    Raises:
        ValueError: there are fewer blocks than stages.
    """
    outer = [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]
    if len(outer) < stages:
        raise ValueError(
            f"pipeline: {stages} stages need as many blocks, and the model has {len(outer)}: name where each stage "
            "but the first begins in pipeline.split, or the classes of blocks in pipeline.blocks"
        )
    costs, at = [0] * len(outer), stages_of(module, outer[1:])
    for name, size in cost(module).items():
        costs[at[name]] += size
    least, most = max(costs), sum(costs)
    while least < most:  # the smallest limit within which so many stages are enough
        limit = (least + most) // 2
        if len(begins(costs, limit, 0)) <= stages:
            most = limit
        else:
            least = limit + 1
    return [outer[index] for index in begins(costs, least, stages)[1:]]


def begins(costs: Sequence[int], limit: int, stages: int) -> list[int]:
    """Return where stages begin that take as many blocks as fit into a limit, and leave one for each that follows."""
    found, total = [0], 0
    for index, one in enumerate(costs):
        behind = stages - len(found)
        if index and (total + one > limit or len(costs) - index <= behind):
            found.append(index)
            total = 0
        total += one
    return found


def stages_of(module: torch.nn.Module, split: Sequence[str]) -> dict[str, int]:
    """Return the stage of each parameter and buffer by its name: that of the last beginning ahead of it."""
    stages: dict[str, int] = {}
    stage = 0
    for prefix, part in module.named_modules(remove_duplicate=False):
        if prefix in split:
            stage = split.index(prefix) + 1
        dot = f"{prefix}." if prefix else ""
        for name, _ in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            stages[dot + name] = stage
    return stages
