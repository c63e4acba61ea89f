"""The command `hookline simulate`: what a rank of so many holds in memory and sends in a step."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hookline.commands import add_configuration, mendable, new_parser, read_configuration
from hookline_simulate.world import World

if TYPE_CHECKING:
    from hookline_simulate.clock import Speeds

EXAMPLES = """\
examples:
  hookline simulate --world 8x64 run.yaml         on 8 machines with 64 devices each
  hookline simulate --world 8 run.yaml            on 8 devices of one machine
  hookline simulate --world 2x4 run.yaml -p fsdp plugins.fsdp.replicas=2
  hookline simulate --world 8x64 --json run.yaml  the same in bytes, for machines
"""
SPEEDS = {
    "flops": "FLOP/s of one device",
    "link": "bytes/s that a device sends within its machine",
    "network": "bytes/s that a device sends to other machines",
}


def main(words: Sequence[str]) -> int:
    """Run the command with the words behind its name; return its exit code: 1 where the step could not be simulated.

    Raises:
        UserError: what the user can mend.
    """
    options = _parser().parse_intermixed_args(words)
    try:
        with mendable(ValueError, TypeError):
            return _show(options)
    except ValueError:  # the module's own, whose place is in the traceback
        traceback.print_exc()
        return 1


def _parser() -> argparse.ArgumentParser:
    about = "Simulate an optimizer step as one rank of many, and show its memory and its communication."
    parser = new_parser("hookline simulate", about, EXAMPLES)
    add_configuration(parser)
    parser.add_argument("--world", required=True, metavar="MxN", help="M machines of N devices each; N: ranks of one")
    parser.add_argument(
        "--device", default="h100", metavar="NAME", help="whose speeds are assumed: a100, h100 (default)"
    )
    for name, what in SPEEDS.items():
        parser.add_argument(f"--{name}", type=float, metavar="N", help=f"{what}, if not those of --device")
    parser.add_argument("--json", action="store_true", help="for machines")
    return parser


def _speeds(options: argparse.Namespace) -> Speeds:
    """Return the speeds that are asked for.

    Raises:
        ValueError: there are none of this name, or one that is not above zero.
    """
    from hookline_simulate.clock import DEVICES

    if options.device not in DEVICES:
        raise ValueError(
            f"--device={options.device} is not known; take one of {', '.join(DEVICES)}, and state other speeds by "
            "--flops, --link and --network"
        )
    said = {name: getattr(options, name) for name in SPEEDS if getattr(options, name) is not None}
    for name, value in said.items():
        if value <= 0:
            raise ValueError(f"--{name}={value:g} must be above 0")
    if "flops" in said:
        said["half"] = said["single"] = said.pop("flops")
    return DEVICES[options.device]._replace(**said)


def _show(options: argparse.Namespace) -> int:
    from hookline_simulate.simulate import simulate

    found = simulate(read_configuration(options), World(options.world), _speeds(options))
    print(json.dumps(found.as_json(), indent=2) if options.json else "\n".join(found.lines()))
    if found.missing:
        print(f"hookline: {found.missing}", file=sys.stderr)
    return 1 if found.missing else 0
