"""Run a configuration on the workers of Ray Train: the command `hookline ray`, and a plugin that reports to Ray."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hookline import CallbackInterface, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

STORE = "HOOKLINE_RAY_STORE"  # in the environment of what `hookline ray` runs: host and port of its store
FOLDER = "folder of the run"  # key of that store


@dataclass(eq=False)
class Ray(CallbackInterface):
    """Report the metrics of each evaluation to Ray Train; does nothing in a run that `hookline ray` has not started.

    It also tells the command which run has something to go on with.
    """

    def __post_init__(self) -> None:
        if STORE not in os.environ:
            self.on_end_validation = self.on_checkpoint = None  # type: ignore[assignment,method-assign]

    @hookimpl
    def on_end_validation(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        report = importlib.import_module("ray.train").report  # all ranks come here, and it waits for all
        report({**metrics, "step": trainer.global_step, "epoch": trainer.epoch})

    @hookimpl
    def on_checkpoint(self, trainer: Trainer, kind: str) -> None:
        if kind == "checkpoint":  # a model alone is nothing to go on with
            connect(os.environ[STORE]).set(FOLDER, str(trainer.run_dir.resolve()))


@functools.cache
def connect(address: str) -> Any:
    """Return the store of `hookline ray` at host:port."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, _, port = address.rpartition(":")
    return TCPStore(host, int(port), is_master=False, wait_for_workers=False)
