"""The command `hookline runs`: list, show, compare and plot what is recorded of runs. Imports nothing heavy."""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hookline import nearest
from hookline.commands import add_command, new_parser
from hookline.files import replacing
from hookline_runs import compare, curves
from hookline_runs.edit_commands import add_edits
from hookline_runs.pages import PIPED, facts, render_run, render_runs
from hookline_runs.records import FILE, Run, list_runs, plain, read_run

EXAMPLES = """\
examples:
  hookline runs                                   what has been recorded
  hookline runs show digits-1                     its parameters, curves and metrics
  hookline runs compare digits-1 digits-2
  hookline runs plot digits-1 digits-2 --out curves.png
  hookline runs serve                             a page that follows them, in a browser
  hookline runs export-page --out runs.html       the same in one file, to send
  hookline runs tag digits-1 --add baseline
"""


def main(words: Sequence[str]) -> int:
    """Run the command with the words behind its name; return its exit code.

    Raises:
        ValueError: what the user can mend.
    """
    options = _parser().parse_args(words)
    options.command(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "List the runs of a folder; show, compare or plot them."
    parser = new_parser("hookline runs", about, EXAMPLES)
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--folder", default=argparse.SUPPRESS, help="where the runs are (default: runs)")
    machines = argparse.ArgumentParser(add_help=False, parents=[where])
    machines.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="for machines")
    parser.add_argument("--folder", default="runs", help="where the runs are (default: runs)")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--archived", action="store_true", help="list archived runs too")
    parser.set_defaults(command=_list)
    add = functools.partial(add_command, parser.add_subparsers(metavar="COMMAND"))
    a_run = "a run's folder, or its name below --folder"
    show = add("show", "show a run's parameters, metrics and curves", _show, parents=[machines])
    show.add_argument("run", metavar="RUN", help=a_run)
    show.add_argument("--rows", metavar="N", help="how many of the last logged steps, or all (default: 20; JSON: all)")
    several = add("compare", "show where runs differ: parameters, versions and metrics", _compare, parents=[machines])
    several.add_argument("runs", nargs="+", metavar="RUN", help=f"{a_run}; differences are from the first")
    plot = add("plot", "draw the curves of runs into a file", _plot, parents=[where])
    plot.add_argument("runs", nargs="+", metavar="RUN", help=a_run)
    plot.add_argument("--out", required=True, metavar="FILE", help="what to write; its suffix is .png, .svg or .pdf")
    plot.add_argument(
        "--metric", nargs="+", action="extend", default=[], metavar="NAME",
        help="what to draw: val_loss, or loss for that of training as well (default: all)",
    )  # fmt: skip
    plot.add_argument("--by", choices=curves.AXES, default="step", help="what goes to the right (default: step)")
    serve = add(
        "serve",
        "show runs on a page in the browser that follows them while they train",
        _serve,
        parents=[where],
    )
    serve.add_argument("dir", nargs="?", metavar="DIR", help="where the runs are (default: --folder)")
    serve.add_argument("--host", default="127.0.0.1", help="who can reach it: this machine alone (default), or more")
    serve.add_argument("--port", type=int, default=0, help="0 for any that is free (default)")
    page = add("export-page", "write runs as a page in one file, which needs no server", _export, parents=[where])
    page.add_argument("runs", nargs="*", metavar="RUN", help="names of runs in --folder (default: all)")
    page.add_argument("--out", required=True, metavar="FILE", help="what to write, such as runs.html")
    page.add_argument("--view", default="", metavar="ADDRESS", help="an address of `runs serve`, whose view it shows")
    add_edits(add, where, _folders)
    return parser


def _list(options: argparse.Namespace) -> None:
    found = list_runs(options.folder)
    if options.json:
        _print_json([facts(run) for run in found])
        return
    listed = [run for run in found if options.archived or not run.notes.archived]
    if listed or not found:
        print(render_runs(listed, _width()))
    if left := len(found) - len(listed):
        print(f"{left} archived run{'s are' if left > 1 else ' is'} left out: hookline runs --archived")


def _show(options: argparse.Namespace) -> None:
    wanted = options.rows if options.rows is not None else "all" if options.json else "20"
    if wanted != "all" and not (wanted.isdecimal() and wanted.isascii()):
        raise ValueError(f"--rows {wanted} is neither a number from 0 nor all")
    rows = None if wanted == "all" else int(wanted)
    run = read_run(_folder(options.folder, options.run))
    if options.json:
        shown = run.rows if rows is None else run.rows[max(len(run.rows) - rows, 0) :]
        evaluations = [{"stage": stage, **values} for stage, values in run.evaluations]
        more = {name: getattr(run, name) for name in ("versions", "config", "checkpoints", "objects", "unreadable")}
        _print_json(facts(run) | more | {"evaluations": evaluations, "rows": shown})
        return
    print(render_run(run, rows, _width()))
    if drawn := curves.draw(run, _width(), sys.stdout.isatty(), sys.stdout.encoding):
        print("", *drawn, sep="\n")


def _compare(options: argparse.Namespace) -> None:
    compared = _read(options)
    if len(compared) < 2:
        raise ValueError(f"there is nothing to compare {', '.join(compared)} with: name two runs or more")
    difference = compare.Difference(compared)
    if options.json:
        _print_json({"runs": {label: facts(run) for label, run in compared.items()}, **difference.as_json()})
    else:
        print(difference.render(_width()))


def _plot(options: argparse.Namespace) -> None:
    print(f"wrote {curves.plot(_read(options), Path(options.out), options.metric, options.by)}")


def _read(options: argparse.Namespace) -> dict[str, Run]:
    """Read the runs that were named, each once: by the names of their folders, or paths where two are of one name."""
    found = dict.fromkeys(_folder(options.folder, named).resolve() for named in options.runs)
    names = [folder.name for folder in found]
    return {
        name if names.count(name) == 1 else str(folder): read_run(folder)
        for folder, name in zip(found, names, strict=True)
    }


def _serve(options: argparse.Namespace) -> None:
    from hookline_runs import report  # what makes a server takes a while to import

    report.serve(Path(options.folder if options.dir is None else options.dir), options.host, options.port)


def _export(options: argparse.Namespace) -> None:
    from hookline_runs.report.inline import page_of

    out = Path(options.out)
    body = page_of(Path(options.folder), options.runs, options.view)
    try:
        with replacing(out) as new:
            new.write_bytes(body)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror or error}") from error
    print(f"wrote {out}")


def _folders(options: argparse.Namespace) -> list[Path]:
    return [_folder(options.folder, named) for named in dict.fromkeys(options.runs)]


def _folder(root: str, named: str) -> Path:
    """Return the folder of a run that was named by its path, or by its name in the folder of runs."""
    places = Path(named), Path(root) / named
    for there in (lambda place: (place / FILE).is_file(), Path.is_dir):
        for place in filter(there, places):
            return place
    names = [path.parent.name for path in sorted(Path(root).glob(f"*/{FILE}"))]
    listed = ", ".join(names[-20:]) + (f", and {len(names) - 20} more" if len(names) > 20 else "")
    raise ValueError(
        f"there is no run {named!r}, neither at this path nor in {root}{nearest(named, names)}; "
        + (f"{root} has {listed}" if names else "name the folder of the runs by --folder")
    )


def _width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPED


def _print_json(value: Any) -> None:
    print(json.dumps(plain(value), indent=2, allow_nan=False))
