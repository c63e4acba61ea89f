"""LERNOMATIC's models and trainers, whose training is the core's."""

from hookline_lernomatic.bridge import Lernomatic
from hookline_lernomatic.infer.inferrer import Inferrer
from hookline_lernomatic.model.common import LernomaticModel, allow_import
from hookline_lernomatic.param.lr_common import LogFinder
from hookline_lernomatic.train.trainer import Trainer

__version__ = "0.1.0"

__all__ = ["Inferrer", "Lernomatic", "LernomaticModel", "LogFinder", "Trainer", "allow_import"]
