"""Modules split as a plan says, and what ranks then have parts of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from hookline_tp.plan import LAYOUTS, Style


def split(model: torch.nn.Module, mesh: Any, chosen: Mapping[str, Any]) -> None:
    """Split the modules that are chosen; weights that were one stay one, and what is frozen stays so.

    Raises:
        ValueError: weights that are one are split in two ways.
    """
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    tied: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(weight), []).append(name)
    for name, style in chosen.items():
        module = model.get_submodule(name)
        if isinstance(style, Style):
            refuse_remainders(name, style, module, mesh.size())
            style = as_torch(style, module)
        parallelize_module(module, mesh, style)
    for first, *others in tied.values():
        weight = model.get_parameter(first)
        weight.requires_grad_(first not in frozen)
        for other in others:
            if layout(model.get_parameter(other)) != layout(weight):
                raise ValueError(
                    f"{first} and {other} are one weight, and tp.plan splits them in two ways: give both modules such "
                    "styles that it is split alike ('row' for an Embedding, 'column' for the Linear), or none"
                )
            owner, _, attribute = other.rpartition(".")
            setattr(model.get_submodule(owner), attribute, weight)


def as_torch(style: Style, module: torch.nn.Module) -> ParallelStyle:
    """Return torch's style for what a text says; all of them take and give plain tensors, but for logits."""
    before, behind = (None if said is None else LAYOUTS[said] for said in style[1:])
    if style.kind == "sequence":
        return SequenceParallel(use_local_output=True)
    if style.kind == "input":
        return PrepareModuleInput(input_layouts=before, desired_input_layouts=behind, use_local_output=True)
    if style.kind == "output":
        assert before is not None
        assert behind is not None
        return PrepareModuleOutput(output_layouts=before, desired_output_layouts=behind)
    if style.kind == "row":
        if before is None and isinstance(module, torch.nn.Embedding):
            before = LAYOUTS["whole"]  # numbers of words have no features
        return RowwiseParallel(input_layouts=before, output_layouts=behind)
    as_parts = style.behind == "logits"
    return ColwiseParallel(input_layouts=before, output_layouts=behind, use_local_output=not as_parts)


def refuse_remainders(name: str, style: Style, module: torch.nn.Module, size: int) -> None:
    """Have a module refuse a sequence that cannot be cut into equal parts, at which ranks would wait for each other."""
    if style.behind != "sequence" or style.before == "sequence":
        return

    def look(whole: Any) -> None:
        length = whole.shape[1]
        if length % size:
            raise ValueError(
                f"tp.plan: {name!r} is to cut a sequence of {length} over {size} ranks, which do not divide it: pad it"
            )

    if style.kind == "output":
        module.register_forward_hook(lambda _, __, output: look(output))
    else:
        module.register_forward_pre_hook(lambda _, inputs: look(inputs[0]))


@contextlib.contextmanager
def losses_of_parts() -> Iterator[None]:
    """Have cross entropy take logits of which ranks have parts."""
    error = None
    with loss_parallel():
        try:
            yield
        except BaseException as raised:  # torch's own would last for ever behind it
            error = raised
    if error is not None:
        raise error


def here(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def layout(tensor: torch.Tensor) -> Any:
    """Return how a tensor is split; None where it is not."""
    return tensor.placements if isinstance(tensor, DTensor) else None


def whole(value: Any) -> Any:
    """Return outputs with those put together of which ranks have parts."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {key: whole(kept) for key, kept in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(whole, value))
    return value
