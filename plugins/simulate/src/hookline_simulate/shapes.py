"""Tensors that have shapes and no values: what they hold in memory, and what is sent of them."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, _resolve_process_group
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hookline_simulate.clock import Clock
from hookline_simulate.world import SENT, Collective, World


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bytes_of(tree: Any) -> int:
    """Return the bytes of the tensors in nested containers that this rank has; what is tied counts once."""
    leaves = tree_leaves([dict(kept) if isinstance(kept, Mapping) else kept for kept in tree])
    tensors = {id(leaf): local(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)}
    return sum(map(size_of, tensors.values()))


def size_of(tensor: Any) -> int:
    """Return the bytes of a tensor: those of its parts, where it is made of others (in 8 bits, say)."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(size_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return int(tensor.numel() * tensor.element_size())


class Shapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Has tensors without values wherever numbers are not whole, and counts what they hold and what is sent."""

    def __init__(self, world: World, clock: Clock) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.clock = clock
        self._world = world
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.sharded = self.in_forward = self.counting = False
        self.live = self.peak = self.gradients = self.states = 0
        self.activations: int | None = None
        self.parameters: list[torch.nn.Parameter] = []
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, Any] = {}
        self._counted: dict[tuple[str, int, str], Collective] = {}

    def emptied(self, value: Any) -> Any:
        """Return a tensor without its values, if its numbers are not whole."""
        has_values = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) and not value.is_meta
        if not has_values or not value.is_floating_point():
            return value
        with self, torch.no_grad():
            fake = self._empty(torch.empty_like, value)
            return torch.nn.Parameter(fake, value.requires_grad) if isinstance(value, torch.nn.Parameter) else fake

    def _empty(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Do an operation without values."""
        with self.fake:
            result = func(*args, **kwargs)
        self.fake.fake_tensor_converter.tensor_memo.clear()  # its references would forbid `module.to(...)`
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do an operation with values where all tensors have them, else without."""
        plain = torch._C._disabled_torch_dispatch_impl
        if any(kind is not FakeTensor and kind.__torch_dispatch__ is not plain for kind in types):
            return NotImplemented  # e.g. a DTensor: what it does with its parts comes by here again
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        empty = any(isinstance(tensor, FakeTensor) for tensor in tensors) or (not tensors and _is_float(func, kwargs))
        if not empty and func.namespace == "c10d" and func.__name__.startswith("recv"):
            raise RuntimeError("it waits for numbers that another rank sends, and here is nobody else")
        if not empty:
            result = func(*args, **kwargs)
        elif func is torch.ops.aten._local_scalar_dense.default and not self.in_forward:
            return {torch.bool: True, torch.int64: 0}.get(tensors[0].dtype, 0.0)  # a flag says that all is well
        elif func is torch.ops.aten._pin_memory.default:
            result = args[0]
        elif func.namespace == "c10d":
            result = _do_nothing(func, args)
        else:
            result = self._empty(func, *args, **kwargs)
        self._note(tensors)
        self._note(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        if self.counting and func.namespace in ("c10d", "_c10d_functional", "_dtensor"):
            self._count(func, args, result)
        elif self.counting:
            self.clock.compute(func, args, kwargs, result)
        return result

    # Memory ---------------------------------------------------------------------------

    def find(self) -> None:
        """Look for what lives already, made while nobody listened: what plugins keep, an average of weights."""
        gc.collect()
        fakes = [found for found in gc.get_objects() if issubclass(type(found), FakeTensor)]
        self._note(fake for fake in fakes if fake.fake_mode is self.fake)

    def _note(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            if isinstance(tensor, FakeTensor):
                self._resized(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._sizes:

            def freed(_: Any) -> None:
                self.live -= self._sizes.pop(key)
                del self._watched[key]
                self.clock.forget(key)

            self._watched[key] = weakref.ref(storage, freed)
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    @contextlib.contextmanager
    def resizes(self) -> Iterator[None]:
        """Hear of memory that is given back, or taken again, while its tensor lives on."""
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if id(storage) in self._sizes:
                self._resized(storage)
                self.peak = max(self.peak, self.live)
            return result

        with mock.patch.object(torch.UntypedStorage, "resize_", resize_):
            yield

    # Communication --------------------------------------------------------------------

    def _count(self, func: Any, args: Any, result: Any) -> None:
        group = next(filter(None, map(_group, args)), None)
        if group is None or "barrier" in func.__name__:
            self.clock.compute(func, args, {}, result)  # it waits for another
            return
        name = func.__name__.partition(".")[0].strip("_")
        kind = next((known for known in SENT if known.replace("_", "") in name.replace("_", "")), name)
        if kind == "all_to_all" and any(isinstance(parts, list) and len(parts) - parts.count(0) == 1 for parts in args):
            kind = "permute"  # each sends all that it has to one other
        ranks = dist.get_process_group_ranks(group)
        size = max(bytes_of([part]) for part in (*args[:2], result))  # in and out: one of them is the whole
        key = kind, len(ranks), self._world.where(ranks)
        row = self._counted.setdefault(key, Collective(*key))
        row.calls, row.bytes = row.calls + 1, row.bytes + size
        self.clock.send(row, ranks, size, func, (args, result))

    @property
    def collectives(self) -> list[Collective]:
        """What has been counted."""
        return list(self._counted.values())


def _is_float(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Tell whether what makes a tensor out of nothing makes one whose numbers are not whole."""
    if torch.device(kwargs.get("device") or "cpu").type == "meta":  # somebody else's shapes
        return False
    dtype = kwargs.get("dtype")
    if dtype is None:
        return not func.__name__.startswith(("arange", "randint", "randperm"))
    return bool(dtype.is_floating_point or dtype.is_complex)


def _do_nothing(func: Any, args: Any) -> Any:
    """Return what a collective returns that has not changed its tensors."""
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(args[0] if isinstance(args[0], list) else [args[0]])
    work = torch._C._distributed_c10d._create_work_from_future(future).boxed()  # type: ignore[attr-defined]
    return work if len(func._schema.returns) == 1 else (args[0], work)


def _group(argument: Any) -> Any:
    """Return the process group that an argument of a collective names."""
    if isinstance(argument, torch.ScriptObject):
        with contextlib.suppress(RuntimeError):
            return ProcessGroup.unbox(argument)
    if isinstance(argument, str):
        with contextlib.suppress(RuntimeError):
            return _resolve_process_group(argument)  # type: ignore[arg-type]
    return argument if isinstance(argument, dist.ProcessGroup) else None
