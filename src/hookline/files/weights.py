"""A model's tensors as files hold them: what is tied stored once, each in its own memory, shared out over shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from typing import NamedTuple

import torch

INDEX = "model.safetensors.index.json"
"""Says which tensor is in which file, where there are several."""

Tensors = dict[str, torch.Tensor]


def memory_of(tensor: torch.Tensor) -> Hashable:
    """Return what two tensors have alike that are one (tied); not for an empty one, which has no memory of its own."""
    layout = tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()
    return tensor.data_ptr(), tensor.device, *layout


def untie(state: Mapping[str, torch.Tensor]) -> tuple[Tensors, dict[str, str]]:
    """Return dense tensors, of those that are tied the first, and by the names of the others which that is."""
    tensors: Tensors = {}
    tied: dict[str, str] = {}
    names: dict[Hashable, str] = {}
    for name, tensor in state.items():
        first = names.setdefault(memory_of(tensor), name) if tensor.numel() else name
        if first == name:
            tensors[name] = tensor.detach()
        else:
            tied[name] = first
    return tensors, tied


class Shard(NamedTuple):
    """One of the files that hold a model in the format of safetensors."""

    file: str
    tensors: Tensors
    metadata: dict[str, str]
    """The names of what is tied to one of its tensors, as `safetensors.torch.load_model` expects them."""


def shards(tensors: Tensors, tied: Mapping[str, str], limit: float) -> Iterator[Shard]:
    """Give the files of a model as Hugging Face names them: `model.safetensors`, or several that are numbered.

    Tensors are shared out in their order, and are on the host and in memory of their own as `owned` gives them when
    their file is taken.

    Args:
        tensors: what `untie` returned.
        tied: and which names stand for others.
        limit: bytes of the tensors in one file; one that is larger has a file of its own.
    """
    parts: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += tensor.nbytes
    for number, names in enumerate(parts, 1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        metadata = {name: first for name, first in tied.items() if first in names} | {"format": "pt"}
        yield Shard(file, owned({name: tensors[name] for name in names}, tensors), metadata)


def owned(chosen: Tensors, tensors: Tensors) -> Tensors:
    """Return some of a model's tensors on the host, contiguous, each alone in its memory; copied only where need be."""
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    alone = {}
    for name, tensor in chosen.items():
        host = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        view = host.untyped_storage().nbytes() != host.nbytes or users[host.untyped_storage().data_ptr()] > 1
        alone[name] = host.clone() if view else host
    return alone
