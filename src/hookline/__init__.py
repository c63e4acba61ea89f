"""A training framework for PyTorch: a small loop with hooks; plugins do everything else."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hookline import commands as commands
    from hookline import config as config
    from hookline import files as files
    from hookline import hookspecs as hookspecs
    from hookline import tracking as tracking
    from hookline.blocks import find_blocks as find_blocks
    from hookline.cadence import every as every
    from hookline.cadence import seconds as seconds
    from hookline.config import instantiate as instantiate
    from hookline.data import count_samples as count_samples
    from hookline.data import shard as shard
    from hookline.data import sharded as sharded
    from hookline.installed import nearest as nearest
    from hookline.interfaces import CallbackInterface as CallbackInterface
    from hookline.interfaces import ModuleInterface as ModuleInterface
    from hookline.interfaces import Stage as Stage
    from hookline.marks import event as event
    from hookline.marks import hookimpl as hookimpl
    from hookline.marks import verb as verb
    from hookline.monitored import Watched as Watched
    from hookline.outputs import named_rows as named_rows
    from hookline.randomness import generator as generator
    from hookline.randomness import kept_rng as kept_rng
    from hookline.randomness import set_seed as set_seed
    from hookline.state import copy_state as copy_state
    from hookline.trainer import Trainer as Trainer

__version__ = "0.1.0"

_HOMES = {  # public name: module; imported at the first access, so that `hookline --help` needs no torch
    "CallbackInterface": "interfaces",
    "ModuleInterface": "interfaces",
    "Stage": "interfaces",
    "Trainer": "trainer",
    "Watched": "monitored",
    "commands": "commands",
    "config": "config",
    "copy_state": "state",
    "count_samples": "data",
    "event": "marks",
    "every": "cadence",
    "files": "files",
    "find_blocks": "blocks",
    "generator": "randomness",
    "hookimpl": "marks",
    "hookspecs": "hookspecs",
    "instantiate": "config",
    "kept_rng": "randomness",
    "named_rows": "outputs",
    "nearest": "installed",
    "seconds": "cadence",
    "set_seed": "randomness",
    "shard": "data",
    "sharded": "data",
    "tracking": "tracking",
    "verb": "marks",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hookline' has no attribute {name!r}")
    module = importlib.import_module(f"hookline.{_HOMES[name]}")
    return module if name == _HOMES[name] else getattr(module, name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
