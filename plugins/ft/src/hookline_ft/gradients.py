"""The average of the gradients of all replicas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

BUCKET = 64 * 2**20  # bytes of gradients that are averaged at a time


def average(manager: Any, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Average the gradients of optimizers over all replicas, in place."""
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    gradients = [gradient(p) for p in dict.fromkeys(parameters) if p.requires_grad]
    averaged = []
    for bucket in buckets(gradients):
        flat = torch.cat([one.reshape(-1) for one in bucket])
        averaged.append((bucket, flat, manager.allreduce(flat)))
    for bucket, flat, work in averaged:
        work.wait()  # what goes wrong refuses the step
        for one, part in zip(bucket, torch.split(flat, [one.numel() for one in bucket]), strict=True):
            one.copy_(part.view_as(one))


def gradient(parameter: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a parameter; zeros where it has none, so that all replicas average the same ones."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Return tensors in groups of one type that are not too large."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.nbytes > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
