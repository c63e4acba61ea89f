"""Configuration: defaults, then YAML, then the command line, in one checked OmegaConf tree.

The tree has the nodes `module` (built from its `_target_`, nested ones too), `trainer` (the options of `Trainer`),
`plugins` (by name; null turns one off), `required_plugins` (a run refuses to start without them) and `vars` (your own
values, for interpolations). The dataclasses of `trainer` and of each plugin define their keys and types, so a typo or a
wrong type is an error before any work. What a class of `_target_` takes is held against its annotations where it is
made.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import omegaconf
from omegaconf import DictConfig, OmegaConf

from hookline.arguments import listed, make, parameters_of, spell, typed
from hookline.installed import load, load_path, name_of, nearest, refuse_without
from hookline.masking import MASK, escaped, hide_variables, marked, mask, redact
from hookline.options import Options
from hookline.randomness import set_seed
from hookline.reading import load_yaml, read_mapping
from hookline.reading import to_yaml as to_yaml
from hookline.trainer import Trainer

NODES = ("module", "trainer", "plugins", "required_plugins", "vars")
OPTIONS = tuple(field.name for field in dataclasses.fields(Options))


def load_config(file: str | Path, overrides: Sequence[str] = (), plugins: Sequence[str] = ()) -> DictConfig:
    """Read a configuration.

    Args:
        file: a YAML file.
        overrides: `key.of.node=value`, with values in YAML; later ones win.
        plugins: `name` turns a plugin on, `no:name` turns it off.

    Raises:
        ValueError: a file that is missing or not YAML, or an unknown, missing or mistyped key; the message has
            the full key and the nearest existing one.
    """
    path = Path(file)
    tree = read_mapping(path, ", ".join(NODES))
    given = OmegaConf.create({key: _node(str(key), value) for key, value in tree.items()})
    assert isinstance(given, DictConfig)
    for override in overrides:
        _override(given, override)
    for plugin in plugins:
        on, name = (False, plugin[3:]) if plugin.startswith("no:") else (True, plugin)
        if on and OmegaConf.select(given, f"plugins.{name}") is None:
            OmegaConf.update(given, f"plugins.{name}", {}, force_add=True)
        elif not on:
            OmegaConf.update(given, f"plugins.{name}", None, force_add=True)
    if OmegaConf.select(given, "trainer.run_name") is None:
        OmegaConf.update(given, "trainer.run_name", _plain(path.stem), force_add=True)
    hide_variables(str(OmegaConf.to_container(given, resolve=False)))  # from errors, from here on
    config = _structure(given)
    _refuse_missing(config)
    resolve(config)
    return config


def _node(key: str, value: Any) -> Any:
    """Return the value of a node, with a list of plugins as a mapping.

    Raises:
        ValueError: it is no node, or its value is no mapping.
    """
    if key not in NODES:
        meant = f", did you mean 'trainer.{key}'?" if key in OPTIONS else nearest(key, NODES)
        raise ValueError(f"{key}: unknown key{meant}; the nodes are {', '.join(NODES)}")
    if key == "plugins" and isinstance(value, list):
        return _named(value)
    if key == "required_plugins":
        return _required(value)
    if value is not None and not isinstance(value, dict):
        examples = {
            "module": "{_target_: my_project.Classifier}",
            "plugins": "{clip: {max_norm: 0.5}}, or a list of names",
        }
        raise ValueError(
            f"{key}: this takes a mapping of keys, e.g. {examples.get(key, '{epochs: 3}')}; not {spell(value)}"
        )
    return value


def _named(plugins: Sequence[Any]) -> dict[str, Any]:
    """Return a list of names, and of mappings of one name to its options, as one mapping."""
    named: dict[str, Any] = {}
    for at, entry in enumerate(plugins):
        pair = {entry: {}} if isinstance(entry, str) else entry
        if not isinstance(pair, dict) or len(pair) != 1 or "_plugin_" in pair:
            raise ValueError(
                f"plugins.{at}: in a list, a plugin is its name, or a mapping of its name alone to its options; "
                f"not {spell(entry)}"
            )
        name = str(*pair)
        if name in named:
            raise ValueError(
                f"plugins.{at}: {name!r} is in the list twice; {{ANOTHER_NAME: {{_plugin_: {name}}}}} has two"
            )
        named.update(pair)
    return named


def _override(config: DictConfig, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ValueError(f"{override!r} is no override; write key.of.node=value, e.g. trainer.epochs=3")
    try:
        value = load_yaml(text)
        if value is None and not text.strip():
            raise ValueError("it has no value; write null for none, or '\"\"' for an empty text")
        value = _node(key, value) if key in NODES else value
        replaced = isinstance(value, dict) and not {"_target_", "_plugin_"}.isdisjoint(value)
        OmegaConf.update(config, key, value, force_add=True, merge=not replaced)
    except (ValueError, omegaconf.errors.OmegaConfBaseException) as error:
        raise ValueError(f"{override!r} cannot be read: {str(error).splitlines()[0]}") from error


def _structure(given: DictConfig) -> DictConfig:
    """Merge the tree into the defaults of the trainer and of each plugin, key by key."""
    for key in map(str, given):
        _node(key, None)
    required = _required(given.get("required_plugins"))
    refuse_without(required)
    plugins = {name: _plugin(f"plugins.{name}", node) for name, node in _items(given.get("plugins"))}
    if required:
        refuse_without(
            required, _active(node.get("_plugin_", name) for name, node in plugins.items() if node is not None)
        )
    return OmegaConf.create(
        {
            **({"required_plugins": required} if required else {}),
            "vars": given.get("vars") or {},
            "module": given.get("module") or {},
            "trainer": merge_schema("trainer", Options, given.get("trainer")),
            "plugins": plugins,
        }
    )


def _required(node: Any) -> list[str]:
    required = [] if node is None else OmegaConf.to_container(node) if OmegaConf.is_list(node) else node
    if not isinstance(required, list) or not all(isinstance(text, str) for text in required):
        raise ValueError(
            f"required_plugins: this is a list, such as [checkpoint, hookline-clip>=0.1], not {required!r}"
        )
    return required


def _active(named: Iterable[str]) -> set[str]:
    """Return the installed names of plugins and of what they require."""
    active, left = set[str](), list(named)
    while left:
        plugin_class = load(left.pop())
        active.add(name_of(plugin_class))
        left += [name for name in getattr(plugin_class, "requires", ()) if name not in active]
    return active


def _items(node: DictConfig | None) -> Iterable[tuple[str, Any]]:
    return [] if node is None else [(str(name), node[name]) for name in node]


def _plugin(where: str, node: Any) -> Any:
    if node is None:
        return None
    if not isinstance(node, DictConfig):
        raise ValueError(f"{where}: a plugin takes a mapping of options ({{}} for none) or null, not {node!r}")
    options = node.copy()
    target = options.pop("_plugin_", None)
    merged = merge_schema(where, _class_of(where, target), options)
    return merged if target is None else OmegaConf.create({"_plugin_": target, **dict(merged.items_ex(resolve=False))})


def _class_of(where: str, target: Any) -> type:
    try:
        plugin_class = load(str(target or where.removeprefix("plugins.")))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not dataclasses.is_dataclass(plugin_class):
        raise ValueError(f"{where}: {plugin_class.__name__} is no dataclass, so nothing can be said of its options")
    return plugin_class


def merge_schema(where: str, schema: type, node: Any) -> DictConfig:
    """Merge a node into the defaults of a dataclass, which defines the valid keys."""
    known = [field for field in dataclasses.fields(schema) if field.init]
    names = [field.name for field in known]
    for key in map(str, node or ()):
        if key not in names:
            raise ValueError(f"{where}.{key}: unknown key{nearest(key, names)}; {where} has {listed(key, names)}")
    try:
        merged = OmegaConf.merge({field.name: _default(field) for field in known}, node or {})
    except omegaconf.errors.OmegaConfBaseException as error:
        key = ".".join([where, *([str(error.full_key)] if error.full_key else [])])
        raise ValueError(f"{key}: {str(error).splitlines()[0]}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _default(field: dataclasses.Field[Any]) -> Any:
    """Return the default of an option as plain data."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    if isinstance(field.default, (enum.Enum, Path)):
        return field.default.name if isinstance(field.default, enum.Enum) else str(field.default)
    return omegaconf.MISSING if field.default is dataclasses.MISSING else field.default


def _refuse_missing(config: DictConfig) -> None:
    written = OmegaConf.to_container(config, resolve=False)
    missing = [key for key, value in _leaves(written) if value == omegaconf.MISSING]
    if missing:
        raise ValueError(
            f"{missing[0]}: this key needs a value" + (f"; so do {', '.join(missing[1:])}" if missing[1:] else "")
        )
    if OmegaConf.select(config, "module._target_") is None:
        raise ValueError("module._target_: this key needs a value, the dotted path of your ModuleInterface class")


# Build --------------------------------------------------------------------------------


def resolve(config: DictConfig) -> dict[str, Any]:
    """Return the configuration as plain data, with interpolations resolved.

    Raises:
        ValueError: an interpolation without a target, or a masked secret.
    """
    try:
        tree: Any = OmegaConf.to_container(config, resolve=True)
    except omegaconf.errors.OmegaConfBaseException as error:
        text = str(error).splitlines()[0]
        if missing := re.search("Environment variable ('.*') not found", text):
            text = f"the environment variable {missing[1]} is not set; set it, or give {error.full_key}=…"
        raise ValueError(redact(f"{error.full_key}: {text}")) from None
    for key, value in _leaves(tree):
        if value == MASK:
            raise ValueError(f"{key}: this secret was masked when the configuration was saved; give it: {key}=…")
    for node, made in _made(tree):
        node.update({key: value for key, value in made.items() if isinstance(value, (bool, int, float, str))})
    return tree  # type: ignore[no-any-return]


def _made(tree: dict[str, Any]) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the options of the trainer and of each plugin, as plain data and as they are annotated."""
    yield tree["trainer"], typed("trainer", "Trainer", parameters_of(Options), tree["trainer"])
    for name, options in tree["plugins"].items():
        if options is not None:
            plugin_class = _class_of(f"plugins.{name}", options.get("_plugin_"))
            yield options, typed(f"plugins.{name}", plugin_class.__name__, parameters_of(plugin_class), options)


def build_trainer(config: DictConfig) -> Trainer:
    """Return the trainer of a configuration; its module is built under the seed."""
    tree = resolve(config)
    for node, made in _made(tree):
        node.update(made)

    def make_module() -> Any:
        set_seed(tree["trainer"]["seed"])
        return instantiate(tree["module"], "module")

    return Trainer(make_module, plugins=tree["plugins"], config=masked(config), **tree["trainer"])


def instantiate(node: Any, where: str) -> Any:
    """Build the object of `_target_`, with the other keys as its arguments, and nested ones first.

    Args:
        node: plain data; data without `_target_` comes back equal.
        where: its key in the configuration, for messages.

    Raises:
        ValueError: a target that cannot be imported, arguments that it does not take, or values that it
            refuses with a `ValueError` of its own.
    """
    if isinstance(node, list):
        return [instantiate(item, f"{where}.{index}") for index, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    arguments = {key: instantiate(value, f"{where}.{key}") for key, value in node.items() if key != "_target_"}
    if "_target_" not in node:
        return arguments
    try:
        target = load_path(str(node["_target_"]))
    except ValueError as error:
        raise ValueError(f"{where}._target_: {error}") from error
    if not callable(target):
        raise ValueError(f"{where}._target_: {node['_target_']!r} is neither a class nor a function")
    return make(target, arguments, where)


# Show and keep ------------------------------------------------------------------------


def masked(config: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration without its secrets.

    A value that depends on an environment variable stays as it was written (`${oc.env:TOKEN}`), so that the saved
    configuration still runs if the variable is set. Other secrets become `***`.
    """
    tree, written = resolve(config), OmegaConf.create(escaped(OmegaConf.to_container(config, resolve=False)))
    given = {name: load(node.get("_plugin_", name)) for name, node in tree["plugins"].items() if node is not None}
    return mask(tree, OmegaConf.to_container(written, resolve=True), marked(given))  # type: ignore[no-any-return]


def _leaves(tree: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
