"""PyMarlin's names beyond its module interface, which is the core's: trainer, arguments, data, stats, parser."""

from hookline import CallbackInterface, ModuleInterface, Stage
from hookline_pymarlin import stats as stats
from hookline_pymarlin.arguments import DefaultCheckpointerArguments, TrainerArguments
from hookline_pymarlin.backends import (
    DDPTrainerBackend,
    SingleProcess,
    SingleProcessAmp,
    SingleProcessApexAmp,
    SingleProcessDpSgd,
    TrainerBackend,
    build_trainer_backend,
)
from hookline_pymarlin.checkpointer import AbstractCheckpointer, Checkpoint, DefaultCheckpointer
from hookline_pymarlin.data import DataInterface, DataProcessor, DistributedPreprocessArguments
from hookline_pymarlin.loggers import getlogger
from hookline_pymarlin.parser import CustomArgParser
from hookline_pymarlin.plugins import Pymarlin
from hookline_pymarlin.ranks import DistributedTrainingArguments, rank_zero_only
from hookline_pymarlin.stats import BasicStats, StatInitArguments, global_stats
from hookline_pymarlin.trainer import Trainer
from hookline_pymarlin.writers import Stdout, Writer, WriterInitArguments

__version__ = "0.1.0"

__all__ = [
    "AbstractCheckpointer",
    "BasicStats",
    "CallbackInterface",
    "Checkpoint",
    "CustomArgParser",
    "DDPTrainerBackend",
    "DataInterface",
    "DataProcessor",
    "DefaultCheckpointer",
    "DefaultCheckpointerArguments",
    "DistributedPreprocessArguments",
    "DistributedTrainingArguments",
    "ModuleInterface",
    "Pymarlin",
    "SingleProcess",
    "SingleProcessAmp",
    "SingleProcessApexAmp",
    "SingleProcessDpSgd",
    "Stage",
    "StatInitArguments",
    "Stdout",
    "Trainer",
    "TrainerArguments",
    "TrainerBackend",
    "Writer",
    "WriterInitArguments",
    "build_trainer_backend",
    "getlogger",
    "global_stats",
    "rank_zero_only",
    "stats",
]
