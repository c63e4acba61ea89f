"""The steps of a run whose model is in stages: windows, evaluations, gradients of all stages, their state."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from hookline import CallbackInterface, Stage, generator, hookimpl, hookspecs, kept_rng, set_seed
from hookline_pipeline.running import Made, Pass, Staged, form_of
from hookline_pipeline.schedules import Line, Meta, make, metas_of, step, unaveraged
from hookline_pipeline.stages import keepers_of
from hookline_pipeline.state import Shares

if TYPE_CHECKING:
    from hookline import Trainer

REMEMBERED = 16  # schedules, of micro-batches of different shapes


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


class Steps(CallbackInterface):
    """Does the steps of a model in stages; the plugin registers it where there are several ranks.

    Args:
        schedule: by torch's name.
        line: the ranks that micro-batches go through.
        staged: the model.
        stages: the stage of each parameter and buffer by its name.
        shares: who has what of a state.
    """

    def __init__(self, schedule: str, line: Line, staged: Staged, stages: Mapping[str, int], shares: Shares) -> None:
        self._schedule, self._line, self.staged, self._stages, self._shares = schedule, line, staged, stages, shares
        self._forms: dict[str, Form] = {}  # by the form of a micro-batch
        self._schedules: dict[tuple[str, int], Any] = {}
        self._loss: torch.Tensor | None = None  # that is to go backward
        self._tied: list[tuple[torch.Tensor, int, list[int]]] = []  # weights of several stages: who steps, who else has

    # Ranks ----------------------------------------------------------------------------

    @hookimpl(optionalhook=True)  # of distributed
    def get_peers(self) -> Any:
        return self._shares.meshes[self._line.place].get_group()

    @hookimpl(wrapper=True, optionalhook=True)  # of distributed
    def get_replicated(self) -> Generator[None, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        named = yield
        return {name: one for name, one in named.items() if self._shares.places.get(name) in (None, self._line.place)}

    # The step -------------------------------------------------------------------------

    @hookimpl
    def run_window(self, trainer: Trainer, window: Sequence[Any]) -> list[tuple[Any, ...]]:
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
        source = generator(trainer, f"pipeline {trainer.share}")
        seeds: list[list[int]] = torch.randint(2**62, (size, self._line.stages + 1), generator=source).tolist()
        return seeds

    def _run(
        self, trainer: Trainer, form: str | None, several: list[tuple[int, Any]], size: int, seeds: list[list[int]]
    ) -> list[tuple[Any, ...]]:
        """Run forward and backward for micro-batches of one form; return their outputs, those of the last stage."""
        line = self._line
        if form is None:
            raise ValueError("pipeline: a batch must consist of tensors and plain values, in tuples, lists and dicts")
        form += "".join("01"[weight.requires_grad] for weight in trainer.module.parameters())  # as what is sent has one
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
            if len(self._schedules) == REMEMBERED:  # they have buffers for what is received
                del self._schedules[next(iter(self._schedules))]
            self._schedules[key] = make(
                self._schedule, line, trainer.model, self._weights(trainer), metas, len(several),
                trainer.device, lambda *args: self._compute(*args),
            )  # fmt: skip
        self._compute = compute
        step(self._schedules[key], len(several))
        return self._share_out(trainer, [found.get(index, ()) for index, _ in several])

    def _learn(self, trainer: Trainer, batch: Any, seeds: list[int]) -> Form:
        """Return what goes between stages for batches of one form, and what their modules make."""
        line = self._line
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
        set_seed(seeds[0])
        self.staged.current = Pass(stage, received, made, seeds[stage + 1], keeps)
        try:
            yield
        finally:
            self.staged.current = None

    def _weights(self, trainer: Trainer) -> dict[int, list[torch.nn.Parameter]]:
        """Return the parameters of each stage of this rank."""
        weights: dict[int, list[torch.nn.Parameter]] = {stage: [] for stage in self._line.mine}
        for name, weight in trainer.module.named_parameters(remove_duplicate=False):
            if self._stages[name] in weights:
                weights[self._stages[name]].append(weight)
        return weights

    def _share_out(self, trainer: Trainer, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Return, on all ranks, what the last stage has returned, as far as anybody takes it."""
        line = self._line
        last = line.rank_of(line.stages - 1) == line.place
        if not trainer.plugins.collecting:
            rows = [row[:1] for row in rows]
        told = line.tell_all(tree_map_only(torch.Tensor, to_host, rows) if last else None)
        return rows if last else data_to(told, trainer.device)

    @hookimpl
    def call_model(self, trainer: Trainer, batch: Any, stage: Stage) -> Any:
        current = self.staged.current
        if current is None:
            return self._go_through(trainer, batch, stage)
        outputs = hookspecs.call_model(trainer=trainer, batch=batch, stage=stage)
        return outputs if current.stage + 1 == self._line.stages else Sent(outputs)

    def _go_through(self, trainer: Trainer, batch: Any, stage: Stage) -> Any:
        """Run the step of an evaluation through all stages; return, on all ranks, what the last one returns."""
        line, outputs = self._line, None
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
        if self.staged.current is None:
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

    def find_tied(self) -> None:
        """Find the weights that several stages have, once they are in their places."""
        named = dict(self._shares.module.named_parameters())
        kept = keepers_of(self._shares.module, self._shares.places)
        self._tied = [(named[name], first, others) for name, (first, *others) in kept.items() if others]

    @hookimpl(tryfirst=True)
    def on_begin_optimizer_step(self, trainer: Trainer) -> None:
        """Add up the gradients of weights that several stages have, on the first of them, which alone steps them."""
        line = self._line
        for weight, first, others in self._tied:
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
            for place in others:
                if line.place == first:
                    dist.send(here(weight).contiguous(), group=line.group, group_dst=place)
                elif line.place == place:
                    dist.recv(here(weight), group=line.group, group_src=first)

    @hookimpl(wrapper=True)
    def step_optimizer(self, closure: Any) -> Generator[None, bool, bool]:
        if closure is not None:
            raise ValueError(
                "pipeline: an optimizer with a closure (LBFGS) looks at all parameters at once, and each rank has "
                "those of its stages alone; take one that steps each parameter by itself"
            )
        return (yield)

    @hookimpl
    def get_total_norm(self, trainer: Trainer, norm: torch.Tensor, norm_type: float) -> torch.Tensor:
        line = self._line
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        norms = [torch.empty_like(norm) for _ in range(line.size)]
        dist.all_gather(norms, norm, group=line.group)
        whole: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        return whole

    # State ----------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def get_run_state(self) -> Generator[None, dict[str, Any], dict[str, Any]]:
        state = yield
        return self._shares.of_all(state)

    @hookimpl
    def set_run_state(self, trainer: Trainer, state: Mapping[str, Any], stage: Stage) -> bool:
        own = self._shares.of_this_rank(state)
        loaded = bool(hookspecs.set_run_state(trainer=trainer, state=own, stage=stage))
        self._give_tied()
        self._shares.remember()
        return loaded

    @hookimpl
    def allocate(self, trainer: Trainer, path: Sequence[Any], shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        found = self._shares.allocate(path, shape, dtype)
        return hookspecs.allocate(trainer=trainer, path=path, shape=shape, dtype=dtype) if found is None else found

    @hookimpl(wrapper=True, trylast=True)  # before who puts together what the ranks of one stage share
    def export_model(self, trainer: Trainer) -> Generator[None, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        state = yield
        return self._shares.gathered(state, trainer.device)


def here(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor where it can be sent as an object."""
    return tensor.detach().cpu()


def data_to(value: Any, device: torch.device) -> Any:
    """Return what was sent as an object with its tensors on a device."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), value)
