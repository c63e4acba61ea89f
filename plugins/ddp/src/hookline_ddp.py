"""Train one model on all ranks: each has the whole of it, and gradients are averaged (DistributedDataParallel)."""

from __future__ import annotations

import contextlib
import itertools
import logging
import operator
from collections.abc import Generator, Mapping, Sequence
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

TRAINED = operator.attrgetter("requires_grad")
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
        self._model: torch.nn.Module | None = None  # that of all ranks; None with one process
        self._weights: list[torch.nn.Parameter] = []
        self._trained: list[bool] = []  # which of them are trained, as gradients are averaged now
        self._apart: list[tuple[Any, torch.nn.Parameter]] = []  # what is averaged over other ranks, with their mesh
        self._known: dict[int, torch.Tensor] = {}  # by id, all that rank 0 has given to the others
        self._first = False  # whether a static graph has not been seen yet
        if self.compression == "none":
            self.average_gradients = None  # type: ignore[assignment,method-assign]  # hides it: torch averages
        if self.find_unused_parameters:
            self.shadow = None  # type: ignore[assignment,method-assign]  # it uses all of them

    # The model ------------------------------------------------------------------------

    @hookimpl
    def shard_model(self, trainer: Trainer, model: torch.nn.Module) -> torch.nn.Module:
        model = model.to(trainer.device)
        if trainer.world_size == 1:
            return model
        apart = {
            f"{module}.{name}": (mesh, weight)
            for module, mesh in trainer.hook.get_shard_meshes(trainer=trainer).items()
            for name, weight in model.get_submodule(module).named_parameters()
        }
        split = [name for name, weight in model.named_parameters() if isinstance(weight, DTensor) and name not in apart]
        if split:
            raise ValueError(
                f"ddp cannot average a model whose layers are split over ranks, as {split[0]} is; take fsdp instead"
            )
        if apart:
            leave_out: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
            leave_out(model, [*apart])
        self._apart = [*apart.values()]
        if self.compression == "bf16" and trainer.device.type == "cpu":
            raise ValueError("ddp.compression=bf16 needs CUDA: gloo, which joins ranks on CPUs, has none; take fp16")
        self._model, self._wrapped, self._weights, self._known = model, None, [], {}
        self._take_stock(trainer)
        return model if self._wrapped is None else self._wrapped

    @hookimpl(trylast=True)  # behind those who freeze layers, or add some
    def on_begin_train(self, trainer: Trainer) -> None:
        self._look_again(trainer)

    @hookimpl(trylast=True)
    def on_begin_train_epoch(self, trainer: Trainer) -> None:  # type: ignore[override]
        self._look_again(trainer)

    def _look_again(self, trainer: Trainer) -> None:
        """Average the gradients of what is trained now, which may be other weights than before."""
        before = self._wrapped
        if self._model is None or not self._take_stock(trainer):
            return
        log.info("ddp: %d of %d weights are trained now, and averaged", sum(self._trained), len(self._trained))
        if self._wrapped is not before:
            trainer.built.use_model(self._model if self._wrapped is None else self._wrapped)

    def _take_stock(self, trainer: Trainer) -> bool:
        """Give new weights and buffers of rank 0 to all ranks, and wrap what is trained; answer whether it is other.

        Raises:
            ValueError: ranks train other weights, or have them in another order.
        """
        assert self._model is not None
        named = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        rows = [(name, tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad) for name, tensor in named.items()]
        group = trainer.hook.get_mesh(trainer=trainer)["data"].get_group()
        gathered = trainer.hook.all_gather(trainer=trainer, value=rows)
        refuse_others({rank: gathered[rank] for rank in dist.get_process_group_ranks(group)})
        new = [tensor for tensor in named.values() if id(tensor) not in self._known]
        trainer.hook.broadcast(trainer=trainer, tensors=new)
        self._known = {id(tensor): tensor for tensor in named.values()}
        weights = list(self._model.parameters())
        trained = list(map(TRAINED, weights))
        if list(map(id, weights)) == list(map(id, self._weights)) and trained == self._trained:
            return False
        self._weights, self._trained = weights, trained
        apart = {id(weight) for _, weight in self._apart}
        if not any(weight.requires_grad and id(weight) not in apart for weight in weights):
            self._wrapped = None  # nothing to average; torch would refuse it
            return True
        if self._wrapped is None:
            self._wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
        DistributedDataParallel.__init__(  # in place, so that who holds `trainer.model` holds what averages
            self._wrapped,
            self._model,
            process_group=group,
            device_ids=[trainer.device] if trainer.device.type == "cuda" else None,
            init_sync=False,  # done above, for what is new
            find_unused_parameters=self.find_unused_parameters,
            static_graph=self.static_graph,
            bucket_cap_mb=self.bucket_cap_mb,
            gradient_as_bucket_view=True,
        )
        self._wrapped.broadcast_buffers = self.broadcast_buffers  # all begin with those of rank 0 in any case
        if trainer.plugins.heard["average_gradients"]:
            ask = trainer.hook.average_gradients
            self._wrapped.register_comm_hook(trainer, lambda trainer, bucket: ask(trainer=trainer, bucket=bucket))
        self._powersgd = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=10)
        self._first = self.static_graph
        return True

    @hookimpl(optionalhook=True)  # of distributed
    def average_gradients(self, bucket: Any) -> Any:
        if self.compression == "powersgd":
            return powerSGD_hook.powerSGD_hook(self._powersgd, bucket)
        return getattr(default_hooks, f"{self.compression}_compress_hook")(None, bucket)

    # The step -------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def forward_backward(self, trainer: Trainer, index: int, size: int) -> Generator[None, Any, Any]:
        if list(map(TRAINED, self._weights)) != self._trained:  # by now frozen or unfrozen; 0.1 us a weight
            self._look_again(trainer)
        keep_to_itself = self._wrapped is not None and index + 1 < size and not self._first
        self._first = False  # of a static graph, which torch has to see whole before it is left unaveraged
        if keep_to_itself:
            with self._wrapped.no_sync():  # type: ignore[union-attr]
                return (yield)
        outputs = yield
        if self._apart and index + 1 == size:
            self._average_apart()
        return outputs

    def _average_apart(self) -> None:
        """Average the gradients of what some ranks alone have, on these."""
        for mesh, weight in self._apart:
            if weight.grad is not None and mesh.size() > 1:
                gradient: Any = weight.grad.to_local()  # type: ignore[attr-defined]
                dist.all_reduce(gradient, group=mesh.get_group())
                gradient /= mesh.size()

    @hookimpl(optionalhook=True)  # of distributed
    @contextlib.contextmanager
    def shadow(self, trainer: Trainer) -> Generator[None, None, None]:
        """Let the model stand still, while buckets of gradients and buffers go around as ever."""
        if list(map(TRAINED, self._weights)) != self._trained:
            self._look_again(trainer)
        if self._wrapped is None:
            yield
            return
        model = self._wrapped.module
        self._wrapped.module = Still(model)
        try:
            yield
        finally:
            self._wrapped.module = model

    # Evaluation -----------------------------------------------------------------------

    @hookimpl(optionalhook=True)  # of distributed
    def shares_buffers(self) -> bool:
        return self.broadcast_buffers

    @hookimpl(wrapper=True, trylast=True)  # innermost: who swaps other weights in has done it
    def evaluate(self, trainer: Trainer) -> Generator[None, Any, Any]:
        if self._model is None:
            return (yield)
        trained = trainer.model
        trainer.built.use_model(self._model)
        try:
            return (yield)
        finally:
            trainer.built.use_model(trained)

    @hookimpl
    def on_exception(self, exception: BaseException) -> None:
        if "find_unused_parameters" in str(exception):
            exception.add_note(
                "with hookline this is `ddp.find_unused_parameters: true`; better where it can be done is to have no "
                "parameter that the loss does not depend on, or to set its requires_grad to False"
            )


def refuse_others(ranks: Mapping[int, Sequence[tuple[Any, ...]]]) -> None:
    """Refuse ranks that would average other weights together: averaging goes by order.

    Raises:
        ValueError: the first that is different, and on which rank.
    """
    lowest = min(ranks)
    for rank, rows in ranks.items():
        for place, (own, first) in enumerate(itertools.zip_longest(rows, ranks[lowest])):
            if own != first:
                raise ValueError(
                    f"ddp averages weights in their order, and number {place} is {in_words(own)} on rank {rank} and "
                    f"{in_words(first)} on rank {lowest}: add, freeze and unfreeze the same on all ranks at the same "
                    "step"
                )


def in_words(row: tuple[Any, ...] | None) -> str:
    """Return what a weight or a buffer is."""
    if row is None:
        return "missing"
    name, shape, dtype, trained = row
    return f"{name} ({dtype.removeprefix('torch.')}{list(shape)}, {'trained' if trained else 'not trained'})"


class Still(torch.nn.Module):
    """Stands in for a model: answers a loss of zero that depends on every parameter, and looks at no batch."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]

    def forward(self, **arguments: Any) -> torch.Tensor:
        """Return the sum of no number of each parameter."""
        return torch.stack([weight.flatten()[:0].sum() for weight in self.weights]).sum()
