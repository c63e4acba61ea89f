"""`train_step`, replayed: which steps are of one kind, when a kind is captured, and what is said if none can be."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from hookline_cudagraph.graphs import PLAIN, Graph, Uncapturable

if TYPE_CHECKING:
    from hookline import Trainer

COUNTED = 64
"""Of how many kinds that are not captured the steps are counted, before counting begins anew."""


class CapturedStep:
    """Stands in the place of `train_step`."""

    def __init__(self, trainer: Trainer, warmup: int, limit: int) -> None:
        module = trainer.module
        self.trainer, self.method, self.warmup, self.limit = trainer, module.train_step, warmup, limit
        self.stream: Any = torch.cuda.Stream(trainer.device)  # type: ignore[no-untyped-call]
        self.graphs: dict[Any, Graph] = {}
        self.reason = ""
        """Why all steps run in Python from now on; "" while they do not."""
        self.capturing = False
        self._seen: collections.Counter[Any] = collections.Counter()
        self._parts, self._weights = [*module.modules()], [*module.parameters()]
        self._tensors = [*self._weights, *module.buffers()]

    def __call__(self, global_step: int, batch: Any, device: Any) -> Any:
        if self.reason or not torch.is_grad_enabled():
            return self.method(global_step=global_step, batch=batch, device=device)
        leaves, form = tree_flatten(batch)
        try:
            kind = self._kind(leaves, form)
            if (graph := self.graphs.get(kind)) is None and self._due(kind):
                graph = self.graphs[kind] = self._capture(leaves, form, device)
            if graph is not None:
                return graph(global_step, leaves)
        except Uncapturable as why:
            self._give_up(str(why))
            return self.method(global_step=global_step, batch=batch, device=device)
        return self._warm_up(global_step, batch, device)

    def _kind(self, leaves: list[Any], form: Any) -> tuple[Any, ...]:
        """Return all that a graph keeps, and that has to be the same at a replay.

        Raises:
            Uncapturable: the batch has something else than tensors on the device, numbers and texts.
        """
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and not leaf.is_cuda:
                raise Uncapturable(f"a tensor of the batch is on {leaf.device}")
            if not isinstance(leaf, (torch.Tensor, *PLAIN)):
                raise Uncapturable(f"the batch has a {type(leaf).__name__}, neither tensor nor number nor text")
        return (
            form,
            *[(x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else (type(x), x) for x in leaves],
            *[part.training for part in self._parts],
            *[weight.requires_grad for weight in self._weights],
            *[tensor.data_ptr() for tensor in self._tensors],
            torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        )

    def _due(self, kind: Any) -> bool:
        """Count a step of a kind that is not captured; tell whether to capture it."""
        if len(self._seen) >= COUNTED and kind not in self._seen:
            self._seen.clear()
        self._seen[kind] += 1
        if self._seen[kind] <= self.warmup:
            return False
        if len(self.graphs) < self.limit:
            return True
        self.trainer.say_once(
            f"cudagraph: steps of more than cudagraph.kinds={self.limit} kinds come often: of other shapes of the "
            "batch, with other weights to train, or in other modes; those that came last run in Python"
        )
        return False

    def _capture(self, leaves: list[Any], form: Any, device: Any) -> Graph:
        def run(leaves: list[Any], global_step: Any) -> Any:
            return self.method(global_step=global_step, batch=tree_unflatten(leaves, form), device=device)

        self.capturing = True
        try:
            return Graph(self.trainer, run, leaves, self.stream)
        finally:
            self.capturing = False

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self.graphs.clear()
        self.trainer.say_once(f"cudagraph: train_step is not captured: {reason}")

    def _warm_up(self, global_step: int, batch: Any, device: Any) -> Any:
        """Do a step in Python, on the stream that captures, where libraries make what they have for each stream."""
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            outputs = self.method(global_step=global_step, batch=batch, device=device)
        here.wait_stream(self.stream)
        return outputs

    def __reduce__(self) -> Any:
        return same, (self.method,)


def same(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return what is given: a copy of a module has the method that was there before."""
    return method
