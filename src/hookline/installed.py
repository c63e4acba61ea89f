"""The installed plugins, read from metadata: nothing of a plugin is imported before a run names it."""

from __future__ import annotations

import difflib
import functools
import importlib
import re
import shlex
from collections.abc import Iterable
from importlib import metadata
from typing import Any

PLUGINS = "hookline.plugins"
COMMANDS = "hookline.commands"


entry_points = functools.cache(metadata.entry_points)  # it reads a file of each distribution that is installed


@functools.cache
def claims(group: str = PLUGINS) -> dict[str, list[metadata.EntryPoint]]:
    """Return the entry points of a group by name; two of one name are of two distributions, and clash."""
    found: dict[str, list[metadata.EntryPoint]] = {}
    for point in entry_points().select(group=group):
        found.setdefault(point.name, []).append(point)
    for name, points in found.items():
        if len(points) > 1:  # else nobody needs to know of whom it is, which takes long to read
            found[name] = sorted({distribution(point): point for point in reversed(points)}.values(), key=distribution)
    return dict(sorted(found.items()))


@functools.cache
def installed(group: str = PLUGINS) -> dict[str, metadata.EntryPoint]:
    """Return one entry point for each name of a group: the plugins, or the commands.

    A command's entry point is a function that takes the words after the command's name and returns an exit code.
    """
    return {name: points[0] for name, points in claims(group).items()}


def find(name: str, group: str = PLUGINS) -> metadata.EntryPoint | None:
    """Return the entry point of a name, or None.

    Raises:
        ValueError: two distributions claim the name.
    """
    points = claims(group).get(name, [])
    if len(points) > 1:
        both = " and ".join(f"{distribution(point)} ({point.value})" for point in points)
        cure = "uninstall one of them"
        if group == PLUGINS:
            first = points[0].value.replace(":", ".")
            cure += f", or name the class of the other: `plugins: {{{name}: {{_plugin_: {first}}}}}`"
        raise ValueError(f"two distributions bring {group.removeprefix('hookline.')} named {name!r}: {both}; {cure}")
    return points[0] if points else None


def load(name: str) -> type:
    """Import the class of a plugin, by its installed name or by a dotted path.

    Raises:
        ValueError: no such plugin is installed (the message has the nearest name), or it needs other versions than
            are installed, or it cannot be imported.
    """
    if "." in name:
        return load_path(name)  # type: ignore[no-any-return]
    point = find(name)
    if point is None:
        raise ValueError(
            f"no plugin named {name!r} is installed{nearest(name, installed())}; installed are "
            f"{', '.join(installed()) or 'none'}. `pip install hookline-{name}` may bring it"
        )
    _check_once(point)
    try:
        loaded: type = point.load()
        return loaded
    except (Exception, SystemExit) as error:  # a module may call sys.exit
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
    except (ImportError, SystemExit) as error:
        raise ValueError(f"{path!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise ValueError(f"{path!r} cannot be imported: {home} has no {name!r}{nearest(name, dir(module))}")
    return getattr(module, name)


def name_of(plugin_class: type) -> str:
    """Return the installed name of a plugin class, else the class's name in snake_case."""
    point = _point_of(plugin_class)
    return point.name if point else re.sub(r"(?<!^)(?=[A-Z])", "_", plugin_class.__name__).lower()


def nearest(word: str, words: Iterable[str]) -> str:
    """Return ", did you mean …?" with the nearest word, or ""."""
    found = difflib.get_close_matches(word, list(words), n=1)
    return f", did you mean {found[0]!r}?" if found else ""


def distribution_of(plugin_class: type) -> str:
    """Return "name version" of the distribution of a plugin class, or the name of its module."""
    point = _point_of(plugin_class)
    return distribution(point) if point else plugin_class.__module__


def _point_of(plugin_class: type) -> metadata.EntryPoint | None:
    value = f"{plugin_class.__module__}:{plugin_class.__qualname__}"
    return next((point for points in claims().values() for point in points if point.value == value), None)


def distribution(point: metadata.EntryPoint) -> str:
    """Return "name version" of the distribution of an entry point."""
    if point.dist is None:
        return point.value
    said = point.dist.metadata
    return f"{said['Name']} {said['Version']}"


def check_requirements(point: metadata.EntryPoint) -> None:
    """Compare a distribution's requirements with the installed versions; pip does not keep them consistent.

    Raises:
        ValueError: the first that is missing or of another version, and the command that installs it.
    """
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


_check_once = functools.cache(check_requirements)  # of a plugin that is loaded: no two have its name


def refuse_without(required: Iterable[str], active: Iterable[str] | None = None) -> None:
    """Refuse to start without plugins, each named as a plugin or a distribution, with a range of versions or not.

    Args:
        required: such as `clip` or `hookline-clip>=0.1`.
        active: the installed names of the plugins of the run; None to ask only whether all are installed.

    Raises:
        ValueError: those that are missing and the command that installs them, or the first that is not active.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    missing = []
    for text in required:
        try:
            asked = Requirement(text)
        except InvalidRequirement as error:
            raise ValueError(f"required_plugins: {text!r} must be like clip or hookline-clip>=0.1") from error
        names = {asked.name, re.sub(r"[-_.]+", "-", asked.name).lower()}
        found = [one for one in installed().values() if {one.name, one.dist.name if one.dist else one.name} & names]
        if not any(one.dist and asked.specifier.contains(one.dist.version, prereleases=True) for one in found):
            missing.append(f"hookline-{asked.name.removeprefix('hookline-').replace('_', '-')}{asked.specifier}")
        elif active is not None and not {one.name for one in found} & {*active}:
            name = found[0].name
            raise ValueError(
                f"required_plugins: {text} is not active; name it in plugins (`{name}: {{}}`, or `-p {name}`)"
            )
    if missing:
        raise ValueError(f"required_plugins: not installed; `pip install {' '.join(map(shlex.quote, missing))}`")
