"""A CUDA device that is not there: its tensors compute on the CPU, and are as strict as those of a real device.

torch's own `FakeTensor` cannot stand in for one: in a build of torch without CUDA its backward pass ends the process.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode  # sees every operation; torch documents it under this name
from torch.utils._pytree import tree_leaves, tree_map_only

from hookline.testing import fake_graphs
from hookline.testing.fake_autocast import fake_autocast

CUDA = torch.device("cuda", 0)
BASE: Any = torch._C.TensorBase
MAKE: Any = torch.Tensor._make_subclass
COPIES = ("aten::copy_", "aten::_to_copy", "aten::_foreach_copy_")


class Wait(NamedTuple):
    """Something for which the host waits for the device."""

    what: str
    where: str
    """File and line of the innermost frame that is not torch's."""

    def __str__(self) -> str:
        return f"{self.what}, {self.where}"


def _on_cuda(value: Any) -> bool:
    """Tell whether a tensor, or the first of several, is on the device: `here` is its values."""
    return hasattr(value[0] if isinstance(value, list | tuple) and value else value, "here")


def _put(here: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is on the device, with the memory of one on the CPU.

    For C++ it has only a shape, and the dispatch keys of CUDA: autograd asks for no real device then.
    """
    shape = torch.empty_strided(here.shape, here.stride(), dtype=here.dtype, device="meta")
    made = MAKE(torch.Tensor, shape, False, device_for_backend_keys=CUDA)
    made.here = here
    return made  # type: ignore[no-any-return]


class Members:
    """Members of `torch.Tensor` that do no operation, and would tell what C++ knows: of a tensor without values."""

    device = property(lambda self: CUDA if _on_cuda(self) else BASE.device.__get__(self))
    is_cuda = property(_on_cuda)
    is_meta = property(lambda self: not _on_cuda(self) and BASE.is_meta.__get__(self))

    @property
    def data(self: Any) -> Any:
        return BASE.data.__get__(self)

    @data.setter
    def data(self: Any, value: Any) -> None:
        BASE.data.__set__(self, value)
        self.__dict__.pop("here", None)
        if _on_cuda(value):
            self.here = value.here

    @staticmethod
    def _make_subclass(cls: Any, data: Any, requires_grad: bool = False, **kwargs: Any) -> Any:
        made = MAKE(cls, data, requires_grad, **kwargs)
        if _on_cuda(data):
            made.here = data.here
        return made

    def get_device(self: Any) -> Any:
        return 0 if _on_cuda(self) else BASE.get_device(self)

    def data_ptr(self: Any) -> Any:
        return BASE.data_ptr(getattr(self, "here", self))

    def untyped_storage(self: Any) -> Any:
        return BASE.untyped_storage(getattr(self, "here", self))

    def numpy(self: Any, *, force: bool = False) -> Any:
        if _on_cuda(self) and not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to the host")
        return BASE.numpy(self.cpu() if _on_cuda(self) else self, force=force)

    def tolist(self: Any) -> Any:
        return BASE.tolist(self.detach().cpu())

    def record_stream(self: Any, stream: Any) -> None:
        pass


class FakeCuda(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The device while it is there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[Wait] = []
        """What has waited while `watching`."""
        self.watching = False
        self.means: tuple[str, ...] = ()
        """Which other device C++ means by `cuda`, while a function of its tensors runs."""
        self.random = torch.Generator().manual_seed(0).get_state()
        """The state of the device's own random numbers."""
        self.capturing: fake_graphs.CUDAGraph | None = None
        """The CUDA graph that records what is asked of the device."""
        self.sync_mode = 0
        """As `torch.cuda.set_sync_debug_mode` sets it: with 2, an operation for which the host would wait raises."""

    def wait(self, what: str, *, asked: bool = False) -> None:
        """Note that the host waits for the device; `asked` where it does so by a function that is made for it."""
        if self.capturing is not None:
            self.capturing.broken = True
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what}, {_place()})")
        if self.sync_mode == 2 and not asked:
            raise RuntimeError(f"called a synchronizing CUDA operation ({what}, {_place()})")
        if self.watching:
            self.waits.append(Wait(what, _place()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do an operation on the CPU; its result is where a real one would be."""
        if any(kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl for kind in types):
            return NotImplemented  # e.g. a DTensor: what it does with its parts comes by here again
        name, kwargs = func.name().partition(".")[0], dict(kwargs or {})
        if name in ("aten::is_pinned", "aten::_pin_memory"):
            return args[0] if name == "aten::_pin_memory" else False
        tensors: list[Any] = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = any(map(_on_cuda, tensors))
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type in ("cuda", *self.means)
            kwargs["device"] = torch.device("cpu") if there else kwargs["device"]
        elif not there:
            return func(*args, **kwargs)
        self._look(func, name, args, kwargs, tensors, there)
        given, named = tree_map_only(torch.Tensor, self._values, (args, kwargs))
        draws = there and torch.Tag.nondeterministic_seeded in func.tags
        do = self.do if self.capturing is None else self.capturing.record
        result = do(func, given, named, draws)
        known = {id(tensor.here): tensor for tensor in tensors if _on_cuda(tensor)}

        def wrapped(tensor: torch.Tensor) -> torch.Tensor:
            same = known.get(id(tensor))
            if same is not None and same.shape != tensor.shape:
                raise NotImplementedError(f"{name} changes a shape in place, and on the fake device it cannot")
            if same is not None or not there:
                return tensor if same is None else same
            made = _put(tensor)
            if self.capturing is not None:
                self.capturing.memory.hold(made, tensor)
            return made

        return tree_map_only(torch.Tensor, wrapped, result)

    def _look(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[torch.Tensor], there: bool) -> None:
        """See whether an operation mixes devices, and whether the host waits for it."""
        if name in COPIES:
            target = there if name == "aten::_to_copy" else _on_cuda(args[0])
            source = _on_cuda(args[0] if name == "aten::_to_copy" else args[1])
            patient = kwargs.get("non_blocking") or args[2:3] == (True,)
            if source and not target:
                self.wait(f"{name} copies to the host")
            elif target and not source and self.capturing is not None:
                self.wait(f"{name} copies from memory of the host that is not pinned")
            elif target and not source and not patient:
                self.wait(f"{name} copies from the host, and not with non_blocking=True")
        elif name.startswith("aten::index"):
            _refuse_mixed([args[0], *args[2:]], name)
            indices = [one for one in tree_leaves(args[1:2]) if isinstance(one, torch.Tensor)]
            if any(one.dtype in (torch.bool, torch.uint8) for one in indices):
                self.wait(f"{name} counts what a mask chooses")
            elif not all(map(_on_cuda, indices)):
                self.wait(f"{name} copies an index from the host")
        else:
            _refuse_mixed(tensors, name)
            if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
                self.wait(f"{name} needs values on the host")

    def _values(self, tensor: Any) -> Any:
        """Return the values of a tensor; a capture keeps a number of the CPU as it is now."""
        if _on_cuda(tensor):
            return tensor.here
        return tensor if self.capturing is None else tensor.clone()

    def do(self, func: Any, args: Any, kwargs: Any, draws: bool) -> Any:
        """Do an operation on values."""
        return self._draw(func, args, kwargs) if draws else func(*args, **kwargs)

    def _draw(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Draw random numbers of the device."""
        if (generator := kwargs.get("generator")) is not None:
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device.type}'")
        before = torch.get_rng_state()
        torch.set_rng_state(self.random)
        try:
            return func(*args, **kwargs)
        finally:
            self.random = torch.get_rng_state()
            torch.set_rng_state(before)


class Stream:
    """A stream of a device, or an event of one: what it is given is done at once, and only the host can wait."""

    device: FakeCuda

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take what torch's own takes, and need nothing of it."""

    def wait_stream(self, stream: Stream) -> None:
        """Wait on the device."""

    def wait_event(self, event: Stream) -> None:
        """Wait on the device."""

    def record_event(self) -> Stream:
        """Return an event."""
        return self

    def synchronize(self) -> None:
        """Wait on the host."""
        self.device.wait("torch.cuda.Stream.synchronize", asked=True)


class Asked(TorchFunctionMode):
    """Says before a function goes to C++ what is asked there of a device that would have to exist."""

    def __init__(self, device: FakeCuda) -> None:
        super().__init__()
        self._fake = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function with `cuda:0` where `cuda` is asked for."""
        args, kwargs = [_indexed(one) for one in args], {name: _indexed(one) for name, one in (kwargs or {}).items()}
        asked = [*args, *kwargs.values()]
        before, ours = self._fake.means, any(map(_on_cuda, asked))
        self._fake.means = ("meta",) if ours and not any(map(_is_meta, asked)) else ()
        try:
            if func is torch.Tensor.cuda or (func is torch.as_tensor and ours):
                return args[0].to(kwargs.get("device") or CUDA, kwargs.get("dtype"))
            if func is torch.Tensor.new_tensor and ours:
                func, kwargs = torch.tensor, {"dtype": args.pop(0).dtype, "device": CUDA, **kwargs}
            if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == CUDA:
                return func(*args, **{**kwargs, "device": None}).to(CUDA)
            return func(*args, **kwargs)
        finally:
            self._fake.means = before


def _is_meta(value: Any) -> bool:
    return type(value) in (str, torch.device) and value in ("meta", torch.device("meta"))


def _indexed(value: Any) -> Any:
    return CUDA if type(value) in (str, torch.device) and value in ("cuda", torch.device("cuda")) else value


def _refuse_mixed(values: Any, name: str) -> None:
    """Raise where tensors are on two devices; a number on the CPU may go everywhere but into one tensor with others."""
    joins = name in ("aten::stack", "aten::cat")
    tensors = [one for one in values if isinstance(one, torch.Tensor)]
    found = {one.device for one in tensors if one.ndim or joins or _on_cuda(one)}
    if len(found) > 1:
        said = ", ".join(sorted(map(str, found)))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {said} ({name}, {_place()})")


def _place() -> str:
    """Return the file and line of the innermost frame that is not torch's."""
    frame: Any = inspect.currentframe()
    while frame.f_back is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("torch", "contextlib") and frame.f_code.co_filename != __file__:
            break
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Have a CUDA device within: `device="cuda"` trains on it, with the numbers of the CPU.

    Tensors on it refuse to meet those of the CPU, and what would make the host wait for a device is noted in `waits`
    while `watching` is true. CUDA graphs are captured and replayed, and refuse what those of a real device refuse. It
    has random numbers of its own, autocast and no kernels, and its streams do all at once: neither speed, nor memory,
    nor what only CUDA's kernels compute shows.
    """
    device = FakeCuda()
    with contextlib.ExitStack() as stack:
        for name, stands_in in _functions(device).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stands_in))
        for name in (one for one in vars(Members) if not one.startswith("__")):
            stack.enter_context(mock.patch.object(torch.Tensor, name, vars(Members)[name]))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "'pin_memory' argument is set as true but no accelerator is found")
        stack.enter_context(fake_autocast(_on_cuda))
        stack.enter_context(Asked(device))
        stack.enter_context(device)
        yield device


def _functions(device: FakeCuda) -> dict[str, Any]:
    """Return what stands in for functions of `torch.cuda`."""
    stream = type("Stream", (Stream,), {"device": device})
    properties = SimpleNamespace(name="fake", total_memory=2**34, major=9, minor=0, uuid="fake")

    def set_state(state: Any, *_: Any, **__: Any) -> None:
        device.random = (state[0] if isinstance(state, list) else state).clone()

    def seed(number: int) -> None:
        device.random = torch.Generator().manual_seed(number).get_state()

    def set_sync_mode(mode: int | str) -> None:
        device.sync_mode = ("default", "warn", "error").index(mode) if isinstance(mode, str) else mode

    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "_is_in_bad_fork": False,
        "_lazy_init": None, "set_device": None, "empty_cache": None, "reset_peak_memory_stats": None,
        "get_device_properties": properties, "get_device_name": "fake", "get_device_capability": (9, 0),
        "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0, "memory_summary": "",
        "memory_stats": {}, "mem_get_info": (2**34, 2**34), "is_bf16_supported": True,
        "set_per_process_memory_fraction": None,
    }  # fmt: skip
    random: dict[str, Any] = {
        "get_rng_state": lambda *_: device.random.clone(),
        "get_rng_state_all": lambda: [device.random.clone()],
        "set_rng_state": set_state,
        "set_rng_state_all": set_state,
        "manual_seed": seed,
        "manual_seed_all": seed,
    }
    return {
        **{name: (lambda *_, _answer=answer, **__: _answer) for name, answer in answers.items()},
        **{name: fake_graphs.apart_from_captures(device, function) for name, function in random.items()},
        **fake_graphs.functions(device),
        "Stream": stream,  # a class: packages that are imported meanwhile write `torch.cuda.Stream | None`
        "current_stream": stream,
        "stream": contextlib.nullcontext,
        "synchronize": lambda *_: device.wait("torch.cuda.synchronize", asked=True),
        "set_sync_debug_mode": set_sync_mode,
        "get_sync_debug_mode": lambda: device.sync_mode,
    }
