"""Schedules with a warm-up, each the factor of the learning rate by the steps that were done."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR


def _schedule(
    optimizer: torch.optim.Optimizer, warmup: int, factor: Callable[[int], float], last_epoch: int = -1
) -> LambdaLR:
    """Return a schedule that rises evenly to 1 over the steps of the warm-up, and goes on with a factor."""
    return LambdaLR(optimizer, lambda step: step / warmup if step < warmup else factor(step), last_epoch)


def _part(step: int, first: int, last: int) -> float:
    """Return how far a step is between two others; 1 behind them."""
    return min(1.0, (step - first) / max(1, last - first))


def constant(optimizer: torch.optim.Optimizer, last_epoch: int = -1) -> LambdaLR:
    """Leave the learning rate as it is."""
    return _schedule(optimizer, 0, lambda step: 1.0, last_epoch)


def constant_with_warmup(optimizer: torch.optim.Optimizer, num_warmup_steps: int, last_epoch: int = -1) -> LambdaLR:
    """Rise, and stay."""
    return _schedule(optimizer, num_warmup_steps, lambda step: 1.0, last_epoch)


def linear_with_warmup(
    optimizer: torch.optim.Optimizer, num_warmup_steps: int, num_training_steps: int, last_epoch: int = -1
) -> LambdaLR:
    """Rise, and fall evenly to 0."""
    return _schedule(
        optimizer, num_warmup_steps, lambda step: 1 - _part(step, num_warmup_steps, num_training_steps), last_epoch
    )


def cosine_with_warmup(
    optimizer: torch.optim.Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
) -> LambdaLR:
    """Rise, and follow so many waves of a cosine: half a one falls to 0."""

    def factor(step: int) -> float:
        part = (step - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps)
        return max(0.0, (1 + math.cos(2 * math.pi * num_cycles * part)) / 2)

    return _schedule(optimizer, num_warmup_steps, factor, last_epoch)


def cosine_with_hard_restarts_with_warmup(
    optimizer: torch.optim.Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: int = 1,
    last_epoch: int = -1,
) -> LambdaLR:
    """Rise, and fall to 0 like half a cosine so many times, from 1 each time."""

    def factor(step: int) -> float:
        part = _part(step, num_warmup_steps, num_training_steps)
        return 0.0 if part == 1 else (1 + math.cos(math.pi * (num_cycles * part % 1))) / 2

    return _schedule(optimizer, num_warmup_steps, factor, last_epoch)


def inverse_sqrt(
    optimizer: torch.optim.Optimizer, num_warmup_steps: int, timescale: int | None = None, last_epoch: int = -1
) -> LambdaLR:
    """Rise, and fall with the root of the steps; `timescale` is the step at which it would begin at 1."""
    scale = timescale or num_warmup_steps or 10_000
    return _schedule(
        optimizer, num_warmup_steps, lambda step: math.sqrt(scale / (step + scale - num_warmup_steps)), last_epoch
    )


def polynomial_decay_with_warmup(
    optimizer: torch.optim.Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    lr_end: float = 1e-7,
    power: float = 1.0,
    last_epoch: int = -1,
) -> LambdaLR:
    """Rise, and fall to `lr_end` with a power of what is left.

    Raises:
        ValueError: it would rise to it.
    """
    lr = optimizer.defaults["lr"]
    if not lr_end < lr:
        raise ValueError(f"lr_end={lr_end} must be below the learning rate, {lr}")

    def factor(step: int) -> float:
        left = 1 - _part(step, num_warmup_steps, num_training_steps)
        return float(((lr - lr_end) * left**power + lr_end) / lr)

    return _schedule(optimizer, num_warmup_steps, factor, last_epoch)


BY_NAME: dict[str, Callable[..., LambdaLR]] = {
    "CosineWithWarmup": cosine_with_warmup,
    "Constant": constant,
    "ConstantWithWarmup": constant_with_warmup,
    "CosineWithHardRestartsWithWarmup": cosine_with_hard_restarts_with_warmup,
    "InverseSQRT": inverse_sqrt,
    "LinearWithWarmup": linear_with_warmup,
    "PolynomialDecayWithWarmup": polynomial_decay_with_warmup,
}
