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


class RankZeroOnly:
    """Has a function done by rank 0 alone; the others wait for it, and get None. It may raise: none waits for ever.

    Until a `Trainer` is made, each process does it, as in PyMarlin.
    """

    rank = 0
    """Of this process; a `Trainer` says it."""

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def done(*args: Any, **kwargs: Any) -> Any:
            several = dist.is_available() and dist.is_initialized()
            try:
                return function(*args, **kwargs) if (dist.get_rank() if several else self.rank) == 0 else None
            finally:
                if several:
                    dist.barrier()

        return done


rank_zero_only = RankZeroOnly()
