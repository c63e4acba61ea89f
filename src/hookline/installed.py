"""The installed plugins, read from metadata: nothing of a plugin is imported before a run names it."""

from __future__ import annotations

import difflib
import functools
import importlib
import re
from collections.abc import Iterable
from importlib import metadata
from typing import Any

PLUGINS = "hookline.plugins"
COMMANDS = "hookline.commands"


@functools.cache
def installed(group: str = PLUGINS) -> dict[str, metadata.EntryPoint]:
    """Return the entry points of a group by name: the plugins, or the commands.

    A command's entry point is a function that takes the words after the command's name and returns an exit code.

    Raises:
        ValueError: two distributions claim one name.
    """
    found: dict[str, metadata.EntryPoint] = {}
    for point in sorted(metadata.entry_points(group=group), key=lambda point: point.name):
        other = found.setdefault(point.name, point)
        if distribution(other) != distribution(point):
            raise ValueError(
                f"two distributions bring {group.removeprefix('hookline.')} named {point.name!r}: "
                f"{distribution(other)} and {distribution(point)}; uninstall one of them"
            )
    return found


def load(name: str) -> type:
    """Import the class of a plugin, by its installed name or by a dotted path.

    Raises:
        ValueError: no such plugin is installed (the message has the nearest name), or it needs other versions than
            are installed, or it cannot be imported.
    """
    if "." in name:
        return load_path(name)  # type: ignore[no-any-return]
    point = installed().get(name)
    if point is None:
        raise ValueError(
            f"no plugin named {name!r} is installed{nearest(name, installed())}; installed are "
            f"{', '.join(installed()) or 'none'}. `pip install hookline-{name}` may bring it"
        )
    return load_point(point)


def load_point(point: metadata.EntryPoint) -> type:
    """Import the class of a plugin, by its entry point.

    Raises:
        ValueError: it needs other versions than are installed, or it cannot be imported.
    """
    _check_requirements(point)
    try:
        loaded: type = point.load()
        return loaded
    except Exception as error:
        raise ValueError(
            f"plugin {point.name!r} of {distribution(point)} cannot be imported ({point.value}): "
            f"{type(error).__name__}: {error}"
        ) from error


def load_path(path: str) -> Any:
    """Import the object of a dotted path.

    Raises:
        ValueError: there is no such object.
    """
    home, _, name = path.rpartition(".")
    if not all(path.split(".")) or not home:
        raise ValueError(f"{path!r} is no dotted path, such as package.module.Name")
    try:
        module = importlib.import_module(home)
    except ImportError as error:
        raise ValueError(f"{path!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise ValueError(f"{path!r} cannot be imported: {home} has no {name!r}{nearest(name, dir(module))}")
    return getattr(module, name)


def name_of(plugin_class: type) -> str:
    """Return the installed name of a plugin class, else the class's name in snake_case."""
    value = f"{plugin_class.__module__}:{plugin_class.__qualname__}"
    for name, point in installed().items():
        if point.value == value:
            return name
    return re.sub(r"(?<!^)(?=[A-Z])", "_", plugin_class.__name__).lower()


def nearest(word: str, words: Iterable[str]) -> str:
    """Return ", did you mean …?" with the nearest word, or ""."""
    found = difflib.get_close_matches(word, list(words), n=1)
    return f", did you mean {found[0]!r}?" if found else ""


def distribution_of(plugin_class: type) -> str:
    """Return "name version" of the distribution of a plugin class, or the name of its module."""
    point = installed().get(name_of(plugin_class))
    if point is not None and point.value == f"{plugin_class.__module__}:{plugin_class.__qualname__}":
        return distribution(point)
    return plugin_class.__module__


def distribution(point: metadata.EntryPoint) -> str:
    """Return "name version" of the distribution of an entry point."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def _check_requirements(point: metadata.EntryPoint) -> None:
    """Compare a distribution's requirements with the installed versions; pip does not keep them consistent."""
    from packaging.requirements import Requirement

    for text in (point.dist.requires or []) if point.dist else []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            have = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            have = "not installed"
        if have == "not installed" or not requirement.specifier.contains(have, prereleases=True):
            raise ValueError(
                f"plugin {point.name!r} of {distribution(point)} needs {requirement.name}"
                f"{requirement.specifier}, but {requirement.name} is {have}; "
                f"`pip install '{requirement.name}{requirement.specifier}'`"
            )
