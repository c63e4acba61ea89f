"""Checkpoints of Lightning's form, read without running code."""

from __future__ import annotations

import inspect
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from hookline_lightning.files.plain import AttributeDict
from hookline_lightning.run.calls import call, overridden

HPARAMS = "hyper_parameters"


def read(path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
    """Read a checkpoint, of Lightning's or of this package.

    Args:
        path: of the file.
        map_location: where to, as for `torch.load`; by default where it was, if that is here.
        weights_only: False runs what code the file holds; only for a file whose maker you trust.

    Raises:
        ValueError: no such file, or one that holds more than tensors and plain data.
    """
    if isinstance(path, (str, os.PathLike)):
        if "://" in os.fspath(path):
            raise ValueError(f"{path} is a URL: fetch it first; hookline_checkpoint.load_foreign(url) reads weights")
        if Path(path).is_dir():
            raise ValueError(
                f"{path} is a folder: a checkpoint of a run, which fit(ckpt_path=…) goes on with; "
                "`hookline checkpoints export` makes a file of its weights"
            )
        if not Path(path).exists():
            raise ValueError(f"{path} is not there")
    if map_location is None and not torch.cuda.is_available():
        map_location = "cpu"
    try:
        found = torch.load(path, map_location=map_location, weights_only=weights_only is not False)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain data, and reading it would run code. If you trust whoever made "
            "it, pass weights_only=False, or allow what it names by torch.serialization.safe_globals: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if not isinstance(found, dict) or not isinstance(found.get("state_dict"), Mapping):
        raise ValueError(f"{path} is no checkpoint of Lightning: it has no state_dict")
    return found


def load_from_checkpoint(
    kind: Any, checkpoint_path: Any, map_location: Any = None, hparams_file: Any = None,
    strict: bool | None = None, weights_only: bool | None = None, **overrides: Any,
) -> Any:  # fmt: skip
    """Return a module or a data module made with the saved parameters, a module with the saved weights.

    Raises:
        ValueError: a file that cannot be read, see `read`.
        TypeError: arguments of `__init__` that are neither saved nor given, or are none of it.
    """
    checkpoint = read(checkpoint_path, map_location, weights_only)
    of_data = not issubclass(kind, torch.nn.Module)
    key = f"datamodule_{HPARAMS}" if of_data else HPARAMS
    kept = dict(_of_file(hparams_file) if hparams_file is not None else checkpoint.get(key) or {})
    made = _make(kind, kept, checkpoint.get(key.replace(HPARAMS, "hparams_name")), overrides, checkpoint_path)
    if of_data:
        if (state := checkpoint.get(kind.__qualname__)) is not None:
            made.load_state_dict(state)
        return made
    for hook in ("configure_model", "on_load_checkpoint"):
        if method := overridden(made, hook):
            call(method, *([checkpoint] if hook == "on_load_checkpoint" else []))
    made.load_state_dict(
        checkpoint["state_dict"], strict=getattr(made, "strict_loading", True) if strict is None else strict
    )
    first = next((one for one in checkpoint["state_dict"].values() if isinstance(one, torch.Tensor)), None)
    return made if first is None else made.to(first.device)


def _of_file(path: Any) -> Mapping[str, Any]:
    if Path(path).suffix.lower() not in (".yaml", ".yml"):
        raise ValueError(f"hparams_file={str(path)!r} must be a file of YAML")
    return yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}


def _make(kind: Any, kept: dict[str, Any], name: str | None, overrides: Mapping[str, Any], path: Any) -> Any:
    takes, more = arguments_of(kind)
    if unknown := [one for one in overrides if one not in takes and not more and (not name or name == "kwargs")]:
        known = ", ".join(takes)
        raise TypeError(f"{kind.__name__}.__init__ has no argument {unknown[0]!r}; it has {known}")
    if name and name in takes and name not in overrides:
        given: dict[str, Any] = {name: AttributeDict({**kept, **overrides})}
    else:
        given = {**kept, **overrides}
        given = given if more else {one: value for one, value in given.items() if one in takes}
    missing = [one.name for one in takes.values() if one.default is one.empty and one.name not in given]
    if missing:
        raise TypeError(
            f"{kind.__name__} needs {', '.join(missing)}, which {path} has not: save_hyperparameters() in __init__ "
            f"keeps plain data; give the rest: load_from_checkpoint(path, {missing[0]}=…)"
        )
    return kind(**given)


def arguments_of(kind: type) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the named arguments of a class, and whether it takes any others."""
    parameters = list(inspect.signature(kind).parameters.values())
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    more = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
    return {one.name: one for one in parameters if one.kind in named}, more
