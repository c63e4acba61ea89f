"""Helpers for commands, of the core and of plugins. No torch is imported before a command needs it."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookline.masking import redact

if TYPE_CHECKING:
    from omegaconf import DictConfig


class UserError(Exception):
    """A mistake of the user: printed in one line, without a traceback and without secrets."""

    def __init__(self, text: object) -> None:
        super().__init__(redact(str(text)))


def new_parser(name: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """Return the parser of a command, e.g. "hookline checkpoints"; the text below the help keeps its lines."""
    return argparse.ArgumentParser(
        name, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_command(
    commands: Any, name: str, summary: str, command: Callable[[argparse.Namespace], Any], **more: Any
) -> argparse.ArgumentParser:
    """Add a command to subparsers, and return its parser; `options.command` is the function."""
    description = summary[0].upper() + summary[1:] + "."
    added: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=description, **more)
    added.set_defaults(command=command)
    return added


def add_configuration(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """Let a command take a configuration as `hookline fit` does; `read_configuration` reads it."""
    parser.add_argument("config", nargs="?" if optional else None, help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override a key, e.g. trainer.epochs=3")
    parser.add_argument(
        "-p", dest="plugins", action="append", default=[], metavar="[no:]NAME", help="turn a plugin on, or off"
    )


def read_configuration(options: argparse.Namespace, *overrides: str) -> DictConfig:
    """Read the configuration of the command line; overrides of the command come after the user's.

    Raises:
        ValueError: the configuration is not usable; the message has the reason.
    """
    path = Path(options.config)
    if not path.is_file():
        home, near, there = _nearby(path)
        meant = f", did you mean '{home / near}'?" if near else ""
        raise ValueError(f"{path} is no file{meant}; the configurations in {home} are {', '.join(there) or 'none'}")
    if "torch" not in sys.modules:
        say("importing torch")
    from hookline import config

    return config.load_config(path, [*options.overrides, *overrides], options.plugins)


def _nearby(path: Path) -> tuple[Path, str, list[str]]:
    """Return a folder, which of its configurations may have been meant, and those that there are."""
    home = path if path.is_dir() else path.parent
    there = sorted(one.name for suffix in ("yaml", "yml") for one in home.glob(f"*.{suffix}"))
    wanted = "config.yaml" if path.is_dir() else path.name
    near = difflib.get_close_matches(wanted, there, n=1) or [one for one in there if Path(one).stem == path.stem]
    return home, near[0] if near else "", there[:20]


def say(text: str) -> None:
    """Tell who sits at a terminal what takes a while; nothing elsewhere, on other ranks and with `--quiet`."""
    wanted = logging.getLogger("hookline").level <= logging.INFO and os.environ.get("RANK", "0") == "0"
    if wanted and sys.stderr.isatty():
        print(f"hookline: {text} …", file=sys.stderr, flush=True)


def run_to_first_step(options: argparse.Namespace) -> Any:
    """Run the configuration of the command line up to its first step, without observers; return its trainer.

    For commands that try something before training. The run's folder is thrown away.
    """
    from hookline import config
    from hookline.interfaces import CallbackInterface
    from hookline.marks import hookimpl

    class NoStep(CallbackInterface):
        """Ends a run before its first step."""

        @hookimpl
        def train_epoch(self, trainer: Any) -> bool:
            trainer.stop("only what comes before training was asked for", "preempted", 0, alone=False)
            return False

    with tempfile.TemporaryDirectory() as folder:
        overrides = (f"trainer.runs_folder={folder}", "trainer.sanity_val_steps=0", "trainer.eval_when_start=false")
        loaded = read_configuration(options, *overrides)
        say("building the module and the plugins")
        trainer = config.build_trainer(loaded)
        for _, plugin in trainer.plugins.listed():
            if getattr(plugin, "observer", False):
                trainer.plugins.unregister(plugin)
        trainer.plugins.register(NoStep(), "no_step")
        trainer.train()
    return trainer


@contextlib.contextmanager
def mendable(*kinds: type[Exception]) -> Iterator[None]:
    """Print errors of hookline in one line, with their notes; errors of the user's code keep their traceback.

    Warnings are printed in one line too.

    Raises:
        UserError: `hookline` or one of its plugins raised one of these kinds.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        try:
            yield
        except kinds as error:
            if _raised_by_user_code(error):
                raise
            raise UserError("\n  ".join([str(error), *getattr(error, "__notes__", ())])) from error


def _show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
    name = "" if category is UserWarning else f"{category.__name__}: "
    print(redact(f"hookline: {name}{message}"), file=sys.stderr)


def _raised_by_user_code(error: BaseException) -> bool:
    """Tell whether an error comes from the user's module, not from a check of hookline."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and not traceback.tb_frame.f_globals.get("__name__", "").startswith("hookline")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Return lines of aligned columns below their heads, left-aligned unless they are in `right`."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    aligned = [
        [cell.rjust(w) if c in right else cell.ljust(w) for c, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return ["  ".join(line).rstrip() for line in aligned]
