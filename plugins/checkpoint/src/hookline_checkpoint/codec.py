"""Take a state apart into tensors and JSON, and put it together again: exactly, and without pickle.

What JSON has stays as it is. All else is an object of one key that begins with "$":
`{"$tuple": […]}`, `{"$tensor": "net.weight"}`, `{"$dtensor": "net.weight"}` for one of which
ranks have shares. A dictionary that JSON cannot hold, because its keys are no strings or begin
with "$", is written as pairs: `{"$dict": [[key, value], …]}`.
"""

from __future__ import annotations

import base64
import datetime
import enum
import inspect
import json
import math
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch

from hookline.files.weights import Tensors, memory_of
from hookline_checkpoint.storage import Buffer, Reader

NATIVE = {  # what safetensors knows, in its words; tensors of other dtypes are stored as their bytes
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
DTYPES = {word: dtype for dtype, word in NATIVE.items()}
FACTORIES = {kind.__name__: kind for kind in (bool, int, float, str, list, tuple, dict, set)}
ARRAY_KINDS = "biufcmMSU"  # of numpy dtypes: those whose bytes are their value


def split(tree: Any, where: str = "") -> tuple[Tensors, Any]:
    """Take a tree apart into tensors by flat name and a tree that JSON can hold.

    Tensors stay where they are and share memory with the tree, so store them before anything
    changes. Tensors that are one memory (tied weights) become one; other views of one memory
    become tensors of their own. Those of which ranks have shares stay DTensors.

    Args:
        tree: nested containers of tensors and plain Python data.
        where: what the tree is, for messages.

    Raises:
        TypeError: something that is neither, with its full path.
        ValueError: a container that contains itself.
    """
    splitter = _Splitter(where)
    encoded = splitter.encode(tree, ())
    return splitter.tensors, encoded


def join(tensors: Mapping[str, torch.Tensor], encoded: Any) -> Any:
    """Put together what `split` took apart; the tensors are those that are given.

    Raises:
        ValueError: this was not made by `split`.
    """
    try:
        return _Joiner(tensors).decode(encoded)
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"not a tree that this version reads: {type(error).__name__}: {error}") from error


def tensors_to_parts(tensors: Mapping[str, torch.Tensor]) -> Iterator[Buffer]:
    """Yield a safetensors file part by part: its head, then each tensor's bytes, copied only from another device.

    The format asks for the length of the head, the head as JSON, and the data without gaps; the
    widest dtypes come first and the head is padded to 8 bytes, so that every tensor is aligned.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    head, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        head[name] = {"dtype": NATIVE[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    written = json.dumps(head).encode()
    written += b" " * (-len(written) % 8)
    yield len(written).to_bytes(8, "little") + written
    for _, tensor in ordered:
        if tensor.numel():
            yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def is_shared(value: Any) -> bool:
    """Tell whether a value is a tensor of which ranks have shares, a DTensor, without importing what makes them."""
    return isinstance(value, torch.Tensor) and hasattr(value, "to_local")


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor as another one."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def read_tensors(file: Reader, names: Container[str] | None = None) -> Tensors:
    """Return the tensors of a safetensors file, each read into memory of its own.

    Not into one memory for all: sums depend in the last bit on how a tensor lies in memory, and
    torch lays its own out alike.

    Args:
        file: its content.
        names: keep these alone.

    Raises:
        ValueError: it is none.
    """
    tensors, place = {}, 0
    try:
        head = json.loads(file.take(int.from_bytes(file.take(8), "little")))
        for name, entry in sorted(head.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            end = place + math.prod(shape) * dtype.itemsize
            if entry["data_offsets"] != [place, end] or end - place > file.left:
                raise ValueError(f"{name} is not where the head says")
            if names is not None and name not in names:
                file.skip(end - place)
                place = end
                continue
            tensors[name] = torch.empty(shape, dtype=dtype)
            if end > place:
                file.fill(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
            place = end
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"no safetensors file: {type(error).__name__}: {error}") from error
    return tensors


def tree_to_bytes(encoded: Any) -> bytes:
    """Return a JSON file."""
    return json.dumps(encoded, allow_nan=False, separators=(",", ":")).encode("ascii")


# Taking apart -------------------------------------------------------------------------


class _Splitter:
    def __init__(self, where: str) -> None:
        self.where = where
        self.tensors: Tensors = {}
        # Name by memory, to find ties; with the tensor, so that its memory is not given to another meanwhile.
        self.stored: dict[Hashable, tuple[str, torch.Tensor]] = {}
        self.open: set[int] = set()  # containers under way, to find circles

    def encode(self, value: Any, path: tuple[Any, ...]) -> Any:
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if -(2**63) <= value < 2**63 else {"$int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, torch.Tensor):
            return self.tensor(value, path)
        if kind in SCALARS:
            tag, encode, _ = SCALARS[kind]
            encoded = encode(value)
            return {tag: encoded} if encoded is not None else self.refuse(value, path)
        if kind in CONTAINERS:
            if id(value) in self.open:
                raise ValueError(f"{self.at(path)} contains itself; a checkpoint holds trees only")
            self.open.add(id(value))
            encoded = CONTAINERS[kind](self, value, path)
            self.open.remove(id(value))
            return encoded
        return self.numpy(value, path)

    def items(self, values: Iterable[Any], path: tuple[Any, ...]) -> list[Any]:
        return [self.encode(value, (*path, index)) for index, value in enumerate(values)]

    def members(self, values: Iterable[Any], path: tuple[Any, ...]) -> list[Any]:
        """Encode the members of a set, in an order that does not change from process to process."""
        return sorted((self.key(value, path) for value in values), key=json.dumps)

    def key(self, key: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(key, torch.Tensor):
            raise TypeError(
                f"{self.at(path)} has a tensor as a key or a member, which is found by its identity and would be "
                "lost; use names or numbers"
            )
        return self.encode(key, (*path, key))

    def pairs(self, mapping: Mapping[Any, Any], path: tuple[Any, ...]) -> list[Any]:
        return [[self.key(key, path), self.encode(value, (*path, key))] for key, value in mapping.items()]

    def dict(self, value: dict[Any, Any], path: tuple[Any, ...]) -> Any:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.encode(kept, (*path, key)) for key, kept in value.items()}
        return {"$dict": self.pairs(value, path)}

    def ordered_dict(self, value: OrderedDict[Any, Any], path: tuple[Any, ...]) -> Any:
        # A state dict carries the versions of its modules, by which they read older layouts.
        metadata = getattr(value, "_metadata", None)
        return {"$ordereddict": [self.pairs(value, path), self.encode(metadata, (*path, "_metadata"))]}

    def defaultdict(self, value: defaultdict[Any, Any], path: tuple[Any, ...]) -> Any:
        factory = value.default_factory
        if factory is not None and factory not in FACTORIES.values():
            raise TypeError(
                f"{self.at(path)} is a defaultdict of {_describe(factory)}; its factory can be "
                f"{', '.join(FACTORIES)} or None: give dict(…) instead"
            )
        name = None if factory is None else factory.__name__
        return {"$defaultdict": [name, self.pairs(value, path)]}

    def tensor(self, value: torch.Tensor, path: tuple[Any, ...]) -> Any:
        if is_shared(value):
            return self.dtensor(value, path)
        plain = type(value) in (torch.Tensor, torch.nn.Parameter)
        if not plain or value.layout != torch.strided or value.is_quantized or value.is_nested or value.is_meta:
            self.refuse(value, path)
        value = value.detach().resolve_conj().resolve_neg()
        memory = memory_of(value)
        if value.numel() and memory in self.stored:
            name, _ = self.stored[memory]
        else:
            name = self.unused(path)
            self.stored[memory] = name, value
            native = value.dtype in NATIVE
            self.tensors[name] = value if native else as_bytes(value)
        extra: dict[str, Any] = {}
        if value.dtype not in NATIVE:
            extra = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        # Sums over a tensor depend on its layout in the last bit, so a dense one keeps it (channels last).
        if not value.is_contiguous() and torch.empty_like(value, device="meta").stride() == value.stride():
            extra["stride"] = list(value.stride())
        return {"$tensor": {"name": name, **extra} if extra else name}

    def dtensor(self, value: Any, path: tuple[Any, ...]) -> Any:
        if any(placement.is_partial() for placement in value.placements):
            self.refuse(value, path)
        here = value.to_local()
        # By the whole memory, since of a small tensor a rank may have nothing: ranks must name all of them alike.
        memory = here.untyped_storage().data_ptr() or id(value), here.storage_offset(), value.dtype, value.shape
        if memory not in self.stored:
            self.stored[memory] = self.unused(path), value
            self.tensors[self.stored[memory][0]] = value.detach()
        return {"$dtensor": self.stored[memory][0]}

    def numpy(self, value: Any, path: tuple[Any, ...]) -> Any:
        numpy = sys.modules.get("numpy")
        array = numpy is not None and type(value) is numpy.ndarray
        scalar = numpy is not None and isinstance(value, numpy.generic)
        if not (array or scalar) or value.dtype.kind not in ARRAY_KINDS:
            return self.refuse(value, path)
        if scalar:
            return {"$npscalar": [value.dtype.str, value.tobytes().hex()]}
        name = self.unused(path)
        self.tensors[name] = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8) if value.nbytes else EMPTY
        return {"$ndarray": {"name": name, "dtype": value.dtype.str, "shape": list(value.shape)}}

    def unused(self, path: tuple[Any, ...]) -> str:
        """Return a name that no tensor has yet; it is for people, the tree says what belongs where."""
        text = ".".join(map(str, path)).encode(errors="backslashreplace").decode()
        name, number = text, 1
        while name in self.tensors or name == "__metadata__":  # a reserved word of safetensors
            number += 1
            name = f"{text}#{number}"
        return name

    def at(self, path: tuple[Any, ...]) -> str:
        return ".".join(map(str, (self.where, *path) if self.where else path)) or "the state"

    def refuse(self, value: Any, path: tuple[Any, ...]) -> Any:
        raise TypeError(
            f"{self.at(path)} is {_describe(value)}; a checkpoint holds tensors and plain data (numbers, text, "
            f"lists, dicts …), so that reading one runs no code: {_cure(value)}"
        )


def _describe(value: Any) -> str:
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    if inspect.isroutine(value):
        return f"a function ({getattr(value, '__qualname__', name)})"
    if isinstance(value, torch.nn.Module):
        return f"a module ({kind.__qualname__})"
    if isinstance(value, enum.Enum):
        return f"the enum member {kind.__qualname__}.{value.name}"
    if isinstance(value, torch.Tensor):
        if kind not in (torch.Tensor, torch.nn.Parameter):
            return f"a tensor of the subclass {name}"
        form = "quantized" if value.is_quantized else "nested" if value.is_nested else "meta" if value.is_meta else ""
        return f"a {form or str(value.layout).removeprefix('torch.')} tensor"
    if name == "numpy.ndarray":
        return f"a numpy array of dtype {value.dtype}"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"a namedtuple ({kind.__qualname__})"
    return f"an object of {name}"


def _cure(value: Any) -> str:
    if isinstance(value, (torch.nn.Module, torch.optim.Optimizer)):
        return "give its state_dict()"
    if isinstance(value, torch.Generator):
        return "give its get_state()"
    if isinstance(value, torch.Tensor):
        return "give its parts as dense tensors"
    if isinstance(value, enum.Enum):
        return "give its name or its value"
    if isinstance(value, datetime.datetime):
        return "give it with a fixed offset, as by astimezone(datetime.UTC)"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "give tuple(…), or its _asdict()"
    if is_dataclass(value) and not isinstance(value, type):
        return "give dataclasses.asdict(…)"
    return "leave it out of get_state, and make it anew in update_state"


# Putting together ---------------------------------------------------------------------


class _Joiner:
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.made: Tensors = {}  # one object per name: what was tied is tied

    def decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        tag = next(iter(value), "")
        if not tag.startswith("$"):
            return {key: self.decode(kept) for key, kept in value.items()}
        return TAGS[tag](self, value[tag])

    def pairs(self, value: list[Any]) -> list[tuple[Any, Any]]:
        return [(self.decode(key), self.decode(kept)) for key, kept in value]

    def ordered_dict(self, value: list[Any]) -> OrderedDict[Any, Any]:
        joined: Any = OrderedDict(self.pairs(value[0]))
        if value[1] is not None:
            joined._metadata = self.decode(value[1])
        return joined  # type: ignore[no-any-return]

    def defaultdict(self, value: list[Any]) -> defaultdict[Any, Any]:
        factory: Any = None if value[0] is None else FACTORIES[value[0]]
        return defaultdict(factory, self.pairs(value[1]))

    def tensor(self, value: Any) -> torch.Tensor:
        extra = value if isinstance(value, dict) else {"name": value}
        name = extra["name"]
        if name not in self.made:
            tensor = self.tensors[name]
            if "dtype" in extra:
                tensor = tensor.view(as_dtype(extra["dtype"])).reshape(extra["shape"])
            if "stride" in extra:
                tensor = torch.empty_strided(tensor.shape, extra["stride"], dtype=tensor.dtype).copy_(tensor)
            self.made[name] = tensor
        return self.made[name]

    def ndarray(self, value: dict[str, Any]) -> Any:
        return _numpy(value["dtype"], value["shape"], self.tensors[value["name"]].numpy().tobytes())


def _numpy(dtype: str, shape: Iterable[int], content: bytes) -> Any:
    import numpy

    return numpy.ndarray(tuple(shape), _plain(numpy.dtype(dtype)), bytearray(content))


def _plain(dtype: Any) -> Any:
    if dtype.kind not in ARRAY_KINDS:
        raise ValueError(f"no dtype of plain numbers, times or text: {dtype}")
    return dtype


def as_dtype(name: str) -> torch.dtype:
    """Return the dtype of torch that has this name.

    Raises:
        ValueError: none has.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch.{name} is no dtype")
    return dtype


def _datetime(value: datetime.datetime) -> Any:
    # Other time zones than fixed offsets would come back as something else, so they are refused.
    fixed = value.tzinfo is None or type(value.tzinfo) is datetime.timezone
    return [value.isoformat(), value.fold] if fixed else None


def _alone(decode: Callable[[Any], Any]) -> Callable[[_Joiner, Any], Any]:
    """Make a decoder of what holds nothing else into one of the table."""
    return lambda _, value: decode(value)


SCALARS: dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    bytes: ("$bytes", lambda v: base64.b64encode(v).decode(), base64.b64decode),
    bytearray: (
        "$bytearray",
        lambda v: base64.b64encode(v).decode(),
        lambda v: bytearray(base64.b64decode(v)),
    ),
    complex: ("$complex", lambda v: [repr(v.real), repr(v.imag)], lambda v: complex(*map(float, v))),
    type(Path()): ("$path", str, Path),
    datetime.datetime: (
        "$datetime",
        _datetime,
        lambda v: datetime.datetime.fromisoformat(v[0]).replace(fold=v[1]),
    ),
    datetime.date: ("$date", datetime.date.isoformat, datetime.date.fromisoformat),
    datetime.timedelta: (
        "$timedelta",
        lambda v: [v.days, v.seconds, v.microseconds],
        lambda v: datetime.timedelta(*v),
    ),
    torch.dtype: ("$dtype", lambda v: str(v).removeprefix("torch."), as_dtype),
    torch.device: ("$device", str, torch.device),
    torch.Size: ("$size", list, torch.Size),
}

CONTAINERS: dict[type, Callable[[_Splitter, Any, tuple[Any, ...]], Any]] = {
    list: _Splitter.items,
    tuple: lambda s, v, path: {"$tuple": s.items(v, path)},
    set: lambda s, v, path: {"$set": s.members(v, path)},
    frozenset: lambda s, v, path: {"$frozenset": s.members(v, path)},
    deque: lambda s, v, path: {"$deque": [s.items(v, path), v.maxlen]},
    dict: _Splitter.dict,
    OrderedDict: _Splitter.ordered_dict,
    defaultdict: _Splitter.defaultdict,
    Counter: lambda s, v, path: {"$counter": s.pairs(v, path)},
}

TAGS: dict[str, Callable[[_Joiner, Any], Any]] = {
    **{tag: _alone(decode) for tag, _, decode in SCALARS.values()},
    "$int": lambda _, v: int(v, 16),
    "$float": lambda _, v: float(v),
    "$tensor": _Joiner.tensor,
    "$dtensor": _Joiner.tensor,
    "$ndarray": _Joiner.ndarray,
    "$npscalar": lambda _, v: _numpy(v[0], (), bytes.fromhex(v[1]))[()],
    "$tuple": lambda j, v: tuple(j.decode(v)),
    "$set": lambda j, v: set(j.decode(v)),
    "$frozenset": lambda j, v: frozenset(j.decode(v)),
    "$deque": lambda j, v: deque(j.decode(v[0]), v[1]),
    "$dict": lambda j, v: dict(j.pairs(v)),
    "$ordereddict": _Joiner.ordered_dict,
    "$defaultdict": _Joiner.defaultdict,
    "$counter": lambda j, v: Counter(dict(j.pairs(v))),
}

EMPTY = torch.empty(0, dtype=torch.uint8)
