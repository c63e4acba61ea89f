"""Train a model of which each rank has a share: parameters, gradients and optimizer states (FSDP2, `fully_shard`)."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from hookline import CallbackInterface, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

log = logging.getLogger("hookline")


@dataclass(eq=False)
class Fsdp(CallbackInterface):
    """Keep a share of the model on each rank, and put a block together only while it is used.

    Checkpoints hold the whole tensors under their names, so they are as portable as those of one rank, and a run
    goes on with any number of ranks.
    """

    wrap: list[str] = field(default_factory=list)
    """Names of the classes whose modules are blocks, put together one at a time; the rest of the model is one more."""
    min_parameters: int = 0
    """Modules of `wrap` with fewer parameters than this are no blocks of their own."""
    reshard_after_forward: bool = True
    """Take a block apart again between its forward and its backward: less memory, one more gathering."""
    param_dtype: str | None = None
    """What forward and backward compute in: float32, bfloat16 or float16; null for the parameters' own."""
    reduce_dtype: str | None = None
    """What gradients are summed in; null for that of the parameters."""
    cpu_offload: bool = False
    """Keep the shares in the memory of the host."""
    replicas: int = 1
    """How many copies of the sharded model there are; each is shared by so many fewer ranks."""

    requires = ("distributed",)

    def __post_init__(self) -> None:
        for option in ("param_dtype", "reduce_dtype"):
            name = getattr(self, option)
            if name is not None and name not in DTYPES:
                raise ValueError(f"fsdp.{option}={name!r} must be one of {', '.join(DTYPES)}, or null")
        if self.replicas < 1 or self.min_parameters < 0:
            raise ValueError(
                f"fsdp.replicas={self.replicas} must be at least 1, and fsdp.min_parameters={self.min_parameters} at "
                "least 0"
            )
        self._mesh: Any = None

    # The model ------------------------------------------------------------------------

    @hookimpl(wrapper=True, optionalhook=True)  # of distributed, which may be the later one to come
    def get_mesh_shape(self) -> Generator[None, dict[str, int], dict[str, int]]:
        shape = yield
        return {"replicate": self.replicas, **shape} if self.replicas > 1 else shape

    @hookimpl
    def shard_model(self, trainer: Trainer, model: torch.nn.Module) -> torch.nn.Module:
        model = model.to(trainer.device)
        if trainer.world_size == 1:
            log.warning(
                "fsdp: this is one process, so there is nobody to share the model with. `hookline fit run.yaml "
                "--nproc 2` starts two on this machine"
            )
            return model
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)  # as ddp does; modules that were built apart may begin apart
        if trainer.shares % self.replicas:
            raise ValueError(f"fsdp.replicas={self.replicas} does not divide the {trainer.shares} ranks")
        mesh = trainer.hook.get_mesh(trainer=trainer)
        self._mesh = mesh["replicate", "data"] if self.replicas > 1 else mesh["data"]
        options: dict[str, Any] = {
            "mesh": self._mesh,
            "reshard_after_forward": self.reshard_after_forward,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=DTYPES.get(self.param_dtype or ""), reduce_dtype=DTYPES.get(self.reduce_dtype or "")
            ),
            "offload_policy": CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy(),
        }
        blocks = self._blocks(model)
        for block in blocks:
            fully_shard(block, **options)
        fully_shard(model, **options)
        log.info("fsdp: %d blocks over %s ranks", len(blocks) + 1, "x".join(map(str, self._mesh.shape)))
        return model

    def _blocks(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        """Return the blocks, the innermost first.

        Raises:
            ValueError: a name of `wrap` is that of no module.
        """
        found = {type(module).__name__ for module in model.modules()}
        unknown = sorted({*self.wrap} - found)
        if unknown:
            raise ValueError(
                f"fsdp.wrap names {', '.join(unknown)}, and the model has none; it has {', '.join(sorted(found))}"
            )
        named = [module for module in model.modules() if type(module).__name__ in self.wrap and module is not model]
        return [module for module in reversed(named) if size_of(module) >= self.min_parameters]

    # The step -------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def forward_backward(self, trainer: Trainer, index: int, size: int) -> Generator[None, Any, Any]:
        """Sum gradients over ranks once a window: before its last micro-batch they stay whole on each rank."""
        if self._mesh is not None and size > 1:
            root(trainer.model).set_requires_gradient_sync(index + 1 == size)
        return (yield)

    @hookimpl(wrapper=True, trylast=True)  # who swaps other weights in does that in the shares
    def evaluate(self, trainer: Trainer) -> Generator[None, Any, Any]:
        """Put the model together before an evaluation, so that ranks may have different numbers of batches in it."""
        blocks = [module for module in trainer.model.modules() if isinstance(module, FSDPModule)]
        for block in blocks:
            block.unshard()
            block.set_reshard_after_forward(False, recurse=False)
        try:
            return (yield)
        finally:
            for block in blocks:
                block.set_reshard_after_forward(self.reshard_after_forward, recurse=False)
                block.reshard()

    # State ----------------------------------------------------------------------------

    @hookimpl(wrapper=True, tryfirst=True)
    def get_run_state(self) -> Generator[None, dict[str, Any], dict[str, Any]]:
        state = yield
        return whole(state)  # type: ignore[no-any-return]

    @hookimpl(wrapper=True)
    def set_run_state(self, trainer: Trainer, state: dict[str, Any]) -> Generator[None, bool, bool]:
        """Give each rank its share of what was stored whole."""
        if self._mesh is not None:
            weights = dict(trainer.module.state_dict())
            state["module"] = {name: share(value, weights.get(name)) for name, value in state["module"].items()}
            for optimizer in state["optimizers"]:
                optimizer["state"] = {
                    name: {key: share(value, weights.get(name)) for key, value in kept.items()}
                    for name, kept in optimizer["state"].items()
                }
        return (yield)

    @hookimpl(wrapper=True)
    def export_model(self) -> Generator[None, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        state = yield
        return whole(state)  # type: ignore[no-any-return]


def size_of(module: torch.nn.Module) -> int:
    """Return how many numbers the parameters of a module have."""
    return sum(parameter.numel() for parameter in module.parameters())


def root(model: torch.nn.Module) -> FSDPModule:
    """Return a sharded model as what it is."""
    assert isinstance(model, FSDPModule)
    return model


def whole(value: Any) -> Any:
    """Return a state with every tensor of which ranks have shares put together, on all of them and on the host."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, Mapping):
        return {key: whole(kept) for key, kept in value.items()}
    if type(value) in (list, tuple):
        return type(value)([whole(kept) for kept in value])
    return value


def share(value: Any, like: Any) -> Any:
    """Return this rank's share of a whole tensor, where it belongs to a parameter of that shape that is shared."""
    if isinstance(value, torch.Tensor) and isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value
