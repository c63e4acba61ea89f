"""Share long sequences: each rank has a part of every sequence, and attention goes around over all of them.

`parts` cuts sequences and puts together what ranks know of them, `attention` has torch's ring compute what parts see of
each other, `check` compares a step in parts with a whole one, and the plugin, here, does all three in a run.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hookline import CallbackInterface, Stage, hookimpl, hookspecs
from hookline_context_parallel.attention import around, instead, settings
from hookline_context_parallel.check import compare, refuse_ignored
from hookline_context_parallel.parts import Parts, named_in, reduced, tensors_of, with_tensors

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

DATA = "data"  # the dimension of the mesh in which the ranks of a sequence are neighbours
ROTATIONS = ("allgather", "alltoall")


@dataclass(eq=False)
class ContextParallel(CallbackInterface):
    """Share every sequence of a batch over ranks: the part that each has goes through the model, attention sees all."""

    size: int = 0
    """How many ranks share a sequence, neighbours; 0 for all."""
    batch: dict[str, int] = field(default_factory=dict)
    """The tensors of a batch that have the sequence, by key or place, each with the dimension in which they have it."""
    buffers: dict[str, int] = field(default_factory=dict)
    """Buffers of the module with a row for each position (of a rotary or learned embedding), likewise."""
    balance: bool = True
    """Give each rank a piece from the head and one from the tail of a sequence, which are as much work for all under
    causal attention; false for attention that is not causal."""
    rotate: str = "allgather"
    """How keys and values come to all ranks: "allgather" at once, "alltoall" one part after the other."""
    verify: bool = True
    """Compare what a few positions come to with what one rank computes of them, before a session's first step."""

    requires = ("distributed",)

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"context_parallel.size={self.size} must be a number of ranks, or 0 for all")
        if self.rotate not in ROTATIONS:
            raise ValueError(f"context_parallel.rotate={self.rotate!r} must be one of {', '.join(ROTATIONS)}")
        self._size = 1
        self._parts: Parts | None = None
        self._at = At(1, 0, 0)  # of the batch under way
        self._weight = torch.tensor(1.0)  # of this rank's part of it
        self._verified = not self.verify

    # Ranks ----------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def get_share(self, trainer: Trainer) -> Generator[None, tuple[int, int], tuple[int, int]]:
        """Have the ranks of a sequence take the same share of the data."""
        share, shares = yield
        self._size = 1 if trainer.world_size == 1 else self.size or shares
        if shares % self._size:
            raise ValueError(f"context_parallel.size={self.size} does not divide the {shares} ranks that it may share")
        return share // self._size, shares // self._size

    @hookimpl(wrapper=True)
    def run(self) -> Generator[None, bool, bool]:
        self._verified = not self.verify
        with settings(self.rotate, self.balance) if self._size > 1 else contextlib.nullcontext():
            return (yield)

    @hookimpl(wrapper=True)
    def shard_model(self, trainer: Trainer) -> Generator[None, torch.nn.Module, torch.nn.Module]:
        if self._size > 1:
            if not trainer.plugins.performers("shard_model"):
                raise ValueError(
                    "context_parallel gives each rank the gradients of its part of the sequences, and no plugin makes "
                    "one model of those of the ranks: add ddp, or fsdp"
                )
            self._parts = Parts(self._mesh(trainer), self.balance)
            for name in self.buffers:
                buffer_of(trainer.module, name)
        return (yield)

    def _mesh(self, trainer: Trainer) -> Any:
        """Return the ranks that have the parts of this rank's sequences."""
        mesh = trainer.hook.get_mesh(trainer=trainer)
        names, ranks = list(mesh.mesh_dim_names), mesh.mesh
        place = names.index(DATA)
        names[place : place + 1] = [DATA, "context"]
        ranks = ranks.unflatten(place, (-1, self._size))
        mesh = DeviceMesh(mesh.device_type, ranks, mesh_dim_names=tuple(names))
        trainer.hook.on_make_groups(trainer=trainer, groups=mesh.get_all_groups())
        return mesh["context"]

    # The step -------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def prepare_batch(self, trainer: Trainer, batch: Any, stage: Stage) -> Generator[None, Any, Any]:
        """Look at what would be wrong in silence: at labels before they go to their device, and once at the model."""
        if self._parts is not None and not trainer.plugins.heard["get_weight"]:
            refuse_ignored({name: tensor for name, tensor in tensors_of(batch) if name in self.batch})
        batch = yield
        if self._parts is not None and not self._verified and stage is Stage.TRAIN:
            self._verified = True
            compare(trainer, self._parts, batch, self.batch, functools.partial(self._of_parts, stage=stage))
        return batch

    @hookimpl
    def call_model(self, trainer: Trainer, batch: Any, stage: Stage) -> Any:
        if self._parts is None:
            return hookspecs.call_model(trainer=trainer, batch=batch, stage=stage)
        return self._of_parts(trainer, self._parts, batch, stage)

    def _of_parts(self, trainer: Trainer, parts: Parts, batch: Any, stage: Stage) -> Any:
        """Return what a step returns for a batch, of which this rank computes its part."""
        named = named_in(batch, self.batch, parts.pieces)
        part = with_tensors(batch, {name: parts.cut(tensor, self.batch[name]) for name, tensor in named.items()})
        first = next(iter(named))
        self._at = At.of(named[first], self.batch[first], parts.mesh.size())
        weighed = trainer.plugins.heard["get_weight"]
        given = trainer.hook.get_weight(trainer=trainer, batch=part, stage=stage) if weighed else 1.0
        self._weight = torch.as_tensor(given)
        with self._active(trainer, parts), trainer.logs.apart() as logged:
            outputs = hookspecs.call_model(trainer=trainer, batch=part, stage=stage)
        for told in reduced(logged, parts, self._weight):
            trainer.log(**told)
        if stage is Stage.PREDICT:
            return self._together(outputs)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
        word, plugins = stage.value, trainer.plugins
        asked = plugins.heard[f"on_end_{word}_step"] or plugins.rooms.get(f"on_end_{word}_epoch", 0) > 1
        if stage is Stage.TRAIN or not asked:
            return (*map(self._together, outputs[:1]), *outputs[1:])
        return tuple(map(self._together, outputs))

    @hookimpl(wrapper=True)
    def forward_backward(self, trainer: Trainer) -> Generator[None, Any, Any]:
        """Put outputs of training together for those who take some, when nothing asks for their graph any more."""
        outputs = yield
        asked = self._parts is not None and trainer.plugins.collecting
        return (outputs[0], *map(self._together, outputs[1:])) if asked else outputs

    @hookimpl(wrapper=True)
    def run_backward(self, trainer: Trainer) -> Generator[None, bool, bool]:
        """Compute in parts what is computed once more in backward (activation checkpointing)."""
        with contextlib.nullcontext() if self._parts is None else self._active(trainer, self._parts):
            return (yield)

    @contextlib.contextmanager
    def _active(self, trainer: Trainer, parts: Parts) -> Iterator[None]:
        """Have the model take its inputs for a part of the sequence: in attention, and of what it knows of places."""
        length = self._at.length * parts.mesh.size()
        ring = functools.partial(around, parts.mesh, self._at.length, self.balance)
        with instead(ring), contextlib.ExitStack() as stack:
            for name, dim in self.buffers.items():
                stack.enter_context(cut_in_forward(trainer.module, name, dim, length, parts))
            yield

    def _together(self, value: Any) -> Any:
        """Return outputs of a part of the sequence as they are of the whole.

        Raises:
            ValueError: one that has no position of the sequence, nor is a mean over it.
        """
        assert self._parts is not None
        at, parts = self._at, self._parts
        if isinstance(value, Mapping):
            return {key: self._together(kept) for key, kept in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self._together, value))
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if isinstance(value, torch.Tensor):
            if value.numel() == 1 and value.is_floating_point():
                return parts.mean(value, self._weight)
            rows = len(value) if at.dim and value.ndim else at.rows
            if value.ndim > at.dim and value.shape[at.dim] == at.length and rows == at.rows:
                return parts.whole(value, at.dim)
            if at.dim == 1 and rows == at.rows * at.length:  # both in one dimension
                return parts.whole(value.reshape(at.rows, at.length, *value.shape[1:]), 1).flatten(0, 1)
        elif isinstance(value, (bool, str)) or value is None:
            return value
        said = f"a tensor of {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        raise ValueError(
            f"context_parallel: a step returns {said}, and a part of the sequence has {at.length} positions in "
            f"dimension {at.dim}: return what has a value for each, or a mean over them as a tensor of shape ()"
        )


class At(NamedTuple):
    """Where outputs of a part have its positions."""

    dim: int
    length: int
    rows: int
    """The size of their first dimension."""

    @classmethod
    def of(cls, whole: torch.Tensor, dim: int, ranks: int) -> At:
        """Return where that is, for the first of the named tensors of a batch."""
        dim %= whole.ndim
        return cls(dim, whole.shape[dim] // ranks, len(whole))


def buffer_of(module: torch.nn.Module, name: str) -> torch.Tensor:
    """Return a buffer by its full name.

    Raises:
        ValueError: there is none of that name.
    """
    there = dict(module.named_buffers())
    if name not in there:
        listed = ", ".join(there) or "no buffer"
        raise ValueError(f"context_parallel.buffers names {name!r}, and the module has {listed}")
    return there[name]


@contextlib.contextmanager
def cut_in_forward(module: torch.nn.Module, name: str, dim: int, length: int, parts: Parts) -> Iterator[None]:
    """Have a module see the part of its buffer that belongs to this rank's positions, in its forward alone.

    Who gives all ranks the buffers of one does so before.
    """
    path, _, attribute = name.rpartition(".")
    owner, whole = module.get_submodule(path), buffer_of(module, name)
    if whole.shape[dim] < length:
        raise ValueError(f"context_parallel.buffers: {name} has {whole.shape[dim]} rows for {length} positions")
    before = owner.register_forward_pre_hook(
        lambda *_: setattr(owner, attribute, parts.cut(whole.narrow(dim, 0, length), dim))
    )
    behind = owner.register_forward_hook(lambda *_: setattr(owner, attribute, whole), always_call=True)
    try:
        yield
    finally:
        before.remove()
        behind.remove()
