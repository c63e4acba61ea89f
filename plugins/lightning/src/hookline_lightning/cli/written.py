"""Classes by their paths, as LightningCLI writes them: `class_path`, `init_args`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

PACKAGES = ("lightning", "pytorch_lightning")
OURS = ("hookline_lightning.callbacks", "hookline_lightning.loggers", "hookline_lightning")
NODE = {"class_path", "init_args", "dict_kwargs"}


def is_node(value: Any) -> bool:
    """Tell whether a value names a class."""
    return isinstance(value, Mapping) and "class_path" in value and set(value) <= NODE


def class_of(path: str) -> Any:
    """Return the class of a path.

    Raises:
        ValueError: there is none.
    """
    home, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(home), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"class_path {path!r} cannot be imported: {error}") from error


def resolved(path: str, homes: tuple[str, ...] = ()) -> str:
    """Return the whole path of a class: of a short name, and of Lightning's own where it is not installed.

    Args:
        path: as it is written.
        homes: modules in which a short name may be.

    Raises:
        ValueError: a short name that is in none of them, or a class of Lightning's that is not here.
    """
    name = path.rpartition(".")[2]
    package = path.partition(".")[0]
    if "." not in path:
        homes, what = homes + (OURS if homes else ()), "is no whole path of a class, such as package.module.Name"
    elif package in PACKAGES and importlib.util.find_spec(package) is None:
        homes, what = OURS, f"is of the package {package}, which is not installed, and has no counterpart here"
    else:
        return path
    for home in homes:
        try:
            if hasattr(importlib.import_module(home), name):
                return f"{home}.{name}"
        except ImportError:
            continue
    raise ValueError(f"class_path {path!r} {what}")


def target(node: Any) -> Any:
    """Return a value of LightningCLI's as hookline's configuration has it, `_target_` in the place of `class_path`."""
    if isinstance(node, Mapping) and is_node(node):
        path = resolved(node["class_path"])
        arguments = {**(node.get("init_args") or {}), **(node.get("dict_kwargs") or {})}
        kind = class_of(path)
        arguments = {name: _as_wanted(kind, name, value) for name, value in arguments.items()}
        if isinstance(kind, type) and issubclass(kind, (torch.optim.Optimizer, LRScheduler, ReduceLROnPlateau)):
            return {"_target_": "hookline_lightning.cli.written.later", "class_path": path, **target(arguments)}
        return {"_target_": path, **target(arguments)}
    if isinstance(node, Mapping):
        return {str(key): target(value) for key, value in node.items()}
    return [target(value) for value in node] if isinstance(node, (list, tuple)) else node


def _as_wanted(kind: Any, name: str, value: Any) -> Any:
    """Return an argument, with the node of a function or a class where its text names one that is wanted."""
    if not isinstance(value, str) or "." not in value:
        return value
    kinds = inspect.getmro(kind) if isinstance(kind, type) else ()
    function = next((vars(one)["__init__"] for one in kinds if "__init__" in vars(one)), kind)
    try:
        hint = typing.get_type_hints(function).get(name)
    except Exception:  # of names that only a type checker knows
        return value
    hints = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    wanted = any((typing.get_origin(one) or one) in (Callable, type, typing.Callable) for one in hints)
    return {"_target_": "hookline_lightning.cli.written.class_of", "path": value} if wanted else value


# What the configuration names ----------------------------------------------------------


def later(class_path: str, **init_args: Any) -> Any:
    """Return a function that makes an optimizer of weights, or a scheduler of an optimizer."""
    return functools.partial(class_of(class_path), **init_args)


def configured(module: Any, optimizer: Any, lr_scheduler: Any = None, monitor: str | None = None) -> Any:
    """Return a module whose `configure_optimizers` answers these.

    Args:
        module: the user's.
        optimizer: makes one of weights.
        lr_scheduler: makes one of an optimizer.
        monitor: the value that the scheduler looks at.
    """
    module.configure_optimizers = functools.partial(_configure, module, optimizer, lr_scheduler, monitor)
    return module


def _configure(module: Any, optimizer: Any, lr_scheduler: Any, monitor: str | None) -> Any:
    made = optimizer(module.parameters())
    if lr_scheduler is None:
        return made
    scheduler = lr_scheduler(made)
    return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}
