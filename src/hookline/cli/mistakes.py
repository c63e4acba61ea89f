"""What a newcomer types that is no command or option of hookline, and what to type in its place."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hookline.commands import UserError, read_configuration
from hookline.installed import nearest

MEANT = {  # words of other programs
    "train": "fit", "run": "fit", "start": "fit", "launch": "fit", "resume": "fit CONFIG --resume",
    "continue": "fit CONFIG --resume", "eval": "validate", "evaluate": "validate", "val": "validate",
    "infer": "predict", "inference": "predict", "list": "runs", "ls": "runs", "show": "runs show", "create": "init",
    "help": "--help", "version": "--version", "config": "fit CONFIG --print-config", "ckpt": "checkpoints",
}  # fmt: skip


def refuse_unknown_command(word: str, known: Sequence[str]) -> None:
    """Say which command was meant.

    Raises:
        UserError: it is no command.
    """
    if word in known or word.startswith("-"):
        return
    if word.endswith((".yaml", ".yml")):
        raise UserError(f"{word!r} is a configuration, and a command is wanted first: `hookline fit {word}` trains it")
    if word in MEANT and MEANT[word].split()[0] in (*known, "--help", "--version"):
        brings, meant = "", f", did you mean {MEANT[word]!r}?"
    else:
        brings, meant = f". `pip install hookline-{word}` may bring it", nearest(word, known)
    raise UserError(f"there is no command {word!r}{meant}; there are {', '.join(known)}{brings}")


def refuse_unknown_option(unknown: str, words: Sequence[str], options: Any) -> None:
    """Say which key of the configuration was meant by an option such as `--epochs 3`.

    Raises:
        UserError: a key of the configuration is like it.
    """
    name, equals, value = unknown.lstrip("-").partition("=")
    after = next(iter(words[words.index(unknown) + 1 :]), "-") if unknown in words else "-"
    if not equals:
        value = after if not after.startswith("-") and "=" not in after else "true"
    found = _nearest_keys(name.replace("-", "_"), list(_keys(options)))
    if found:
        others = f" (or {', '.join(f'{key}={value}' for key in found[1:])})" if found[1:] else ""
        raise UserError(
            f"{unknown.partition('=')[0]} is no option of this command; a value of the configuration is written "
            f"without dashes: {found[0]}={value}{others}"
        )


def _keys(options: Any) -> Iterator[str]:
    """Yield the keys that the configuration of the command line has, as far as it can be read."""
    from hookline.config import OPTIONS, resolve

    try:
        options.overrides = [word for word in options.overrides if "=" in word]
        tree = resolve(read_configuration(options))
    except ValueError:
        tree = {}
    yield from (f"trainer.{name}" for name in OPTIONS)
    for node in ("module", "plugins", "vars"):
        yield from _paths(tree.get(node) or {}, node)


def _paths(tree: Mapping[str, Any], path: str) -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{path}.{name}")
        if not name.startswith("_"):
            yield f"{path}.{name}"


def _nearest_keys(name: str, keys: Iterable[str]) -> list[str]:
    """Return the keys that end like a name, or are spelt like it, the nearest first."""
    known = list(dict.fromkeys(keys))
    same = [key for key in known if key == name or key.endswith(f".{name}")]
    if same:
        return same
    if "." in name:
        return difflib.get_close_matches(name, known, n=3, cutoff=0.75)
    last = {key: key.rpartition(".")[2] for key in known}
    initials = [key for key, word in last.items() if "".join(part[:1] for part in word.split("_")) == name]
    near = difflib.get_close_matches(name, list(last.values()), n=3)
    return [*initials, *(key for word in near for key, ends in last.items() if ends == word)][:3]
