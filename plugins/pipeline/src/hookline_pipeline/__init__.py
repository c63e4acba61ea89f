"""Train a model that is cut into stages, each on its own ranks, through which micro-batches go one behind another.

Each file imports those above it alone:

| file | what it is for |
|---|---|
| `absent` | tensors of other stages |
| `stages` | where stages begin, and what belongs to them |
| `running` | a step of the module as one stage |
| `schedules` | torch's schedules over the micro-batches of a window |
| `state` | the state of all stages in one |
| `steps` | the plugin that does the steps, registered where there are several ranks |

The plugin, here, cuts the model.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from hookline import CallbackInterface, find_blocks, hookimpl
from hookline_pipeline.absent import give_up, hidden
from hookline_pipeline.running import Staged
from hookline_pipeline.schedules import SCHEDULES, SPLIT_BACKWARD, V_SHAPED, Line
from hookline_pipeline.stages import keepers_of, refuse_names, split_evenly, stages_of
from hookline_pipeline.state import Shares
from hookline_pipeline.steps import Steps

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

DIMENSION = "pipe"  # of the mesh

log = logging.getLogger("hookline.pipeline")


@dataclass(eq=False)
class Pipeline(CallbackInterface):
    """Cut the model into stages on different ranks, and have the micro-batches of a window go through them."""

    size: int = 0
    """How many ranks a micro-batch goes through; 0 for all."""
    split: list[str] = field(default_factory=list)
    """Names of the modules at which the second stage and those behind it begin; empty to cut between blocks, so that
    each stage has about as much to compute."""
    blocks: list[str] = field(default_factory=list)
    """Without `split`, names of the classes whose modules are blocks; empty for what `get_blocks()` answers."""
    schedule: str = "1F1B"
    """The order of forwards and backwards: GPipe, 1F1B, LoopedBFS, Interleaved1F1B, InterleavedZeroBubble,
    ZBVZeroBubble or DualPipeV. The last five have several stages on each rank."""
    stages_per_rank: int = 0
    """Without `split`, how many stages each rank has; 0 for as few as the schedule takes, which is 1 or 2."""

    requires = ("distributed",)

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"pipeline.schedule={self.schedule!r} must be one of {', '.join(SCHEDULES)}")
        if self.size < 0 or self.stages_per_rank < 0:
            raise ValueError(
                f"pipeline.size={self.size} and pipeline.stages_per_rank={self.stages_per_rank} must be at least 0"
            )
        self._single = self.schedule in ("GPipe", "1F1B")
        if self.split and self.stages_per_rank:
            raise ValueError("pipeline.split says where stages begin; leave pipeline.stages_per_rank away")
        if self._single and self.stages_per_rank > 1:
            raise ValueError(f"pipeline.schedule={self.schedule} has one stage a rank: take Interleaved1F1B for more")
        self._meshes: list[Any] = []  # by place in the line, the ranks that have the same stages
        self._steps: Steps | None = None  # where there are several ranks

    # Ranks ----------------------------------------------------------------------------

    def _size_of(self, trainer: Trainer) -> int:
        return 1 if trainer.world_size == 1 else self.size or trainer.world_size

    @hookimpl(wrapper=True)
    def get_share(self, trainer: Trainer) -> Generator[None, tuple[int, int], tuple[int, int]]:
        share, shares = yield
        size = self._size_of(trainer)
        if shares % size:
            raise ValueError(f"pipeline.size={size} does not divide the {shares} ranks")
        return share % (shares // size), shares // size

    @hookimpl(wrapper=True, tryfirst=True, optionalhook=True)  # of distributed, which may be the later one to come
    def get_mesh_shape(self, trainer: Trainer) -> Generator[None, dict[str, int], dict[str, int]]:
        shape = yield
        return {DIMENSION: self._size_of(trainer), **shape}

    # The model ------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def split_model(
        self, trainer: Trainer, model: torch.nn.Module
    ) -> Generator[None, torch.nn.Module, torch.nn.Module]:
        names = self._names(trainer, model)
        size = self._size_of(trainer)
        if size == 1:
            return (yield)
        for hook, what in (("update", "does the whole step itself"), ("compile_model", "compiles what is cut here")):
            if others := trainer.plugins.performers(hook):
                raise ValueError(f"pipeline does not go with {', '.join(others)}, which {what}: turn one of them off")
        if trainer.shares > 1 and not trainer.plugins.performers("shard_model"):
            raise ValueError(
                f"pipeline.size={size} leaves {trainer.shares} models over the {trainer.world_size} ranks, and no "
                "plugin makes one of them: add ddp or fsdp, or set pipeline.size=0 for all ranks"
            )
        begins = [*model.parameters(), *model.buffers()]  # modules that were built apart may begin apart
        trainer.hook.broadcast(trainer=trainer, tensors=begins)
        model = yield
        self._cut(trainer, model, names, self._line_of(trainer, size, len(names) + 1))
        assert self._steps is not None
        return self._steps.staged

    def _cut(self, trainer: Trainer, model: torch.nn.Module, names: list[str], line: Line) -> None:
        """Leave the model the stages of this rank, and have its steps done."""
        module = trainer.module
        stages = stages_of(module, names)
        places = {name: line.rank_of(stage) for name, stage in stages.items()}
        staged = Staged(model, type(module).__name__, names)
        staged.take_hold(module, stages)
        kept = keepers_of(module, places)
        give_up(module, {name: self._meshes[at[0]] for name, at in kept.items() if line.place not in at})
        shares = Shares(module, places, line.place, self._meshes, line.group, staged.left_out)
        self._steps = Steps(self.schedule, line, staged, stages, shares)
        trainer.plugins.register(self._steps, f"{trainer.plugins.get_name(self)}.steps")
        log.info("pipeline: stages %s of %d begin at %s", line.mine, line.stages, ", ".join(names))

    def _names(self, trainer: Trainer, model: torch.nn.Module) -> list[str]:
        """Return the names of the modules at which the stages behind the first begin.

        Raises:
            ValueError: the model has none of such a name, or their number does not fit the ranks.
        """
        size = self._size_of(trainer)
        if self.split:
            refuse_names(self.split, trainer.module)
            stages = len(self.split) + 1
            if size > 1 and (stages != size if self._single else stages % size or stages == size):
                many = f"{size} stages" if self._single else f"a multiple of {size} stages, at least {2 * size}"
                raise ValueError(
                    f"pipeline.split makes {stages} stages, and pipeline.schedule={self.schedule} needs {many} "
                    f"over {size} ranks"
                )
            return self.split
        if size == 1:
            return []
        stages = size * (self.stages_per_rank or (1 if self._single else 2))
        blocks = find_blocks(trainer, trainer.module, "pipeline.blocks", self.blocks)
        return split_evenly(trainer.module, blocks, stages)

    def _line_of(self, trainer: Trainer, size: int, stages: int) -> Line:
        """Return the ranks that this one's micro-batches go through, and make all the groups that are needed.

        The last stage is on the first ranks, which show and record what it knows of the loss.
        """
        v_shaped = SCHEDULES[self.schedule] in V_SHAPED
        each = trainer.world_size // size
        turn = list if v_shaped else reversed
        own, group = trainer.rank % each, None
        for column in range(each):
            ranks = list(turn(range(column, trainer.world_size, each)))
            made = dist.new_group(ranks, sort_ranks=False)
            group = made if column == own else group
        rows = [list(range(first, first + each)) for first in range(0, trainer.world_size, each)]
        self._meshes = [DeviceMesh(trainer.device.type, ranks, mesh_dim_names=("stage",)) for ranks in turn(rows)]
        own_mesh = next(mesh for mesh in self._meshes if mesh.get_coordinate() is not None)
        trainer.hook.on_make_groups(trainer=trainer, groups=[group, own_mesh.get_group()])
        return Line(group, dist.get_rank(group), size, stages, v_shaped)

    @hookimpl(wrapper=True, tryfirst=True)
    def shard_model(self, trainer: Trainer) -> Generator[None, torch.nn.Module, torch.nn.Module]:
        if self._steps is None:
            return (yield)
        with hidden(trainer.module):
            model = yield
        if isinstance(model, FSDPModule) and SCHEDULES[self.schedule] in SPLIT_BACKWARD:
            raise ValueError(
                f"pipeline.schedule={self.schedule} computes the gradients of weights apart, and those of weights that "
                "fsdp shares come out wrong that way (torch 2.13): take Interleaved1F1B, or ddp in place of fsdp"
            )
        self._steps.find_tied()
        return model
