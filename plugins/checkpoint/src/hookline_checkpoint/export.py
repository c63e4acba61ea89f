"""Write the weights of a checkpoint for other programs."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hookline_checkpoint.codec import NATIVE
from hookline_checkpoint.layout import unpack_shared

SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt"}
INDEX = "model.safetensors.index.json"
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|" + re.escape(INDEX))


def export(
    path: Path, to: Path, form: str, max_shard_size: int | None, force: bool, folder: bool = False
) -> list[Path]:
    """Write the module's tensors of a checkpoint under their names; return the files.

    Args:
        path: the checkpoint.
        to: a file, or a folder, which then gets `model.safetensors` or `model.pt`.
        form: "safetensors", where tied weights are stored once, under their first name, and the
            metadata says which name is which, as `safetensors.torch.load_model` reads it; or
            "torch", a state dict in which they are tied.
        max_shard_size: bytes of tensors in one file; `to` is then a folder.
        force: replace files that are there.
        folder: `to` is a folder even if it is not there yet.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ValueError: a file is there, or this form cannot hold the module's state.
    """
    if form == "torch" and max_shard_size is not None:
        raise ValueError("--max-shard-size splits safetensors files; leave it away, or leave --format torch away")
    state = _weights(path)
    sharded = max_shard_size is not None
    folder = folder or sharded or to.is_dir()
    if sharded and to.is_file():
        raise ValueError(f"--to={to}: --max-shard-size may write several files, so name a folder")
    home, name = (to, "model" + SUFFIXES[form]) if folder else (to.parent, to.name)
    # A loader that finds one file would not look at shards next to it, so neither may stay from another export.
    there = [home / name] if os.path.lexists(home / name) else []
    if folder and form == "safetensors" and home.is_dir():
        there = sorted(file for file in home.iterdir() if OURS.fullmatch(file.name))
    check_free(there, force)
    if form == "torch":
        home.mkdir(parents=True, exist_ok=True)
        written = [_put(home / name, lambda file: torch.save(state, file))]
    else:
        written = put_safetensors(state, home, name, "say --format torch", max_shard_size)
    for file in set(there) - set(written):
        file.unlink()
    return written


def _weights(path: Path) -> dict[str, torch.Tensor]:
    state = unpack_shared(path, ["module"])["module"]
    if not isinstance(state, dict) or not state:
        raise ValueError(f"the module's get_state gave no tensors by name in {path}, so there is nothing to export")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{name!r} of the module's get_state is a {type(value).__name__}; only tensors by name can be exported"
            )
    return state


def check_free(there: Sequence[Path], force: bool) -> None:
    """Refuse to replace files, unless it is forced.

    Raises:
        ValueError: there is one.
    """
    if there and not force:
        raise ValueError(f"{', '.join(map(str, there))} is there already; name another place, or say --force")


def put_safetensors(
    state: Mapping[str, torch.Tensor], home: Path, name: str, otherwise: str, limit: int | None = None
) -> list[Path]:
    """Write tensors as safetensors; return the files.

    Args:
        state: tensors by name. Those that are one memory are stored once, under the first name,
            and the metadata says which name is which.
        home: the folder, which is made if it is not there.
        name: the file's name, if there is one file.
        otherwise: what to do with a tensor that safetensors cannot hold, for the message.
        limit: bytes of tensors in one file.

    Raises:
        ValueError: safetensors cannot hold a tensor.
    """
    stored: dict[str, torch.Tensor] = {}
    first: dict[Any, str] = {}
    tied: dict[str, str] = {}
    storages: set[int] = set()
    for key, tensor in state.items():
        if tensor.dtype not in NATIVE:
            raise ValueError(f"safetensors has no {tensor.dtype}, which {key!r} is; {otherwise}")
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
            raise ValueError(f"safetensors holds dense tensors, and {key!r} is not one; {otherwise}")
        # An empty tensor has no memory of its own, so it is tied only to itself.
        memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        kept = first.setdefault(memory if tensor.numel() else id(tensor), key)
        if kept != key:
            tied[key] = kept
            continue
        dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
        storage = dense.untyped_storage().data_ptr()
        stored[key] = dense.clone() if storage in storages else dense  # safetensors refuses other views of one memory
        storages.add(storage)
    home.mkdir(parents=True, exist_ok=True)
    shards = _shards(stored, limit)
    if len(shards) == 1:
        return [_put_shard(home / name, shards[0], tied)]
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    place = {key: file for file, shard in zip(names, shards, strict=True) for key in shard}
    written = [
        _put_shard(home / file, shard, {key: kept for key, kept in tied.items() if kept in shard})
        for file, shard in zip(names, shards, strict=True)
    ]
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in stored.values())},
        "weight_map": {**place, **{key: place[kept] for key, kept in tied.items()}},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    # The index last: whoever reads through it finds all that it names.
    return [*written, _put(home / INDEX, lambda file: Path(file).write_text(text))]


def _shards(tensors: Mapping[str, torch.Tensor], limit: int | None) -> list[dict[str, torch.Tensor]]:
    """Share tensors out in their order; one that is larger than the limit has a shard of its own."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if limit is not None and shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _put_shard(path: Path, tensors: dict[str, torch.Tensor], tied: Mapping[str, str]) -> Path:
    return _put(path, lambda file: save_file(tensors, file, {"format": "pt", **tied}))


def _put(path: Path, write: Any) -> Path:
    """Write a file under another name and rename it, so that nobody meets half of it."""
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
