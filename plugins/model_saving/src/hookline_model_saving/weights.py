"""Weights as files that plain torch and safetensors load."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

Tensors = dict[str, torch.Tensor]


def size(text: str) -> int:
    """Return the bytes that a text such as "10GB", "500 MB" or "2GiB" says.

    Raises:
        ValueError: it says none, with examples.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b", str(text).strip().lower())
    number = float(match[1]) * UNITS[match[2] or ""] if match else 0
    if number < 1:
        raise ValueError(
            f'model_saving.max_shard_size={text!r} is no size; write one like "10GB", "500MB" or "2GiB" (1024³ bytes)'
        )
    return int(number)


def untie(weights: Mapping[str, Any]) -> tuple[Tensors, dict[str, str]]:
    """Return the tensors, of those that are one memory (tied) the first, and which name stands for which other.

    Raises:
        TypeError: something that is no dense tensor, with its name.
    """
    tensors: Tensors = {}
    tied: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}  # by memory
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
            what = f"a {value.layout} tensor" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise TypeError(
                f"model_saving: {name!r} of the model's weights is {what}; a model is saved as dense tensors with "
                "values, so that loading it runs no code: leave it out of the state dict (persistent=False, "
                "get_extra_state), or wrap `export_model` in a plugin"
            )
        memory = (value.data_ptr(), value.device, value.dtype, value.shape, value.stride())
        first = names.setdefault(memory, name) if value.numel() else name
        if first == name:
            tensors[name] = value.detach()
        else:
            tied[name] = first
    return tensors, tied


def write_pt(folder: Path, tensors: Tensors, tied: Mapping[str, str]) -> None:
    """Write `pytorch_model.pt`, a plain dictionary with what is tied in it as one."""
    owned = _owned(tensors, tensors)
    with open(folder / "pytorch_model.pt", "wb") as file:
        torch.save(owned | {name: owned[first] for name, first in tied.items()}, file)


def write_safetensors(folder: Path, tensors: Tensors, tied: Mapping[str, str], limit: int) -> None:
    """Write `model.safetensors`, or shards of `limit` bytes at most and their index, as Hugging Face does.

    What is tied is stored under its first name; the metadata of that file has the others, as
    `safetensors.torch.load_model` expects. A tensor larger than `limit` has a shard of its own.

    Raises:
        TypeError: a dtype that safetensors does not have.
    """
    for name, tensor in tensors.items():
        try:
            save({name: torch.empty(0, dtype=tensor.dtype)})
        except KeyError:
            raise TypeError(
                f"model_saving: {name!r} is {tensor.dtype}, which safetensors does not have; set "
                "model_saving.safe_serialization=false"
            ) from None
    parts = shards(tensors, limit)
    where: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        where |= dict.fromkeys(names, file)
        metadata = {name: first for name, first in tied.items() if first in names} | {"format": "pt"}
        path = folder / file
        path.touch()
        mode = path.stat().st_mode  # safetensors would leave a file that only its owner may read
        save_file(_owned({name: tensors[name] for name in names}, tensors), path, metadata)
        path.chmod(mode)
    if len(parts) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def shards(tensors: Tensors, limit: int) -> list[list[str]]:
    """Share names over shards in their order, each of at most `limit` bytes or one tensor."""
    parts: list[list[str]] = [[]]
    room = limit
    for name, tensor in tensors.items():
        if parts[-1] and tensor.nbytes > room:
            parts.append([])
            room = limit
        parts[-1].append(name)
        room -= tensor.nbytes
    return parts


def _owned(chosen: Tensors, tensors: Tensors) -> Tensors:
    """Return tensors on the host, contiguous, each alone in its memory; copied only where they are not."""
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    owned = {}
    for name, tensor in chosen.items():
        host = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        view = host.untyped_storage().nbytes() != host.nbytes or users[host.untyped_storage().data_ptr()] > 1
        owned[name] = host.clone() if view else host
    return owned
