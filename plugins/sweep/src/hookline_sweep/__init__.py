"""Search hyper-parameters with Optuna: the command `hookline sweep`, and the plugin that its trials report with."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, Stage, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

TRIAL = "HOOKLINE_SWEEP_TRIAL"
"""In the environment of a trial, as JSON: the `folder` of the sweep, the `trial`, the `metric` and the `pruner`."""


@dataclass(eq=False)
class Sweep(CallbackInterface):
    """Report each evaluation of a trial to its sweep, and stop it if it is pruned.

    It does nothing in a run that `hookline sweep` has not started.
    """

    def __post_init__(self) -> None:
        if TRIAL not in os.environ:
            for hook in ("on_begin_train", "get_watched_metrics", "on_boundary", "on_checkpoint", "on_end_run"):
                setattr(self, hook, None)

    @hookimpl
    def on_begin_train(self, trainer: Trainer) -> None:
        self._pruned = False
        self._failed = ""
        self._told: Any = None
        if trainer.rank == 0:
            from hookline_sweep.study import Told, storage_of

            told = json.loads(os.environ[TRIAL])
            self._told = Told(storage_of(Path(told["folder"])), told["trial"], told["pruner"])
            self._told.note("run", str(trainer.run_dir))
        self._metric: str = json.loads(os.environ[TRIAL])["metric"]

    @hookimpl(wrapper=True)
    def get_watched_metrics(self) -> Generator[None, dict[str, str], dict[str, str]]:
        return (yield) | {self._metric: "sweep --metric"}

    @hookimpl
    def on_boundary(self, trainer: Trainer) -> None:
        """Report the metric of the evaluation; all ranks stop together if rank 0 says so."""
        if not trainer.due("eval") or self._metric not in trainer.metrics:
            return
        value = trainer.metrics[self._metric]
        if not math.isfinite(value):  # the same on all ranks
            self._failed = f"{self._metric} is {value} in evaluation {trainer.counters.evaluations}"
            trainer.stop(f"the trial has failed: {self._failed}", alone=False)
            return
        hopeless = trainer.rank == 0 and self._told.report(trainer.counters.evaluations, value)
        verdict = torch.tensor([float(hopeless)])
        if trainer.hook.all_reduce(trainer=trainer, value=verdict, op="max").item():
            self._pruned = True
            trainer.stop(f"the sweep has pruned this trial: {self._metric}={value:.6g}", alone=False)

    @hookimpl
    def on_checkpoint(self, trainer: Trainer, kind: str) -> None:
        if kind == "checkpoint" and trainer.rank == 0:  # a model alone is nothing to continue from
            self._told.note("resume", str(trainer.run_dir))

    @hookimpl
    def on_end_run(self, trainer: Trainer, stage: Stage, status: str, reason: str) -> None:
        """Tell the outcome; a trial that was interrupted stays open, so that the sweep continues it."""
        told = getattr(self, "_told", None)
        if told is None or stage is not Stage.TRAIN:
            return
        if status == "preempted" or reason.startswith("KeyboardInterrupt"):
            told.note("interrupted", True)
        elif status == "failed" or self._failed:
            told.fail(self._failed or reason)
        else:
            told.end(self._pruned)
