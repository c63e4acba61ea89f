"""Replay the training step as CUDA graphs: `train_step` with its backward, and the step of each optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hookline import CallbackInterface, hookimpl
from hookline_cudagraph.graphs import Uncapturable
from hookline_cudagraph.optimizer import CapturedOptimizer, uncapturable
from hookline_cudagraph.step import CapturedStep

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

LEAST = 3


@dataclass(eq=False)
class CudaGraph(CallbackInterface):
    """Replay `train_step`, its backward and the steps of optimizers as CUDA graphs; hooks and logging stay Python.

    What cannot be captured runs in Python, as without this plugin, and a warning says why.
    """

    warmup: int = 3
    """How many steps of a kind run in Python before it is captured. A kind is all that a graph keeps: the shapes of a
    batch, which weights are trained, the modes of modules."""
    kinds: int = 4
    """How many kinds of steps are captured, each with memory of its own; steps of other kinds run in Python."""

    def __post_init__(self) -> None:
        if self.warmup < LEAST:
            raise ValueError(f"cudagraph.warmup={self.warmup} must be at least {LEAST}: libraries choose kernels first")
        if self.kinds < 1:
            raise ValueError(f"cudagraph.kinds={self.kinds} must be at least 1; `plugins.cudagraph: null` turns it off")
        self._step: CapturedStep | None = None
        self._put_back: list[tuple[Any, str, Any]] = []

    @hookimpl(trylast=True)  # around what others put in the place of `train_step`
    def on_begin_train(self, trainer: Trainer) -> None:
        if reason := unfit(trainer):
            trainer.say_once(f"cudagraph: nothing is captured: {reason}")
            return
        self._step = CapturedStep(trainer, self.warmup, self.kinds)
        self._replace(trainer.module, "train_step", self._step)
        for optimizer in trainer.optimizers:
            if reason := uncapturable(optimizer):
                trainer.say_once(f"cudagraph: {type(optimizer).__name__}.step is not captured: {reason}")
            else:
                captured = CapturedOptimizer(trainer, optimizer, self._step.stream, self.warmup, self.kinds)
                self._replace(optimizer, "step", captured)

    def _replace(self, of: Any, name: str, value: Any) -> None:
        self._put_back.append((of, name, vars(of).get(name)))
        setattr(of, name, value)

    @hookimpl(tryfirst=True)
    def on_log_object(self, name: str) -> None:
        if self._step is not None and self._step.capturing:
            raise Uncapturable(f"it logs the object {name}")

    @hookimpl
    def on_end_run(self, trainer: Trainer) -> None:
        if self._step is not None and not (self._step.graphs or self._step.reason):
            trainer.say_once(
                f"cudagraph: no step was captured: none of its kind came more than {self.warmup} times (shapes, values "
                "in the batch that are no tensors), or nobody called train_step with gradients"
            )
        for of, name, value in reversed(self._put_back):
            delattr(of, name) if value is None else setattr(of, name, value)
        self._put_back.clear()
        self._step = None


def unfit(trainer: Trainer) -> str:
    """Return why nothing of a run can be captured, or ""."""
    if trainer.device.type != "cuda":
        return f"the run is on {trainer.device}, and graphs are CUDA's"
    if trainer.world_size > 1:
        return "the run has several ranks, with which it was never tried"
    shared = [name for name, weight in trainer.module.named_parameters() if hasattr(weight, "device_mesh")]
    return f"weights are shared out over ranks, as {shared[0]} is" if shared else ""
