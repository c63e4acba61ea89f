"""Tell in what two checkpoints differ, by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hookline_checkpoint.headers import ranks_of
from hookline_checkpoint.layout import own, unpack, unpack_own
from hookline_checkpoint.storage import read_manifest


def differences(a: Path, b: Path, *, sections: Collection[str] | None = None) -> list[str]:
    """Return a line for each tensor or value that differs in its bits, or is in one checkpoint alone.

    Args:
        a: a checkpoint.
        b: another.
        sections: compare these alone.

    Raises:
        CheckpointError: one is damaged.
        ValueError: a section that one of them has not.
    """
    kept = [_leaves(path, sections) for path in (a, b)]
    lines = []
    for name in dict.fromkeys([*kept[0], *kept[1]]):
        if name not in kept[1]:
            lines.append(f"{name}: only in {a}")
        elif name not in kept[0]:
            lines.append(f"{name}: only in {b}")
        elif said := _difference(kept[0][name], kept[1][name]):
            lines.append(f"{name}: {said}")
    return lines


def _leaves(path: Path, sections: Collection[str] | None) -> dict[str, Any]:
    """Return all tensors and values of a checkpoint by dotted name; what ranks have for themselves bears a number."""
    state = unpack(path, 0)
    others = [unpack_own(path, rank) for rank in range(1, ranks_of(read_manifest(path)))]
    owned = {n: {f"rank {r}": kept[n] for r, kept in enumerate([state, *others])} for n in own(state)}
    state |= owned
    unknown = set(sections or ()) - set(state)
    if unknown:
        raise ValueError(f"--section={min(unknown)}: {path} has {', '.join(state)}")
    return {".".join(name): value for name, value in _walk(state, ()) if sections is None or name[0] in sections}


def _walk(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _walk(value, (*path, str(key)))
    elif isinstance(tree, Sequence) and not isinstance(tree, (str, bytes, bytearray)) and tree:
        for index, value in enumerate(tree):
            yield from _walk(value, (*path, str(index)))
    else:
        yield path, tree


def _difference(a: Any, b: Any) -> str:
    """Return in what two leaves differ, or nothing."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return _of_tensors(a, b)
    if type(a) is float and type(b) is float:
        return "" if repr(a) == repr(b) else f"{a!r} and {b!r}, difference {abs(a - b):.3g}"
    said = [_text(value) for value in (a, b)]
    return "" if said[0] == said[1] else " and ".join(text if len(text) <= 80 else f"{text[:80]}…" for text in said)


def _text(value: Any) -> str:
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__} {sorted(map(repr, value))}"
    if hasattr(value, "tobytes"):  # of an array of numpy, whose repr leaves out what is in the middle
        return f"{value.dtype}{list(value.shape)} {value.tobytes().hex()}"
    return f"{type(value).__name__} {value!r}"


def _of_tensors(a: torch.Tensor, b: torch.Tensor) -> str:
    forms = [f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in (a, b)]
    if forms[0] != forms[1]:
        return " and ".join(forms)
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    if torch.equal(*bits):
        return ""
    wide = torch.complex128 if a.is_complex() else torch.float64 if a.is_floating_point() else None
    if wide is None:
        return f"{int((a != b).sum())} of {a.numel()} elements differ"
    x, y = a.to(wide), b.to(wide)
    apart = torch.where(x == y, 0.0, (x - y).abs())
    apart_in_bits = (bits[0] != bits[1]).reshape(a.numel(), -1).any(1)
    return f"{int(apart_in_bits.sum())} of {a.numel()} elements differ, max abs difference {float(apart.max()):.3g}"
