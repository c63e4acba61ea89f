"""Tensors as the bytes of a safetensors file, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import torch

from hookline.files.weights import Tensors
from hookline_checkpoint.storage import PIECE, Buffer, Reader

NATIVE = {  # what safetensors knows, in its words; tensors of other dtypes are stored as their bytes
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
DTYPES = {word: dtype for dtype, word in NATIVE.items()}


def tensors_to_parts(tensors: Mapping[str, torch.Tensor]) -> Iterator[Buffer]:
    """Yield a safetensors file part by part: its head, then each tensor's bytes, copied only from another device.

    The format asks for the length of the head, the head as JSON, and the data without gaps; the
    widest dtypes come first and the head is padded to 8 bytes, so that every tensor is aligned.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    yield head_of({name: (tensor.dtype, tensor.shape) for name, tensor in ordered.items()})
    for tensor in ordered.values():
        yield from part_of(tensor)


def head_of(forms: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the head of a safetensors file whose tensors lie behind it in this order."""
    head: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in forms.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        head[name] = {"dtype": NATIVE[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    written = json.dumps(head).encode()
    written += b" " * (-len(written) % 8)
    return len(written).to_bytes(8, "little") + written


def part_of(tensor: torch.Tensor) -> Iterator[Buffer]:
    """Yield the bytes of a tensor, if it has some."""
    if tensor.numel():
        yield tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().data


def is_shared(value: Any) -> bool:
    """Tell whether a value is a tensor of which ranks have shares, a DTensor, without importing what makes them."""
    return isinstance(value, torch.Tensor) and hasattr(value, "to_local")


def name_of(kind: type) -> str:
    """Return the whole name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def made_of_others() -> dict[str, Any]:
    """Return by name the classes of tensors that are made of others, and that their packages let files name.

    A package says so to torch when it is imported (`torch.serialization.add_safe_globals`).
    """
    known = [kind for kind in torch.serialization.get_safe_globals() if isinstance(kind, type)]
    others = [kind for kind in known if not kind.__module__.startswith("torch.")]
    return {name_of(kind): kind for kind in others if hasattr(kind, "__tensor_unflatten__")}


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor as another one."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def read_tensors(file: Reader) -> Tensors:
    """Return the tensors of a safetensors file, each read into memory of its own.

    Not into one memory for all: sums depend in the last bit on how a tensor lies in memory, and
    torch lays its own out alike.

    Raises:
        ValueError: it is none.
    """
    return {name: tensor for name, _, tensor in tensors_in(file)}


def tensors_in(
    file: Reader, names: Container[str] | None = None, by_rows: Container[str] = ()
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield the tensors of a safetensors file one by one, as they lie in it, each behind its name and 0; keep none.

    Args:
        file: its content.
        names: leave all others out.
        by_rows: yield these as some rows at a time, each time behind the number of the first.

    Raises:
        ValueError: it is none.
    """
    place = 0
    try:
        head = json.loads(file.take(int.from_bytes(file.take(8), "little")))
        head.pop("__metadata__", None)
        ordered = sorted(head.items(), key=lambda item: item[1]["data_offsets"])
        for name, entry in ordered:
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            end = place + math.prod(shape) * dtype.itemsize
            if entry["data_offsets"] != [place, end] or end - place > file.left:
                raise ValueError(f"{name} is not where the head says")
            if names is not None and name not in names:
                file.skip(end - place)
            else:
                count = shape[0] if shape else 1
                some = max(1, PIECE * count // max(end - place, 1)) if shape and name in by_rows else count
                for begin in range(0, count, some) if count else (0,):
                    rows = torch.empty([min(some, count - begin), *shape[1:]] if shape else [], dtype=dtype)
                    if rows.numel():
                        file.fill(rows.reshape(-1).view(torch.uint8).numpy().data)
                    yield name, begin, rows
            place = end
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"no safetensors file: {type(error).__name__}: {error}") from error


def as_dtype(name: str) -> torch.dtype:
    """Return the dtype of torch that has this name.

    Raises:
        ValueError: none has.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch.{name} is no dtype")
    return dtype
