"""Train a model of which each rank has a share: parameters, gradients and optimizer states (FSDP2, `fully_shard`)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from hookline import CallbackInterface, Stage, find_blocks, hookimpl
from hookline_fsdp.meta import give_values, refuse_values

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

log = logging.getLogger("hookline.fsdp")


@dataclass(eq=False)
class Fsdp(CallbackInterface):
    """Keep a share of the model on each rank, and put a block together only while it is used.

    Each rank stores its share in a checkpoint, under the names of the whole; a run goes on with any number of ranks.
    """

    wrap: list[str] = field(default_factory=list)
    """Names of the classes whose modules are blocks, put together one at a time; the rest of the model is one more.
    Empty for those that the module's `get_blocks()` answers."""
    min_parameters: int = 0
    """Modules with fewer parameters than this are no blocks of their own."""
    reshard_after_forward: bool = True
    """Take a block apart again between its forward and its backward: less memory, one more gathering."""
    param_dtype: str | None = None
    """What forward and backward compute in: float32, bfloat16 or float16; null for the parameters' own."""
    reduce_dtype: str | None = None
    """What gradients are summed in; null for that of the parameters."""
    cpu_offload: bool = False
    """Keep the shares in the memory of the host; on a CPU they are there in any case."""
    broadcast_buffers: bool = True
    """Give all ranks the buffers of rank 0 (running statistics) before each forward of training, and after a step."""
    replicas: int = 1
    """How many copies of the sharded model there are; each is shared by so many fewer ranks."""
    meta: bool = False
    """Make the module without memory for its weights, and give it to one block at a time, with first values, just
    before ranks take their shares of it. The trainer is then given a function that makes the module."""

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
        self._has_buffers = False  # of which all ranks have those of rank 0
        if not self.meta:
            setattr(self, "adapt_module", None)  # noqa: B010 - an attribute hides the method from the plugin manager

    # The model ------------------------------------------------------------------------

    @hookimpl(wrapper=True, optionalhook=True)  # of distributed, which may be the later one to come
    def get_mesh_shape(self) -> Generator[None, dict[str, int], dict[str, int]]:
        shape = yield
        return {"replicate": self.replicas, **shape} if self.replicas > 1 else shape

    @hookimpl(wrapper=True, tryfirst=True)  # adapters make parameters as well
    def adapt_module(self) -> Generator[None, Any, Any]:
        with torch.device("meta"):
            module = yield
        if isinstance(module, torch.nn.Module):
            refuse_values(module)
        return module

    @hookimpl
    def shard_model(self, trainer: Trainer, model: torch.nn.Module) -> torch.nn.Module:
        seed = trainer.options.seed
        if not self.meta:
            model = model.to(trainer.device)
        elif trainer.world_size == 1:
            give_values(model, model, trainer.device, seed)
        if trainer.world_size == 1:
            return model
        begins = [*model.parameters(), *model.buffers()]  # modules that were built apart may begin apart
        trainer.hook.broadcast(trainer=trainer, tensors=begins)
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
            "offload_policy": CPUOffloadPolicy() if self.cpu_offload and not trainer.on_cpu else OffloadPolicy(),
        }
        apart = trainer.hook.get_shard_meshes(trainer=trainer)  # of modules whose ranks are others
        meshes = {model.get_submodule(name): mesh for name, mesh in apart.items()}
        blocks = [block for block in self._blocks(trainer, model) if block not in meshes]
        for block in (*meshes, *blocks, model):
            if self.meta:
                give_values(model, block, trainer.device, seed)
            mesh = meshes.get(block, self._mesh)
            along = functools.partial(second_dimension, mesh.size()) if block in meshes else None
            fully_shard(block, **(options | {"mesh": mesh, "shard_placement_fn": along}))
        if self.broadcast_buffers and any(True for _ in model.buffers()):
            model.register_forward_pre_hook(functools.partial(self._share_in_training, trainer))
            self._has_buffers = True
        if self.param_dtype is not None:
            compare_with_autocast(model, self.param_dtype, trainer.device.type)
        log.info("fsdp: %d blocks over %s ranks", len(blocks) + 1, "x".join(map(str, self._mesh.shape)))
        return model

    def _blocks(self, trainer: Trainer, model: torch.nn.Module) -> list[torch.nn.Module]:
        """Return the blocks, the innermost first.

        Raises:
            ValueError: a name of `wrap` is that of no module, or the module answers what is none of the model.
        """
        blocks = [block for block in find_blocks(trainer, model, "fsdp.wrap", self.wrap).values() if block is not model]
        return [block for block in reversed(blocks) if size_of(block) >= self.min_parameters]

    @hookimpl(optionalhook=True)  # of distributed
    def shares_buffers(self) -> bool:
        return self.broadcast_buffers

    # The step -------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def forward_backward(self, trainer: Trainer, index: int, size: int) -> Generator[None, Any, Any]:
        """Sum gradients over ranks once a window: before its last micro-batch they stay whole on each rank."""
        if self._mesh is not None and size > 1:
            root(trainer.model).set_requires_gradient_sync(index + 1 == size)
        return (yield)

    def _share_in_training(self, trainer: Trainer, model: torch.nn.Module, *_: Any) -> None:
        if trainer.stage is Stage.TRAIN:  # else ranks may have different numbers of batches
            trainer.hook.broadcast(trainer=trainer, tensors=list(model.buffers()))

    @hookimpl(tryfirst=True)
    def on_boundary(self, trainer: Trainer) -> None:
        if self._has_buffers:  # else those of other ranks would be of the state, and not what training goes on with
            trainer.hook.broadcast(trainer=trainer, tensors=list(trainer.model.buffers()))

    # Evaluation -----------------------------------------------------------------------

    @hookimpl(wrapper=True, optionalhook=True)  # of distributed
    def computes_together(self) -> Generator[None, bool, bool]:
        return (yield) or self._mesh is not None

    @hookimpl(optionalhook=True)  # of distributed
    def on_compute_apart(self, trainer: Trainer, apart: bool) -> None:
        """Put the whole model together on each rank, or take it apart."""
        for block in trainer.model.modules():
            if self._mesh is not None and isinstance(block, FSDPModule):
                if apart:
                    block.unshard()
                else:
                    block.reshard()
                block.set_reshard_after_forward(self.reshard_after_forward and not apart, recurse=False)

    # Export ---------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def export_model(self) -> Generator[None, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        state = yield
        return whole(state)  # type: ignore[no-any-return]


def second_dimension(ranks: int, weight: torch.Tensor) -> Shard | None:
    """Return in what to share a part of a weight that has fewer rows here than ranks; None for its rows, as ever."""
    here = weight.to_local() if isinstance(weight, DTensor) else weight
    return Shard(1) if here.ndim > 1 and len(here) < ranks and here.shape[1] % ranks == 0 else None


def size_of(module: torch.nn.Module) -> int:
    """Return how many numbers the parameters of a module have."""
    return sum(parameter.numel() for parameter in module.parameters())


def compare_with_autocast(model: torch.nn.Module, param_dtype: str, device_type: str) -> None:
    """Have the first step refuse an autocast of another precision than the parameters are cast to.

    Raises:
        ValueError: in that step.
    """

    def compare(*_: Any) -> None:
        handle.remove()
        if torch.is_autocast_enabled(device_type):
            dtype = str(torch.get_autocast_dtype(device_type)).removeprefix("torch.")
            if dtype != param_dtype:
                raise ValueError(
                    f"fsdp.param_dtype={param_dtype}, and steps run under autocast of {dtype}, which would cast once "
                    "more: leave fsdp.param_dtype away, or turn off the plugin of mixed precision (amp)"
                )

    handle = model.register_forward_pre_hook(compare)


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
