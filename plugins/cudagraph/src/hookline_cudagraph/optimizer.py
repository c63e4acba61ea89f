"""The step of an optimizer, replayed: of the same gradients, states and options, which are part of a graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from hookline_cudagraph.graphs import Uncapturable, captured

if TYPE_CHECKING:
    from hookline import Trainer

WITHOUT = (torch.optim.SGD,)
"""Optimizers without the option `capturable` whose steps compute no number in Python but of their options."""
LATE = 5
"""After how many warm-ups it is said that nothing was captured so far."""


def uncapturable(optimizer: Optimizer) -> str:
    """Return why the steps of an optimizer cannot be captured, or ""."""
    own = vars(optimizer).get("step")
    if not type(optimizer).__module__.startswith("torch.optim."):
        return "it is none of torch's optimizers"
    if own is not None and not (inspect.isroutine(own) and hasattr(own, "_wrapped_by_lr_sched")):
        return "somebody has put another in its place"
    if type(optimizer) in WITHOUT:
        tensors = [name for group in optimizer.param_groups for name in group if isinstance(group[name], torch.Tensor)]
        return f"it asks the device for {tensors[0]}, which is a tensor" if tensors else ""
    if any("capturable" not in group for group in optimizer.param_groups):
        return "torch cannot capture it"
    if not all(group["capturable"] for group in optimizer.param_groups):
        return "it computes numbers in Python; make it with capturable=True"
    return ""


class CapturedOptimizer:
    """Stands in the place of the `step` of an optimizer; its hooks stay Python.

    A step is of one kind with another if all addresses and options are equal: they stay in the graph what they were.
    """

    _wrapped_by_lr_sched = True
    """torch's schedulers ask whether they have put their own step in the place of the optimizer's, to note each."""

    def __init__(self, trainer: Trainer, optimizer: Optimizer, stream: Any, warmup: int, limit: int) -> None:
        self.trainer, self.optimizer, self.in_python = trainer, optimizer, optimizer.step
        self.stream, self.warmup, self.limit = stream, warmup, limit
        self.body = inspect.unwrap(type(optimizer).step)
        self.hooked = Optimizer.profile_hook_step(self._run)
        self.graphs: list[tuple[Any, torch.cuda.CUDAGraph]] = []
        self.reason = ""
        """Why all steps run in Python from now on; "" while they do not."""
        self._last: Any = ([], [])
        self._alike = self._steps = 0  # steps of the last kind in a row, and all

    def __call__(self, closure: Callable[[], Any] | None = None) -> Any:
        scaled = getattr(self.optimizer, "grad_scale", None) is not None  # by a fused step, from a tensor made anew
        if closure is not None or scaled or self.reason:
            return self.in_python(closure)
        return self.hooked(self.optimizer)

    def _run(self, optimizer: Optimizer) -> None:
        try:
            graph = self._graph()
        except Uncapturable as why:
            self.reason, graph = str(why), None
            self.trainer.say_once(f"cudagraph: {type(optimizer).__name__}.step is not captured: {why}")
        if graph is None:
            with torch.no_grad():
                self.body(optimizer)
        else:
            graph.replay()
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what torch's schedulers note

    def _graph(self) -> torch.cuda.CUDAGraph | None:
        """Return the graph for this step, captured if enough steps like it came before; None for a step in Python."""
        last, kind = self._last, self._kind()
        self._last, self._alike, self._steps = kind, self._alike + 1 if kind == last else 1, self._steps + 1
        for known, graph in self.graphs:
            if known == kind:
                return graph
        if self._alike > self.warmup and len(self.graphs) < self.limit:
            graph = torch.cuda.CUDAGraph()
            with captured(graph, None, self.stream), torch.no_grad():
                self.body(self.optimizer)
            self.graphs.append((kind, graph))
            return graph
        if self._steps == LATE * self.warmup and not self.graphs:
            self._say_why(dict(last[0]), dict(kind[0]))
        return None

    def _kind(self) -> tuple[list[Any], list[Any]]:
        """Return the options and the addresses of all tensors."""
        groups, state = self.optimizer.param_groups, self.optimizer.state
        options = [
            (f"{name} of group {number}", kept(value))
            for number, group in enumerate(groups)
            for name, value in group.items()
            if name != "params"
        ]
        weights = [weight for group in groups for weight in group["params"]]
        tensors = [one for weight in weights for one in (weight, weight.grad, *state.get(weight, {}).values())]
        return options, [kept(tensor) for tensor in tensors]

    def _say_why(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        others = [name for name in now if before.get(name) != now[name]]
        why = f"{', '.join(others)} changes from step to step" if others else "gradients lie elsewhere in each step"
        advice = "; a rate may be a tensor on the device, which a scheduler fills" if others else ""
        name = type(self.optimizer).__name__
        self.trainer.say_once(f"cudagraph: {name}.step is not captured so far: {why}{advice}", about=f"{name} late")


def kept(value: Any) -> Any:
    """Return what a graph keeps: of a tensor on the device its address, else the value.

    Raises:
        Uncapturable: a tensor that has no address.
    """
    if not isinstance(value, torch.Tensor):
        return value
    if value.layout is not torch.strided:
        raise Uncapturable("a gradient is sparse")
    return ("at", value.data_ptr()) if value.is_cuda else value.tolist()
