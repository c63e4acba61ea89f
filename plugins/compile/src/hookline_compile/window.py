"""The whole window: `train_step` with its loss and backward, and the step of each optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from hookline_compile.breaks import Breaks
from hookline_compile.compiled import Compiled, name_of, own_function

if TYPE_CHECKING:
    from hookline import Trainer

GRAPHS = ("reduce-overhead", "max-autotune")
"""The modes that replay CUDA graphs, whose outputs the next replay overwrites."""

Options = dict[str, Any]


class CompiledFunction(Compiled):
    """A part of the window, compiled: it says at which lines it breaks, and what it returns is the caller's own."""

    def __init__(
        self, trainer: Trainer, function: Callable[..., Any], name: str, advice: str, options: Options
    ) -> None:
        super().__init__(function, torch.compile(own_function(function), **options), advice)
        self.trainer, self.breaks, self.overwritten = trainer, Breaks(name), options["mode"] in GRAPHS

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.breaks.begin()
        outputs = super().__call__(*args, **kwargs)
        self.breaks.tell(self.trainer)
        return copied(outputs) if self.overwritten else outputs


def compile_function(trainer: Trainer, function: Callable[..., Any], options: Options) -> CompiledFunction:
    """Return a function of another plugin, compiled; what cannot be compiled in one piece is no error of the user's."""
    name = f"{function.__module__}.{name_of(function)}"
    advice = f"this is {name}, which a plugin calls at each step. `compile.scope: blocks` leaves it in Python"
    return CompiledFunction(trainer, function, name, advice, options | {"fullgraph": False})


class CompiledStep(CompiledFunction):
    """`train_step`, compiled with the backward of its loss; what it logs is logged when it has returned."""

    def __init__(self, trainer: Trainer, options: Options) -> None:
        self.module = trainer.module
        given = self.module.train_step
        method = given.method if isinstance(given, Compiled) else given  # of an earlier trainer
        advice = "this is train_step. `compile.scope: blocks` leaves it in Python and compiles the blocks of the model"
        super().__init__(trainer, method, "train_step", advice, options)
        self.called = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.trainer, self.called = self.module.trainer, True  # a later trainer may have none to compile
        with self.trainer.logs.later():
            return super().__call__(*args, **kwargs)


def copied(outputs: Any) -> Any:
    """Return the outputs of a step, with tensors that the next step does not overwrite."""
    if isinstance(outputs, (tuple, list)):
        return tuple(map(copied, outputs))
    return outputs.clone() if isinstance(outputs, torch.Tensor) else outputs


def compile_optimizer(trainer: Trainer, train_step: CompiledStep, optimizer: Optimizer, options: Options) -> None:
    """Compile the step of an optimizer of torch, once; say why another stays as it is."""
    own = vars(optimizer).get("step")
    if isinstance(own, CompiledOptimizerStep):
        return
    name = type(optimizer).__name__
    if not type(optimizer).__module__.startswith("torch.optim."):
        reason = "it is none of torch's optimizers"
    elif own is not None and not hasattr(own, "_wrapped_by_lr_sched"):
        reason = "somebody has put another in its place"
    elif optimizer.defaults.get("differentiable"):
        reason = "it is differentiable"
    else:
        optimizer.step = CompiledOptimizerStep(trainer, train_step, optimizer, options)  # type: ignore[method-assign]
        return
    trainer.say_once(f"compile: {name}.step is not compiled: {reason}")


class CompiledOptimizerStep:
    """The step of an optimizer: its hooks in Python, what it computes compiled, and rates that may change.

    torch compiles a number as a constant, and compiles anew for another. So the learning rates, which schedules change,
    are tensors while the step runs.
    """

    _wrapped_by_lr_sched = True
    """torch's schedulers ask whether they have put their own step in the place of the optimizer's, to note each."""

    def __init__(self, trainer: Trainer, train_step: CompiledStep, optimizer: Optimizer, options: Options) -> None:
        self.trainer, self.train_step = trainer, train_step
        self.optimizer, self.in_python = optimizer, optimizer.step
        body = inspect.unwrap(type(optimizer).step)
        self.compiled = torch.compile(own_function(body), **options | {"fullgraph": False})
        self.hooked = Optimizer.profile_hook_step(self._run)
        self.breaks = Breaks(f"{type(optimizer).__name__}.step")
        self.rates: dict[int, torch.Tensor] = {}

    def __call__(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is None:
            return self.hooked(self.optimizer)
        name = type(self.optimizer).__name__
        self.trainer.say_once(f"compile: {name}.step is not compiled: it gets a closure, which runs the whole window")
        return self.in_python(closure)

    def _run(self, optimizer: Optimizer) -> None:
        if not self.train_step.called:
            raise ValueError(
                "compile.scope='window' compiles train_step, and this step has not called it: the module, or a plugin, "
                "trains by calling other parts of it; take compile.scope: blocks"
            )
        self.breaks.begin()
        numbers = [group["lr"] for group in optimizer.param_groups]
        try:
            for place, group in enumerate(optimizer.param_groups):
                group["lr"] = self._rate(place, group)
            with torch.no_grad():
                self.compiled(optimizer)
        finally:
            for group, number in zip(optimizer.param_groups, numbers, strict=True):
                group["lr"] = number
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what torch's schedulers note
        self.breaks.tell(self.trainer)

    def _rate(self, place: int, group: dict[str, Any]) -> torch.Tensor:
        if isinstance(group["lr"], torch.Tensor):
            return group["lr"]
        if place not in self.rates:
            device = group["params"][0].device if group["params"] else None
            self.rates[place] = torch.empty((), dtype=torch.float64, device=device)
        return self.rates[place].fill_(group["lr"])
