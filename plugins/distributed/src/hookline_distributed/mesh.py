"""The hooks that `distributed` brings: the mesh of ranks, what they hold alike, and shadowing."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from hookline import verb

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


@verb
def get_replicated(trainer: Trainer, buffers: bool) -> dict[str, torch.Tensor]:
    """Answer by name the tensors of which all ranks have to hold the same bits; asked before an evaluation and a save.

    `buffers` says whether those of the model are among them: before an evaluation; while it trains they may be each
    rank's own. None are where nobody performs `shard_model`, since each rank then trains a model of its own. Wrapped
    by who leaves ranks something of their own.
    """
    if not trainer.plugins.performers("shard_model"):
        return {}
    module = trainer.module
    return dict(module.named_parameters()) | (dict(module.named_buffers()) if buffers else {})


@verb
def shadow(trainer: Trainer) -> contextlib.AbstractContextManager[None]:
    """Answer a context in which the training model takes part in what ranks do together, and computes nothing.

    Its forward answers a loss of zero that gives every parameter a gradient of zero. Performed by who makes one model
    of those of the ranks, where that can be done; asked for by `distributed.uneven=join`.
    """
    return contextlib.nullcontext()
