"""CUDA graphs of a device that is not there: what a capture records, what it refuses, and what a replay does again."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils._pytree import tree_leaves

GARBAGE = 255
"""What each byte of memory is that holds no result yet, or none any more: NaN in numbers of any precision."""


class Device(Protocol):
    """What graphs use of the device."""

    capturing: CUDAGraph | None
    random: torch.Tensor

    def do(self, func: Any, args: Any, kwargs: Any, draws: bool) -> Any:
        """Do an operation on values, which may draw random numbers of the device."""

    def wait(self, what: str, *, asked: bool = False) -> None:
        """Have the host wait."""


class Pool:
    """Memory of one graph, or of several: what has been made in it, and who still holds it."""

    def __init__(self) -> None:
        self.own: set[int] = set()
        """Where it is."""
        self.made: list[tuple[weakref.ref[torch.Tensor], torch.Tensor]] = []
        """Each tensor of the device that lies in it, with its values."""

    def hold(self, made: torch.Tensor, here: torch.Tensor) -> None:
        """Note a tensor of the device, if it lies in this memory."""
        if _memory(here) in self.own:
            self.made.append((weakref.ref(made), here))

    def give_back(self) -> list[torch.Tensor]:
        """Return the values of what nobody holds any more: another capture, or the rest of this one, may lie there."""
        held = {_memory(here) for tensor, here in self.made if tensor() is not None}
        free = [here for _, here in self.made if _memory(here) not in held]
        self.made = [pair for pair in self.made if _memory(pair[1]) in held]
        return free


class Call(NamedTuple):
    """An operation, with the values that it works on."""

    func: Any
    args: Any
    kwargs: Any
    draws: bool
    results: list[torch.Tensor]


class CUDAGraph:
    """Operations that were recorded, and are done again on the same memory.

    A capture does nothing: what it makes is garbage until the first replay. Numbers are those of the capture, random
    ones are drawn anew. Behind a replay, memory that nobody has held since the capture is garbage again.
    """

    device: Device

    def __init__(self, keep_graph: bool = False) -> None:
        self.calls: list[Call] | None = None

    def capture_begin(self, pool: Pool | None = None, capture_error_mode: str = "global") -> None:
        """Record from here on."""
        if self.device.capturing is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing (one in another)")
        self.memory, self.broken, self._random = pool or Pool(), False, self.device.random
        self._calls: list[Call] = []
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # memory of others, and what it held
        self.device.capturing = self

    def record(self, func: Any, args: Any, kwargs: Any, draws: bool) -> Any:
        """Do an operation, of which `capture_end` leaves nothing; return its result."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for one in given:  # not only what a schema says is written: those of batch norms do not say it
            if _memory(one) not in self.memory.own and _memory(one) not in self._before:
                self._before[_memory(one)] = _bytes(one), _bytes(one).clone()
        result = self.device.do(func, args, kwargs, draws)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        views = {_memory(one) for one in given}
        fresh = {_memory(one) for one in results} - views
        self.memory.own |= fresh
        if fresh or func._schema.is_mutable:
            self._calls.append(Call(func, args, kwargs, draws, results))
        return result

    def capture_end(self) -> None:
        """Record no more."""
        self.device.capturing, self.device.random = None, self._random
        for now, before in self._before.values():
            now.copy_(before)
        for _, here in self.memory.made:
            _bytes(here).fill_(GARBAGE)
        self._free = self.memory.give_back()
        if self.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.calls = self._calls

    def replay(self) -> None:
        """Do all again: no Python but that of the fake device runs."""
        if self.calls is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        with torch.no_grad():
            for func, args, kwargs, draws, results in self.calls:
                again = [one for one in tree_leaves(self.device.do(func, args, kwargs, draws)) if torch.is_tensor(one)]
                for kept, new in zip(results, again, strict=True):
                    if _memory(kept) != _memory(new):
                        kept.copy_(new)
            for here in self._free:
                _bytes(here).fill_(GARBAGE)

    def reset(self) -> None:
        """Forget what was recorded."""
        self.calls = None

    def pool(self) -> Pool:
        """Return the memory, for another capture."""
        return self.memory


def _memory(here: torch.Tensor) -> int:
    return here.untyped_storage().data_ptr()


def _bytes(here: torch.Tensor) -> torch.Tensor:
    """Return all memory that a tensor lies in."""
    return torch.empty(0, dtype=torch.uint8).set_(here.untyped_storage())


def functions(device: Device) -> dict[str, Any]:
    """Return what stands in for functions of `torch.cuda`."""

    @contextlib.contextmanager
    def graph(
        cuda_graph: CUDAGraph, pool: Pool | None = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        device.wait("torch.cuda.graph waits before it begins", asked=True)
        cuda_graph.capture_begin(pool, capture_error_mode)
        try:
            yield
        finally:
            cuda_graph.capture_end()

    return {
        "CUDAGraph": type("CUDAGraph", (CUDAGraph,), {"device": device}),
        "graph": graph,
        "graph_pool_handle": Pool,
        "is_current_stream_capturing": lambda: device.capturing is not None,
    }


def apart_from_captures(device: Device, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the random numbers of the device, which raises within a capture."""

    def outside(*args: Any, **kwargs: Any) -> Any:
        if device.capturing is not None:
            raise RuntimeError("Cannot ask a CUDA generator for its state, or set it, during CUDA graph capture")
        return function(*args, **kwargs)

    return outside
