"""Which section of a run's state lies in which file of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hookline_checkpoint.codec import join, read_tensors, split, tensors_to_parts, tree_to_bytes
from hookline_checkpoint.headers import SHARED, TREES, own_files, ranks_of
from hookline_checkpoint.storage import Buffer, CheckpointError, read, read_manifest, read_tree

OWN = ("logs", "rng", "window")  # the sections that each rank has for itself


def own(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of a state that this rank has for itself."""
    return {name: state[name] for name in OWN if name in state}


def pack(state: Mapping[str, Any], owned: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Iterable[Buffer]]]:
    """Return names and contents of a checkpoint's files, each made when it is taken.

    Args:
        state: sections by name; those of `OWN` are taken from `owned`.
        owned: what `own` answers on each rank.

    Raises:
        TypeError: at once, if something in it cannot be stored.
    """
    others = {name: section for name, section in state.items() if name not in (*SHARED, *OWN)}
    parts = {"module": state["module"], "optimizers": state["optimizers"], "others": others}
    shared = {part: split(tree, "" if part == "others" else part) for part, tree in parts.items()}
    return _contents(shared, [split(sections) for sections in owned])


def _contents(
    shared: Mapping[str, tuple[dict[str, Any], Any]], owned: Iterable[tuple[dict[str, Any], Any]]
) -> Iterator[tuple[str, Iterable[Buffer]]]:
    for part, (tensors, _) in shared.items():
        yield SHARED[part], tensors_to_parts(tensors)
    yield TREES, [tree_to_bytes({part: tree for part, (_, tree) in shared.items()})]
    for rank, (tensors, tree) in enumerate(owned):
        file_of_tensors, file_of_tree = own_files(rank)
        yield file_of_tensors, tensors_to_parts(tensors)
        yield file_of_tree, [tree_to_bytes(tree)]


def unpack(path: Path, rank: int) -> dict[str, Any]:
    """Return the state that a checkpoint holds for one rank; one that was not there gets no section of its own.

    Raises:
        CheckpointError: it is damaged.
    """
    is_new = rank > 0 and rank >= ranks_of(read_manifest(path))
    file_of_tensors, file_of_tree = own_files(0 if is_new else rank)
    readers = {
        **dict.fromkeys([*SHARED.values(), file_of_tensors], read_tensors),
        **dict.fromkeys([TREES, file_of_tree], read_tree),
    }
    _, contents = read(path, readers)
    try:
        parts = {part: join(contents[name], contents[TREES][part]) for part, name in SHARED.items()}
        sections = join(contents[file_of_tensors], contents[file_of_tree])
        others = parts.pop("others")
        return {**parts, **others} if is_new else {**parts, **others, **sections}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"it cannot be understood: {error}") from error
