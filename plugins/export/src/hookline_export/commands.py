"""The command `hookline export`: evaluate the newest checkpoint of a run, and export its net."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hookline import config
from hookline.commands import add_configuration, mendable, new_parser, read_configuration

EXAMPLES = """\
examples:
  hookline export runs/digits-1 --to onnx            the newest checkpoint of this run
  hookline export run.yaml --to pt2 --to onnx       that of the newest run of this configuration
  hookline export runs/digits-1 plugins.export.module=net.encoder
"""


def main(words: Sequence[str]) -> int:
    """Run the command with the words behind its name; return its exit code.

    Raises:
        ValueError: what the user can mend.
    """
    about = "Evaluate the newest checkpoint of a run, and export its net as the plugin export does."
    parser = new_parser("hookline export", about, EXAMPLES)
    add_configuration(parser)
    parser.add_argument(
        "--to", action="append", metavar="FORM", help="pt2, onnx or safetensors; may be given again (default: pt2)"
    )
    options = parser.parse_intermixed_args(words)
    given, own = Path(options.config), ["trainer.resume=true"]
    if given.is_dir():
        options.config, own = str(given / "config.yaml"), [f"trainer.resume={json.dumps(str(given))}"]
    if options.to is not None:
        own.append(f"plugins.export.to={json.dumps(options.to)}")
    options.plugins = [*options.plugins, *(["export"] if "export" not in options.plugins else [])]
    with mendable(ValueError, TypeError, ImportError):
        trainer = config.build_trainer(read_configuration(options, *own))
        if not trainer.plugins.performers("restore"):
            raise ValueError("nobody reads the weights of a run: name the plugin that does, e.g. `-p checkpoint`")
        plugin: Any = trainer.plugins.get_plugin("export")
        plugin.check(trainer)
        trainer.validate()
        plugin.export(trainer)
    print(plugin.folder or trainer.run_dir / "export")
    return 0
