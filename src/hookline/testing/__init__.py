"""Helpers for tests of plugins: a tiny trainer, hand-written loops, budgets, checks of the contract."""

from hookline.testing.budgets import Budget, calls_per_step, count_syncs
from hookline.testing.check import check_plugin
from hookline.testing.digest import digest
from hookline.testing.memory import Memory
from hookline.testing.ranks import run_ranks
from hookline.testing.tiny import TinyModule, hand_written_loop, tiny_trainer
from hookline.testing.trackers import Told, check_killed_tracker, check_quiet_tracker, check_tracker

__all__ = [
    "Budget",
    "Memory",
    "TinyModule",
    "Told",
    "calls_per_step",
    "check_killed_tracker",
    "check_plugin",
    "check_quiet_tracker",
    "check_tracker",
    "count_syncs",
    "digest",
    "hand_written_loop",
    "run_ranks",
    "tiny_trainer",
]
