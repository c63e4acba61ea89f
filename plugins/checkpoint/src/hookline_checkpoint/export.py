"""Write the weights of a checkpoint for other programs."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hookline_checkpoint.codec import NATIVE, join, tensors_from_bytes
from hookline_checkpoint.headers import SHARED, TREES
from hookline_checkpoint.storage import CheckpointError, read

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
    if there and not force:
        raise ValueError(f"{', '.join(map(str, there))} is there already; name another place, or say --force")
    home.mkdir(parents=True, exist_ok=True)
    if form == "torch":
        written = [_put(home / name, lambda file: torch.save(state, file))]
    else:
        written = _safetensors(state, home, name, max_shard_size)
    for file in set(there) - set(written):
        file.unlink()
    return written


def _weights(path: Path) -> dict[str, torch.Tensor]:
    _, contents = read(path, [SHARED["module"], TREES])
    try:
        tree = json.loads(contents[TREES])["module"]
        state = join(tensors_from_bytes(contents[SHARED["module"]]), tree)
    except (KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"it cannot be understood: {error}") from error
    if not isinstance(state, dict) or not state:
        raise ValueError(f"the module's get_state gave no tensors by name in {path}, so there is nothing to export")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{name!r} of the module's get_state is a {type(value).__name__}; only tensors by name can be exported"
            )
    return state


def _safetensors(state: Mapping[str, torch.Tensor], home: Path, name: str, limit: int | None) -> list[Path]:
    stored: dict[str, torch.Tensor] = {}
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for key, tensor in state.items():
        kept = first.setdefault(id(tensor), key)  # what was tied comes out of `join` as one object
        if kept != key:
            tied[key] = kept
            continue
        if tensor.dtype not in NATIVE:
            raise ValueError(f"safetensors has no {tensor.dtype}, which {key!r} is; say --format torch")
        stored[key] = tensor.contiguous()
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
