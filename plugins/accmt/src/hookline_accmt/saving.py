"""The folder `model_path`: what may lie there before training, and how a model gets into it."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hookline.files import clear, replacing

PT, INDEX = ".pt", "pytorch_model.pt.index.json"  # of what the plugin model_saving writes


def refuse_taken(model_path: str, policies: str | Sequence[str]) -> None:
    """Refuse before training what could not be saved after the first evaluation.

    Raises:
        ValueError: nothing can be written, or something else lies where a model shall be.
    """
    folder = Path(model_path).absolute()
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        why = "nothing can be written into it" if above.is_dir() else "it is no folder"
        raise ValueError(f"model_path={model_path!r} cannot hold a model: {above} stands there, and {why}")
    for name in [policies] if isinstance(policies, str) else policies:
        refuse_other(folder / re.sub(r"[^\w.-]", "_", name))


def refuse_other(folder: Path) -> None:
    """Refuse a folder that a model would replace, and that holds something else.

    Raises:
        ValueError: what is there was not written here.
    """
    if folder.exists() and not (folder / "model.json").is_file():
        raise ValueError(
            f"{folder} holds something else than a model that was saved here, such as one of ACCMT, and a model is to "
            "be saved there: move it away, or give another model_path"
        )


def put_model(saved: Path, folder: Path, model: torch.nn.Module) -> None:
    """Have a model that was saved in a folder, too; without room for a copy, where the disk is the same.

    One of transformers has the names and the configuration that its `from_pretrained` reads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refuse_other(folder / saved.name)
    clear(folder)
    with replacing(folder / saved.name) as new:
        shutil.copytree(saved, new, copy_function=link)
        configuration: Any = getattr(model, "config", None)
        if hasattr(configuration, "save_pretrained"):
            rename_for_transformers(new)
            configuration = copy.deepcopy(configuration)
            configuration.architectures = [type(model).__name__]
            configuration.save_pretrained(new)
            generation: Any = getattr(model, "generation_config", None)
            if generation is not None:
                generation.save_pretrained(new)


def rename_for_transformers(folder: Path) -> None:
    """Give files of torch the names that transformers reads."""
    for file in folder.glob(f"*{PT}"):
        file.rename(file.with_suffix(".bin"))
    if (old := folder / INDEX).exists():
        index = json.loads(old.read_text())
        index["weight_map"] = {name: f"{file.removesuffix(PT)}.bin" for name, file in index["weight_map"].items()}
        old.unlink()
        (folder / INDEX.replace(PT, ".bin")).write_text(json.dumps(index, indent=2) + "\n")


def link(source: str, target: str) -> None:
    """Copy a file by a link, where the disk is the same and has links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
