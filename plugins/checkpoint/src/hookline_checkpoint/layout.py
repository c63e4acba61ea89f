"""Which section of a run's state lies in which file of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hookline.files.weights import Tensors
from hookline_checkpoint.codec import join, split, tree_to_bytes
from hookline_checkpoint.headers import SHARED, SHARES, TREES, entries, own_files, ranks_of
from hookline_checkpoint.storage import Buffer, Reader, read, read_manifest, read_tree, understanding
from hookline_checkpoint.stored import tensors_of_file
from hookline_checkpoint.tensors import is_shared, read_tensors, tensors_in, tensors_to_parts

OWN = ("own_plugins", "logs", "rng", "loader", "window")  # the sections that each rank has for itself

Allocate = Callable[..., torch.Tensor]
"""What a tensor that was stored in shares is read into: by its `path` in the state, `shape` and `dtype`."""
Parts = tuple[dict[str, tuple[Tensors, Any]], list[tuple[Tensors, Any]]]
"""What is stored, as tensors and tree each: what ranks have in common by part, and what each has for itself."""


def own(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of a state that this rank has for itself."""
    return {name: state[name] for name in OWN if name in state}


def pack(state: Mapping[str, Any], owned: Sequence[Mapping[str, Any]]) -> Parts:
    """Take a state apart into what is stored; its tensors share memory with it.

    Args:
        state: sections by name; those of `OWN` are taken from `owned`.
        owned: what `own` answers on each rank.

    Raises:
        TypeError: something in it cannot be stored.
    """
    others = {name: section for name, section in state.items() if name not in (*SHARED, *OWN)}
    parts = {"module": state["module"], "optimizers": state["optimizers"], "others": others}
    shared = {part: split(tree, "" if part == "others" else part) for part, tree in parts.items()}
    return shared, [split(sections) for sections in owned]


def shares(parts: Parts) -> dict[str, Tensors]:
    """Return the tensors of which each rank stores its share, by part and name; nothing where there are none."""
    found = {part: {n: t for n, t in tensors.items() if is_shared(t)} for part, (tensors, _) in parts[0].items()}
    return {part: tensors for part, tensors in found.items() if tensors}


def contents(parts: Parts) -> Iterator[tuple[str, Iterable[Buffer]]]:
    """Yield names and contents of the files that one rank writes for all, each made when it is taken."""
    shared, owned = parts
    for part, (tensors, _) in shared.items():
        yield SHARED[part], tensors_to_parts({n: t for n, t in tensors.items() if not is_shared(t)})
    yield TREES, [tree_to_bytes({part: tree for part, (_, tree) in shared.items()})]
    for rank, (tensors, tree) in enumerate(owned):
        file_of_tensors, file_of_tree = own_files(rank)
        yield file_of_tensors, tensors_to_parts(tensors)
        yield file_of_tree, [tree_to_bytes(tree)]


def unpack(path: Path, rank: int, allocate: Allocate | None = None) -> dict[str, Any]:
    """Return the state that a checkpoint holds for one rank; one that was not there gets no section of its own.

    Raises:
        CheckpointError: it is damaged.
    """
    parts = unpack_shared(path, SHARED, allocate)
    is_new = rank > 0 and rank >= ranks_of(read_manifest(path))
    sections = {} if is_new else unpack_own(path, rank)
    with understanding():
        others = parts.pop("others")
        return {**parts, **others, **sections}


def unpack_shared(path: Path, parts: Collection[str], allocate: Allocate | None = None) -> dict[str, Any]:
    """Return parts of what ranks have in common; every tensor is whole and on the CPU where nothing else is allocated.

    Raises:
        CheckpointError: it is damaged.
    """
    about = read_manifest(path)
    _, trees = read(path, dict.fromkeys([TREES, *({SHARES} & about["files"].keys())], read_tree))
    found: dict[str, Tensors] = {}
    with understanding():
        wanted = {part: trees[TREES][part] for part in parts}
        targets = {part: _targets(path, part, tree, allocate) for part, tree in wanted.items()}
    readers = {SHARED[part]: partial(_read, shares=shares) for part, shares in targets.items()}
    _, contents = read(path, readers)
    if SHARES in trees:
        from hookline_checkpoint.sharded import load  # needs torch.distributed, which is slow to import

        found = load(path, about, trees[SHARES], wanted, allocate)
    with understanding():
        return {part: join({**contents[SHARED[part]], **found.get(part, {})}, tree) for part, tree in wanted.items()}


def _targets(path: Path, part: str, tree: Any, allocate: Allocate | None) -> Tensors:
    """Return by name the memory for this rank's shares of tensors that are stored whole."""
    if allocate is None:
        return {}
    targets: Tensors = {}
    forms = tensors_of_file(path / SHARED[part])
    for where, tag, name in entries(tree, () if part == "others" else (part,)):
        if tag == "$tensor" and isinstance(name, str) and name not in targets:
            form, _ = forms[name]
            tensor = allocate(path=where, shape=form.shape, dtype=form.dtype)
            if is_shared(tensor):
                targets[name] = tensor
    return targets


def _read(file: Reader, shares: Tensors) -> Tensors:
    """Return the tensors of a file; of those that ranks share, the shares, never one of them whole."""
    if not shares:
        return read_tensors(file)
    from hookline_checkpoint.sharded import regions_of, take_rows

    regions, tensors = regions_of(shares), dict(shares)
    for name, first, rows in tensors_in(file, by_rows=shares):
        if name in shares:
            take_rows(rows, first, regions[name])
        else:
            tensors[name] = rows
    return tensors


def unpack_own(path: Path, rank: int) -> dict[str, Any]:
    """Return the sections that one rank has for itself.

    Raises:
        CheckpointError: it is damaged.
    """
    file_of_tensors, file_of_tree = own_files(rank)
    _, contents = read(path, {file_of_tensors: read_tensors, file_of_tree: read_tree})
    with understanding():
        return dict(join(contents[file_of_tensors], contents[file_of_tree]))
