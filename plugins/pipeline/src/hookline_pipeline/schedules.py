"""torch's schedules, over micro-batches that are no tensors: their numbers go through them in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)
from torch.nn.parallel import DistributedDataParallel

SCHEDULES: dict[str, Any] = {
    "GPipe": ScheduleGPipe,
    "1F1B": Schedule1F1B,
    "LoopedBFS": ScheduleLoopedBFS,
    "Interleaved1F1B": ScheduleInterleaved1F1B,
    "InterleavedZeroBubble": ScheduleInterleavedZeroBubble,
    "ZBVZeroBubble": ScheduleZBVZeroBubble,
    "DualPipeV": ScheduleDualPipeV,
}
"""By torch's names."""
V_SHAPED = (ScheduleZBVZeroBubble, ScheduleDualPipeV)
"""Those in which the first and the last stage are on one rank."""

SPLIT_BACKWARD = (ScheduleInterleavedZeroBubble, *V_SHAPED)
"""Those that compute the gradients of weights apart from those of inputs."""

Meta = tuple[tuple[int, ...], torch.dtype, bool]
"""Shape, type and whether there is a gradient, of what goes from stage to stage."""


class Line(NamedTuple):
    """The ranks that a micro-batch goes through, and which of the stages are this one's."""

    group: Any
    """In the order of the stages; of V-shaped schedules of their first half."""
    place: int
    """Of this rank in the group."""
    size: int
    stages: int
    v_shaped: bool

    def rank_of(self, stage: int) -> int:
        """Return the place of the rank that has a stage."""
        if self.v_shaped:
            return stage if stage < self.size else 2 * self.size - 1 - stage
        return stage % self.size

    @property
    def mine(self) -> list[int]:
        """The stages of this rank, ascending."""
        return [stage for stage in range(self.stages) if self.rank_of(stage) == self.place]

    def send(self, stage: int, value: Any, tensors: Sequence[torch.Tensor]) -> None:
        """Send an object and tensors to the rank of a stage."""
        peer = self.rank_of(stage)
        dist.send_object_list([value], group=self.group, group_dst=peer)
        for tensor in tensors:
            dist.send(tensor, group=self.group, group_dst=peer)

    def hear(self, stage: int) -> Any:
        """Return the object that the rank of a stage sends."""
        heard = [None]
        dist.recv_object_list(heard, group=self.group, group_src=self.rank_of(stage))
        return heard[0]

    def receive(self, stage: int, metas: Sequence[Meta], device: torch.device) -> list[torch.Tensor]:
        """Return the tensors that the rank of a stage sends."""
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, _ in metas]
        for tensor in tensors:
            dist.recv(tensor, group=self.group, group_src=self.rank_of(stage))
        return tensors

    def tell_all(self, value: Any) -> Any:
        """Return, on all ranks, what the rank of the last stage gives."""
        told = [value]
        dist.broadcast_object_list(told, group=self.group, group_src=self.rank_of(self.stages - 1))
        return told[0]


def metas_of(tensors: Sequence[torch.Tensor]) -> list[Meta]:
    """Return what is to be known of tensors before they can be received."""
    return [(tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for tensor in tensors]


class Part(torch.nn.Module):
    """The parameters of one stage, for schedules that compute gradients of inputs and weights apart."""

    def __init__(self, weights: Sequence[torch.nn.Parameter]) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(weights)


class Stage(PipelineStage):
    """A stage that is called with the number of a micro-batch, and what comes from the stage before."""

    def __init__(self, compute: Callable[[int, int, tuple[torch.Tensor, ...]], Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._compute = compute

    def forward_maybe_with_nosync(self, *received: torch.Tensor, **kwargs: Any) -> Any:
        """Compute; whether ranks average gradients in it is known to who runs the schedule."""
        return self._compute(self.stage_index, int(kwargs["number"]), received)


def make(
    name: str,
    line: Line,
    model: torch.nn.Module,
    weights: Mapping[int, Sequence[torch.nn.Parameter]],
    metas: Mapping[int, Sequence[Meta]],
    micro_batches: int,
    device: torch.device,
    compute: Callable[[int, int, tuple[torch.Tensor, ...]], Any],
) -> Any:
    """Return a schedule of torch.

    Args:
        name: of it; where it needs more micro-batches, one that computes the same in another order is taken.
        line: the ranks.
        model: what the loop calls; one that torch shards needs its care.
        weights: by stage.
        metas: what comes to each stage, and behind the last what leaves it.
        micro_batches: how many there are.
        device: of the tensors.
        compute: called with the stage, the number of a micro-batch and what has come.
    """
    kind = SCHEDULES[name]
    stages: list[Any] = [
        Stage(
            compute,
            model if isinstance(model, FSDPModule) else Part(weights[stage]),
            stage,
            line.stages,
            device,
            input_args=tuple(map(example, metas[stage])),
            output_args=tuple(map(example, metas[stage + 1])),
            group=line.group,
        )
        for stage in line.mine
    ]
    options: dict[str, Any] = {"n_microbatches": micro_batches, "loss_fn": lambda loss, _: loss, "scale_grads": False}
    if not issubclass(kind, PipelineScheduleMulti):
        return (kind if micro_batches >= line.stages else ScheduleGPipe)(stages[0], **options)
    try:
        return kind(stages, **options)
    except ValueError:  # too few micro-batches, or a number that this one does not take
        return (ScheduleZBVZeroBubble if line.v_shaped else ScheduleLoopedBFS)(stages, **options)


def example(meta: Meta) -> torch.Tensor:
    """Return a tensor without values."""
    shape, dtype, gradient = meta
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=gradient)


def step(schedule: Any, micro_batches: int) -> None:
    """Run a schedule once: forward and backward of all micro-batches."""
    numbers = torch.arange(micro_batches)
    schedule.step(target=numbers, return_outputs=False, number=numbers)


def unaveraged(model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return a context in which ranks leave gradients as they are, where they are averaged as backward goes."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()
