"""Faults, placed instead of raced: at a hook, at a file operation, in a file, in a power cut; and processes for them.

A fault point is something that has a name anyway, so nothing has to be put into the code that is tested:
a hook of the loop (`at_hook("on_boundary", kill, nth=3)` is a plugin), or an operation on a file
(`with at_file(folder, "rename step-*", kill):`, where the operation is one of `OPERATIONS`, done through `os`).
"""

from hookline.testing.faults.actions import OPERATIONS, Operation, at_file, at_hook, failing, kill, watching
from hookline.testing.faults.damage import cut_off, flip_bit, zero_page
from hookline.testing.faults.power import Cut, Recorder, power_cuts
from hookline.testing.faults.processes import PRELOADED, Child, Outcome, run

__all__ = [
    "OPERATIONS", "PRELOADED", "Child", "Cut", "Operation", "Outcome", "Recorder", "at_file", "at_hook", "cut_off",
    "failing", "flip_bit", "kill", "power_cuts", "run", "watching", "zero_page",
]  # fmt: skip
