"""Helpers for tests of plugins: a tiny trainer, hand-written loops, budgets, checks of the contract."""

from hookline.testing.budgets import Budget, calls_per_step, count_syncs
from hookline.testing.checks import CHECKS, check_plugin
from hookline.testing.digest import digest
from hookline.testing.fake_cuda import fake_cuda
from hookline.testing.memory import Memory
from hookline.testing.other_device import other_device
from hookline.testing.ranks import on_ranks, run_ranks
from hookline.testing.tiny import ByClosure, PlainModule, TinyModule, hand_written_loop, tiny_trainer
from hookline.testing.trackers import Told, check_killed_tracker, check_quiet_tracker, check_tracker
from hookline.testing.trained import Trained, assert_one_model, train_tiny

__all__ = [
    "CHECKS",
    "Budget",
    "ByClosure",
    "Memory",
    "PlainModule",
    "TinyModule",
    "Told",
    "Trained",
    "assert_one_model",
    "calls_per_step",
    "check_killed_tracker",
    "check_plugin",
    "check_quiet_tracker",
    "check_tracker",
    "count_syncs",
    "digest",
    "fake_cuda",
    "hand_written_loop",
    "on_ranks",
    "other_device",
    "run_ranks",
    "tiny_trainer",
    "train_tiny",
]
