"""Weights as files that plain torch and safetensors load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file

from hookline.files.weights import INDEX, Tensors, shards


def refuse_others(weights: Mapping[str, Any]) -> None:
    """Refuse weights that are no dense tensors with values.

    Raises:
        TypeError: there is one, with its name.
    """
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
            what = f"a {value.layout} tensor" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise TypeError(
                f"model_saving: {name!r} of the model's weights is {what}; a model is saved as dense tensors with "
                "values, so that loading it runs no code: leave it out of the state dict (persistent=False, "
                "get_extra_state), or wrap `export_model` in a plugin"
            )


def write_pt(folder: Path, tensors: Tensors, tied: Mapping[str, str], limit: int) -> None:
    """Write `pytorch_model.pt`, a plain dictionary with what is tied in it as one; or shards of `limit` bytes at most.

    The shards have an index as those of safetensors have, and what is tied lies in one of them.
    """
    where: dict[str, str] = {}
    for shard in shards(tensors, tied, limit):
        file = f"pytorch_{Path(shard.file).stem}.pt"
        weights = shard.tensors | {name: shard.tensors[tied[name]] for name in tied if tied[name] in shard.tensors}
        with open(folder / file, "wb") as opened:
            torch.save(weights, opened)
        where |= dict.fromkeys(weights, file)
    write_index(folder / "pytorch_model.pt.index.json", tensors, where)


def write_safetensors(folder: Path, tensors: Tensors, tied: Mapping[str, str], limit: int) -> None:
    """Write `model.safetensors`, or shards of `limit` bytes at most and their index, as Hugging Face does.

    What is tied is stored under its first name. A tensor larger than `limit` has a shard of its own.

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
    where: dict[str, str] = {}
    for shard in shards(tensors, tied, limit):
        where |= dict.fromkeys(shard.tensors, shard.file)
        path = folder / shard.file
        path.touch()
        mode = path.stat().st_mode  # safetensors would leave a file that only its owner may read
        save_file(shard.tensors, path, shard.metadata)
        path.chmod(mode)
    write_index(folder / INDEX, tensors, where)


def write_index(path: Path, tensors: Tensors, where: Mapping[str, str]) -> None:
    """Write in which file each tensor is, where there are several."""
    if len({*where.values()}) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(where)}
        path.write_text(json.dumps(index, indent=2) + "\n")
