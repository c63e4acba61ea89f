"""Modules of Lightning, today's and those of its first year, whose training is the core's.

- `module` (on `bases`, `hparams`), `callbacks`, `loggers`, `seeding`, `early`: what programs import.
- `plugin`, `trainer`: what begins a run.
- `run/`: what adapts a module of today's, tells it of its run and does what it asks; `first_year/`: likewise.
- `translating/`: arguments, callbacks and loggers as options and plugins; `cli/`: configurations of LightningCLI.
- `files/`, `logs/`: checkpoints in Lightning's form; `self.logger`.
"""

from hookline_lightning.first_year.hyperopt import HyperOptArgumentParser
from hookline_lightning.module import Callback, LightningDataModule, LightningModule
from hookline_lightning.plugin import Lightning
from hookline_lightning.run.loaders import CombinedLoader
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
