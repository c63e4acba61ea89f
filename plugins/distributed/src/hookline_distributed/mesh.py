"""The hooks that `distributed` brings: the mesh of ranks, to whose dimensions plugins give names, and shadowing."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

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
def shadow(trainer: Trainer) -> contextlib.AbstractContextManager[None]:
    """Answer a context in which the training model takes part in what ranks do together, and computes nothing.

    Its forward answers a loss of zero that gives every parameter a gradient of zero. Performed by who makes one model
    of those of the ranks, where that can be done; asked for by `distributed.uneven=join`.
    """
    return contextlib.nullcontext()
