"""A layer that is a mixture of experts: a router chooses a few of them for each token."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routed(NamedTuple):
    """What a router answers for `tokens` tokens of which each goes to `top_k` experts."""

    logits: Tensor
    """In float32, of shape (tokens, experts)."""
    weights: Tensor
    """Of the experts chosen for each token, summing to 1: (tokens, top_k)."""
    chosen: Tensor
    """The numbers of these experts, the best first: (tokens, top_k)."""
    counts: Tensor
    """How many tokens have chosen each expert: (experts,)."""
    capacity: int | None
    """How many of them each expert takes; None for all."""


class Router(nn.Module):
    """Chooses for each token the experts with the highest scores of a linear layer, in float32."""

    def __init__(self, width: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set first values, as a linear layer has them."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, tokens: Tensor, capacity_factor: float | None = None) -> Routed:
        """Route tokens of shape (tokens, width)."""
        with torch.autocast(tokens.device.type, enabled=False):
            logits = F.linear(tokens.float(), self.weight.float())
        scores, chosen = logits.softmax(-1).topk(self.top_k)
        experts = len(self.weight)
        counts = torch.zeros(experts, dtype=torch.int64, device=tokens.device)
        counts = counts.index_add(0, chosen.flatten(), torch.ones_like(chosen.flatten()))
        capacity = None if capacity_factor is None else math.ceil(capacity_factor * chosen.numel() / experts)
        return Routed(logits, scores / scores.sum(-1, keepdim=True), chosen, counts, capacity)


class Experts(nn.Module):
    """Gated networks of two layers (SwiGLU), their weights stacked: `experts` comes first in each shape."""

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(experts, width, hidden))
        self.up = nn.Parameter(torch.empty(experts, width, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set first values, as a linear layer has them."""
        for weight in self.parameters():
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, tokens: Tensor, counts: Tensor | None = None) -> Tensor:
        """Compute each expert on its own tokens.

        Args:
            tokens: (tokens, width), sorted by expert; or (experts, capacity, width), as many of each.
            counts: how many tokens are of each expert; None where they are as many of each.
        """
        hidden = F.silu(product(tokens, self.gate, counts)) * product(tokens, self.up, counts)
        return product(hidden, self.down, counts)


class MixtureOfExperts(nn.Module):
    """Sends each token to `top_k` of its experts, and returns the sum of their answers by the weights of the router.

    With a `capacity_factor` each expert takes at most `ceil(capacity_factor * tokens * top_k / experts)` tokens of one
    call in training, first choices before second ones and in the order of tokens. Others are dropped: the expert
    adds nothing to them. In evaluation, and with None, nothing is dropped.
    """

    def __init__(
        self, width: int, hidden: int, experts: int, top_k: int = 2, capacity_factor: float | None = None
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k={top_k} must be from 1 to the number of experts, {experts}")
        if capacity_factor is not None and not capacity_factor > 0:
            raise ValueError(f"capacity_factor={capacity_factor} must be above 0, or None to drop nothing")
        self.capacity_factor = capacity_factor
        self.router = Router(width, experts, top_k)
        self.experts = Experts(experts, width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixture for each token of `x`, whose last dimension is the width."""
        tokens = x.reshape(-1, x.shape[-1])
        routed = self.router(tokens, self.capacity_factor if self.training else None)
        answers: Tensor = self._all(tokens, routed) if routed.capacity is None else self._some(tokens, routed)
        weights = routed.weights.t().unsqueeze(-1).to(answers.dtype)
        mixture: Tensor = (answers * weights).sum(0)
        return mixture.reshape(x.shape)

    def _all(self, tokens: Tensor, routed: Routed) -> Tensor:
        """Return what the chosen experts say, of shape (top_k, tokens, width)."""
        chosen = routed.chosen.t().flatten()
        order = chosen.argsort(stable=True)
        answers = self.experts(tokens.repeat(self.router.top_k, 1)[order], routed.counts)
        return answers[order.argsort()].reshape(self.router.top_k, *tokens.shape)  # type: ignore[no-any-return]

    def _some(self, tokens: Tensor, routed: Routed) -> Tensor:
        """Return the same, with zeros where an expert has no place."""
        chosen, experts, capacity = routed.chosen.t().flatten(), len(routed.counts), routed.capacity or 0
        queues = chosen.unsqueeze(1) == torch.arange(experts, device=chosen.device)
        place = queues.cumsum(0).gather(1, chosen.unsqueeze(1)).squeeze(1) - 1
        slot = torch.where(place < capacity, chosen * capacity + place, experts * capacity)  # the last one is for none
        rows = tokens.new_zeros(experts * capacity + 1, tokens.shape[-1])
        rows = rows.index_copy(0, slot, tokens.repeat(self.router.top_k, 1))
        answers = self.experts(rows[:-1].reshape(experts, capacity, -1)).flatten(0, 1)
        answers = torch.cat([answers, answers.new_zeros(1, answers.shape[-1])])
        return answers[slot].reshape(self.router.top_k, *tokens.shape)


def product(tokens: Tensor, weights: Tensor, counts: Tensor | None) -> Tensor:
    """Return the tokens of each expert times its matrix."""
    if counts is None:
        return torch.bmm(tokens, weights)
    if tokens.is_cuda:
        return grouped(tokens, weights, counts)
    parts = torch.split(tokens, counts.tolist())
    return torch.cat([part @ matrix for part, matrix in zip(parts, weights, strict=True)])


def grouped(tokens: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """Return the same by one kernel, which needs no number on the host; it knows no autocast."""
    kind = tokens.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype
    offsets = counts.cumsum(0, dtype=torch.int32)
    return F.grouped_mm(tokens.to(dtype), weights.to(dtype), offs=offsets)
