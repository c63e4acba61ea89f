"""Train one model on all ranks: each has the whole of it, and gradients are averaged (DistributedDataParallel)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hookline import CallbackInterface, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

COMPRESSIONS = ("none", "fp16", "bf16", "powersgd")

log = logging.getLogger("hookline.ddp")


@dataclass(eq=False)
class Ddp(CallbackInterface):
    """Keep the whole model on each rank, and average the gradients of all, while backward still runs.

    Within a window of several micro-batches they are averaged once, in the last one. Evaluation calls the model
    itself, so that ranks may have different numbers of batches.
    """

    find_unused_parameters: bool = False
    """Look after each forward for parameters that the loss does not depend on; slower, so only where there are some."""
    static_graph: bool = False
    """Promise that each step uses the same parameters in the same order."""
    broadcast_buffers: bool = True
    """Give all ranks the buffers of rank 0 (running statistics) before each forward of training."""
    bucket_cap_mb: int = 25
    """Megabytes of gradients that are averaged at a time."""
    compression: str = "none"
    """What gradients are averaged in: "none", "fp16", "bf16" or "powersgd"."""

    requires = ("distributed",)

    def __post_init__(self) -> None:
        if self.compression not in COMPRESSIONS:
            raise ValueError(f"ddp.compression={self.compression!r} must be one of {', '.join(COMPRESSIONS)}")
        if self.bucket_cap_mb < 1:
            raise ValueError(f"ddp.bucket_cap_mb={self.bucket_cap_mb} must be at least 1 megabyte")
        self._wrapped: DistributedDataParallel | None = None
        if self.find_unused_parameters:
            self.shadow = None  # type: ignore[assignment,method-assign]  # it uses all of them

    @hookimpl
    def shard_model(self, trainer: Trainer, model: torch.nn.Module) -> torch.nn.Module:
        model = model.to(trainer.device)
        if trainer.world_size == 1:
            log.warning(
                "ddp: this is one process, so there is nobody to average with. `hookline fit run.yaml --nproc 2` "
                "starts two on this machine, `torchrun --nproc-per-node 2 -m hookline fit run.yaml` does as well"
            )
            return model
        split = [name for name, weight in model.named_parameters() if isinstance(weight, DTensor)]
        if split:
            raise ValueError(
                f"ddp cannot average a model whose layers are split over ranks, as {split[0]} is; take fsdp instead"
            )
        if not any(weight.requires_grad for weight in model.parameters()):
            return model  # nothing to average; torch would refuse it
        if self.compression == "bf16" and trainer.device.type == "cpu":
            raise ValueError("ddp.compression=bf16 needs CUDA: gloo, which joins ranks on CPUs, has none; take fp16")
        self._wrapped = DistributedDataParallel(
            model,
            device_ids=[trainer.device] if trainer.device.type == "cuda" else None,
            find_unused_parameters=self.find_unused_parameters,
            static_graph=self.static_graph,
            bucket_cap_mb=self.bucket_cap_mb,
            gradient_as_bucket_view=True,
        )
        self._wrapped.broadcast_buffers = self.broadcast_buffers  # all begin with those of rank 0 in any case
        self._compress(self._wrapped)
        return self._wrapped

    def _compress(self, wrapped: DistributedDataParallel) -> None:
        if self.compression == "powersgd":
            state = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=10)
            wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        elif self.compression != "none":
            hook = getattr(default_hooks, f"{self.compression}_compress_hook")
            wrapped.register_comm_hook(None, hook)

    @hookimpl(wrapper=True)
    def forward_backward(self, index: int, size: int) -> Generator[None, Any, Any]:
        keep_to_itself = self._wrapped is not None and index + 1 < size
        with self._wrapped.no_sync() if keep_to_itself else contextlib.nullcontext():  # type: ignore[union-attr]
            return (yield)

    @hookimpl(optionalhook=True)  # of distributed
    @contextlib.contextmanager
    def shadow(self) -> Generator[None, None, None]:
        """Let the model stand still, while buckets of gradients and buffers go around as ever."""
        if self._wrapped is None:
            yield
            return
        model = self._wrapped.module
        self._wrapped.module = Still(model)
        try:
            yield
        finally:
            self._wrapped.module = model

    @hookimpl(wrapper=True)
    def evaluate(self, trainer: Trainer) -> Generator[None, Any, Any]:
        if self._wrapped is None:
            return (yield)
        if self.broadcast_buffers:  # since the last forward each rank has its own
            for buffer in self._wrapped.buffers():
                dist.broadcast(buffer, src=0)
        trainer.model = self._wrapped.module
        try:
            return (yield)
        finally:
            trainer.model = self._wrapped

    @hookimpl
    def on_exception(self, exception: BaseException) -> None:
        if "find_unused_parameters" in str(exception):
            exception.add_note(
                "with hookline this is `ddp.find_unused_parameters: true`; better where it can be done is to have no "
                "parameter that the loss does not depend on, or to set its requires_grad to False"
            )


class Still(torch.nn.Module):
    """Stands in for a model: answers a loss of zero that depends on every parameter, and looks at no batch."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]

    def forward(self, **arguments: Any) -> torch.Tensor:
        """Return the sum of no number of each parameter."""
        return torch.stack([weight.flatten()[:0].sum() for weight in self.weights]).sum()
