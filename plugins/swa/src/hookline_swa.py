"""Average the weights of the last part of training, each counting the same (stochastic weight averaging)."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.swa_utils import SWALR, get_swa_multi_avg_fn, update_bn

from hookline import CallbackInterface, Stage, copy_state, hookimpl, hookspecs, kept_rng

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm)

Tensors = dict[str, torch.Tensor]

log = logging.getLogger("hookline.swa")


@dataclass(eq=False)
class Swa(CallbackInterface):
    """Average the weights of the last part of training; when it ends, evaluate and export the average.

    Batch norm then gets statistics of its own for the average, from the training data.
    """

    begin: Any = 0.75
    """Where averaging begins: a share of the run's steps below 1, or a number of optimizer steps."""
    every: int | None = None
    """Average the weights after each so many optimizer steps; null for those of an epoch."""
    lr: float | None = None
    """Learning rate to which SWALR moves from there on, instead of the module's schedulers; null leaves them alone."""
    anneal: int = 10
    """How many averages that takes."""
    anneal_strategy: str = "cos"
    """On which way: "cos" or "linear"."""
    evaluate: bool = False
    """Whether evaluations and exports within training have the average; after training they have it in any case."""
    batch_norm: int | None = None
    """Batches of the training data for the statistics of batch norm; null for an epoch, 0 to leave them as they are."""

    averages = True  # as every plugin does that evaluates and exports an average of the weights

    def __post_init__(self) -> None:
        share = isinstance(self.begin, float) and 0 <= self.begin < 1
        if not (share or (type(self.begin) is int and self.begin >= 0)):
            raise ValueError(f"swa.begin={self.begin!r} must be a share of the run, such as 0.75, or steps from 0")
        for option, least in (("every", 1), ("anneal", 1), ("batch_norm", 0)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise ValueError(f"swa.{option}={value} must be at least {least}")
        if self.lr is not None and not 0 <= self.lr < math.inf:
            raise ValueError(f"swa.lr={self.lr} must be a learning rate from 0, or null")
        if self.anneal_strategy not in ("cos", "linear"):
            raise ValueError(f"swa.anneal_strategy={self.anneal_strategy!r} must be cos or linear")
        if self.lr is None:
            self.step_schedulers = None  # type: ignore[assignment,method-assign]  # hides it: the core does it
        self._move = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
        self.on_setup()

    # Averaging ------------------------------------------------------------------------

    @hookimpl
    def on_setup(self) -> None:
        """Begin anew: an object may have been another trainer's before."""
        self._average: Tensors = {}
        self._count = 0  # of the weights in it
        self._statistics: Tensors | None = None  # of batch norm, for this average
        self._annealing: list[SWALR] = []
        self._waiting: list[dict[str, Any]] = []  # its states, until it is made
        self._begins, self._each = 0, 1
        self._training = self._begun = False

    @hookimpl
    def on_begin_train(self, trainer: Trainer) -> None:
        """Find out when to average.

        Raises:
            ValueError: it depends on a length of the run that is unknown; or another plugin has an average as well.
        """
        others = [name for name, plugin in trainer.plugins.listed() if getattr(plugin, "averages", False) is True]
        if len(others) > 1:
            said = " and ".join(sorted(others))
            raise ValueError(f"{said} would each evaluate and export an average of the weights; name one of them")
        self._training = self._begun = True
        totals, each = trainer.totals, self.every or trainer.totals.steps_per_epoch
        if each is None:
            raise ValueError("swa.every=null is an epoch, whose length is unknown; give a number of steps")
        if isinstance(self.begin, float) and totals.steps is None:
            raise ValueError(f"swa.begin={self.begin} is of a run whose length is unknown; give a number of steps")
        if self.batch_norm is None and totals.batches_per_epoch is None and any(Pass(trainer).norms()):
            raise ValueError("swa.batch_norm=null is an epoch, whose length is unknown; give a number of batches")
        self._begins = self.begin if isinstance(self.begin, int) else math.ceil(self.begin * (totals.steps or 0))
        self._each = each
        if self.lr is not None:
            self._annealing = [SWALR(one, self.lr, self.anneal, self.anneal_strategy) for one in trainer.optimizers]  # type: ignore[arg-type]
            self._take_back(self._waiting)

    @hookimpl(trylast=True)
    def on_end_train_step(self, trainer: Trainer, global_step: int, stepped: bool) -> None:  # type: ignore[override]
        """Add the weights to the average, behind those who still change them."""
        if global_step > self._begins and global_step % self._each == 0 and stepped:
            self._update(parameters_of(trainer.module))
            for scheduler in self._annealing:
                scheduler.step()

    def _update(self, parameters: Tensors) -> None:
        averages, targets = [], []
        for name, parameter in parameters.items():
            average = self._average.get(name)
            if average is not None:
                self._average[name] = average = average.to(parameter.device)  # a state that was restored is on the CPU
                averages.append(here(average))
                targets.append(here(parameter.detach()).to(average.dtype))
            elif parameter.requires_grad:  # what is frozen is its own average
                dtype = torch.float32 if parameter.itemsize < 4 else parameter.dtype
                self._average[name] = parameter.detach().to(dtype, copy=True)
        if averages:
            self._move(averages, targets, self._count)
        self._count, self._statistics = self._count + 1, None

    @hookimpl
    def step_schedulers(
        self, trainer: Trainer, when: str, optimizers: Sequence[torch.optim.Optimizer], metrics: Mapping[str, float]
    ) -> bool:
        """Let the module's schedulers stand still from where averaging begins."""
        if trainer.global_step + (when == "step") > self._begins:
            return True
        return hookspecs.step_schedulers(trainer=trainer, when=when, optimizers=optimizers, metrics=metrics)

    # Evaluating and exporting ---------------------------------------------------------

    @hookimpl(wrapper=True, specname="evaluate")
    def evaluate_the_average(self, trainer: Trainer) -> Generator[None, dict[str, float], dict[str, float]]:
        self._renew(trainer)
        with self._swapped_in(trainer.module):
            return (yield)

    @hookimpl(wrapper=True)
    def export_model(self, trainer: Trainer) -> Generator[None, Tensors, Tensors]:
        with self._swapped_in(trainer.module) as swapped:
            state = yield
            return copy_state(state) if swapped else state

    @hookimpl
    def on_end_train(self, trainer: Trainer) -> None:  # type: ignore[override]
        """Have the average from here on."""
        self._training = False
        self._renew(trainer)
        if not self._count and trainer.rank == 0:
            log.warning("swa has averaged nothing: no step after step %d is a multiple of %d", self._begins, self._each)

    @hookimpl(wrapper=True, tryfirst=True)
    def run(self, trainer: Trainer, stage: Stage) -> Generator[None, bool, bool]:
        """Give batch norm its statistics also where nothing was left to train."""
        self._training = self._begun = False
        answer = yield
        if not self._begun:
            self._renew(trainer)
        return answer

    def _renew(self, trainer: Trainer) -> None:
        """Give batch norm the statistics of the average, unless it has them, with `update_bn` of torch."""
        if self._training or self._statistics is not None or not self._count or self.batch_norm == 0:
            return
        model, place = trainer.model, trainer.cursor.get_state()
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            trainer.built.use_model(model.module)  # which would give all ranks the statistics of one
        passes, modules = Pass(trainer), [module for module in trainer.module.modules() if module.training]
        evaluation = trainer.evaluation.under_way(Stage.VAL)  # in which ranks do not share their buffers
        try:
            with kept_rng(), trainer.idling(), evaluation, self._swapped_in(trainer.module):
                for module in modules:
                    module.training = True
                trainer.cursor.begin_epoch(0)  # the same batches whenever it is done
                if any(passes.norms()):
                    (loader,) = trainer.loaders.get(Stage.TRAIN).values()
                    limit = self.batch_norm or trainer.totals.batches_per_epoch
                    update_bn(map(Batch, itertools.islice(loader, limit)), passes)
                self._statistics = {name: over_ranks(trainer, buffer) for name, buffer in passes.norms()}
        finally:
            trainer.cursor.update_state(place)
            trainer.built.use_model(model)

    @contextlib.contextmanager
    @torch.no_grad()
    def _swapped_in(self, module: torch.nn.Module) -> Iterator[bool]:
        """Have the average in the module's own tensors, if it is asked for, and afterwards what was there."""
        other = self._average | (self._statistics or {}) if self.evaluate or not self._training else {}
        current: Tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        swapped = {name: current[name] for name in other if name in current}
        trained = {name: tensor.clone() for name, tensor in swapped.items()}
        try:
            for name, tensor in swapped.items():
                tensor.copy_(other[name])
            yield bool(swapped)
        finally:
            for name, tensor in swapped.items():
                tensor.copy_(trained[name])

    # State ----------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return the average by the names of parameters, and the places of the schedulers."""
        states = [scheduler.state_dict() for scheduler in self._annealing] or self._waiting
        return {"average": dict(self._average), "count": self._count, "schedulers": states}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._average, self._count, self._statistics = dict(state["average"]), state["count"], None
        self._take_back(state["schedulers"])

    def _take_back(self, states: list[dict[str, Any]]) -> None:
        self._waiting = [] if self._annealing else states
        for scheduler, state in zip(self._annealing, states, strict=False):
            scheduler.load_state_dict(state)


class Batch:
    """A batch of any kind, which `update_bn` passes on as it is."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch


class Pass(torch.nn.Module):
    """A model for `update_bn`: what a training step calls, in the modes in which modules are trained."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.run = trainer

    def modules(self) -> Iterator[torch.nn.Module]:  # type: ignore[override]
        """Yield what is in train mode; batch norm that is not keeps its statistics."""
        return (module for module in self.run.module.modules() if module.training)

    def norms(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the statistics of batch norm by name."""
        for place, module in self.run.module.named_modules():
            if module.training and isinstance(module, NORMS):
                for name, buffer in module.named_buffers():
                    yield f"{place}.{name}".replace("_orig_mod.", ""), buffer

    def train(self, mode: bool = True) -> Pass:
        """Leave modes as they are."""
        return self

    def forward(self, given: Batch) -> Any:
        """Call the model as a training step does."""
        trainer = self.run
        batch = trainer.hook.prepare_batch(trainer=trainer, batch=given.batch, stage=Stage.TRAIN)
        return trainer.hook.call_model(trainer=trainer, batch=batch, stage=Stage.TRAIN)


def over_ranks(trainer: Trainer, buffer: torch.Tensor) -> torch.Tensor:
    """Return a copy of a statistic, its mean over all ranks; each has seen equally many batches."""
    if not buffer.is_floating_point():
        return buffer.clone()
    summed: torch.Tensor = trainer.hook.all_reduce(trainer=trainer, value=buffer.clone(), op="sum")
    return summed if trainer.shares == 1 else summed.div_(trainer.shares)


def parameters_of(module: torch.nn.Module) -> Tensors:
    """Return the parameters that can be averaged by name; one that is tied stands there once."""
    named = module.named_parameters()
    return {name: weight for name, weight in named if weight.is_floating_point() or weight.is_complex()}


def here(tensor: Any) -> torch.Tensor:
    """Return this rank's share of a tensor that ranks share."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]
