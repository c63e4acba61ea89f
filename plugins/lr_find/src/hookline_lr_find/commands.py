"""The command `hookline lr-find`: sweeps the learning rate of a configuration, and trains nothing."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from hookline.commands import add_configuration, mendable, new_parser, run_to_first_step, table
from hookline_lr_find import Found, said
from hookline_lr_find.curve import draw, save_picture

EXAMPLES = """\
examples:
  hookline lr-find run.yaml
  hookline lr-find run.yaml plugins.lr_find.low=1e-5 plugins.lr_find.steps=200 --plot curve.png
  hookline lr-find run.yaml --json
"""


def main(words: Sequence[str]) -> int:
    """Run the command with the words behind its name; return 0, or 1 if there is no rate to suggest.

    Raises:
        ValueError: the configuration is not usable, or the picture cannot be written.
    """
    parser = new_parser("hookline lr-find", "Try rising learning rates, and suggest one.", EXAMPLES)
    add_configuration(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curve into a file, e.g. curve.png")
    parser.add_argument("--json", action="store_true", help="print all points as JSON")
    options = parser.parse_intermixed_args(words)
    options.plugins = ["lr_find", *options.plugins]
    logging.getLogger("hookline.lr_find").setLevel(logging.WARNING)  # what it finds is printed
    with mendable(ValueError):
        trainer = run_to_first_step(options)
        found: Found = dict(trainer.plugins.listed())["lr_find"].found
        if trainer.rank == 0:
            if options.plot is not None:
                save_picture(options.plot, found.points, found.suggestion)
            print(json.dumps(dataclasses.asdict(found), indent=2) if options.json else "\n".join(shown(found)))
    return 0 if found.suggestion is not None else 1


def shown(found: Found) -> list[str]:
    """Return what is printed: a table of at most 20 points, the curve, and the suggestion."""
    few = found.points[:: max(1, len(found.points) // 20)]
    rows = [[f"{point.rate:.3g}", f"{point.loss:.4g}", f"{point.smoothed:.4g}"] for point in few]
    lines = table(["rate", "loss", "smoothed"], rows, right=(0, 1, 2))
    return [*lines, "", *draw(found.points, found.suggestion), "", said(found)]
