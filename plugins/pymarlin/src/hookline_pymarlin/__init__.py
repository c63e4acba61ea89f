"""PyMarlin's names beyond its module interface, which is the core's: trainer, arguments, data, stats, parser."""

from hookline import CallbackInterface, ModuleInterface, Stage
from hookline_pymarlin.arguments import (
    DefaultCheckpointerArguments,
    StatInitArguments,
    TrainerArguments,
    WriterInitArguments,
)
from hookline_pymarlin.checkpointer import AbstractCheckpointer, Checkpoint
from hookline_pymarlin.data import DataInterface, DataProcessor
from hookline_pymarlin.parser import CustomArgParser
from hookline_pymarlin.plugins import Pymarlin
from hookline_pymarlin.ranks import rank_zero_only
from hookline_pymarlin.stats import Writer, global_stats
from hookline_pymarlin.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "AbstractCheckpointer",
    "CallbackInterface",
    "Checkpoint",
    "CustomArgParser",
    "DataInterface",
    "DataProcessor",
    "DefaultCheckpointerArguments",
    "ModuleInterface",
    "Pymarlin",
    "Stage",
    "StatInitArguments",
    "Trainer",
    "TrainerArguments",
    "Writer",
    "WriterInitArguments",
    "global_stats",
    "rank_zero_only",
]
