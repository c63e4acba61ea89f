"""Damage to files."""

from __future__ import annotations

import os
import random
from pathlib import Path


def flip_bit(path: Path, chance: random.Random) -> str:
    """Flip one bit of a file; return where."""
    content = bytearray(path.read_bytes())
    place, bit = chance.randrange(len(content)), chance.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} of {path.name}"


def zero_page(path: Path, chance: random.Random, size: int = 4096) -> str:
    """Overwrite one page of a file with zeros; return where."""
    content = bytearray(path.read_bytes())
    page = chance.randrange(-(-len(content) // size))
    part = slice(page * size, min((page + 1) * size, len(content)))
    content[part] = bytes(part.stop - part.start)
    path.write_bytes(content)
    return f"page {page} of {path.name}"


def cut_off(path: Path, keep: float | int) -> None:
    """Keep only the beginning of a file: a share of it, or a number of bytes."""
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if isinstance(keep, float) else keep)
