"""Experts on several ranks: their weights split, and tokens sent to the rank that has their expert and back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def split(name: str, module: torch.nn.Module, mesh: Any) -> Exchange:
    """Leave each rank of a mesh an equal part of the experts of a module, and have it exchange tokens.

    Raises:
        ValueError: they cannot be split.
    """
    weights = dict(module.named_parameters())
    numbers = {of: len(weight) if weight.ndim > 1 else None for of, weight in weights.items()}
    experts = next(iter(numbers.values()), None)
    if experts is None or set(numbers.values()) != {experts} or any("." in of for of in numbers):
        said = ", ".join(f"{of} {list(weight.shape)}" for of, weight in weights.items()) or "none"
        raise ValueError(
            f"expert_parallel: the parameters of {name!r} must be its own, and have the experts in their first "
            f"dimension, equally many; they are {said}"
        )
    if experts % mesh.size():
        raise ValueError(
            f"expert_parallel: the {experts} experts of {name!r} cannot be split over {mesh.size()} ranks; set "
            "expert_parallel.size to a number that divides them"
        )
    for of, weight in weights.items():
        part = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
        setattr(module, of, torch.nn.Parameter(part, weight.requires_grad))
    exchange = Exchange(module, mesh)
    module.forward = exchange
    return exchange


class Exchange:
    """The forward of a module of experts of which each rank has a part.

    The module's own forward gets the tokens of all ranks for the experts that are here, as `Experts.forward` says.
    """

    def __init__(self, module: torch.nn.Module, mesh: Any) -> None:
        self.module, self.mesh = module, mesh
        self._own: Callable[..., Tensor] = module.forward
        self._whole: dict[str, Tensor] = {}  # by name, while this rank computes for itself

    def put_together(self, together: bool) -> None:
        """Have all experts on each rank for the forwards to come, or the own part again."""
        named = self.module.named_parameters() if together else ()
        self._whole = {name: whole(weight.detach()) for name, weight in named}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # splits are numbers that only a forward knows
    def __call__(self, tokens: Tensor, counts: Tensor | None = None) -> Tensor:
        """Do what the module's forward does with all experts."""
        if self._whole:
            with self._having(self._whole):
                return self._own(tokens, counts)
        size = self.mesh.size()
        named: Any = self.module.named_parameters()
        parts = {name: Shared.apply(weight.to_local(), size) for name, weight in named}  # type: ignore[no-untyped-call]
        with self._having(parts):
            return self._even(tokens) if counts is None else self._uneven(tokens, counts)

    @contextlib.contextmanager
    def _having(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Let the module see plain tensors where its parameters are: an attribute comes before a parameter."""
        vars(self.module).update(weights)
        try:
            yield
        finally:
            for name in weights:
                del vars(self.module)[name]

    def _even(self, tokens: Tensor) -> Tensor:
        """Exchange as many tokens of each expert: (experts, capacity, width), the most that a rank has of them."""
        experts, capacity, width = tokens.shape
        size, group = self.mesh.size(), self.mesh.get_group()
        most = torch.tensor(capacity, device=tokens.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        room = int(most)  # micro-batches of ranks may have different sizes
        sent = torch.nn.functional.pad(tokens, (0, 0, 0, room - capacity)).reshape(size, -1, room, width)
        here = swapped(sent, group).transpose(0, 1)
        answers = self._own(here.reshape(experts // size, size * room, width), None)
        back = answers.reshape(experts // size, size, room, -1).transpose(0, 1)
        return swapped(back, group).reshape(experts, room, -1)[:, :capacity]

    def _uneven(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Exchange tokens that are sorted by expert; those of one expert are then in the order of ranks."""
        size, group = self.mesh.size(), self.mesh.get_group()
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=group)
        ours = arriving.reshape(size, -1)
        sizes, sent = ours.sum(1).tolist(), counts.reshape(size, -1).sum(1).tolist()
        came = swapped(tokens, group, sizes, sent)
        order = torch.arange(ours.shape[1], device=ours.device).repeat(size).repeat_interleave(arriving)
        order = order.argsort(stable=True)
        answers = self._own(came[order], ours.sum(0))[order.argsort()]
        return swapped(answers, group, sent, sizes)


class Shared(torch.autograd.Function):
    """A weight whose gradient is divided: ranks average gradients, and this one is the sum over several of them."""

    @staticmethod
    def forward(context: Any, weight: Tensor, ranks: int) -> Tensor:
        """Return the weight."""
        context.ranks = ranks
        return weight.view_as(weight)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient, divided."""
        return gradient / context.ranks, None


class Swap(torch.autograd.Function):
    """An all-to-all of rows; the gradients of rows that have gone to a rank come back from it."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, group: Any, arriving: list[int] | None, sent: list[int] | None) -> Tensor:
        """Return the rows that ranks have for this one."""
        context.back = group, sent, arriving
        rows = len(tensor) if arriving is None else sum(arriving)
        came = tensor.new_empty(rows, *tensor.shape[1:])
        dist.all_to_all_single(came, tensor.contiguous(), arriving, sent, group=group)
        return came

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradients of the rows that went away."""
        return swapped(gradient, *context.back), None, None, None


def swapped(tensor: Tensor, group: Any, arriving: list[int] | None = None, sent: list[int] | None = None) -> Tensor:
    """Return the rows that ranks have for this one, in the order of ranks.

    Args:
        tensor: the rows for each rank, one rank after the other.
        group: the ranks.
        arriving: how many rows come from each; None where all are equally many.
        sent: how many go to each.
    """
    return Swap.apply(tensor, group, arriving, sent)  # type: ignore[no-any-return, no-untyped-call]


def whole(value: Any) -> Any:
    """Return a tensor put together of the parts that ranks have."""
    return value.full_tensor() if isinstance(value, DTensor) else value
