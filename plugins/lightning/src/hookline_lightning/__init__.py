"""Modules of Lightning, today's and those of its first year, whose training is the core's."""

from hookline_lightning.hyperopt import HyperOptArgumentParser
from hookline_lightning.loaders import CombinedLoader
from hookline_lightning.module import Callback, LightningDataModule, LightningModule
from hookline_lightning.plugin import Lightning
from hookline_lightning.seeding import seed_everything
from hookline_lightning.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "Callback",
    "CombinedLoader",
    "HyperOptArgumentParser",
    "Lightning",
    "LightningDataModule",
    "LightningModule",
    "Trainer",
    "seed_everything",
]
