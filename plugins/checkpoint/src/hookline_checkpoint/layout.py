"""Which section of a run's state lies in which file of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hookline_checkpoint.codec import join, split, tensors_from_bytes, tensors_to_bytes, tree_to_bytes
from hookline_checkpoint.headers import SHARED, TREES, own_files
from hookline_checkpoint.storage import CheckpointError, read

OWN = "rng"  # the section that each rank has for itself


def pack(state: Mapping[str, Any], rngs: Sequence[Any]) -> Iterator[tuple[str, bytes]]:
    """Return names and contents of a checkpoint's files, each made when it is taken.

    Args:
        state: sections by name; `rng` is taken from `rngs`.
        rngs: that section of each rank.

    Raises:
        TypeError: at once, if something in it cannot be stored.
    """
    others = {name: section for name, section in state.items() if name not in (*SHARED, OWN)}
    parts = {"module": state["module"], "optimizers": state["optimizers"], "others": others}
    shared = {part: split(tree, "" if part == "others" else part) for part, tree in parts.items()}
    owned = [split(rng, OWN) for rng in rngs]
    return _contents(shared, owned)


def _contents(
    shared: Mapping[str, tuple[dict[str, Any], Any]], owned: Iterable[tuple[dict[str, Any], Any]]
) -> Iterator[tuple[str, bytes]]:
    for part, (tensors, _) in shared.items():
        yield SHARED[part], tensors_to_bytes(tensors)
    yield TREES, tree_to_bytes({part: tree for part, (_, tree) in shared.items()})
    for rank, (tensors, tree) in enumerate(owned):
        file_of_tensors, file_of_tree = own_files(rank)
        yield file_of_tensors, tensors_to_bytes(tensors)
        yield file_of_tree, tree_to_bytes(tree)


def unpack(path: Path, rank: int) -> dict[str, Any]:
    """Return the state that a checkpoint holds for one rank.

    Raises:
        CheckpointError: it is damaged, or holds nothing for this rank.
    """
    file_of_tensors, file_of_tree = own_files(rank)
    _, contents = read(path, [*SHARED.values(), TREES, file_of_tensors, file_of_tree])
    try:
        trees = json.loads(contents.pop(TREES))
        parts = {part: join(tensors_from_bytes(contents.pop(name)), trees[part]) for part, name in SHARED.items()}
        rng = join(tensors_from_bytes(contents[file_of_tensors]), json.loads(contents[file_of_tree]))
    except (KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"it cannot be understood: {error}") from error
    others = parts.pop("others")
    return {**parts, **others, OWN: rng}
