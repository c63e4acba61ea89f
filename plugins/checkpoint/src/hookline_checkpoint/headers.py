"""What tensors a checkpoint holds, read from the heads of its files: no tensor data, and no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hookline_checkpoint.storage import CheckpointError, read, read_head, read_tree

SHARED = {  # part of the shared state: the file of its tensors; their names in it are those of the part
    "module": "model.safetensors",
    "optimizers": "optim.safetensors",
    "others": "state.safetensors",  # trainer, schedulers, plugins and what a plugin may add
}
TREES = "state.json"
SHARES = "shards.json"  # which tensors are stored in shares: form of each, and where the pieces are
HF = "hf.json"  # what the module says of itself in Hugging Face's format, where it does
DTYPES = {"BOOL": "bool", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64"}
KINDS = {"F": "float", "I": "int", "U": "uint"}
PAIRS = {  # tags of mappings that are written as pairs: where in them the pairs are
    "$dict": (),
    "$counter": (),
    "$ordereddict": (0,),
    "$defaultdict": (1,),
}


def own_files(rank: int) -> tuple[str, str]:
    """Return the names of the files of one rank: tensors, and the tree."""
    return f"rank-{rank:04d}.safetensors", f"rank-{rank:04d}.json"


def shares_of(rank: int) -> str:
    """Return the name of the file with the shares of one rank."""
    return f"shards-{rank:04d}.safetensors"


def ranks_of(about: Mapping[str, Any]) -> int:
    """Return by how many ranks a checkpoint was written, as its manifest says.

    Raises:
        CheckpointError: it has fewer files than that.
    """
    ranks = about.get("world_size", 1)
    if type(ranks) is not int or not 0 < ranks <= len(about["files"]):
        raise CheckpointError(f"it says that {ranks!r} ranks have written it, and lists {len(about['files'])} files")
    return ranks


class Tensor(NamedTuple):
    """What is known of a tensor without its data; `tied_to` names the one that it is, `size` is in bytes."""

    name: str
    dtype: str
    shape: list[int]
    size: int
    tied_to: str


def tensors_of(path: Path, about: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """Return the tensors of a checkpoint by section, as its trees name them.

    Raises:
        CheckpointError: it is damaged.
    """
    ranks = [own_files(rank) for rank in range(ranks_of(about))]
    names = [TREES, *(tree for _, tree in ranks), *({SHARES} & about["files"].keys())]
    _, trees = read(path, dict.fromkeys(names, read_tree))
    try:
        sections: dict[str, list[Tensor]] = {}
        for part, file in SHARED.items():
            tree = trees[TREES][part]
            heads = {**read_head(path, file), **trees.get(SHARES, {}).get(part, {})}
            for section, below in tree.items() if part == "others" else [(part, tree)]:
                sections[section] = list(_tensors(below, heads))
        for rank, (file, tree) in enumerate(ranks):
            heads = read_head(path, file)
            for section, below in trees[tree].items():
                sections[f"{section} of rank {rank}"] = list(_tensors(below, heads))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"it cannot be understood: {type(error).__name__}: {error}") from error
    return sections


def _tensors(tree: Any, heads: Mapping[str, Any]) -> Iterator[Tensor]:
    met: dict[str, str] = {}  # name in the file: the first name in the tree
    for path, tag, entry in entries(tree):
        given = entry if isinstance(entry, dict) else {"name": entry}
        head, name = heads[given["name"]], ".".join(map(str, path))
        if tag == "$dtensor":
            dtype, size = head["dtype"], head["size"]
        else:
            dtype, (begin, end) = given.get("dtype") or _dtype(head["dtype"]), head["data_offsets"]
            size = end - begin
        tied_to = met.setdefault(given["name"], name)
        is_first = tied_to == name
        yield Tensor(
            name, dtype, given.get("shape", head["shape"]), size if is_first else 0, "" if is_first else tied_to
        )


def entries(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str, Any]]:
    """Yield where each tensor or array of an encoded tree is, its tag, and what is said of it."""
    if isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from entries(value, (*path, index))
    elif isinstance(tree, dict):
        tag = next(iter(tree), "")
        if tag in ("$tensor", "$dtensor", "$ndarray"):
            yield path, tag, tree[tag]
        elif tag in PAIRS:
            pairs = tree[tag]
            for place in PAIRS[tag]:
                pairs = pairs[place]
            for key, value in pairs:
                yield from entries(value, (*path, str(key)))
        elif tag == "$deque":
            yield from entries(tree[tag][0], path)
        elif tag.startswith("$"):
            yield from entries(tree[tag], path)
        else:
            for key, value in tree.items():
                yield from entries(value, (*path, key))


def _dtype(code: str) -> str:
    return DTYPES.get(code) or f"{KINDS.get(code[0], code[0])}{code[1:]}"
