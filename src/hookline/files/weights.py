"""The tensors of a model as files store them: tied tensors once, each in its own memory, split over shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from typing import NamedTuple

import torch

INDEX = "model.safetensors.index.json"
"""The file that maps tensors to files, if there are several."""

Tensors = dict[str, torch.Tensor]


def memory_of(tensor: torch.Tensor) -> Hashable:
    """Return a key that is equal for tied tensors; not for empty tensors, which have no memory of their own."""
    layout = tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()
    return tensor.data_ptr(), tensor.device, *layout


def untie(state: Mapping[str, torch.Tensor]) -> tuple[Tensors, dict[str, str]]:
    """Return dense tensors, only the first of tied ones, and for each other name the name of its first."""
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
    """One file of a model in the safetensors format."""

    file: str
    tensors: Tensors
    metadata: dict[str, str]
    """The names tied to its tensors, as `safetensors.torch.load_model` expects them."""


def shards(tensors: Tensors, tied: Mapping[str, str], limit: float) -> Iterator[Shard]:
    """Yield the files of a model with the names of Hugging Face: `model.safetensors`, or several numbered ones.

    The order of tensors stays. The tensors of a file are copied to the host, as by `owned`, when the file is yielded.

    Args:
        tensors: the tensors that `untie` returned.
        tied: the tied names that `untie` returned.
        limit: bytes of the tensors in one file; a larger tensor gets a file of its own.
    """
    for file, names in files_of({name: tensor.nbytes for name, tensor in tensors.items()}, limit).items():
        metadata = {name: first for name, first in tied.items() if first in names} | {"format": "pt"}
        yield Shard(file, owned({name: tensors[name] for name in names}, tensors), metadata)


def files_of(sizes: Mapping[str, int], limit: float) -> dict[str, list[str]]:
    """Return the names of the tensors in each file of a model, for tensors of so many bytes; see `shards`."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, nbytes in sizes.items():
        if parts[-1] and size + nbytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += nbytes
    count = len(parts)
    several = (f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))
    return dict(zip(["model.safetensors"] if count == 1 else several, parts, strict=True))


def owned(chosen: Tensors, tensors: Tensors) -> Tensors:
    """Return some tensors of a model on the host, contiguous, each in its own memory; copied only if necessary."""
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    alone = {}
    for name, tensor in chosen.items():
        host = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        view = host.untyped_storage().nbytes() != host.nbytes or users[host.untyped_storage().data_ptr()] > 1
        alone[name] = host.clone() if view else host
    return alone
