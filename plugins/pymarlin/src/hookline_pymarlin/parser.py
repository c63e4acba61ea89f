"""A YAML of arguments, and what the command line changes of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from hookline import nearest


class CustomArgParser:
    """Reads a YAML and overrides it by `--section.key value`.

    Args:
        yaml_file_arg_key: the argument that names the YAML, or a folder with one in it.
        default_yamlfile: the YAML unless named.
    """

    def __init__(self, yaml_file_arg_key: str = "config_path", default_yamlfile: str = "config.yaml") -> None:
        self.key = yaml_file_arg_key
        self.default = default_yamlfile

    def parse(self, arguments: Sequence[str] | None = None) -> dict[str, Any]:
        """Return the arguments.

        `--a.b 4` and `--a.b=4` override a key that the YAML has; the value is read as YAML and takes the kind of the
        value that was there. `--params '{"a.b": 4}'` does so for several, and wins.

        Raises:
            ValueError: no such file, an unknown key with the nearest, or a value of another kind.
        """
        given = list(pairs(sys.argv[1:] if arguments is None else arguments))
        named = [value for name, value in given if name == self.key]
        config = read(Path(named[-1] if named else self.default), self.key)
        last = {}
        for name, value in given:
            if name == "params":
                last = json.loads(value)
                if not isinstance(last, dict):
                    raise ValueError(f"--params {value!r} is not a mapping of keys to values")
            elif name != self.key:
                override(config, name, yaml.safe_load(value))
        for name, value in last.items():
            override(config, name, value)
        return config


def pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Give names and values of `--name value` and `--name=value`."""
    words = iter(arguments)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise ValueError(f"{word!r} is no argument: write --section.key value")
        if not equals:
            following = next(words, None)
            if following is None:
                raise ValueError(f"--{name} is without a value")
            value = following
        yield name, value


def read(path: Path, key: str) -> dict[str, Any]:
    """Return what a YAML holds; of a folder the first in it."""
    if path.is_dir():
        files = sorted(path.glob("*.yaml"))
        if not files:
            raise ValueError(f"the folder {str(path)!r} holds no .yaml")
        path = files[0]
    if not path.is_file():
        raise ValueError(f"there is no {str(path)!r}; --{key} names the YAML")
    held = yaml.safe_load(path.read_text())
    if not isinstance(held, dict):
        raise ValueError(f"{str(path)!r} must hold keys and values")
    return held


def override(config: dict[str, Any], name: str, value: Any) -> None:
    """Change one value, at a key with dots in it."""
    *sections, last = name.split(".")
    node: Any = config
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node:
        raise ValueError(f"--{name} is in no part of the YAML{nearest(name, keys(config))}")
    if isinstance(node[last], dict):
        raise ValueError(f"--{name} is a section; name one of its keys: {', '.join(keys(node[last], f'{name}.'))}")
    node[last] = like(node[last], value, name)


def keys(config: dict[str, Any], path: str = "") -> Iterator[str]:
    """Give all keys with dots in them."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from keys(value, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def like(before: Any, value: Any, name: str) -> Any:
    """Return a value in the kind of the one that it replaces.

    Raises:
        ValueError: it is of another kind.
    """
    if before is None or value is None or type(value) is type(before):
        return value
    if isinstance(before, bool):
        words = {"y": True, "t": True, "true": True, "1": True, "n": False, "f": False, "false": False, "0": False}
        if str(value).lower() in words:
            return words[str(value).lower()]
    elif isinstance(before, float) and type(value) in (int, str):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(before, str):
        return str(value)
    raise ValueError(f"--{name} {value!r} is a {type(value).__name__}; the YAML has {before!r} there")
