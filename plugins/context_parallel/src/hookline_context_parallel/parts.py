"""Sequences cut into the parts of ranks, and what ranks know of them put together."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

ALONE = "batch"  # the name of a tensor that is the whole batch


@dataclass(frozen=True)
class Parts:
    """Which part of each sequence this rank has: a stretch of it, or one from the head and one from the tail."""

    mesh: Any
    """The ranks that have the parts of one sequence, a mesh of one dimension."""
    balanced: bool

    @property
    def pieces(self) -> int:
        """How many pieces a sequence is cut into."""
        return int(self.mesh.size()) * (2 if self.balanced else 1)

    def cut(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        """Return this rank's part of a tensor."""
        rank, pieces = self.mesh.get_local_rank(), whole.chunk(self.pieces, dim)
        return torch.cat([pieces[rank], pieces[-1 - rank]], dim) if self.balanced else pieces[rank].contiguous()

    def whole(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        """Return a tensor put together of the parts of all ranks, without a graph."""
        part = part.detach().contiguous()
        parts = [torch.empty_like(part) for _ in range(self.mesh.size())]
        dist.all_gather(parts, part, group=self.mesh.get_group())
        if self.balanced:
            halves = [one.chunk(2, dim) for one in parts]
            parts = [head for head, _ in halves] + [tail for _, tail in reversed(halves)]
        return torch.cat(parts, dim)

    def reduced(self, value: torch.Tensor, op: str) -> torch.Tensor:
        """Return a number reduced over ranks; `op` is sum, min or max."""
        value = value.clone()
        dist.all_reduce(value, getattr(dist.ReduceOp, op.upper()), group=self.mesh.get_group())
        return value

    def mean(self, value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the weighted mean of a number over ranks; each gives gradients to its own part of it."""
        return _Mean.apply(value, weight, self.mesh)  # type: ignore[no-any-return,no-untyped-call]


class _Mean(torch.autograd.Function):
    """The mean of all ranks, whose gradient the mean of all ranks' gradients puts together again."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor, weight: torch.Tensor, mesh: Any) -> torch.Tensor:
        weight = weight.to(value.device, torch.float64)
        pair = torch.stack([torch.where(weight > 0, value.detach().double().reshape(()) * weight, 0.0), weight])
        dist.all_reduce(pair, group=mesh.get_group())
        context.part = torch.where(weight > 0, mesh.size() * weight / pair[1], 0.0)
        return (pair[0] / pair[1]).to(value.dtype).reshape(value.shape)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return (gradient * context.part).to(gradient.dtype), None, None


def tensors_of(batch: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a batch by name: keys and places, with dots between them."""
    if isinstance(batch, torch.Tensor):
        yield name or ALONE, batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for key, value in batch.items() if isinstance(batch, Mapping) else enumerate(batch):
            yield from tensors_of(value, f"{name}.{key}" if name else str(key))


def with_tensors(batch: Any, new: Mapping[str, torch.Tensor], name: str = "") -> Any:
    """Return a batch with other tensors in the place of those that are named."""
    if isinstance(batch, torch.Tensor):
        return new.get(name or ALONE, batch)
    if isinstance(batch, Mapping):
        made: Any = copy.copy(batch)
        for key, value in batch.items():
            made[key] = with_tensors(value, new, f"{name}.{key}" if name else str(key))
        return made
    if isinstance(batch, (list, tuple)):
        values = [
            with_tensors(value, new, f"{name}.{place}" if name else str(place)) for place, value in enumerate(batch)
        ]
        return type(batch)._make(values) if hasattr(batch, "_make") else type(batch)(values)
    return batch


def named_in(batch: Any, dims: Mapping[str, int], pieces: int) -> dict[str, torch.Tensor]:
    """Return the tensors of a batch that have the sequence.

    Raises:
        ValueError: none is named, or one that is not there; they have other lengths, or one that cannot be cut.
    """
    there = dict(tensors_of(batch))
    listed = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in there.items()) or "no tensor"
    asked = "name each tensor that has the sequence, with its dimension, such as context_parallel.batch={tokens: 1}"
    if not dims:
        raise ValueError(f"context_parallel.batch is empty, and the batch has {listed}: {asked}")
    for name, dim in dims.items():
        if name not in there or not -there[name].ndim <= dim < there[name].ndim:
            raise ValueError(
                f"context_parallel.batch names dimension {dim} of {name}, and the batch has {listed}: {asked}"
            )
    named = {name: there[name] for name in dims}
    lengths = {tensor.shape[dims[name]] for name, tensor in named.items()}
    if len(lengths) > 1:
        raise ValueError(f"context_parallel.batch names sequences of several lengths; the batch has {listed}")
    (length,) = lengths
    if length % pieces:
        raise ValueError(
            f"context_parallel cuts each sequence into {pieces} pieces, and one of {length} positions has no such: pad "
            f"it in the data to {-length % pieces + length}, with labels that the loss ignores"
        )
    return named


def reduced(
    logged: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], parts: Parts, weight: torch.Tensor
) -> Iterator[dict[str, Any]]:
    """Yield what a step has logged of its part of the sequence as it is of the whole: arguments of `trainer.log`."""
    for values, options in logged:
        by = None if options["weighted_by"] is None else torch.as_tensor(options["weighted_by"], dtype=torch.float64)
        for name, given in values.items():
            value = torch.as_tensor(given).detach().reshape(())
            if options["reduce"] in ("sum", "min", "max"):
                yield {**options, name: parts.reduced(value, options["reduce"])}
            else:
                value = parts.mean(value if value.is_floating_point() else value.double(), weight if by is None else by)
                yield {**options, name: value, "weighted_by": None if by is None else parts.reduced(by, "sum")}
