"""What one rank does for all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass
class DistributedTrainingArguments:
    """The place of this process among the ranks, which the launcher says; the trainer fills it in."""

    local_rank: int = 0
    global_rank: int = 0
    world_size: int = 1
    backend: str = "nccl"
    """Without effect: the device decides."""
    init_method: str = "env://"
    gather_frequency: int | None = None


def rank_zero_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have a function done by rank 0 alone; the others wait for it, and get None. It may raise: none waits for ever."""

    @functools.wraps(function)
    def done(*args: Any, **kwargs: Any) -> Any:
        several = dist.is_available() and dist.is_initialized()
        try:
            return function(*args, **kwargs) if not several or dist.get_rank() == 0 else None
        finally:
            if several:
                dist.barrier()

    return done
