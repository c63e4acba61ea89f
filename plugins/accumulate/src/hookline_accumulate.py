"""Accumulate gradients: several micro-batches make one optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hookline import CallbackInterface, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"


def nearest_divisors(number: int, wanted: int) -> list[int]:
    """Return the divisors of a number that lie nearest to the wanted one, below and above."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    below = [divisor for divisor in divisors if divisor < wanted][-1:]
    above = [divisor for divisor in divisors if divisor > wanted][:1]
    return below + above


@dataclass(eq=False)
class Accumulate(CallbackInterface):
    """Split the batch of each optimizer step into micro-batches; the gradient is the mean of theirs.

    `trainer.train_batch_size` remains the samples of one step over all ranks. Give either field.
    """

    steps: int | None = None
    """Micro-batches of one optimizer step."""
    micro_batch_size: int | None = None
    """Samples of one micro-batch on one rank: what fits into the memory of the device."""

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("steps", "micro_batch_size")}
        if sum(value is not None for value in given.values()) != 1:
            raise ValueError(
                f"accumulate.steps={self.steps} and accumulate.micro_batch_size={self.micro_batch_size}: give exactly "
                "one of them, the number of micro-batches or the size of one"
            )
        for name, value in given.items():
            if value is not None and value < 1:
                raise ValueError(f"accumulate.{name}={value} must be at least 1")

    @hookimpl
    def get_window_size(self, trainer: Trainer) -> int:
        if self.steps is not None:
            return self.steps
        assert self.micro_batch_size is not None
        total, size = trainer.options.train_batch_size, self.micro_batch_size
        ranks: int = trainer.shares
        if total % (ranks * size) == 0:
            return total // (ranks * size)
        shared = f"trainer.train_batch_size={total} over {ranks} rank(s)"
        if total % ranks:
            raise ValueError(
                f"accumulate.micro_batch_size={size}: {shared} leaves {total % ranks} sample(s) over; "
                "make the batch a multiple of the ranks"
            )
        share = total // ranks
        nearest = " or ".join(map(str, nearest_divisors(share, size)))
        raise ValueError(
            f"accumulate.micro_batch_size={size}: {shared} is {share} samples a rank, which micro-batches of {size} "
            f"leave {share % size} of; take a divisor of {share} (the nearest: {nearest}), or another train_batch_size"
        )
