"""The command line. Commands that need no torch import none: help, plugins and hooks start at once."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hookline import __version__
from hookline.cli import going_on, logs, mistakes
from hookline.commands import (
    UserError,
    add_command,
    add_configuration,
    mendable,
    new_parser,
    read_configuration,
    say,
    table,
)
from hookline.installed import COMMANDS, distribution, find, installed, nearest

EXAMPLES = """\
examples:
  hookline fit examples/digits.yaml                      train
  hookline fit examples/digits.yaml trainer.epochs=3 plugins.clip.max_norm=0.5
  hookline fit examples/digits.yaml -p no:progress       without a plugin; -p NAME: with one more
  hookline fit examples/digits.yaml --resume             go on where the newest run was cut
  hookline validate examples/digits.yaml --checkpoint best
  hookline fit examples/digits.yaml -p ddp --nproc 2     in two processes of this machine
  hookline fit runs/digits-1/config.yaml                 do a run once more
  hookline predict examples/chars.yaml --resume
  hookline plan examples/digits.yaml                     who does what in which order
  hookline plan --schedule examples/digits.yaml          which learning rate each step will have
  hookline plugins                                       what is installed
  hookline hooks on_boundary                             what a hook is told, and when
  hookline doctor examples/digits.yaml                   is this machine fit, and what do steps wait for
  hookline init my-project                               a project that trains at once
"""
DOORS = {
    "fit": ("train", "train a module"),
    "validate": ("validate", "evaluate the validation loaders"),
    "test": ("test", "evaluate the test loaders"),
    "predict": ("predict", "predict; the module or a plugin takes the predictions"),
}
OWN = (*DOORS, "plan", "plugins", "hooks", "doctor", "new", "init")
"""The commands of the core."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 only for success, 2 for a mistake of the user, 130 for Ctrl-C."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # so that `_target_: examples.digits.Digits` is found in the user's folder
    try:
        with mendable(ValueError):
            brought = find(words[0], COMMANDS) if words else None
        if brought is not None:
            return _run_brought(brought.load(), words[1:])
        for word in words[:1]:
            mistakes.refuse_unknown_command(word, [*OWN, *installed(COMMANDS)])
        options = _parse(words)
        options.words = words
        code: int = options.command(options)
        return code
    except UserError as error:
        _tell_once(f"hookline: {error}")
        return 2
    except KeyboardInterrupt as error:
        from hookline.cli import launch

        if launch.launched()[1] in ("", "0"):
            print("; ".join(["hookline: interrupted", *map(str, error.args)]), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run_brought(command: Callable[[Sequence[str]], int], words: Sequence[str]) -> int:
    try:
        return command(words)
    except ValueError as error:
        raise UserError(error) from error


def _tell_once(text: str) -> None:
    """Print a line on standard error; of several ranks of this machine that say the same, one does."""
    from hookline.cli import launch

    if launch.is_first_to_say(text):
        print(text, file=sys.stderr)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse; overrides may stand anywhere after the configuration, which argparse alone does not allow."""
    parser = _parser()
    if arguments[:1] in (["-h"], ["--help"]):  # which distribution brings a command takes long to read
        parser.epilog = EXAMPLES + _brought_by_plugins()
    options, rest = parser.parse_known_args(_with_pictures(arguments))
    if isinstance(getattr(options, "resume", None), str) and "=" in options.resume:
        rest, options.resume = [options.resume, *rest], True
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    for word in unknown:
        if hasattr(options, "config") and word.startswith("-"):
            mistakes.refuse_unknown_option(word, arguments, options)
    if unknown or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        options.overrides += rest
    return options


def _with_pictures(words: Sequence[str]) -> list[str]:
    """Return the words with each `--schedule` that names no picture naming the terminal: "-"."""
    following = [*words[1:], ""]
    pictures = (".png", ".svg", ".pdf")
    bare = [
        word == "--schedule" and not after.endswith(pictures) for word, after in zip(words, following, strict=False)
    ]
    return [f"{word}=-" if alone else word for word, alone in zip(words, bare, strict=True)]


def _brought_by_plugins() -> str:
    lines = [f"  {name:<20}{distribution(point)}" for name, point in installed(COMMANDS).items()]
    return "\n".join(["\ncommands of plugins (`hookline COMMAND --help`):", *lines]) if lines else ""


def _parser() -> argparse.ArgumentParser:
    about = "Train PyTorch modules through a small loop of hooks."
    parser = new_parser("hookline", about, EXAMPLES)
    parser.add_argument("--version", action="version", version=f"hookline {__version__}")
    add = functools.partial(add_command, parser.add_subparsers(metavar="COMMAND", required=True))
    _add_doors(add)
    plan = add("plan", "show for each hook who wraps it and who does or hears it", _plan)
    add_configuration(plan)
    plan.add_argument("--json", action="store_true", help="for machines")
    plan.add_argument(
        "--schedule", metavar="FILE.png",
        help="show instead what the schedulers will do, in the terminal or in a picture of this name (png, svg, pdf)",
    )  # fmt: skip
    _add_plugins(add)
    hooks = add("hooks", "show the hooks in the order of the loop", _hooks)
    hooks.add_argument("name", nargs="?", help="one hook, in full")
    doctor = add("doctor", "look at this machine, what is installed, and how a configuration loads its data", _doctor)
    add_configuration(doctor, optional=True)
    doctor.add_argument("--json", action="store_true", help="for machines")
    new = add("new", "write the skeleton of something new", _new)
    new.add_argument("kind", choices=["plugin"])
    new.add_argument("name", help="name of the plugin, e.g. weight-noise")
    init = add("init", "write a project that trains at once: a module, data, a configuration and a test", _init)
    init.add_argument("name", help="name of the project, e.g. my-project")
    for written in (new, init):
        written.add_argument("--folder", default=".", help="where to write it (default: here)")
    return parser


def _add_doors(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that run a configuration."""
    for name, (door, summary) in DOORS.items():
        add_configuration(added := add(name, summary, _door, parents=[_launching()]))
        added.set_defaults(door=door)
        going_on.add_options(added)
        added.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
        added.add_argument(
            "--log-level", choices=logs.LEVELS, help="how much is said of the run on standard error (default: info)"
        )
        added.add_argument(
            "-q", "--quiet", dest="log_level", action="store_const", const="warning",
            help="say nothing but warnings and errors, and show no progress: --log-level warning",
        )  # fmt: skip


def _add_plugins(add: Callable[..., argparse.ArgumentParser]) -> None:
    plugins = add("plugins", "list the installed plugins, or show one, or the hooks of a configuration's", _plugins)
    plugins.add_argument("what", nargs="?", help="a plugin's name or a configuration file")
    plugins.add_argument("--json", action="store_true", help="for machines")
    plugins.add_argument(
        "--verify", action="store_true",
        help="compare the files of each plugin with those that were installed, and import it; exit code 1 for problems",
    )  # fmt: skip


def _launching() -> argparse.ArgumentParser:
    """Return the parser of the launcher's options, which the started processes do not get."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--nproc", metavar="N", help="run it in N processes of this machine; auto for one a CUDA device"
    )
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="N",
        help="with --nproc: how often all start anew, from the newest checkpoint, when one has failed (default: 0)",
    )  # fmt: skip
    return parser


def _configuration(options: argparse.Namespace) -> Any:
    resume = going_on.resume_of(options) if hasattr(options, "resume") else None
    with mendable(ValueError):
        return read_configuration(options, *([] if resume is None else [f"trainer.resume={json.dumps(resume)}"]))


def _trainer(loaded: Any) -> Any:
    from hookline import config

    say("building the module and the plugins")
    with mendable(ValueError, TypeError):
        return config.build_trainer(loaded)


def _door(options: argparse.Namespace) -> int:
    from hookline.cli import launch

    with logs.shown(options.log_level, launch.launched()[1]):
        return _run_or_launch(options)


def _run_or_launch(options: argparse.Namespace) -> int:
    from hookline.cli import launch

    if options.max_restarts < 0 or (options.max_restarts and options.nproc is None):
        raise UserError(
            f"--max-restarts={options.max_restarts} is a number from 0, and goes with --nproc; torchrun has its own"
        )
    if options.nproc is None or options.print_config:
        launch.end_with_agent()
        code: int = launch.recorded(_run)(options)
        return code
    loaded = _configuration(options)
    from hookline import config

    _, words = _launching().parse_known_args(options.words)
    with mendable(ValueError):
        config.resolve(loaded)  # what is wrong with it is said once, before anything starts
        say(f"starting {options.nproc} processes")
        return launch.launch(words, options.nproc, options.max_restarts, shlex.join(options.words))


def _run(options: argparse.Namespace) -> int:
    from hookline.cli import launch

    if options.door == "train" and (folder := launch.remembered()) is not None:
        # the run of the attempt before, not another one of this name
        options.resume, options.resume_or_start, options.checkpoint = folder, False, None
    loaded = _configuration(options)
    if options.print_config:
        from hookline import config

        print(config.to_yaml(config.masked(loaded)), end="")
        return 0
    with _no_early_success(), going_on.no_folder_left(loaded) as trainers:
        trainer = _trainer(loaded)
        trainers.append(trainer)
        _refuse_to_train_apart(trainer, options.door)
        metrics = _do(trainer, options)
    if trainer.rank == 0 and trainer.status == "preempted":
        print(f"hookline: {going_on.how(options.words, trainer)}", file=sys.stderr)
    if metrics and trainer.rank == 0:
        print(json.dumps(metrics, indent=2))
    return launch.report(trainer.exit_code)


def _do(trainer: Any, options: argparse.Namespace) -> Any:
    from hookline import config
    from hookline.cli import launch

    with mendable(ValueError):
        going_on.refuse_nothing_to_resume(options, trainer)
        if options.door == "train" and trainer.rank == 0:
            launch.remember(trainer.run_dir)  # before anything can fail
            tree = {**trainer.config, "trainer": {**trainer.config["trainer"], "resume": False}}
            kept = trainer.run_dir / "config.yaml"
            with contextlib.suppress(FileExistsError), kept.open("x", encoding="utf-8") as file:  # follows no link
                file.write(config.to_yaml(tree))
        elif options.door == "train" and trainer.local_rank == 0:
            trainer.plugins.register(launch.reminder(), "launcher")
        say("preparing the data and the first batch")
        try:
            return getattr(trainer, options.door)()
        except KeyboardInterrupt as error:
            if options.door == "train" and trainer.rank == 0:
                raise going_on.Interrupted(going_on.how(options.words, trainer)) from error
            raise


def _refuse_to_train_apart(trainer: Any, door: str) -> None:
    """Refuse several processes that would each do the whole run, and restarts that would each begin it."""
    from hookline.cli import launch

    launcher, _, number = launch.launched()
    if trainer.world_size == 1 and number > 1:
        alone = ", ".join(launch.STARTED[launcher])
        raise UserError(
            f"{launcher} has started {number} processes, and no plugin makes one run of them, so that each would do "
            f"the same: name one that does, e.g. `-p ddp`, or unset {alone} where each shall be a run of its own"
        )
    if door == "train" and launch.restarts() and not trainer.plugins.performers("restore"):
        raise UserError(
            "a run that is started anew goes on with its newest checkpoint, and no plugin keeps one: name one that "
            "does, e.g. `-p checkpoint`, or leave --max-restarts away"
        )


@contextlib.contextmanager
def _no_early_success() -> Iterator[None]:
    """Make a `sys.exit()` in the middle of a run fail."""
    try:
        yield
    except SystemExit as error:
        if error.code is None or (isinstance(error.code, int) and error.code % 256 == 0):
            notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
            print(f"hookline: the run was left by SystemExit({error.code}) before it was done{notes}", file=sys.stderr)
            error.code = 1
        raise


def _plan(options: argparse.Namespace) -> int:
    if options.schedule is not None:
        from hookline.cli import schedule

        options.overrides.append("trainer.device=cpu")
        trainer = _trainer(_configuration(options))
        with mendable(ValueError):
            schedule.show(trainer, options.schedule, options.json)
        return 0
    rows = _trainer(_configuration(options)).plugins.plan()
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        cells = [[r["hook"], r["kind"], ", ".join(r["wrapped_by"]), ", ".join(r["done_by"])] for r in rows]
        _print_table(["hook", "kind", "wrapped by", "done or heard by"], cells)
    return 0


def _plugins(options: argparse.Namespace) -> int:
    from hookline.cli import plugins

    if Path(options.what or "").suffix not in (".yaml", ".yml"):
        with mendable(ValueError):
            return plugins.verify(options) if options.verify else plugins.show(options)
    if options.json or options.verify:
        raise UserError("--json and --verify go with the name of a plugin, or with none for all, not with a file")
    options.config, options.overrides, options.plugins = options.what, [], []
    manager = _trainer(_configuration(options)).plugins
    for name, plugin in manager.listed():
        print(f"{name}: {(type(plugin).__doc__ or '').strip().partition(chr(10))[0]}")
        for row in manager.plan():
            if name in row["wrapped_by"] + row["done_by"]:
                does = "wraps" if name in row["wrapped_by"] else "does" if row["kind"] == "verb" else "hears"
                print(f"  {does:5} {row['hook']}")
    return 0


def _hooks(options: argparse.Namespace) -> int:
    from hookline.cli.hooks import read_hooks, render

    hooks = read_hooks()
    if options.name is None:
        _print_table(["hook", "kind", "arguments"], [[h.name, h.kind, ", ".join(h.arguments)] for h in hooks])
        return 0
    for hook in hooks:
        if hook.name == options.name:
            print(render(hook))
            return 0
    raise UserError(f"there is no hook {options.name!r}{nearest(options.name, [hook.name for hook in hooks])}")


def _doctor(options: argparse.Namespace) -> int:
    from hookline.cli.doctor import examine

    return examine(options)


def _new(options: argparse.Namespace) -> int:
    from hookline.cli.new import new_plugin

    with mendable(ValueError):
        print(f"wrote {new_plugin(options.name, Path(options.folder))}")
    return 0


def _init(options: argparse.Namespace) -> int:
    from hookline.cli.new import new_project

    with mendable(ValueError):
        folder = new_project(options.name, Path(options.folder))
    print(f"wrote {folder}; train it: cd {folder} && hookline fit run.yaml")
    return 0


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(*table(header, rows), sep="\n")
