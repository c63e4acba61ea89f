"""Have batch norm normalize by the batches of all ranks together: torch's SyncBatchNorm, and the same for CPUs."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hookline import CallbackInterface, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"


@dataclass(eq=False)
class SyncBatchnorm(CallbackInterface):
    """Replace every batch norm of the model by one whose statistics are those of all ranks' parts of a batch."""

    requires = ("distributed",)

    @hookimpl(wrapper=True)  # within activation checkpointing, which calls what is there
    def convert_model(self, trainer: Trainer) -> Generator[None, torch.nn.Module, torch.nn.Module]:
        model = yield
        if trainer.world_size == 1:
            return model
        if trainer.shares < trainer.world_size:
            raise ValueError(
                f"sync_batchnorm takes the statistics of all {trainer.world_size} ranks, and there are "
                f"{trainer.shares} shares of the data: samples that several ranks have (tp, context_parallel) would "
                "count several times. Leave it away"
            )
        if not trainer.on_cpu:
            return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-any-return,no-untyped-call]
        for module in model.modules():
            module.__class__ = OF_CPUS.get(type(module), type(module))
        return model


class Synced:
    """Normalizes as torch's SyncBatchNorm does, which has no kernel for CPUs, in operations that there are."""

    across_ranks = True  # as `distributed.uneven` asks: a batch that only fills up would count

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        """Normalize by the statistics of all ranks in training, in evaluation by the running ones."""
        if not self.training:
            return super().forward(input)  # type: ignore[misc,no-any-return]
        self._check_input_dim(input)
        wide = input if input.dtype is torch.float64 else input.float()
        dims, shape = [0, *range(2, input.ndim)], (-1, *[1] * (input.ndim - 2))
        values = wide.new_tensor([input.numel() // input.shape[1]])
        sums = _Sum.apply(torch.cat([wide.sum(dims), values]))  # type: ignore[no-untyped-call]
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = wide - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(dims)) / count  # type: ignore[no-untyped-call]
        if self.running_mean is not None:
            keep(self, mean.detach(), (variance * count / (count - 1)).detach())
        normal = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)  # type: ignore[no-any-return]


class Synced1d(Synced, torch.nn.BatchNorm1d):
    """A `BatchNorm1d` of all ranks."""


class Synced2d(Synced, torch.nn.BatchNorm2d):
    """A `BatchNorm2d` of all ranks."""


class Synced3d(Synced, torch.nn.BatchNorm3d):
    """A `BatchNorm3d` of all ranks."""


OF_CPUS: dict[type, type] = {base: made for made in (Synced1d, Synced2d, Synced3d) for base in made.__bases__[1:]}


def keep(norm: Any, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """Bring running statistics up to date."""
    norm.num_batches_tracked += 1
    part = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.mul_(1 - part).add_(mean, alpha=part)
    norm.running_var.mul_(1 - part).add_(variance, alpha=part)


class _Sum(torch.autograd.Function):
    """The sum over all ranks; the loss of each depends on what each has put in."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient
