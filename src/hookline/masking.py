"""Secrets: how hookline recognizes them and keeps them out of files and output."""

from __future__ import annotations

import re
from typing import Any

MASK = "***"
_SECRET_KEY = re.compile(
    r"(^|[_-])(password|passwd|secret|credentials?|(api|access|private|secret|auth)[_-]?(key|token)|token|secret[_-]urls?)$",
    re.I,
)
_NO_SECRET_KEY = re.compile(r"(^|[_-])(pad|eos|bos|unk|sep|cls|mask|special)[_-]?token$", re.I)
_SECRET_VALUE = re.compile(r"^(hf_|sk-|ghp_|xox[bap]-)\w{8,}|^sk-[\w-]*\w{16,}|^[\w+.-]+://[^/@\s]+:[^/@\s]+@")


def is_secret(key: str, value: Any) -> bool:
    """Tell whether a value looks like a secret, by its key or by its form."""
    if isinstance(value, str) and _SECRET_VALUE.search(value):
        return True
    return not isinstance(value, (bool, float)) and bool(_SECRET_KEY.search(key)) and not _NO_SECRET_KEY.search(key)


def mask(value: Any, written: Any = None, key: str = "") -> Any:
    """Return a configuration tree without its secrets.

    Args:
        value: the tree, with interpolations resolved.
        written: the same tree before that: a secret that was an interpolation (`${oc.env:TOKEN}`) stays one, so
            that the saved configuration still runs if the variable is set.
        key: the key of the value.
    """
    if isinstance(value, dict):
        originals = written if isinstance(written, dict) else {}
        return {name: mask(kept, originals.get(name), str(name)) for name, kept in value.items()}
    if isinstance(value, list):
        items = written if isinstance(written, list) else [None] * len(value)
        return [mask(kept, item, key) for kept, item in zip(value, items, strict=True)]
    if value is None or not is_secret(key, value):
        return value
    return written if isinstance(written, str) and written.startswith("${") else MASK
