"""ACCMT's names: its module, its trainer with all arguments, hyperparameters, trackers."""

from __future__ import annotations

from typing import Any

from hookline_accmt.accelerator import accelerator
from hookline_accmt.hyperparameters import HyperParameters, Optimizer, Scheduler
from hookline_accmt.later import EXPORTS
from hookline_accmt.metrics import Metric
from hookline_accmt.module import AcceleratorModule
from hookline_accmt.names import Handler, Monitor, set_seed
from hookline_accmt.plugin import Accmt
from hookline_accmt.tracker import Aim, ClearML, CometML, DVCLive, MLFlow, TensorBoard, WandB
from hookline_accmt.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "AcceleratorModule",
    "Accmt",
    "Aim",
    "ClearML",
    "CometML",
    "DVCLive",
    "Handler",
    "HyperParameters",
    "MLFlow",
    "Metric",
    "Monitor",
    "Optimizer",
    "Scheduler",
    "TensorBoard",
    "Trainer",
    "WandB",
    "accelerator",
    "set_seed",
]


def __getattr__(name: str) -> Any:
    if name in EXPORTS:
        raise ImportError(f"{name} of ACCMT {EXPORTS[name].format(name)}")
    raise AttributeError(f"module 'hookline_accmt' has no attribute {name!r}")
