"""An optimizer as `self.optimizers()` shows it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch


class Still(torch.optim.Optimizer):
    """Stands where there is no optimizer, and moves nothing."""

    def step(self, closure: Any = None) -> Any:
        return None if closure is None else closure()


class LightningOptimizer:
    """An optimizer whose `step` goes through the gates of the run."""

    def __init__(self, optimizer: torch.optim.Optimizer, bridge: Any) -> None:
        self.optimizer = optimizer
        self._bridge = bridge
        self.stepped = False
        """Whether it has stepped since the batch began."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Of the optimizer, for `isinstance`."""
        return type(self.optimizer)

    def step(self, closure: Any = None, **options: Any) -> Any:
        """Step, with the gradients averaged over ranks: gates, clipping and the scaler come with it.

        The gradients stay as they are; clear them by `zero_grad`. In automatic optimisation this is a step beside
        that of the run: nothing counts it, and schedulers do not move.

        Returns:
            What the closure answered at last.
        """
        if options:
            raise TypeError(f"step() takes a closure alone, not {', '.join(options)}")
        answers: list[Any] = []
        if closure is not None:
            closure = self._averaging(closure, answers)
        if self._bridge.manual:
            self._step(closure)
            self._bridge.steps += 1
        else:
            self._step_beside(closure)
        return answers[-1] if answers else None

    def _step(self, closure: Any) -> None:
        core = self._bridge.trainer
        self._average()
        gradients = {
            one: one.grad
            for other in core.optimizers
            for group in other.param_groups
            for one in group["params"]
            if closure is None or other is not self.optimizer
        }
        core.step([self.optimizer], closure)  # it clears the gradients of all
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        self.stepped = True

    def _step_beside(self, closure: Any) -> None:
        core, one = self._bridge.trainer, [self.optimizer]
        if core.shares > 1:
            raise ValueError(
                "self.optimizers().step() in automatic optimisation, and several processes: nobody averages these "
                "gradients; set self.automatic_optimization = False in __init__"
            )
        others = [name for name in core.plugins.performers("run_backward") if not name.startswith("lightning.")]
        if others:
            raise ValueError(
                f"self.optimizers().step() in automatic optimisation, and the plugin {others[0]}, which does backward "
                "in a way of its own (scaling the loss, say) and not this one: set self.automatic_optimization = False"
            )
        if closure is None:
            core.hook.on_begin_optimizer_step(trainer=core, optimizers=one)
        else:
            closure = self._completing(closure)
        self._bridge.now.beside = True
        try:
            stepped = bool(core.hook.should_step(trainer=core, optimizers=one))
            if stepped:
                stepped = bool(core.hook.step_optimizer(trainer=core, optimizer=self.optimizer, closure=closure))
            core.hook.on_end_optimizer_step(trainer=core, optimizers=one, stepped=stepped)
        finally:
            self._bridge.now.beside = False

    def _completing(self, closure: Any) -> Any:
        def complete() -> Any:
            loss, core = closure(), self._bridge.trainer
            core.hook.on_begin_optimizer_step(trainer=core, optimizers=[self.optimizer])
            return loss

        return complete

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Generator[None, None, None]:
        """Have only the parameters of this optimizer require gradients within."""
        self._bridge.toggle(self.optimizer)
        try:
            yield
        finally:
            self._bridge.untoggle()

    def _averaging(self, closure: Any, answers: list[Any]) -> Any:
        def run() -> Any:
            with torch.enable_grad():
                answers.append(closure())
            self._average()
            return answers[-1]

        return run

    def _average(self) -> None:
        """Give each gradient its mean over ranks."""
        core = self._bridge.trainer
        if core.shares == 1:
            return
        groups = self.optimizer.param_groups
        found = [one.grad for group in groups for one in group["params"] if one.grad is not None]
        if not found:
            return
        whole = torch.cat([one.flatten() for one in found])
        whole = core.hook.all_reduce(trainer=core, value=whole, op="sum") / core.shares
        for gradient, part in zip(found, whole.split([one.numel() for one in found]), strict=True):
            gradient.copy_(part.view_as(gradient))
