"""The hooks that `distributed` brings: the mesh of ranks, what they hold alike, are given, average, and shadowing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hookline import event, verb
from hookline_distributed.alike import give

if TYPE_CHECKING:
    from hookline import Trainer

REST = "data"  # the dimension of the ranks that are left


@verb
def get_mesh_shape(trainer: Trainer) -> dict[str, int]:
    """Answer the sizes of the mesh's dimensions by name, the outermost first; -1 stands for the ranks that are left.

    Who lays ranks out in one more way wraps this and adds a dimension: before the others where it
    goes between machines, behind them where its ranks talk most: neighbours are on one machine.
    """
    return {REST: -1}


@verb
def get_mesh(trainer: Trainer) -> Any:
    """Answer the `DeviceMesh` of all ranks, made once; `mesh["data"]` is a part of it."""


@event
def on_make_groups(trainer: Trainer, groups: Sequence[Any]) -> None:
    """Run when a plugin has made process groups that this rank belongs to, once it has all of them.

    `distributed` has ranks wait in them for `distributed.timeout`, which torch does in the group of all ranks alone.
    """


@verb
def get_shard_meshes(trainer: Trainer) -> dict[str, Any]:
    """Answer by the names of modules the mesh over which each is shared or averaged, where it is not that of the rest.

    Asked by who shards or averages the model. Wrapped by who leaves ranks other parts of some modules, as of experts:
    those that have one part are the ranks of the answer.
    """
    return {}


@verb
def computes_together(trainer: Trainer) -> bool:
    """Answer whether a forward on one rank needs the same forward on others; asked before an evaluation.

    Ranks with fewer batches then take part in the forwards that others have more of. Wrapped by who has ranks exchange
    something in a forward.
    """
    return False


@event
def on_compute_apart(trainer: Trainer, apart: bool) -> None:
    """Run before an evaluation in which some rank has no batch or does not know how many; after each with False.

    Who exchanges something in a forward puts together on each rank all that it takes, and takes it apart again.
    """


@verb
def get_replicated(trainer: Trainer, buffers: bool) -> dict[str, torch.Tensor]:
    """Answer by name the tensors of which all ranks have to hold the same bits; asked before an evaluation and a save.

    `buffers` says whether those of the model may be among them: before an evaluation, where all ranks are given those
    of rank 0 first; while it trains they may be each rank's own. None are where nobody performs `shard_model`, since
    each rank then trains a model of its own. Wrapped by who leaves ranks something of their own.
    """
    if not trainer.plugins.performers("shard_model"):
        return {}
    module = trainer.module
    alike = buffers and trainer.hook.shares_buffers(trainer=trainer)
    return dict(module.named_parameters()) | (dict(module.named_buffers()) if alike else {})


@verb
def shares_buffers(trainer: Trainer) -> bool:
    """Answer whether the buffers of rank 0 (running statistics) are to be those of all ranks in an evaluation.

    Performed by who makes one model of those of the ranks, where each may be left its own.
    """
    return True


@verb
def broadcast(trainer: Trainer, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Give all ranks the values that tensors have on rank 0, in place; answer the tensors.

    All ranks come to it with the same ones in the same order; where ranks have different parts of the model, those of
    `get_peers` do, and get the values of their first. Those of which ranks have shares (DTensor) stay as they
    are, since who shared them has made them begin alike, and so do those without values (on the meta device).
    """
    give(tensors, trainer.device, trainer.hook.get_peers(trainer=trainer))
    return tensors


@verb
def average_gradients(trainer: Trainer, bucket: Any) -> Any:
    """Answer a future of the mean over all ranks of a bucket of gradients, as one flat tensor.

    Performed by who sends something else than the gradients (compressed ones), wrapped by who looks at them or changes
    them. `bucket` is a `torch.distributed.GradBucket`: `.buffer()` has the gradients of this rank, `.gradients()` and
    `.parameters()` the parts. Asked for by `ddp` while backward runs, in the same order on all ranks, and only where a
    plugin implements it.
    """
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    return default_hooks.allreduce_hook(None, bucket)  # type: ignore[arg-type]


@verb
def get_peers(trainer: Trainer) -> Any:
    """Answer the process group of the ranks that have the same part of the model as this one: all ranks.

    Performed by who gives ranks different parts of it, once they are given.
    """
    return dist.group.WORLD


@verb
def shadow(trainer: Trainer) -> contextlib.AbstractContextManager[None]:
    """Answer a context in which the training model takes part in what ranks do together, and computes nothing.

    Its forward answers a loss of zero that gives every parameter a gradient of zero. Performed by who makes one model
    of those of the ranks, where that can be done; asked for by `distributed.uneven=join`.
    """
    return contextlib.nullcontext()


def sizes_of(shape: Mapping[str, int], world_size: int) -> dict[str, int]:
    """Return the sizes of a mesh's dimensions, that of the ranks which are left worked out.

    Raises:
        ValueError: the others do not divide the ranks.
    """
    others = math.prod(size for size in shape.values() if size > 0)
    if world_size % others:
        said = " x ".join(f"{size} ({name})" for name, size in shape.items() if size > 0)
        raise ValueError(f"the mesh asks for a multiple of {said} ranks, and there are {world_size}")
    return {name: size if size > 0 else world_size // others for name, size in shape.items()}
