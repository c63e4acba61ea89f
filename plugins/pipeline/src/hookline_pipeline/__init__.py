"""Train a model that is cut into stages, each on its own ranks, through which micro-batches go one behind another.

Each file imports those above it alone:

| file | what it is for |
|---|---|
| `absent` | tensors of other stages |
| `stages` | where stages begin, and what belongs to them |
| `running` | a step of the module as one stage |
| `schedules` | torch's schedules over the micro-batches of a window |
| `state` | the state of all stages in one |

The plugin, here, puts them together.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from hookline import CallbackInterface, Stage, find_blocks, generator, hookimpl, hookspecs, kept_rng, set_seed
from hookline_pipeline.absent import give_up, hidden
from hookline_pipeline.running import Made, Pass, Staged, form_of
from hookline_pipeline.schedules import (
    SCHEDULES,
    SPLIT_BACKWARD,
    V_SHAPED,
    Line,
    Meta,
    make,
    metas_of,
    step,
    unaveraged,
)
from hookline_pipeline.stages import refuse_names, split_evenly, stages_of
from hookline_pipeline.state import Shares

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

DIMENSION = "pipe"  # of the mesh

log = logging.getLogger("hookline.pipeline")


@dataclass(frozen=True)
class Sent:
    """What goes to the next stage, in the place of what a step returns; whoever takes it for that fails."""

    tensors: tuple[torch.Tensor, ...]


class Form(NamedTuple):
    """What is known of micro-batches of one form."""

    metas: dict[int, list[Meta]]
    """What comes to each stage of this rank and leaves it, by the stage that gets it."""
    made: dict[str, list[Made]]
    """What modules of earlier stages make."""


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
        self._line: Line | None = None
        self._staged: Staged | None = None
        self._meshes: list[Any] = []  # by place in the line, the ranks that have the same stages
        self._stages: dict[str, int] = {}  # by the name of each parameter and buffer
        self._forms: dict[str, Form] = {}  # by the form of a micro-batch
        self._schedules: dict[tuple[str, int], Any] = {}
        self._shares: Shares | None = None
        self._tied: list[tuple[torch.Tensor, int, list[int]]] = []  # weights of several stages: who steps, who else has
        self._loss: torch.Tensor | None = None  # that is to go backward

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

    @hookimpl(optionalhook=True)  # of distributed
    def get_peers(self) -> Any:
        return dist.group.WORLD if self._line is None else self._meshes[self._line.place].get_group()

    @hookimpl(wrapper=True, optionalhook=True)  # of distributed
    def get_replicated(self) -> Generator[None, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        named = yield
        if self._line is None:
            return named
        mine = self._line.mine
        return {name: one for name, one in named.items() if self._stages.get(name, mine[0]) in mine}

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
        module = trainer.module
        self._stages = stages_of(module, names)
        line = self._line_of(trainer, size, len(names) + 1)
        keepers: dict[int, list[int]] = {}
        for name, weight in module.named_parameters(remove_duplicate=False):
            keepers.setdefault(id(weight), []).append(line.rank_of(self._stages[name]))
        gone = {
            name: self._meshes[keepers[id(weight)][0]]
            for name, weight in module.named_parameters(remove_duplicate=False)
            if line.place not in keepers[id(weight)]
        }
        self._staged = Staged(model, type(module).__name__, names)
        self._staged.take_hold(module, self._stages)
        give_up(module, gone)
        self._line = line
        places = {name: line.rank_of(stage) for name, stage in self._stages.items()}
        self._shares = Shares(module, places, line.place, self._meshes, line.group)
        log.info("pipeline: stages %s of %d begin at %s", line.mine, line.stages, ", ".join(names))
        return self._staged

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
        self._meshes = [DeviceMesh(trainer.device.type, ranks) for ranks in turn(rows)]
        return Line(group, dist.get_rank(group), size, stages, v_shaped)

    @hookimpl(wrapper=True, tryfirst=True)
    def shard_model(self, trainer: Trainer) -> Generator[None, torch.nn.Module, torch.nn.Module]:
        if self._line is None or self._shares is None:
            return (yield)
        with hidden(trainer.module):
            model = yield
        if isinstance(model, FSDPModule) and SCHEDULES[self.schedule] in SPLIT_BACKWARD:
            raise ValueError(
                f"pipeline.schedule={self.schedule} computes the gradients of weights apart, and those of weights that "
                "fsdp shares come out wrong that way (torch 2.13): take Interleaved1F1B, or ddp in place of fsdp"
            )
        keepers: dict[str, list[int]] = {}
        first_names: dict[int, str] = {}
        for name, weight in trainer.module.named_parameters(remove_duplicate=False):
            places = keepers.setdefault(first_names.setdefault(id(weight), name), [])
            places += [] if self._shares.places[name] in places else [self._shares.places[name]]
        named = dict(trainer.module.named_parameters())
        self._tied = [(named[name], first, others) for name, (first, *others) in keepers.items() if others]
        return model

    # The step -------------------------------------------------------------------------

    @hookimpl
    def run_window(self, trainer: Trainer, window: Sequence[Any]) -> list[tuple[Any, ...]]:
        if self._line is None or self._staged is None:
            return hookspecs.run_window(trainer=trainer, window=window)
        if trainer.padding:
            raise ValueError(
                "pipeline does not go with distributed.uneven=pad or join, which fill up windows with what does not "
                "count: take distributed.uneven=drop"
            )
        outputs = list(trainer.window.go_on()) if trainer.window.begun else []
        rest = list(window)[len(outputs) :]
        with kept_rng(), unaveraged(trainer.model):
            seeds = self._seeds(trainer, len(window))
            for form, several in itertools.groupby(enumerate(rest, len(outputs)), key=lambda one: form_of(one[1])):
                outputs += self._run(trainer, form, list(several), len(window), seeds)
        self._average(trainer)
        return outputs

    def _seeds(self, trainer: Trainer, size: int) -> list[list[int]]:
        """Return for each micro-batch the seed of what comes ahead of the model, and that of each stage.

        Ranks of one line thus draw the same numbers ahead of the model, where each of them runs the module's code.
        """
        assert self._line is not None
        source = generator(trainer, f"pipeline {trainer.share}")
        seeds: list[list[int]] = torch.randint(2**62, (size, self._line.stages + 1), generator=source).tolist()
        return seeds

    def _run(
        self, trainer: Trainer, form: str | None, several: list[tuple[int, Any]], size: int, seeds: list[list[int]]
    ) -> list[tuple[Any, ...]]:
        """Run forward and backward for micro-batches of one form; return their outputs, those of the last stage."""
        line = self._line
        assert line is not None
        if form is None:
            raise ValueError("pipeline: a batch must consist of tensors and plain values, in tuples, lists and dicts")
        if form not in self._forms:
            self._forms[form] = self._learn(trainer, several[0][1], seeds[several[0][0]])
        metas, made = self._forms[form]
        found: dict[int, tuple[Any, ...]] = {}

        def compute(stage: int, number: int, received: tuple[torch.Tensor, ...]) -> Any:
            index, batch = several[number]
            trainer.window.begin_micro_batch(index)
            with self._passing(stage, received, made, seeds[index]):
                if stage + 1 < line.stages:
                    batch = trainer.hook.prepare_batch(trainer=trainer, batch=batch, stage=Stage.TRAIN)
                    return trainer.hook.call_model(trainer=trainer, batch=batch, stage=Stage.TRAIN).tensors
                found[index] = trainer.hook.forward_backward(trainer=trainer, batch=batch, index=index, size=size)
                loss, self._loss = self._loss, None
                return loss

        key = form, len(several)
        if key not in self._schedules:
            self._schedules[key] = make(
                self.schedule, line, trainer.model, self._weights(trainer), metas, len(several),
                trainer.device, lambda *args: self._compute(*args),
            )  # fmt: skip
        self._compute = compute
        step(self._schedules[key], len(several))
        return self._share_out(trainer, [found.get(index, ()) for index, _ in several])

    def _learn(self, trainer: Trainer, batch: Any, seeds: list[int]) -> Form:
        """Return what goes between stages for batches of one form, and what their modules make."""
        line = self._line
        assert line is not None
        metas: dict[int, list[Meta]] = {0: [], line.stages: [((), torch.float32, True)]}
        made: dict[str, list[Made]] = {}
        for stage in line.mine:
            if stage and stage not in metas:
                metas[stage], made = line.hear(stage - 1)
            if stage + 1 == line.stages:
                break
            zeros = [
                torch.zeros(shape, dtype=dtype, device=trainer.device, requires_grad=gradient)
                for shape, dtype, gradient in metas[stage]
            ]
            with trainer.idling(), self._passing(stage, zeros, made, seeds, keeps=True):
                ready = trainer.hook.prepare_batch(trainer=trainer, batch=batch, stage=Stage.TRAIN)
                sent = trainer.hook.call_model(trainer=trainer, batch=ready, stage=Stage.TRAIN).tensors
            metas[stage + 1] = metas_of(sent)
            if line.rank_of(stage + 1) != line.place:
                line.send(stage + 1, (metas[stage + 1], made), [])
        for part in trainer.model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        return Form(metas, made)

    @contextlib.contextmanager
    def _passing(
        self,
        stage: int,
        received: Sequence[torch.Tensor],
        made: dict[str, list[Made]],
        seeds: list[int],
        keeps: bool = False,
    ) -> Iterator[None]:
        """Have the module run as one stage within."""
        assert self._staged is not None
        set_seed(seeds[0])
        self._staged.current = Pass(stage, received, made, seeds[stage + 1], keeps)
        try:
            yield
        finally:
            self._staged.current = None

    def _weights(self, trainer: Trainer) -> dict[int, list[torch.nn.Parameter]]:
        """Return the parameters of each stage of this rank."""
        assert self._line is not None
        weights: dict[int, list[torch.nn.Parameter]] = {stage: [] for stage in self._line.mine}
        for name, weight in trainer.module.named_parameters(remove_duplicate=False):
            if self._stages[name] in weights:
                weights[self._stages[name]].append(weight)
        return weights

    def _share_out(self, trainer: Trainer, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Return, on all ranks, what the last stage has returned, as far as anybody takes it."""
        line = self._line
        assert line is not None
        last = line.rank_of(line.stages - 1) == line.place
        if not trainer.plugins.collecting:
            rows = [row[:1] for row in rows]
        told = line.tell_all(tree_map_only(torch.Tensor, to_host, rows) if last else None)
        return rows if last else data_to(told, trainer.device)

    @hookimpl
    def call_model(self, trainer: Trainer, batch: Any, stage: Stage) -> Any:
        if self._staged is None or self._line is None:
            return hookspecs.call_model(trainer=trainer, batch=batch, stage=stage)
        current = self._staged.current
        if current is None:
            return self._go_through(trainer, batch, stage)
        outputs = hookspecs.call_model(trainer=trainer, batch=batch, stage=stage)
        return outputs if current.stage + 1 == self._line.stages else Sent(outputs)

    def _go_through(self, trainer: Trainer, batch: Any, stage: Stage) -> Any:
        """Run the step of an evaluation through all stages; return, on all ranks, what the last one returns."""
        line, outputs = self._line, None
        assert line is not None
        sent: list[torch.Tensor] = []
        made: dict[str, list[Made]] = {}
        seed = int(torch.randint(2**62, ()))
        with kept_rng():
            for one in line.mine:
                received = sent
                if one and line.rank_of(one - 1) != line.place:
                    metas, made = line.hear(one - 1)
                    received = line.receive(one - 1, metas, trainer.device)
                with self._passing(one, received, made, [seed] * (line.stages + 1), keeps=True):
                    outputs = hookspecs.call_model(trainer=trainer, batch=batch, stage=stage)
                sent = [] if one + 1 == line.stages else list(outputs)
                if one + 1 < line.stages and line.rank_of(one + 1) != line.place:
                    line.send(one + 1, (metas_of(sent), made), sent)
        last = line.rank_of(line.stages - 1) == line.place
        told = line.tell_all(tree_map_only(torch.Tensor, to_host, outputs) if last else None)
        return outputs if last else data_to(told, trainer.device)

    @hookimpl
    def run_backward(self, trainer: Trainer, loss: torch.Tensor) -> bool:
        if self._staged is None or self._staged.current is None:
            return hookspecs.run_backward(trainer=trainer, loss=loss)
        self._loss = loss  # torch's schedule runs backward
        return True

    def _average(self, trainer: Trainer) -> None:
        """Average gradients over the ranks of the same stages, where that is not done as backward goes."""
        model = trainer.model
        if isinstance(model, DistributedDataParallel):
            with trainer.hook.shadow(trainer=trainer):
                nothing = model()
            nothing.backward()

    # The optimizer's step -------------------------------------------------------------

    @hookimpl(tryfirst=True)
    def on_begin_optimizer_step(self, trainer: Trainer) -> None:
        """Add up the gradients of weights that several stages have, on the first of them, which alone steps them."""
        line = self._line
        for weight, first, others in self._tied:
            assert line is not None
            for place in others:
                if line.place == place:
                    gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
                    dist.send(here(gradient).contiguous(), group=line.group, group_dst=first)
                    weight.grad = None
                elif line.place == first:
                    more = torch.zeros_like(weight)
                    dist.recv(here(more), group=line.group, group_src=place)
                    weight.grad = more if weight.grad is None else weight.grad.add_(more)

    @hookimpl(tryfirst=True)
    def on_end_optimizer_step(self, trainer: Trainer, stepped: bool) -> None:
        if stepped:
            self._give_tied()

    @torch.no_grad()
    def _give_tied(self) -> None:
        """Give weights that several stages have to those that do not step them."""
        line = self._line
        for weight, first, others in self._tied:
            assert line is not None
            for place in others:
                if line.place == first:
                    dist.send(here(weight).contiguous(), group=line.group, group_dst=place)
                elif line.place == place:
                    dist.recv(here(weight), group=line.group, group_src=first)

    @hookimpl(wrapper=True)
    def step_optimizer(self, closure: Any) -> Generator[None, bool, bool]:
        if closure is not None and self._line is not None:
            raise ValueError(
                "pipeline: an optimizer with a closure (LBFGS) looks at all parameters at once, and each rank has "
                "those of its stages alone; take one that steps each parameter by itself"
            )
        return (yield)

    @hookimpl
    def get_total_norm(self, trainer: Trainer, norm: torch.Tensor, norm_type: float) -> torch.Tensor:
        line = self._line
        if line is None:
            return norm
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        norms = [torch.empty_like(norm) for _ in range(line.size)]
        dist.all_gather(norms, norm, group=line.group)
        whole: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        return whole

    # State ----------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def get_run_state(self) -> Generator[None, dict[str, Any], dict[str, Any]]:
        state = yield
        return state if self._shares is None else self._shares.of_all(state)

    @hookimpl
    def set_run_state(self, trainer: Trainer, state: Mapping[str, Any], stage: Stage) -> bool:
        if self._shares is not None:
            state = self._shares.of_this_rank(state)
        loaded = bool(hookspecs.set_run_state(trainer=trainer, state=state, stage=stage))
        self._give_tied()
        return loaded

    @hookimpl
    def allocate(self, trainer: Trainer, path: Sequence[Any], shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        found = self._shares.allocate(path, shape, dtype) if self._shares is not None else None
        return hookspecs.allocate(trainer=trainer, path=path, shape=shape, dtype=dtype) if found is None else found

    @hookimpl(wrapper=True, trylast=True)  # before who puts together what the ranks of one stage share
    def export_model(self, trainer: Trainer) -> Generator[None, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        state = yield
        return state if self._shares is None else self._shares.gathered(state, trainer.device)


def here(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor where it can be sent as an object."""
    return tensor.detach().cpu()


def data_to(value: Any, device: torch.device) -> Any:
    """Return what was sent as an object with its tensors on a device."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), value)
