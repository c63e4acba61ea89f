"""A YAML of arguments, and what the command line changes of it."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from hookline import nearest

TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
NONE = ("null", "None")
LOGGER = "hookline.pymarlin.parser"


class CustomArgParser:
    """Reads a YAML and overrides it by `--section.key value`.

    Args:
        yaml_file_arg_key: the argument that names the YAML, or a folder with one in it.
        default_yamlfile: the YAML unless named.
        log_level: of what is said about keys that the YAML does not have.
    """

    def __init__(
        self,
        yaml_file_arg_key: str = "config_path",
        default_yamlfile: str = "config.yaml",
        log_level: int | str = "INFO",
    ) -> None:
        self.key = yaml_file_arg_key
        self.default = default_yamlfile
        self.logger = logging.getLogger(LOGGER)
        self.logger.setLevel(log_level)

    def parse(self, arguments: Sequence[str] | None = None) -> dict[str, Any]:
        """Return the arguments, and the path of the YAML under its key.

        `--a.b 4` and `--a.b=4` override a key that the YAML has; the text is read as the kind of the value that was
        there, `--flag` alone is true, and of a list `[3, 4]` or `3-4` are read. Where the YAML has null, the value is
        the text, or None for null and None. `--params '{"a.b": 4}'` does so for several, and wins.

        A key that the YAML does not have is passed over with a warning, unless it nearly is one of them.

        Raises:
            ValueError: no such file, a key that is nearly one of the YAML, or a value of another kind.
        """
        given = list(pairs(sys.argv[1:] if arguments is None else arguments))
        named = [value for name, value in given if name == self.key]
        path = named[-1] if named else self.default
        if path is None:
            raise ValueError(f"--{self.key} is without a path")
        config = read(Path(path), self.key)
        last = {}
        for name, text in given:
            if name == "params":
                last = json.loads(text or "{}")
                if not isinstance(last, dict):
                    raise ValueError(f"--params {text!r} is not a mapping of keys to values")
            elif name != self.key:
                self._override(config, name, text)
        for name, value in last.items():
            self._override(config, name.removeprefix("--"), value)
        config[self.key] = path
        return config

    def _override(self, config: dict[str, Any], name: str, value: Any) -> None:
        """Change one value, at a key with dots in it; None is a name without a value."""
        *sections, last = name.split(".")
        node: Any = config
        for section in sections:
            node = node.get(section) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            if near := nearest(name, keys(config)):
                raise ValueError(f"--{name} is in no part of the YAML{near}")
            self.logger.warning("--%s is in no part of the YAML, and is passed over", name)
        elif isinstance(node[last], dict):
            raise ValueError(f"--{name} is a section; name one of its keys: {', '.join(keys(node[last], f'{name}.'))}")
        else:
            node[last] = like(node[last], value, name)


def pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Give names and values of `--name value`, `--name=value` and `--name`, which has None."""
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise ValueError(f"{word!r} is no argument: write --section.key value")
        if equals:
            yield name, value
        else:
            yield name, words.pop(0) if words and not words[0].startswith("--") else None


def read(path: Path, key: str) -> dict[str, Any]:
    """Return what a YAML holds; of a folder the first in it."""
    if path.is_dir():
        files = sorted(path.glob("*.yaml"))
        if not files:
            raise ValueError(f"the folder {str(path)!r} holds no .yaml")
        path = files[0]
    if not path.is_file():
        raise ValueError(f"there is no {str(path)!r}; --{key} names the YAML")
    held = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(held, dict):
        raise ValueError(f"{str(path)!r} must hold keys and values")
    return held


def keys(config: dict[str, Any], path: str = "") -> Iterator[str]:
    """Give all keys with dots in them."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from keys(value, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def like(before: Any, value: Any, name: str) -> Any:
    """Return a text, or a value of `--params`, in the kind of the value that it replaces.

    Raises:
        ValueError: it is of another kind.
    """
    if value is None:
        if before is False or before is True:
            return True
        raise ValueError(f"--{name} is without a value; the YAML has {before!r} there")
    try:
        if isinstance(before, list):
            return [like(before[0], one, name) if before else one for one in items(value)]
        if before is None or isinstance(before, str):
            return None if before is None and value in NONE else value
        if value in NONE:
            return None
        if isinstance(before, bool):
            return {**dict.fromkeys(TRUE, True), **dict.fromkeys(FALSE, False)}[str(value).lower()]
        if isinstance(before, int) and not isinstance(value, float):
            return int(value)
        if isinstance(before, float):
            return float(value)
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"--{name} {value!r} is a {type(value).__name__}; the YAML has {before!r} there")


def items(value: Any) -> list[Any]:
    """Return the items of a list, of `[3, 4]`, or of `3-4`."""
    if not isinstance(value, str):
        return list(value) if isinstance(value, (list, tuple)) else [value]
    if not value.startswith("["):
        return [one for one in value.split("-") if one]
    return [one if isinstance(one, (int, float)) else str(one) for one in yaml.safe_load(value)]
