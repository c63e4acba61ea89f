"""YAML text to plain data and back: each key once, numbers as people write them, errors in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml

MOST, DEEPEST = 100_000, 50  # values of a configuration and depth of nesting, with aliases expanded
TAG = "tag:yaml.org,2002:"
NUMBERS = {  # 1e-3 is a number; 1:30, 08 and 2026-01-01 are texts, and not 90 seconds, an octal number and a date
    TAG + "int": re.compile(r"[-+]?(0|[1-9][\d_]*|0x[\da-fA-F_]+|0b[01_]+)$"),
    TAG + "float": re.compile(
        r"([-+]?((\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF))|\.(nan|NaN|NAN))$"
    ),
}
HINTS = {  # of what YAML's parser says
    "found character '\\t' that cannot start any token": " (indent with spaces, not with a tab)",
    "mapping values are not allowed here": " (does a text with a colon want quotes, or a line another indentation?)",
    "found unexpected end of stream": " (a quote is not closed)",
}


class _UniqueKeys(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys, and reads 1e-3 as a number."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"the key in line {key.start_mark.line + 1} is neither a text nor a number")
            if key.tag == TAG + "null":
                raise ValueError(f"the key in line {key.start_mark.line + 1} is empty")
            if key.value in seen and key.tag != TAG + "merge":
                raise ValueError(
                    f"the key {key.value!r} is written twice, the second time in line {key.start_mark.line + 1}"
                )
            seen.add(key.value)
        super().flatten_mapping(node)
        # Keep a key that is merged repeatedly once; otherwise a few lines could make a billion keys.
        node.value = list({(key.tag, key.value): (key, kept) for key, kept in node.value}.values())


class _Dumper(yaml.SafeDumper):
    """Quotes texts that look like numbers to the loader, too."""


def _unique_mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_UniqueKeys.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag not in (*NUMBERS, TAG + "timestamp")]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _form in NUMBERS.items():
    _UniqueKeys.add_implicit_resolver(_tag, _form, list("-+0123456789."))
    _Dumper.add_implicit_resolver(_tag, _form, list("-+0123456789."))


def read_mapping(path: Path, keys: str) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Args:
        path: the file.
        keys: which keys it may have, for messages.

    Raises:
        ValueError: it is not there or cannot be read, or holds something else.
    """
    try:
        with path.open(encoding="utf-8") as file:  # from a string, errors would quote lines, which may hold secrets
            tree = load_yaml(file)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no configuration: {error}") from error
    if not isinstance(tree, dict):
        is_empty = "it is empty; " if tree is None else ""
        raise ValueError(f"{path} is no configuration: {is_empty}it must be a mapping with the keys {keys}")
    return tree


def load_yaml(given: str | IO[str]) -> Any:
    """Return the data of a YAML text.

    Raises:
        ValueError: it is not YAML, is nested too deeply, or aliases expand a few lines to too many values.
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
        tree = _construct(given)
        values, depth = measure(tree)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(_said(error)) from error
    if values > MOST or depth > DEEPEST:
        raise ValueError(
            f"it has {values} values nested {depth} deep when its aliases are written out; at most {MOST} nested "
            f"{DEEPEST} deep are read"
        )
    return tree


def _construct(given: str | IO[str]) -> Any:
    loader = _UniqueKeys(given)
    try:
        node = loader.get_single_node()
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value == "plugins" and isinstance(value, (yaml.MappingNode, yaml.SequenceNode)):
                _refuse_nothing(value)
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _refuse_nothing(plugins: yaml.Node) -> None:
    """Refuse a plugin without a value: some would mean its defaults by that, and null turns it off."""
    for entry in plugins.value:
        pairs = [entry] if isinstance(entry, tuple) else entry.value if isinstance(entry, yaml.MappingNode) else []
        for name, value in pairs:
            if value.tag == TAG + "null" and value.value == "":
                raise ValueError(
                    f"plugins.{name.value} in line {name.start_mark.line + 1} has no value; "
                    "write {} for its defaults, or null to turn it off"
                )


def _said(error: yaml.YAMLError) -> str:
    """Return in one line what is wrong, and where."""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    begun = getattr(error, "context_mark", None) if "end of stream" in problem else None
    mark = begun or getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{where}{problem}{HINTS.get(problem, '')}"


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Return a configuration as YAML."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)
