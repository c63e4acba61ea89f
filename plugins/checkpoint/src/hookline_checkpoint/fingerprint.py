"""What a manifest says of a run; and what the one that goes on must have in common with it, for the same bits."""

from __future__ import annotations

import math
import platform
from collections.abc import Container, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

import hookline

if TYPE_CHECKING:
    from hookline import Trainer


def take(trainer: Trainer) -> dict[str, Any]:
    """Return the fingerprint of a run whose loaders and model stand; None in it for what cannot be known."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hookline": hookline.__version__,
        "device": trainer.device.type,
        "threads": torch.get_num_threads(),
        "world_size": trainer.world_size,
        "train_batch_size": trainer.options.train_batch_size,
        "window_size": trainer.window_size,
        "batches_per_epoch": trainer.totals.batches_per_epoch,
        "samples": trainer.cursor.samples,
        "seed": trainer.options.seed,
        "module": type(trainer.module).__qualname__,
        # Who only watches changes no bit, and the order of those who do is the configuration's own affair.
        "plugins": sorted(name for name, plugin in trainer.plugins.listed() if not getattr(plugin, "observer", False)),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any], states: Container[str] = ()) -> list[str]:
    """Return what is another one, in words; what either side does not know is not compared.

    Args:
        before: of the run that saved.
        now: of this run.
        states: the plugins of which the checkpoint has a state.
    """
    said = []
    for key, value in now.items():
        was = before.get(key)
        if was is None or value is None or was == value:
            continue
        if key == "plugins":
            gone, new = sorted(set(was) - set(value)), sorted(set(value) - set(was))
            gone = [f"{name} (its state is not used)" if name in states else name for name in gone]
            parts = (f"without {', '.join(gone)}" if gone else "", f"with {', '.join(new)}" if new else "")
            said.append(f"plugins: now {' and '.join(filter(None, parts))}")
        else:
            said.append(f"{key}: was {was}, is {value}")
    return said


def describe(trainer: Trainer, reason: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a manifest says of the run besides its files; `state` is the trainer's own part of it."""
    return {
        "reason": reason,
        "epoch": state["counters"]["epochs"],
        "position": state["cursor"]["position"],
        "metrics": {name: value if math.isfinite(value) else repr(value) for name, value in state["metrics"].items()},
        "evaluated_at": state["evaluated_at"],
        "world_size": trainer.world_size,
        "fingerprint": take(trainer),
        "versions": {
            "hookline": hookline.__version__,
            "hookline-checkpoint": metadata.version("hookline-checkpoint"),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "plugins": [name for name, _ in trainer.plugins.listed()],
    }
