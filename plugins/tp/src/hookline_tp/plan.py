"""The plan: which style a module is split by, read from texts and checked against the model."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

LAYOUTS = {"whole": Replicate(), "sequence": Shard(1), "features": Shard(-1), "logits": Shard(-1)}
STYLE = re.compile(r"(column|row|sequence|input|output)(?: from (\w+))?(?: to (\w+))?")
SAID, MOVED = (None, "whole", "sequence", "features"), ("whole", "sequence", "features")
KINDS: dict[str, set[Any]] = {  # from what and to what each may be said to be
    "column": set(itertools.product(SAID, (*SAID, "logits"))),
    "row": set(itertools.product(SAID, SAID)),
    "sequence": {(None, None)},
    "input": set(itertools.permutations(MOVED, 2)),
    "output": set(itertools.permutations(MOVED, 2)),
}
OFFERED = (
    "'column', 'row', 'sequence', 'input from X to Y', 'output from X to Y', the first two also with 'from X' or 'to "
    "Y', where X and Y are whole, sequence or features (Y of a column also logits), and styles of torch"
)
HEADS = ("heads", "num_heads", "n_heads", "n_head", "num_attention_heads", "num_key_value_heads", "num_kv_heads")


class Style(NamedTuple):
    """What a text in a plan says: the kind, and from what and to what, None where it does not say."""

    kind: str
    before: str | None
    behind: str | None


def read_style(style: Any, where: str) -> Style | ParallelStyle:
    """Return what a text says, or the object of torch that was given in place of one.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(style, ParallelStyle):
        return style
    match = STYLE.fullmatch(style) if isinstance(style, str) else None
    said = Style(*match.groups()) if match else None
    if said is None or said[1:] not in KINDS[said.kind]:
        raise ValueError(f"{where}: {style!r} is no style; there are {OFFERED}")
    return said


def choose(styles: Mapping[str, Any], model: torch.nn.Module, size: int) -> dict[str, Any]:
    """Return what is to be done with a model by the full names of its modules.

    Raises:
        ValueError: a name is that of no module, a module has two styles, or one that does not fit it.
    """
    modules = dict(model.named_modules())
    chosen: dict[str, Any] = {}
    named_by: dict[str, str] = {}
    for pattern, given in styles.items():
        style = read_style(given, f"tp.plan: {pattern!r}")
        found = [name for name in modules if name and matches(pattern, name)]
        if not found:
            near = difflib.get_close_matches(pattern, filter(None, modules), n=3, cutoff=0.0)
            raise ValueError(f"tp.plan names {pattern!r}, and the model has no such module; near it: {', '.join(near)}")
        for name in found:
            if name in named_by:
                raise ValueError(f"tp.plan: {name!r} is meant by {named_by[name]!r} and by {pattern!r}; name it once")
            named_by[name] = pattern
            if isinstance(style, Style):
                check(name, style, modules, size)
            chosen[name] = style
    return chosen


def matches(pattern: str, name: str) -> bool:
    """Tell whether a name has the parts that a pattern asks for."""
    asked, parts = pattern.split("."), name.split(".")
    return len(asked) == len(parts) and all(map(fnmatch.fnmatchcase, parts, asked))


def check(name: str, style: Style, modules: Mapping[str, torch.nn.Module], size: int) -> None:
    """Refuse what cannot be split so.

    Raises:
        ValueError: a module that is no layer of that kind, or numbers that `size` does not divide.
    """
    module = modules[name]
    if style.kind not in ("column", "row"):
        return
    linear = isinstance(module, torch.nn.Linear)
    if not linear and not isinstance(module, torch.nn.Embedding):
        raise ValueError(
            f"tp.plan: {name!r} is a {type(module).__name__}, and '{style.kind}' splits a Linear or an Embedding"
        )
    numbers = {
        ("column", True): "out_features",
        ("row", True): "in_features",
        ("column", False): "embedding_dim",
        ("row", False): "num_embeddings",
    }
    owner = modules[name.rpartition(".")[0]]
    counts = [(module, name, numbers[style.kind, linear])]
    counts += [(owner, name.rpartition(".")[0], heads) for heads in HEADS if linear]
    for counted, where, attribute in counts:
        count = getattr(counted, attribute, None)
        if isinstance(count, int) and count % size:
            raise ValueError(
                f"tp.plan: {name!r} cannot be split by {style.kind} over {size} ranks: {attribute}={count} of "
                f"{where or 'the model'!r} is no multiple of them"
            )
