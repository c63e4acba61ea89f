"""Take a state apart into tensors and JSON, and put it together again: exactly, and without pickle.

What JSON has stays as it is. All else is an object of one key that begins with "$":
`{"$tuple": […]}`, `{"$tensor": "net.weight"}`, `{"$dtensor": "net.weight"}` for one of which
ranks have shares, `{"$parts": [class, tensors, …]}` for one that is made of other tensors. A
dictionary that JSON cannot hold, because its keys are no strings or begin with "$", is written
as pairs: `{"$dict": [[key, value], …]}`.
"""

from __future__ import annotations

import base64
import datetime
import json
import math
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from hookline.files.weights import Tensors, memory_of
from hookline_checkpoint.refusals import cure, describe
from hookline_checkpoint.tensors import NATIVE, as_bytes, as_dtype, is_shared, made_of_others, name_of

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
                f"{self.at(path)} is a defaultdict of {describe(factory)}; its factory can be "
                f"{', '.join(FACTORIES)} or None: give dict(…) instead"
            )
        name = None if factory is None else factory.__name__
        return {"$defaultdict": [name, self.pairs(value, path)]}

    def tensor(self, value: torch.Tensor, path: tuple[Any, ...]) -> Any:
        if is_shared(value):
            return self.dtensor(value, path)
        if name_of(type(value)) in made_of_others():
            return self.parts(value, path)
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
        if type(here) is not torch.Tensor:
            raise TypeError(
                f"{self.at(path)} is {describe(here)}, of which ranks have shares; a checkpoint holds these whole "
                "alone: train with ddp, or with an optimizer whose states are plain tensors"
            )
        # By the whole memory, since of a small tensor a rank may have nothing: ranks must name all of them alike.
        memory = here.untyped_storage().data_ptr() or id(value), here.storage_offset(), value.dtype, value.shape
        if memory not in self.stored:
            self.stored[memory] = self.unused(path), value
            self.tensors[self.stored[memory][0]] = value.detach()
        return {"$dtensor": self.stored[memory][0]}

    def parts(self, value: Any, path: tuple[Any, ...]) -> Any:
        names, about = value.__tensor_flatten__()
        parts = {name: self.encode(getattr(value, name), (*path, name)) for name in names}
        form = [list(value.shape), list(value.stride())]
        return {"$parts": [name_of(type(value)), parts, self.encode(about, (*path, "about")), *form]}

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
            f"{self.at(path)} is {describe(value)}; a checkpoint holds tensors and plain data (numbers, text, "
            f"lists, dicts …), so that reading one runs no code: {cure(value)}"
        )


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
            joined._metadata = self.decode(value[1])  # where `load_state_dict` looks for the versions of modules
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

    def parts(self, value: list[Any]) -> Any:
        name, parts, about, shape, stride = value
        tensors = self.decode(parts)
        if name not in made_of_others():  # nobody has imported it, so nobody trains with it
            return {"class": name, **tensors}
        return made_of_others()[name].__tensor_unflatten__(tensors, self.decode(about), torch.Size(shape), stride)

    def ndarray(self, value: dict[str, Any]) -> Any:
        return _numpy(value["dtype"], value["shape"], self.tensors[value["name"]].numpy().tobytes())


def _numpy(dtype: str, shape: Iterable[int], content: bytes) -> Any:
    import numpy

    return numpy.ndarray(tuple(shape), _plain(numpy.dtype(dtype)), bytearray(content))


def _plain(dtype: Any) -> Any:
    if dtype.kind not in ARRAY_KINDS:
        raise ValueError(f"no dtype of plain numbers, times or text: {dtype}")
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
    "$parts": _Joiner.parts,
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
