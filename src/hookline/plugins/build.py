"""Build plugin objects from names and options, in an order that puts required plugins first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hookline.installed import load, name_of
from hookline.interfaces import ModuleInterface
from hookline.masking import marked, mask
from hookline.options import Options


def build(plugins: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    """Return plugin objects by name, in order, with required plugins before those that need them.

    Args:
        plugins: objects and names; or a mapping of name to an object, to a mapping of options, or to None to turn
            a plugin off.

    Raises:
        ValueError: two plugins of one name, an unknown name, a circle of requirements.
        TypeError: an object that is not a plugin.
    """
    if isinstance(plugins, Mapping):
        named = {name: _build_one(name, given) for name, given in plugins.items() if given is not None}
        blocked = {name for name, given in plugins.items() if given is None}
    else:
        named, blocked = {}, set()
        for given in plugins:
            plugin = load(given)() if isinstance(given, str) else given
            if isinstance(plugin, type):
                raise TypeError(f"plugins=[{plugin.__name__}] is a class; give an object: {plugin.__name__}(…)")
            name = name_of(type(plugin))
            if name in named:
                raise ValueError(
                    f'two plugins are named {name!r}; name them yourself: plugins={{"{name}": …, "another_{name}": …}}'
                )
            named[name] = plugin
    ordered: dict[str, Any] = {}
    for name in list(named):
        _place(name, named, blocked, ordered, ())
    return ordered


def _build_one(name: str, given: Any) -> Any:
    if not isinstance(given, Mapping):
        if isinstance(given, type):
            raise TypeError(f"plugins[{name!r}] is the class {given.__name__}; give an object: {given.__name__}(…)")
        return given
    options = dict(given)
    plugin_class = load(options.pop("_plugin_", name))
    try:
        return plugin_class(**options)
    except TypeError as error:
        raise ValueError(f"plugins.{name}: {error}") from error


def _place(name: str, named: dict[str, Any], blocked: set[str], ordered: dict[str, Any], path: tuple[str, ...]) -> None:
    """Add a plugin to the order, and before it the plugins that it requires."""
    if name in path:
        raise ValueError(f"plugins require each other in a circle: {' -> '.join([*path, name])}")
    if name in ordered:
        return
    plugin = named[name] if name in named else load(name)()
    for required in getattr(plugin, "requires", ()):
        if required in blocked:
            raise ValueError(f"plugin {name!r} requires {required!r}, which is turned off")
        _place(required, named, blocked, ordered, (*path, name))
    ordered[name] = plugin


def options_of(plugin: Any) -> dict[str, Any]:
    """Return a plugin's configuration: its dataclass fields."""
    if not dataclasses.is_dataclass(plugin):
        return {}
    return {field.name: getattr(plugin, field.name) for field in dataclasses.fields(plugin) if field.init}


def describe(module: ModuleInterface, options: Options, plugins: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration that corresponds to a run built in Python, without secrets."""
    described = {
        "module": {"_target_": f"{type(module).__module__}.{type(module).__qualname__}"},
        "trainer": dataclasses.asdict(options),
        "plugins": {name: options_of(plugin) for name, plugin in plugins.items()},
    }
    kinds = {name: type(plugin) for name, plugin in plugins.items()}
    return mask(described, secrets=marked(kinds))  # type: ignore[no-any-return]
