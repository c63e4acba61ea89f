"""Write the weights of a checkpoint for other programs."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from hookline.files import replacing
from hookline.files.weights import INDEX, shards, untie
from hookline_checkpoint.layout import unpack_shared
from hookline_checkpoint.tensors import NATIVE

SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt"}
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
        with replacing(home / name) as new:
            torch.save(state, new)
        written = [home / name]
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
    for key, tensor in state.items():
        if tensor.dtype not in NATIVE:
            raise ValueError(f"safetensors has no {tensor.dtype}, which {key!r} is; {otherwise}")
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
            raise ValueError(f"safetensors holds dense tensors, and {key!r} is not one; {otherwise}")
    tensors, tied = untie(state)
    home.mkdir(parents=True, exist_ok=True)
    place: dict[str, str] = {}
    written = []
    for shard in shards(tensors, tied, math.inf if limit is None else limit):
        path = home / (shard.file if limit is not None else name)
        with replacing(path) as new:
            save_file(shard.tensors, new, shard.metadata)
        written.append(path)
        place |= dict.fromkeys(shard.tensors, shard.file)
    if len(written) > 1:  # the index last: whoever reads through it finds all that it names
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {**place, **{key: place[kept] for key, kept in tied.items()}},
        }
        with replacing(home / INDEX) as new:
            new.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        written.append(home / INDEX)
    return written
