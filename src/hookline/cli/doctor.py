"""`hookline doctor`: what this machine, the installation and the data loading of a configuration are like."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hookline.cli.loading import look_at
from hookline.cli.machine import OK, PROBLEM, Finding, cores, devices, place, versions
from hookline.commands import UserError, mendable, read_configuration, table
from hookline.config import resolve
from hookline.installed import COMMANDS, PLUGINS, claims, distribution, installed, load


def examine(options: argparse.Namespace) -> int:
    """Print what was found; return 1 if a problem was."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that plugins import
        findings = list(_everything(options))
    if options.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        print(*table(["", "", "what was found"], findings)[1:], sep="\n")
    return int(any(finding.level == PROBLEM for finding in findings))


def _everything(options: argparse.Namespace) -> Iterator[Finding]:
    yield from versions()
    yield from devices()
    yield from cores()
    loaded, config, runs = None, None, "runs"
    if options.config is not None:
        try:
            with mendable(ValueError):
                loaded = read_configuration(options)
                config = resolve(loaded)
            runs = config["trainer"]["runs_folder"]
            yield Finding(OK, "configuration", options.config)
        except UserError as error:
            yield Finding(PROBLEM, "configuration", str(error))
    for about, folder in (("run folder", runs), ("temporary files", tempfile.gettempdir())):
        yield from place(about, Path(folder))
    yield from plugins(None if config is None else config["plugins"])
    if loaded is not None:
        yield from look_at(options)


def plugins(named: dict[str, Any] | None) -> Iterator[Finding]:
    """Yield the distributions of plugins, and which of them cannot be used.

    Args:
        named: the plugins of a configuration, with their options; None for all that are installed.
    """
    twice = set()
    for group in (PLUGINS, COMMANDS):
        for name, points in claims(group).items():
            if len(points) > 1:
                twice.add(name)
                what = f"{group.removeprefix('hookline.')} named {name!r}"
                yield Finding(
                    PROBLEM, "plugins", f"two distributions bring {what}: {' and '.join(map(distribution, points))}"
                )
    there = installed()
    asked = list(there) if named is None else _classes(named)
    errors = {name: _error(name) for name in asked if name not in twice}
    for name, error in errors.items():
        if error:
            yield Finding(PROBLEM, f"plugin {name}", error)
    good = [name for name, error in errors.items() if not error]
    used = sorted({distribution(there[name]) for name in good if name in there})
    yield Finding(OK, "plugins", f"{len(good)} can be imported: {', '.join(used) or 'none'}")


def _error(name: str) -> str:
    """Return why a plugin cannot be imported, or ""."""
    try:
        load(name)
    except KeyboardInterrupt:
        raise
    except ValueError as error:
        return str(error)
    except BaseException as error:  # a module may exit
        return f"it cannot be imported: {type(error).__name__}: {error}"
    return ""


def _classes(named: dict[str, Any]) -> list[str]:
    return [node.get("_plugin_", name) for name, node in named.items() if node is not None]
