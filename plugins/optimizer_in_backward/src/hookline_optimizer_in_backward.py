"""Step each parameter as soon as its gradient is complete, and free the gradient, so that few are alive at once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

MODULE = "module"  # the name of the user's module among the plugins
PERFORMED = ("update", "run_window", "forward_backward", "step_optimizers", "step_optimizer")
"""Verbs whose performers may run backward several times in a step, or step in a way of their own."""


@dataclass(eq=False)
class OptimizerInBackward(CallbackInterface):
    """Step each parameter in backward, as soon as its gradient is complete, and free the gradient.

    The optimizers stay those of the run, with their states and groups. Whoever needs all gradients at once is refused.
    """

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._handles: list[Any] = []
        self._places: dict[torch.Tensor, tuple[torch.optim.Optimizer, int]] = {}  # with the number of the group
        self._parts: dict[torch.optim.Optimizer, torch.optim.Optimizer] = {}  # each steps one parameter at a time
        self._stepping = False  # whether a backward pass of the loop is under way
        self._done = False  # whether one was, in this step

    @hookimpl(trylast=True)  # behind those who add weights, or look at each gradient
    def on_begin_train(self, trainer: Trainer) -> None:
        if said := next(mistakes(trainer), None):
            raise ValueError(f"optimizer_in_backward steps each parameter in backward, so {said}")
        for impl in trainer.plugins.hook.on_begin_optimizer_step.get_hookimpls():
            trainer.say_once(
                f"{impl.plugin_name!r} hears on_begin_optimizer_step, and finds no gradient with optimizer_in_backward"
            )
        for optimizer in trainer.optimizers:
            self._parts[optimizer] = copy.copy(optimizer)
            for number, group in enumerate(optimizer.param_groups):
                for weight in group["params"]:
                    self._places[weight] = optimizer, number
                    self._handles.append(hooked(weight, self._step))

    @hookimpl
    def on_end_run(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._begin()

    # A step ---------------------------------------------------------------------------

    @hookimpl
    def run_backward(self, trainer: Trainer, loss: torch.Tensor) -> bool:
        if self._done or trainer.window_size > 1:
            raise ValueError(
                "optimizer_in_backward: a second backward pass in one optimizer step, of which the first has stepped "
                "already: train with windows of one micro-batch, or turn optimizer_in_backward off"
            )
        self._stepping = self._done = True
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        finally:
            self._stepping = False
        return True

    @hookimpl
    def on_end_optimizer_step(self) -> None:
        self._done = False

    def _step(self, weight: torch.Tensor) -> None:
        """Step one parameter by its own optimizer, whose state and options may be others than in the last step."""
        if not self._stepping:  # in a pass of the user's own, whose gradients the loop steps
            return
        optimizer, number = self._places[weight]
        part, group = self._parts[optimizer], optimizer.param_groups[number]
        first = weight not in optimizer.state
        own = {**group, "params": [weight]}
        part.state, part.param_groups = optimizer.state, [own]
        part.step()
        weight.grad = None
        changed: list[Any] = [name for name, value in own.items() if name != "params" and value is not group.get(name)]
        changed += [key for key in optimizer.state if not isinstance(key, torch.Tensor)] if first else []
        if changed:
            raise ValueError(
                f"optimizer_in_backward: {type(optimizer).__name__} keeps what its parameters share "
                f"({', '.join(map(str, changed))}), so they cannot be stepped one by one; turn this plugin off"
            )


def hooked(weight: torch.Tensor, hook: Any) -> Any:
    """Register a hook on a parameter; one that is frozen may be trained later."""
    trained = weight.requires_grad
    weight.requires_grad_(True)
    handle = weight.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    weight.requires_grad_(trained)
    return handle


def mistakes(trainer: Trainer) -> Iterator[str]:
    """Yield what cannot be trained so, each with who it is and the way out."""
    plugins, hooks = trainer.plugins, trainer.plugins.hook

    def off(name: str) -> str:
        if name == MODULE:
            return "turn optimizer_in_backward off"
        return f"turn it off (`plugins.{name}: null`), or optimizer_in_backward"

    if trainer.window_size > 1:
        for name in plugins.performers("get_window_size") or [MODULE]:
            yield f"a step has one backward pass, and {name!r} asks for {trainer.window_size}; {off(name)}"
    for verb in PERFORMED:
        for name in sorted(plugins.performers(verb)):
            yield f"{name!r}, which performs {verb}, cannot run backward or step by itself; {off(name)}"
    for impl in sorted(hooks.on_begin_optimizer_step.get_hookimpls(), key=lambda impl: impl.plugin_name):
        if "optimizers" in impl.argnames or impl.plugin_name == MODULE:  # else told in `on_begin_train`
            name = impl.plugin_name
            yield f"{name!r}, which needs all gradients at once, would find none; {off(name)}"
    for name in sorted({impl.plugin_name for impl in hooks.should_step.get_hookimpls()} - {"core"}):
        yield f"{name!r}, which may refuse a step, would come too late; {off(name)}"
    for optimizer in trainer.optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer) or optimizer._optimizer_step_pre_hooks:
            yield (
                f"hooks before the step of {type(optimizer).__name__} would find no gradients; make it an optimizer of "
                "torch without such hooks, or turn optimizer_in_backward off"
            )
    if trainer.world_size > 1:
        for name, weight in trainer.module.named_parameters():
            if weight.requires_grad and not hasattr(weight, "device_mesh"):
                yield (
                    f"the gradient of {name} must be that of all ranks by then, and it is this rank's, averaged later: "
                    "share the weights by fsdp, or turn optimizer_in_backward off"
                )
                return
