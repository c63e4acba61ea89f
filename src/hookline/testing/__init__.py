"""What a plugin's author needs to test it: a tiny trainer, hand-written loops, budgets, a check of the contract."""

from hookline.testing.budgets import Budget, calls_per_step, count_syncs
from hookline.testing.check import check_plugin
from hookline.testing.digest import digest
from hookline.testing.memory import Memory
from hookline.testing.ranks import on_ranks, run_ranks
from hookline.testing.tiny import PlainModule, TinyModule, hand_written_loop, tiny_trainer
from hookline.testing.trained import Trained, assert_one_model, train_tiny

__all__ = [
    "Budget",
    "Memory",
    "PlainModule",
    "TinyModule",
    "Trained",
    "assert_one_model",
    "calls_per_step",
    "check_plugin",
    "count_syncs",
    "digest",
    "hand_written_loop",
    "on_ranks",
    "run_ranks",
    "tiny_trainer",
    "train_tiny",
]
