"""The command `hookline trace`: what each plugin costs in each hook, in some steps of a run."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookline import config, files
from hookline.commands import UserError, add_configuration, mendable, new_parser, read_configuration, table

if TYPE_CHECKING:
    from hookline_profile.trace import Measured, Recorder, Row

RUN = ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID")
"""By which the ranks of a run know each other; launchers set them."""
EXAMPLES = """\
examples:
  hookline trace run.yaml                             time 20 steps after 5
  hookline trace run.yaml --steps 100 --warmup 20
  hookline trace run.yaml -p no:wandb                 without a plugin
  hookline trace run.yaml --out trace.json            each call too, for ui.perfetto.dev
  torchrun --nproc-per-node 2 -m hookline trace run.yaml -p ddp
"""


def main(words: Sequence[str]) -> int:
    """Run the command with the words behind its name; return its exit code.

    Raises:
        UserError: what the user can mend.
    """
    options = _parser().parse_intermixed_args(words)
    for name, least in (("steps", 1), ("warmup", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)} must be at least {least}")
    if options.out is not None and not Path(options.out).resolve().parent.is_dir():
        raise UserError(f"--out {options.out}: there is no folder {Path(options.out).parent}")
    try:
        with mendable(ValueError, TypeError), contextlib.redirect_stdout(sys.stderr):
            recorder = _run(options)
    except ValueError:  # the module's own, whose place is in the traceback
        traceback.print_exc()
        return 1
    measured = recorder.measured
    if not measured.steps:
        raise UserError(
            f"training ended before a step could be traced, which takes {options.warmup} steps (--warmup) and one more"
        )
    if measured.rank:
        return 0
    if options.out is not None:
        with files.replacing(Path(options.out)) as new:
            new.write_text(json.dumps(chrome(recorder.events, measured.ranks)))
    print(json.dumps(as_json(measured), indent=2) if options.json else "\n".join(lines(measured)))
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Train some steps, and show how long each plugin takes in each hook, and how often it waits for the device."
    parser = new_parser("hookline trace", about, EXAMPLES)
    add_configuration(parser)
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="optimizer steps to time (default: 20)")
    parser.add_argument("--warmup", type=int, default=5, metavar="N", help="steps before that (default: 5)")
    parser.add_argument("--out", metavar="FILE.json", help="write each call, for ui.perfetto.dev or chrome://tracing")
    parser.add_argument("--json", action="store_true", help="for machines")
    return parser


def _run(options: argparse.Namespace) -> Recorder:
    """Train in a folder that is thrown away, as far as all is measured."""
    from hookline_profile.trace import SYNCS, Recorder

    recorder = Recorder(options.steps, options.warmup, options.out is not None)
    with _folder() as folder:
        trainer = config.build_trainer(read_configuration(options, f"trainer.runs_folder={folder}"))
        recorder.begin(trainer)
        try:
            trainer.train()
        except Exception as error:
            if recorder.phase is not SYNCS:
                raise
            recorder.measured.error = f"{type(error).__name__}: {error}"
        finally:
            recorder.end()
    return recorder


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """Give a folder that is thrown away. The ranks of a run have the same; the first of each machine removes it."""
    run = [os.environ[name] for name in RUN if os.environ.get(name)]
    if not run:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as alone:
            yield alone
        return
    folder = Path(tempfile.gettempdir()) / re.sub(r"[^\w-]", "-", "-".join(["hookline-trace", *run]))
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise UserError(f"{folder}, which the trace would use, belongs to somebody else; remove it, or set TMPDIR")
    try:
        yield str(folder)
    finally:
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            shutil.rmtree(folder, ignore_errors=True)


def rows(measured: Measured) -> list[dict[str, Any]]:
    """Return what each plugin did in each hook, and the rest, by time: numbers of a step."""
    from hookline_profile.trace import CORE, PHASES, Row

    found = [row for row in measured.rows.values() if row.calls or row.syncs]
    rest = Row("", CORE, 0, max(0.0, measured.seconds - sum(row.seconds for row in found)), measured.other_syncs)
    shown = []
    for row in sorted([*found, rest], key=lambda row: -row.seconds):
        phase = PHASES.get(row.hook.partition(" ")[0], "") if row.plugin == CORE else ""
        numbers = {"calls": row.calls / measured.steps, **_numbers([row], measured)}
        shown.append({"hook": row.hook, "plugin": row.plugin, "phase": phase if row.hook else "the rest", **numbers})
    return shown


def plugins(measured: Measured) -> list[dict[str, Any]]:
    """Return what each plugin did in all hooks, by time."""
    by_plugin: dict[str, list[Row]] = {}
    for row in measured.rows.values():
        by_plugin.setdefault(row.plugin, []).append(row)
    totals = [{"plugin": name, **_numbers(own, measured)} for name, own in by_plugin.items() if name != "core"]
    return sorted(totals, key=lambda total: -total["us"])


def _numbers(rows: Iterable[Row], measured: Measured) -> dict[str, Any]:
    rows = list(rows)
    seconds = sum(row.seconds for row in rows)
    syncs = sum(row.syncs for row in rows) / measured.synced if measured.synced else None
    return {"us": seconds / measured.steps * 1e6, "share": seconds / measured.seconds, "syncs": syncs}


def as_json(measured: Measured) -> dict[str, Any]:
    """Return the measurement as plain data; numbers of rows and plugins are those of one step."""
    return {
        "rank": measured.rank,
        "ranks": measured.ranks,
        "device": measured.device,
        "first_step": measured.first,
        "steps": measured.steps,
        "steps_with_syncs_counted": measured.synced,
        "us_per_step": measured.seconds / measured.steps * 1e6,
        "rows": rows(measured),
        "plugins": plugins(measured),
    }


def lines(measured: Measured) -> list[str]:
    """Return the measurement as text."""
    last = measured.first + measured.steps - 1
    place = f"rank {measured.rank} of {measured.ranks}" if measured.ranks > 1 else measured.device
    head = f"steps {measured.first} to {last} on {place}: {measured.seconds / measured.steps * 1e6:,.0f} µs a step"
    cells = [[row["hook"], _who(row), f"{row['calls']:.3g}", *_cells(row)] for row in rows(measured)]
    sums = [[total["plugin"], *_cells(total)] for total in plugins(measured)]
    told = [head, "", *table(["hook", "plugin", "calls", "µs", "share", "syncs"], cells, right=(2, 3, 4, 5))]
    if sums:
        told += ["", *table(["all hooks of", "µs", "share", "syncs"], sums, right=(1, 2, 3))]
    if measured.steps < measured.asked:
        told += ["", f"training ended after {measured.steps} of the {measured.asked} steps to time"]
    if measured.synced < measured.steps:
        why = measured.error or "training ended before"
        told += ["", f"syncs were counted in {measured.synced} of {measured.steps} further steps: {why}"]
    return told


def _who(row: dict[str, Any]) -> str:
    return f"{row['plugin']}: {row['phase']}" if row["phase"] else str(row["plugin"])


def _cells(row: dict[str, Any]) -> list[str]:
    syncs = "-" if row["syncs"] is None else f"{row['syncs']:.3g}"
    return [f"{row['us']:,.1f}", f"{row['share']:.1%}", syncs]


def chrome(events: Sequence[dict[str, Any]], ranks: int) -> dict[str, Any]:
    """Return the events as a file of Chrome's trace format, with times from the first on."""
    zero = events[0]["ts"] if events else 0.0
    names = [
        {"name": "process_name", "ph": "M", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}}
        for rank in range(ranks)
    ]
    return {"traceEvents": names + [{**event, "ts": event["ts"] - zero} for event in events], "displayTimeUnit": "ms"}
