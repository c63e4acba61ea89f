"""The command `hookline batch-find`: finds the largest micro-batch of a configuration, and trains nothing."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hookline import CallbackInterface, config, hookimpl
from hookline.commands import add_configuration, mendable, new_parser, read_configuration

if TYPE_CHECKING:
    from hookline import Trainer

EXAMPLES = """\
examples:
  hookline batch-find run.yaml
  hookline batch-find run.yaml trainer.train_batch_size=1024 plugins.batch_find.memory=0.8
"""


def main(words: Sequence[str]) -> int:
    """Run the command with the words behind its name; return 0.

    Raises:
        ValueError: the configuration is not usable, or nothing fits.
    """
    parser = new_parser("hookline batch-find", "Find the largest micro-batch that fits into memory.", EXAMPLES)
    add_configuration(parser)
    options = parser.parse_intermixed_args(words)
    options.plugins = ["batch_find", "no:accumulate", *options.plugins]
    logging.getLogger("hookline.batch_find").setLevel(logging.WARNING)  # what it finds is printed
    with tempfile.TemporaryDirectory() as folder, mendable(ValueError):
        overrides = (f"trainer.runs_folder={folder}", "trainer.sanity_val_steps=0", "trainer.eval_when_start=false")
        trainer = config.build_trainer(read_configuration(options, *overrides))
        plugins = dict(trainer.plugins.listed())
        for plugin in plugins.values():
            if getattr(plugin, "observer", False):
                trainer.plugins.unregister(plugin)
        trainer.plugins.register(NoStep(), "no_step")
        trainer.train()
        if trainer.rank == 0:
            size, micro_batches = plugins["batch_find"].size, trainer.window_size
            print(f"micro-batches of {size} samples fit: {micro_batches} of them make a step on each rank. Write")
            print(f"plugins:\n  accumulate: {{micro_batch_size: {size}}}")
    return 0


class NoStep(CallbackInterface):
    """Ends a run before its first step."""

    @hookimpl
    def train_epoch(self, trainer: Trainer) -> bool:
        trainer.stop("the size is found", "preempted", 0, alone=False)
        return False
