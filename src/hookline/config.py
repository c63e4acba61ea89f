"""Configuration: defaults, then YAML, then the command line, in one checked OmegaConf tree.

The tree has the nodes `module` (built from its `_target_`, nested ones too), `trainer` (the options of `Trainer`),
`plugins` (by name; null turns one off) and `vars` (your own values, for interpolations). The dataclasses of
`trainer` and of each plugin define their keys and types, so a typo or a wrong type is an error before any work.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import IO, Any

import omegaconf
import yaml
from omegaconf import DictConfig, OmegaConf

from hookline.installed import load, load_path, nearest
from hookline.masking import MASK, escaped, hide_variables, marked, mask
from hookline.options import Options
from hookline.randomness import set_seed
from hookline.trainer import Trainer

NODES = ("module", "trainer", "plugins", "vars")
MOST, DEEPEST = 100_000, 50  # values of a configuration and depth of nesting, with aliases expanded


class _UniqueKeys(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys, and reads 1e-3 as a number."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"the key in line {key.start_mark.line + 1} is neither a text nor a number")
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise ValueError(
                    f"the key {key.value!r} is written twice, the second time in line {key.start_mark.line + 1}"
                )
            seen.add(key.value)
        super().flatten_mapping(node)
        # Keep a key that is merged repeatedly once; otherwise a few lines could make a billion keys.
        node.value = list({(key.tag, key.value): (key, kept) for key, kept in node.value}.values())


def _unique_mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


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
    tree = _read(path)
    given = OmegaConf.create(tree)
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
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:  # from a string, errors would quote lines, which may hold secrets
            tree = _load_yaml(file) or {}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is no configuration: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is no configuration: it must be a mapping with the keys {', '.join(NODES)}")
    return tree


def _load_yaml(given: str | IO[str]) -> Any:
    """Return the data of a YAML text.

    Raises:
        ValueError: it is nested too deeply, or aliases expand a few lines to too many values.
        yaml.YAMLError: it is not YAML.
    """
    measured: dict[int, tuple[int, int]] = {}

    def measure(value: Any) -> tuple[int, int]:
        if not isinstance(value, (dict, list)):
            return 1, 0
        if id(value) not in measured:
            inner = [measure(kept) for kept in (value.values() if isinstance(value, dict) else value)]
            measured[id(value)] = (
                1 + sum(count for count, _ in inner),
                1 + max((depth for _, depth in inner), default=0),
            )
        return measured[id(value)]

    try:
        tree = yaml.load(given, _UniqueKeys)
        values, depth = measure(tree)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if values > MOST or depth > DEEPEST:
        raise ValueError(
            f"it has {values} values nested {depth} deep when its aliases are written out; at most {MOST} nested "
            f"{DEEPEST} deep are read"
        )
    return tree


def _override(config: DictConfig, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override!r} is no override; write key.of.node=value, e.g. trainer.epochs=3")
    try:
        value = _load_yaml(text)
        OmegaConf.update(config, key, value, force_add=True)
    except (yaml.YAMLError, ValueError, omegaconf.errors.OmegaConfBaseException) as error:
        raise ValueError(f"{override!r} cannot be read: {error}") from error


def _structure(given: DictConfig) -> DictConfig:
    """Merge the tree into the schemas of the trainer and of each plugin, key by key."""
    for key in map(str, given):
        if key not in NODES:
            raise ValueError(f"{key}: unknown key{nearest(key, NODES)}; the nodes are {', '.join(NODES)}")
    plugins = {name: _plugin(f"plugins.{name}", node) for name, node in _items(given.get("plugins"))}
    return OmegaConf.create(
        {
            "vars": given.get("vars") or {},
            "module": given.get("module") or {},
            "trainer": merge_schema("trainer", Options, given.get("trainer")),
            "plugins": plugins,
        }
    )


def _items(node: DictConfig | None) -> Iterable[tuple[str, Any]]:
    return [] if node is None else [(str(name), node[name]) for name in node]


def _plugin(where: str, node: Any) -> Any:
    if node is None:
        return None
    if not isinstance(node, DictConfig):
        raise ValueError(f"{where}: a plugin takes a mapping of options ({{}} for none) or null, not {node!r}")
    options = node.copy()
    target = options.pop("_plugin_", None)
    try:
        plugin_class = load(target or where.removeprefix("plugins."))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not dataclasses.is_dataclass(plugin_class):
        raise ValueError(f"{where}: {plugin_class.__name__} is no dataclass, so nothing can be said of its options")
    merged = merge_schema(where, plugin_class, options)
    return merged if target is None else OmegaConf.create({"_plugin_": target, **dict(merged.items_ex(resolve=False))})


def merge_schema(where: str, schema: type, node: Any) -> DictConfig:
    """Merge a node into the defaults of a dataclass, which defines the valid keys and types."""
    fields = [field for field in dataclasses.fields(schema) if field.init]
    try:
        defaults = OmegaConf.structured(
            dataclasses.make_dataclass(schema.__name__, map(_field, fields, repeat(schema)))
        )
        merged = OmegaConf.merge(defaults, node if node is not None else {})
    except omegaconf.errors.ConfigKeyError as error:
        known = [field.name for field in fields]
        key = str(error.key)
        raise ValueError(
            f"{where}.{key}: unknown key{nearest(key, known)}; {where} has {', '.join(known) or 'no keys'}"
        ) from error
    except omegaconf.errors.OmegaConfBaseException as error:
        key = ".".join([where, *([str(error.full_key)] if error.full_key else [])])
        raise ValueError(f"{key}: {str(error).splitlines()[0]}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _field(field: dataclasses.Field[Any], schema: type) -> tuple[str, Any, Any]:
    """Return a field for `make_dataclass`; OmegaConf sees only the fields that are options."""
    kind = field.type
    if isinstance(kind, str):
        home = next(base for base in schema.__mro__ if field.name in inspect.get_annotations(base))
        kind = eval(kind, vars(sys.modules[home.__module__]))
    if field.default_factory is not dataclasses.MISSING:
        return field.name, kind, dataclasses.field(default_factory=field.default_factory)
    default = omegaconf.MISSING if field.default is dataclasses.MISSING else field.default
    return field.name, kind, dataclasses.field(default=default)


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
        tree = OmegaConf.to_container(config, resolve=True)
    except omegaconf.errors.OmegaConfBaseException as error:
        text = str(error).splitlines()[0]
        if missing := re.search("Environment variable ('.*') not found", text):
            text = f"the environment variable {missing[1]} is not set; set it, or give {error.full_key}=…"
        raise ValueError(f"{error.full_key}: {text}") from error
    assert isinstance(tree, dict)
    for key, value in _leaves(tree):
        if value == MASK:
            raise ValueError(f"{key}: this secret was masked when the configuration was saved; give it: {key}=…")
    return tree  # type: ignore[return-value]


def build_trainer(config: DictConfig) -> Trainer:
    """Return the trainer of a configuration; its module is built under the seed."""
    tree = resolve(config)

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
        target = load_path(node["_target_"])
    except ValueError as error:
        raise ValueError(f"{where}._target_: {error}") from error
    _check_arguments(target, arguments, where)
    try:
        return target(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_arguments(target: Any, arguments: Mapping[str, Any], where: str) -> None:
    try:
        signature = inspect.signature(target)
    except ValueError:  # a builtin has no signature
        return
    parameters = signature.parameters.values()
    known = [parameter.name for parameter in parameters]
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        for name in arguments:
            if name not in known:
                raise ValueError(
                    f"{where}.{name}: unknown key{nearest(name, known)}; {target.__name__} takes {', '.join(known)}"
                )
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{where}: {target.__name__}: {error}") from error


# Show and keep ------------------------------------------------------------------------


def masked(config: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration without its secrets.

    A value that depends on an environment variable stays as it was written (`${oc.env:TOKEN}`), so that the saved
    configuration still runs if the variable is set. Other secrets become `***`.
    """
    tree, written = resolve(config), OmegaConf.create(escaped(OmegaConf.to_container(config, resolve=False)))
    given = {name: load(node.get("_plugin_", name)) for name, node in tree["plugins"].items() if node is not None}
    return mask(tree, OmegaConf.to_container(written, resolve=True), marked(given))  # type: ignore[no-any-return]


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Return a configuration as YAML."""
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True, default_flow_style=False)


def _leaves(tree: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
