"""The plugin that takes the simulated step within a run, and ends the run behind it."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._pytree import tree_map_only

from hookline import CallbackInterface, Stage, Trainer, count_samples, hookimpl
from hookline_simulate.shapes import Shapes, bytes_of
from hookline_simulate.world import Plan

NO_VALUES = DataDependentOutputException, DynamicOutputShapeException
STEPS = 3  # the last is measured: in the first states are made, before the second DDP lays out its gradients anew


class Simulated(Exception):
    """The step has been simulated, or cannot be; the run ends here."""


class Simulation(CallbackInterface):
    """Does a step with what the ones before it have left behind: states, gradients' buffers; and ends the run."""

    def __init__(self, mode: Shapes, found: Plan) -> None:
        self._mode = mode
        self._found = found
        self._before = 0
        self._name = ""

    @hookimpl
    def on_setup(self, trainer: Trainer) -> None:
        self._name = type(trainer.module).__name__  # FSDP gives it another class

    @hookimpl(wrapper=True, tryfirst=True)
    def convert_model(self) -> Generator[None, Any, Any]:
        with self._mode:
            return (yield)

    @hookimpl(wrapper=True, tryfirst=True)
    def split_model(self) -> Generator[None, Any, Any]:
        with self._mode:
            return (yield)

    @hookimpl(wrapper=True, tryfirst=True)
    def compile_model(self) -> Generator[None, Any, Any]:
        with self._mode:
            return (yield)

    @hookimpl(wrapper=True, tryfirst=True)
    def shard_model(self) -> Generator[None, Any, Any]:
        with self._mode:
            model = yield
        self._mode.sharded = True
        return model

    @hookimpl(wrapper=True, tryfirst=True)
    def setup_optimizers(self) -> Generator[None, Any, Any]:
        with self._mode:
            return (yield)

    @hookimpl(wrapper=True, tryfirst=True)
    def get_sampler(self, trainer: Trainer, stage: Stage) -> Generator[None, Any, Any]:
        """Have enough samples for this rank, however few there are."""
        sampler = yield
        ours = stage is Stage.TRAIN and not trainer.plugins.performers("get_sampler")
        return type("AtHand", (AtHand, sampler), {"trainer": trainer}) if ours else sampler

    @hookimpl(wrapper=True, tryfirst=True)
    def train_epoch(self, trainer: Trainer, batches: Iterator[Any]) -> Generator[None, bool, bool]:
        mode, found = self._mode, self._found
        mode.parameters = list(trainer.module.parameters())
        window = trainer.hook.take_window(trainer=trainer, batches=batches)
        found.batch = {
            "samples": trainer.options.train_batch_size,
            "micro-batch(es) a rank": len(window),
            "sample(s) in each": count_samples(window[0]) if window else 0,
        }
        if not window:
            found.missing = "no step could be simulated: the training loader gave no batch"
            raise Simulated
        window = tree_map_only(torch.Tensor, mode.emptied, window)
        try:
            with mode:
                for step in range(STEPS):
                    if step == STEPS - 1:
                        mode.find()
                        mode.counting, mode.peak = True, mode.live
                    trainer.training.take_step(window)  # without a boundary: a vote or a save is no part of a step
        except Exception as error:
            what = f"{self._name}.train_step" if mode.in_forward else "the step"
            found.missing = f"{what} could not be simulated: {told(error)}"
            if isinstance(error, NO_VALUES):
                found.missing += "; compute it with tensors alone (torch.where, a mask), or from whole numbers"
        finally:
            mode.counting = False
        raise Simulated
        yield

    @hookimpl(wrapper=True, tryfirst=True)
    def call_model(self) -> Generator[None, Any, Any]:
        self._before, self._mode.in_forward = self._mode.live, True
        self._mode.clock.begin("forward")
        answer = yield  # where it raises, that was in the forward
        self._mode.in_forward = False
        return answer

    @hookimpl(wrapper=True, tryfirst=True)
    def run_backward(self) -> Generator[None, bool, bool]:
        mode = self._mode
        mode.activations = max(mode.activations or 0, mode.live - self._before)
        mode.clock.begin("backward")
        answer = yield
        mode.clock.begin("")
        return answer

    @hookimpl(trylast=True)
    def on_begin_optimizer_step(self, trainer: Trainer) -> None:
        gradients = [p.grad for p in trainer.module.parameters() if p.grad is not None]
        self._mode.gradients = max(self._mode.gradients, bytes_of(gradients))

    @hookimpl
    def on_end_optimizer_step(self, trainer: Trainer) -> None:
        self._mode.states = max(self._mode.states, bytes_of(optimizer.state for optimizer in trainer.optimizers))


class AtHand(torch.utils.data.Sampler[int]):
    """Begins the data set anew where it ends too early."""

    trainer: Trainer

    def __init__(self, data_source: Any) -> None:
        super().__init__(data_source)  # type: ignore[call-arg]
        self.length = len(data_source)

    def __iter__(self) -> Iterator[int]:
        """Give indices in order."""
        return (number % self.length for number in range(len(self)) if self.length)

    def __len__(self) -> int:
        """Return how many."""
        whole: int = super().__len__()  # type: ignore[misc]
        return max(whole, STEPS * self.trainer.window_size * self.trainer.micro_batch_size)


def told(error: BaseException) -> str:
    """Return an error in one line, with the place in the user's code."""
    frames = [
        f"{Path(frame.f_code.co_filename).name}, line {line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not re.match(r"(torch|pluggy|hookline\w*)(\.|$)", name := frame.f_globals.get("__name__", ""))
        and name.partition(".")[0] not in sys.stdlib_module_names
    ]
    where = f" ({frames[-1]})" if frames else ""
    if isinstance(error, NO_VALUES):
        return f"it needs the value of a tensor{where}, and here tensors have none"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}{where}"
