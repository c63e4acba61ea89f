"""PyMarlin's trainer: a translation of its arguments to options and plugins."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

import hookline
from hookline import ModuleInterface
from hookline_pymarlin.arguments import TrainerArguments
from hookline_pymarlin.checkpointer import AbstractCheckpointer, Checkpointed
from hookline_pymarlin.plugins import Outputs, Pymarlin


class Trainer:
    """Trains and validates a PyMarlin module.

    Args:
        module: a `ModuleInterface`, which is the core's own contract.
        args: what to do.
        trainer_backend: "sp", "sp-amp", "ddp" or "ddp-amp", in place of `args.backend`.
        checkpointer: one of the user's own.

    Raises:
        ValueError, TypeError: what cannot be done.
    """

    def __init__(
        self,
        module: ModuleInterface,
        args: TrainerArguments,
        trainer_backend: str | None = None,
        checkpointer: AbstractCheckpointer | None = None,
    ) -> None:
        if trainer_backend is not None:
            args = replace(args, backend=trainer_backend)
        self.args = args
        plugins = {"pymarlin": Pymarlin(), **args.plugins()}
        if checkpointer is not None:
            plugins["checkpoint"] = Checkpointed(checkpointer)
        self.core = hookline.Trainer(module, plugins, **args.options())
        self.module = self.core.module

    def train(self) -> None:
        """Train."""
        with self._logging():
            self.core.train()

    def validate(self) -> Sequence[Any]:
        """Validate; return the collated outputs of the last loader."""
        kept = Outputs()
        self.core.plugins.register(kept, "outputs")
        try:
            with self._logging():
                self.core.validate()
        finally:
            self.core.plugins.unregister(kept)
        return kept.outputs

    @contextlib.contextmanager
    def _logging(self) -> Iterator[None]:
        """Have hookline log from `args.log_level` on."""
        logger = logging.getLogger("hookline")
        before = logger.level
        logger.setLevel(self.args.log_level)
        try:
            yield
        finally:
            logger.setLevel(before)

    def plan(self) -> list[dict[str, Any]]:
        """Return who does what in the run behind it, as `hookline plan` shows it."""
        return self.core.plugins.plan()

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return self.core.device

    @property
    def global_steps_finished(self) -> int:
        """Return the optimizer steps completed."""
        return self.core.global_step

    @property
    def last_epoch(self) -> int:
        """Return the index of the last epoch completed; -1 before the first."""
        return self.core.epoch - 1
