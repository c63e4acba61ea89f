"""The command `hookline batch-find`: finds the largest micro-batch of a configuration, and trains nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hookline.commands import add_configuration, mendable, new_parser, run_to_first_step

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
    with mendable(ValueError):
        trainer = run_to_first_step(options)
        if trainer.rank == 0:
            size, micro_batches = dict(trainer.plugins.listed())["batch_find"].size, trainer.window_size
            print(f"micro-batches of {size} samples fit: {micro_batches} of them make a step on each rank. Write")
            print(f"plugins:\n  accumulate: {{micro_batch_size: {size}}}")
    return 0
