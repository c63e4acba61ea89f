"""Secrets: how hookline recognizes them and keeps them out of files and output."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

MASK = "***"
SHORTEST = 6  # characters of a hidden value that is replaced in messages: shorter ones are parts of other words
_SECRET_KEY = re.compile(
    r"(^|[_-])(password|passwd|secret|credentials?|(api|access|private|secret|auth)[_-]?(key|token)|token|secret[_-]urls?)$",
    re.I,
)
_NO_SECRET_KEY = re.compile(r"(^|[_-])(pad|eos|bos|unk|sep|cls|mask|special)[_-]?token$", re.I)
_SECRET_VALUE = re.compile(r"^(hf_|sk-|ghp_|xox[bap]-)\w{8,}|^sk-[\w-]*\w{16,}|^[\w+.-]+://[^/@\s:]*:[^/@\s]+@")
_VARIABLE = re.compile(r"\$\{oc\.env:(\w+)(,(?!null\})[^{}]*)?\}")
_NESTED = r"(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*"
_RESOLVER = re.compile(r"\$\{[\w.]+:" + _NESTED + r"\}")
_hidden: dict[str, str] = {}  # what was written of each value that was hidden


def is_secret(key: str, value: Any) -> bool:
    """Tell whether a value looks like a secret, by its key or by its form."""
    if isinstance(value, str) and _SECRET_VALUE.search(value):
        return True
    return not isinstance(value, (bool, float)) and bool(_SECRET_KEY.search(key)) and not _NO_SECRET_KEY.search(key)


def marked(plugins: Mapping[str, type]) -> set[str]:
    """Return the dotted keys of the options that their plugins mark: `field(metadata={"secret": True})`."""
    given = [(name, kind) for name, kind in plugins.items() if dataclasses.is_dataclass(kind)]
    options = [(name, field) for name, kind in given for field in dataclasses.fields(kind)]
    return {f"plugins.{name}.{field.name}" for name, field in options if field.metadata.get("secret")}


def mask(value: Any, written: Any = None, secrets: Collection[str] = ()) -> Any:
    """Return a configuration tree without its secrets, and without the values of environment variables.

    Args:
        value: the tree, with interpolations resolved.
        written: the same tree with what depends on the environment as it was written (`${oc.env:TOKEN}`): it stays so,
            so that the saved configuration still runs if the variable is set.
        secrets: dotted keys of secrets whose key and form do not tell it.
    """

    def visit(value: Any, text: Any, path: str, marked: bool) -> Any:
        marked = marked or path in secrets
        kept = text if isinstance(text, str) and "${" in text else None
        if kept is None and isinstance(value, (dict, list, tuple)):
            texts = text if isinstance(text, dict) else dict(enumerate(text or ()))
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            inner = {key: visit(one, texts.get(key), f"{path}.{key}".lstrip("."), marked) for key, one in pairs}
            return inner if isinstance(value, dict) else (list if isinstance(value, list) else tuple)(inner.values())
        key = re.sub(r"(\.\d+)+$", "", path).rpartition(".")[2]
        empty = value is None or (isinstance(value, str) and not value)
        if not empty and (marked or is_secret(key, value)):
            whole = kept is not None and _RESOLVER.fullmatch(kept)
            safe = whole or (kept is not None and not marked and not is_secret(key, _VARIABLE.sub("", kept)))
            kept = _VARIABLE.sub(r"${oc.env:\1}", str(kept)) if safe else MASK  # a default may be a secret too
        if kept is None:
            return value
        _hide(value, kept)
        hide_variables(kept)
        return kept

    return visit(value, written, "", False)


def escaped(tree: Any) -> Any:
    """Escape what a resolver gives (`${oc.env:NAME}`), so that OmegaConf resolves only references to keys."""
    if isinstance(tree, dict):
        return {key: escaped(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [escaped(value) for value in tree]
    return _RESOLVER.sub(lambda match: match[0].replace("${", r"\${"), tree) if isinstance(tree, str) else tree


def redact(text: str) -> str:
    """Return a message with what `mask` has hidden so far as it was written: `${oc.env:NAME}`, or asterisks."""
    found = "|".join(map(re.escape, sorted(_hidden, key=len, reverse=True)))
    return re.sub(rf"(?<!\w)({found})(?!\w)", lambda match: _hidden[match[1]], text) if found else text


def redact_error(error: BaseException | None) -> None:
    """Redact what an exception says, and what led to it."""
    while error is not None:
        said = tuple(redact(one) if isinstance(one, str) else one for one in error.args)
        if said != error.args:
            error.args = said
        for name in ("filename", "filename2"):  # of an OSError
            if isinstance(path := getattr(error, name, None), str):
                setattr(error, name, redact(path))
        error = error.__cause__ or error.__context__


def hide_variables(written: str) -> None:
    """Let `redact` replace the values of the environment variables that a text names."""
    for name in re.findall(r"\$\{oc\.env:(\w+)", written):
        _hide(os.environ.get(name, ""), f"${{oc.env:{name}}}")


def _hide(value: Any, kept: str) -> None:
    if len(str(value)) >= SHORTEST:
        _hidden[str(value)] = kept
