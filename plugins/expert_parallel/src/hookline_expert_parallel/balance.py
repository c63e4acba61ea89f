"""Losses that keep the loads of experts in balance, of what a router has answered in one forward of the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hookline_expert_parallel.layer import Routed


def load_of(calls: Sequence[Routed]) -> Tensor:
    """Return how many choices fell on each expert: (experts,)."""
    return torch.stack([routed.counts for routed in calls]).sum(0)


def relative(load: Tensor) -> Tensor:
    """Return loads as multiples of the balanced one."""
    return load * (len(load) / load.sum().clamp(min=1))


def balance_loss(calls: Sequence[Routed], relative_load: Tensor) -> Tensor:
    """Return the mean probability of each expert times its load, summed: 1 where all have the same load."""
    return relative_load @ logits_of(calls).softmax(-1).mean(0)


def router_z_loss(calls: Sequence[Routed]) -> Tensor:
    """Return the mean square of the logsumexp of the logits."""
    return logits_of(calls).logsumexp(-1).square().mean()


def dropped(calls: Sequence[Routed]) -> Tensor | None:
    """Return how many choices found no place; None where there is no capacity."""
    over = [(r.counts - r.capacity).clamp(min=0).sum() for r in calls if r.capacity is not None]
    return torch.stack(over).sum() if over else None


def logits_of(calls: Sequence[Routed]) -> Tensor:
    """Return the logits of all tokens."""
    return torch.cat([routed.logits for routed in calls])
