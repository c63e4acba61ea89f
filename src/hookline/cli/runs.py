"""`hookline runs`: what is recorded of runs, as text and as JSON. Imports nothing heavy."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hookline.cli import compare, curves
from hookline.cli.layout import number, shorten, strict, table
from hookline.installed import nearest
from hookline.records import COUNTERS, FILE, Run, list_runs, read_run

PIPED = 120
"""Columns of text where the output is no terminal."""


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add what `hookline runs` understands; `options.of_runs` does it, and refuses by ValueError."""
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--folder", default=argparse.SUPPRESS, help="where the runs are (default: runs)")
    machines = argparse.ArgumentParser(add_help=False)
    machines.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="for machines")
    parser.add_argument("--folder", default="runs", help="where the runs are (default: runs)")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(of_runs=_list)
    commands = parser.add_subparsers(metavar="COMMAND")

    def add(
        name: str, summary: str, command: Callable[[argparse.Namespace], None], *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        description = summary[0].upper() + summary[1:] + "."
        added = commands.add_parser(name, help=summary, description=description, parents=[where, *parents])
        added.set_defaults(of_runs=command)
        return added

    a_run = "a run's folder, or its name below --folder"
    show = add("show", "show a run's parameters, metrics and curves", _show, machines)
    show.add_argument("run", metavar="RUN", help=a_run)
    show.add_argument("--rows", metavar="N", help="how many of the last logged steps, or all (default: 20; JSON: all)")
    several = add("compare", "show where runs differ: parameters, versions and metrics", _compare, machines)
    several.add_argument("runs", nargs="+", metavar="RUN", help=f"{a_run}; differences are from the first")
    plot = add("plot", "draw the curves of runs into a file", _plot)
    plot.add_argument("runs", nargs="+", metavar="RUN", help=a_run)
    plot.add_argument("--out", required=True, metavar="FILE", help="what to write; its suffix is .png, .svg or .pdf")
    plot.add_argument(
        "--metric", nargs="+", action="extend", default=[], metavar="NAME",
        help="what to draw: val_loss, or loss for that of training as well (default: all)",
    )  # fmt: skip
    plot.add_argument("--by", choices=curves.AXES, default="step", help="what goes to the right (default: step)")
    serve = add("serve", "show runs on a page in the browser that follows them while they train", _serve)
    serve.add_argument("dir", nargs="?", metavar="DIR", help="where the runs are (default: --folder)")
    serve.add_argument("--host", default="127.0.0.1", help="who can reach it: this machine alone (default), or more")
    serve.add_argument("--port", type=int, default=0, help="0 for any that is free (default)")


def _list(options: argparse.Namespace) -> None:
    found = list_runs(options.folder)
    if options.json:
        _print_json([facts(run) for run in found])
    else:
        print(render_runs(found, _width()))


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
    from hookline.cli import report  # what makes a server takes a while to import

    report.serve(Path(options.folder if options.dir is None else options.dir), options.host, options.port)


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
    print(json.dumps(strict(value), indent=2, allow_nan=False))


def facts(run: Run) -> dict[str, Any]:
    """Return what stands in the list of runs, for machines."""
    best = run.best
    return {
        "run": run.folder.name,
        "folder": str(run.folder),
        "status": run.status,
        "reason": run.reason,
        "step": run.step,
        "totals": run.totals,
        "best": None if best is None else {"metric": run.val_loss, "value": best[run.val_loss], "step": best["step"]},
        "seconds": run.seconds,
        "began": run.began,
        "revision": run.revision,
        "command": run.command,
    }


def render_runs(runs: Sequence[Run], width: int = PIPED) -> str:
    """Return a table of runs; the command takes what is left of the width."""
    if not runs:
        return "no runs with a record yet (the plugin jsonl keeps one: `plugins: {jsonl: {}}`)"
    header = ["run", "status", "step", "best val loss", "at step", "duration", "revision", "started"]
    lines = table(header, [_summary(run) for run in runs], right=(2, 3, 4, 5))
    used = max(map(len, lines)) + 2
    commands = ["command", *(shorten(typed(run.command), max(width - used, 20)) for run in runs)]
    return "\n".join(line.ljust(used) + command for line, command in zip(lines, commands, strict=True))


def typed(command: Sequence[str]) -> str:
    """Return a command as it was typed: without the path of the interpreter, and of `hookline`."""
    words = list(command)
    if words[1:3] == ["-m", "hookline"]:
        words = words[2:]
    elif [Path(word).name for word in words[1:2]] == ["hookline"]:
        words = ["hookline", *words[2:]]
    elif words:
        words[0] = Path(words[0]).name
    return shlex.join(words) or "-"


def _summary(run: Run) -> list[str]:
    best = run.best
    total = run.totals.get("steps")
    return [
        run.folder.name,
        run.status,
        f"{run.step}/{total}" if total is not None else f"{run.step}",
        "-" if best is None else number(best[run.val_loss]),
        "-" if best is None else str(best["step"]),
        _duration(run.seconds),
        (run.revision or "-")[:8],
        _moment(run.began),
    ]


def render_run(run: Run, rows: int | None = 20, width: int = 120) -> str:
    """Return a page on one run.

    Args:
        run: which.
        rows: how many of the last logged steps to show, 0 for none; None for all.
        width: columns of text; a wider table goes on below itself.
    """
    best = run.best
    facts = {
        "folder": str(run.folder),
        "status": f"{run.status}: {run.reason}" if run.reason else run.status,
        "step": f"{run.step} of {run.totals['steps']}" if run.totals.get("steps") is not None else str(run.step),
        f"best {run.val_loss}": "-" if best is None else f"{number(best[run.val_loss])} at step {best['step']}",
        "started": _moment(run.began),
        "duration": _duration(run.seconds) + (f" in {len(run.sessions)} sessions" if len(run.sessions) > 1 else ""),
        "command": shlex.join(run.command) or "-",
        "revision": run.revision or "-",
        "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items()) or "-",
    }
    if run.unreadable:
        facts["unreadable"] = f"{run.unreadable} line(s) of {FILE}"
    parts = [_pairs(facts.items())]
    if run.config:
        parts.append(["hyper-parameters", *_pairs(compare.flatten(run.config))])
    for title, kept in (("checkpoints", run.checkpoints), ("objects", run.objects)):
        if kept:
            parts.append([title, *(_kept(one) for one in kept)])
    for stage, values in run.evaluations:
        parts.append(
            [f"{stage} at step {values['step']}", *_pairs((n, number(v)) for n, v in values.items() if n != "step")]
        )
    if run.rows and rows != 0:
        shown = run.rows if rows is None else run.rows[len(run.rows) - min(rows, len(run.rows)) :]
        left_out = f" (the last {len(shown)} of {len(run.rows)})" if len(shown) < len(run.rows) else ""
        parts.append([f"logged{left_out}", *_rows(shown, width)])
    return "\n\n".join("\n".join(lines) for lines in parts)


def _kept(one: Mapping[str, Any]) -> str:
    if "path" in one:
        return f"  step {one['step']}: {one['path']} ({one['kind']})"
    return (
        f"  step {one['step']}: {one['name']} = {one['text']}"
        if "text" in one
        else (f"  step {one['step']}: {one['name']} ({one['type']}, not kept)")
    )


def _rows(rows: Sequence[Mapping[str, float | int]], width: int) -> list[str]:
    """Lay rows out under the names of their metrics, in as many tables as the width asks for."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in COUNTERS]
    columns = {name: [number(row[name]) if name in row else "" for row in rows] for name in ("step", "epoch", *names)}
    widths = {name: max(len(name), *map(len, cells)) + 2 for name, cells in columns.items()}
    lines: list[str] = []
    while names or not lines:
        block, used = ["step", "epoch"], widths["step"] + widths["epoch"]
        while names and (len(block) == 2 or used + widths[names[0]] <= width):
            used += widths[names[0]]
            block.append(names.pop(0))
        cells = [list(row) for row in zip(*(columns[name] for name in block), strict=True)]
        lines += [*([""] if lines else []), *table(block, cells, right=range(len(block)))]
    return lines


def _pairs(pairs: Iterable[tuple[str, str]]) -> list[str]:
    listed = list(pairs)
    width = max((len(name) for name, _ in listed), default=0)
    return [f"  {name.ljust(width)}  {value}".rstrip() for name, value in listed]


def _moment(seconds: float | None) -> str:
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"
