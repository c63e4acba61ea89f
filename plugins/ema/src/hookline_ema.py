"""Keep an exponential moving average of the weights, to evaluate with and to export."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hookline import CallbackInterface, copy_state, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

BUFFERS = ("copy", "average")

Tensors = dict[str, torch.Tensor]


@dataclass(eq=False)
class Ema(CallbackInterface):
    """Keep an exponential moving average of the weights; evaluate with it, and export it.

    After each optimizer step of the run: average = decay * average + (1 - decay) * weight. It begins
    as the weights after the first step that counts.
    """

    decay: float = 0.999
    """What is left of the average at each update of it: the nearer to 1, the longer it remembers."""
    begin: int = 0
    """Optimizer steps before averaging begins; until then the average is the weights themselves."""
    every: int = 1
    """Update the average after each so many optimizer steps."""
    buffers: str = "copy"
    """Floating buffers (running statistics): "copy" takes the current ones, "average" averages them too."""
    evaluate: bool = True
    """Whether to evaluate with the average; what is exported is the average in any case."""

    averages = True  # as every plugin does that evaluates and exports an average of the weights

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay={self.decay} must be from 0 to below 1, such as 0.999")
        if self.begin < 0:
            raise ValueError(f"ema.begin={self.begin} must be at least 0 optimizer steps")
        if self.every < 1:
            raise ValueError(f"ema.every={self.every} must be at least 1 optimizer step")
        if self.buffers not in BUFFERS:
            raise ValueError(f"ema.buffers={self.buffers!r} must be one of {', '.join(BUFFERS)}")
        if not self.evaluate:
            self.evaluate_the_average = None  # type: ignore[assignment]  # hides the method
        self._move = get_ema_multi_avg_fn(self.decay)  # type: ignore[no-untyped-call]
        self.on_setup()

    # Averaging ------------------------------------------------------------------------

    @hookimpl
    def on_setup(self) -> None:
        """Begin anew: an object may have been another trainer's before."""
        self._average: Tensors = {}
        self._parameters: Tensors | None = None

    @hookimpl
    def on_begin_train(self, trainer: Trainer) -> None:
        for name, buffer in self._averaged_buffers(trainer.module).items():
            if not buffer.isfinite().all():
                raise ValueError(
                    f"ema.buffers={self.buffers!r} cannot average the buffer {name!r}: it has infinite values or NaN "
                    "(a mask?), whose average is NaN; set ema.buffers=copy"
                )

    @hookimpl
    def on_begin_train_epoch(self) -> None:  # type: ignore[override]
        """Look the parameters up anew, since some may have been added."""
        self._parameters = None

    @hookimpl(trylast=True)
    def on_end_train_step(self, trainer: Trainer, global_step: int, stepped: bool) -> None:  # type: ignore[override]
        """Move the average towards the weights, behind those who still change them."""
        if stepped and global_step > self.begin and global_step % self.every == 0:
            self._update(trainer.module)

    def _update(self, module: torch.nn.Module) -> None:
        buffers = self._averaged_buffers(module)
        if self._parameters is None:  # looked up once, not at every step
            self._parameters = parameters_of(module)
            self._shared = any(hasattr(parameter, "to_local") for parameter in self._parameters.values())
            current = self._parameters | buffers  # a state that was restored is on the CPU
            self._average = {n: average.to(current[n].device) for n, average in self._average.items() if n in current}
        averages, targets = [], []
        for name, tensor in (self._parameters | buffers).items():
            average = self._average.get(name)
            if average is not None:
                averages.append(average)
                targets.append(tensor.detach().to(average.dtype))
            elif tensor.requires_grad or name in buffers:  # what is frozen is its own average
                # With half precision the small steps of an average would be rounded away.
                dtype = torch.float32 if tensor.itemsize < 4 else tensor.dtype
                self._average[name] = tensor.detach().to(dtype, copy=True)
        if self._shared:  # torch moves no list of tensors that ranks share in several ways
            averages, targets = ([here(tensor) for tensor in tensors] for tensors in (averages, targets))
        if averages:
            self._move(averages, targets, 0)

    def _averaged_buffers(self, module: torch.nn.Module) -> Tensors:
        return {} if self.buffers == "copy" else {name: b for name, b in module.named_buffers() if can_be_averaged(b)}

    # Evaluating and exporting ---------------------------------------------------------

    @hookimpl(wrapper=True, specname="evaluate")
    def evaluate_the_average(self, trainer: Trainer) -> Generator[None, dict[str, float], dict[str, float]]:
        with self._swapped_in(trainer.module):
            return (yield)

    @hookimpl(wrapper=True)
    def export_model(self, trainer: Trainer) -> Generator[None, Tensors, Tensors]:
        with self._swapped_in(trainer.module):
            state = yield
            return copy_state(state) if self._average else state

    @contextlib.contextmanager
    @torch.no_grad()
    def _swapped_in(self, module: torch.nn.Module) -> Iterator[None]:
        """Have the average in the module's own tensors, and afterwards the very bits that were there."""
        current = parameters_of(module) | self._averaged_buffers(module)
        swapped = {name: tensor for name, tensor in current.items() if name in self._average}
        trained = {name: tensor.clone() for name, tensor in swapped.items()}
        try:
            for name, tensor in swapped.items():
                tensor.copy_(self._average[name])
            yield
        finally:
            for name, tensor in swapped.items():
                tensor.copy_(trained[name])

    # State ----------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return the average by the names of parameters and buffers, also where it has not begun."""
        return {"average": dict(self._average)}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        averages = state["average"].items()  # names with what torch.compile put into them are of an older version
        self._average, self._parameters = {name.replace("_orig_mod.", ""): average for name, average in averages}, None


def parameters_of(module: torch.nn.Module) -> Tensors:
    """Return the parameters that can be averaged by name; one that is tied stands there once."""
    return {name: parameter for name, parameter in module.named_parameters() if can_be_averaged(parameter)}


def here(tensor: Any) -> torch.Tensor:
    """Return this rank's share of a tensor that ranks share."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]


def can_be_averaged(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor holds numbers between which there are others."""
    return tensor.is_floating_point() or tensor.is_complex()
