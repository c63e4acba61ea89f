"""Tensors on the disk by name, of a checkpoint or of a folder of Hugging Face: each is read when it is asked for."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hookline.files.weights import INDEX
from hookline_checkpoint.headers import SHARED, SHARES, TREES
from hookline_checkpoint.storage import (
    MANIFEST,
    PIECE,
    CheckpointError,
    read,
    read_head,
    read_manifest,
    read_tree,
    understanding,
)
from hookline_checkpoint.tensors import DTYPES, as_bytes, as_dtype

RUNNING = ("running_mean", "running_var")  # statistics that belong to the weights they were taken with


class Form(NamedTuple):
    """What is known of a tensor without its data."""

    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Return how many bytes its data has."""
        return self.shape.numel() * self.dtype.itemsize


class Piece(NamedTuple):
    """A part of a tensor: in which file and from which byte on, and from where on and how far in the tensor."""

    file: Path
    begin: int
    offsets: Sequence[int]
    sizes: Sequence[int]


@dataclass
class Stored:
    """Tensors on the disk; what is tied has the same pieces."""

    where: str
    """The checkpoint or the folder, for messages."""
    forms: dict[str, Form] = field(default_factory=dict)
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    """The first name of each tensor that has another one before this."""
    cast: dict[str, torch.dtype] = field(default_factory=dict)
    """What a tensor is read as, where it is stored as another dtype."""

    def form(self, name: str) -> Form:
        """Return the form that `read` gives a tensor."""
        form = self.forms[name]
        return Form(self.cast.get(name, form.dtype), form.shape)

    def read(self, name: str) -> torch.Tensor:
        """Return a whole tensor, in memory of its own."""
        whole = torch.empty(self.form(name).shape, dtype=self.form(name).dtype)
        self.fill(name, [0] * whole.dim(), whole)
        return whole

    @torch.no_grad()
    def fill(self, name: str, begins: Sequence[int], target: torch.Tensor) -> None:
        """Read a part of a tensor into another one of its shape, which may have another dtype and device.

        Args:
            name: of the tensor.
            begins: where the part begins, in each dimension.
            target: has the shape of the part.

        Raises:
            CheckpointError: a file has become shorter.
        """
        dtype = self.forms[name].dtype
        for piece in self.pieces[name]:
            lows = [max(begin, offset) for begin, offset in zip(begins, piece.offsets, strict=True)]
            ends = zip(begins, target.shape, piece.offsets, piece.sizes, strict=True)
            sizes = [
                min(begin + size, offset + length) - low
                for low, (begin, size, offset, length) in zip(lows, ends, strict=True)
            ]
            if min(sizes, default=1) > 0:
                here = target
                for dim, (low, begin, size) in enumerate(zip(lows, begins, sizes, strict=True)):
                    here = here.narrow(dim, low - begin, size)
                _read_part(piece, dtype, [low - off for low, off in zip(lows, piece.offsets, strict=True)], here)


def _read_part(piece: Piece, dtype: torch.dtype, begins: Sequence[int], target: torch.Tensor) -> None:
    """Read a part of a piece, which lies in its file row by row, some rows at a time."""
    row = math.prod(piece.sizes[1:]) * dtype.itemsize
    rows, first = (target.shape[0], begins[0]) if target.dim() else (1, 0)
    some = max(1, PIECE // max(row, 1))
    with open(piece.file, "rb", buffering=0) as file:
        for done in range(0, rows, some):
            count = min(some, rows - done)
            buffer = torch.empty([count, *piece.sizes[1:]] if target.dim() else [], dtype=dtype)
            file.seek(piece.begin + (first + done) * row)
            left = as_bytes(buffer).numpy().data
            while left:
                got = file.readinto(left)
                if not got:
                    raise CheckpointError(f"{piece.file} ends too early; it was changed while it was read")
                left = left[got:]
            if not target.dim():
                target.copy_(buffer)
                continue
            for dim, (begin, size) in enumerate(zip(begins[1:], target.shape[1:], strict=True), 1):
                buffer = buffer.narrow(dim, begin, size)
            target.narrow(0, done, count).copy_(buffer)


# Checkpoints --------------------------------------------------------------------------


def of_checkpoint(path: Path, average: str | None = None) -> Stored:
    """Return the tensors of the module in a checkpoint, when the files that hold them are what was written.

    Args:
        path: the checkpoint.
        average: the plugin whose average of the weights stands for them.

    Raises:
        CheckpointError: it is damaged.
        ValueError: the module's state is not tensors by name, or there is no such average.
    """
    about = read_manifest(path)
    listed = about["files"].keys()
    _, trees = read(path, dict.fromkeys([TREES, *({SHARES} & listed)], read_tree))
    with understanding():
        index = trees.get(SHARES, {})
        stored = _of_part(path, "module", _module_tree(trees[TREES]["module"], path), index)
        if average is not None:
            _replace(stored, _of_part(path, "others", _average_tree(trees[TREES]["others"], average), index), average)
    used = {piece.file.name for pieces in stored.pieces.values() for piece in pieces}
    if missing := used - listed:
        raise CheckpointError(f"{MANIFEST} lists no {', '.join(sorted(missing))}")
    read(path, dict.fromkeys(used, lambda file: None))  # which compares what they hold with what was written
    return stored


def _module_tree(tree: Any, path: Path) -> dict[str, Any]:
    """Return the places of a module's tensors by their names in its state."""
    named = dict(tree["$ordereddict"][0]) if isinstance(tree, dict) and "$ordereddict" in tree else tree
    if not isinstance(named, dict) or not named:
        raise ValueError(f"the module's get_state gave no tensors by name in {path}, so there is nothing to export")
    for name, entry in named.items():
        if not _is_tensor(entry):
            kind = "mapping" if isinstance(entry, dict) else type(entry).__name__
            raise ValueError(f"{name!r} of the module's get_state is a {kind}; only tensors by name can be exported")
    return named


def _is_tensor(entry: Any) -> bool:
    return isinstance(entry, dict) and next(iter(entry), "") in ("$tensor", "$dtensor")


def _average_tree(others: Any, plugin: str) -> dict[str, Any]:
    states = others.get("plugins", {})
    found = {name for name, state in states.items() if isinstance(state, dict) and state.get("average")}
    if plugin not in found:
        raise ValueError(
            f"--average={plugin}: no such plugin keeps an average of the weights in this checkpoint; "
            f"{', '.join(sorted(found)) or 'none'} does"
        )
    return dict(states[plugin]["average"])


def _of_part(path: Path, part: str, tree: Mapping[str, Any], index: Mapping[str, Any]) -> Stored:
    """Return tensors of one part of a checkpoint, by their names in its tree."""
    head = tensors_of_file(path / SHARED[part])
    heads: dict[str, dict[str, tuple[Form, int]]] = {}
    stored = Stored(str(path))
    first: dict[str, str] = {}
    for name, entry in tree.items():
        tag, given = next(iter(entry.items()))
        extra = given if isinstance(given, dict) else {"name": given}
        key = extra["name"]
        if first.setdefault(key, name) != name:
            stored.tied[name] = first[key]
        if tag == "$tensor":
            form, begin = head[key]
            if "dtype" in extra:  # none of safetensors, so its bytes were stored
                form = _checked(Form(as_dtype(extra["dtype"]), torch.Size(extra["shape"])), form.nbytes, key)
            pieces = [Piece(path / SHARED[part], begin, [0] * len(form.shape), form.shape)]
        else:
            said = index[part][key]
            form, pieces = Form(as_dtype(said["dtype"]), torch.Size(said["shape"])), []
            for piece in said["pieces"]:
                file, sizes = str(piece["file"]), torch.Size(piece["sizes"])
                if file not in heads:
                    heads[file] = tensors_of_file(path / Path(file).name)
                there, begin = heads[file][piece["key"]]
                _checked(Form(form.dtype, sizes), there.nbytes, key)
                pieces.append(Piece(path / Path(file).name, begin, list(piece["offsets"]), sizes))
            if sum(math.prod(piece.sizes) for piece in pieces) != form.shape.numel():
                raise CheckpointError(f"{SHARES} lists other pieces of {key} than the whole of it")
        stored.forms[name], stored.pieces[name] = form, pieces
    return stored


def _checked(form: Form, nbytes: int, name: str) -> Form:
    if form.nbytes != nbytes:
        raise CheckpointError(f"{name} is {nbytes} bytes, and {form.nbytes} are listed")
    return form


def _replace(stored: Stored, average: Stored, plugin: str) -> None:
    """Have an average stand for the weights it is of."""
    for name, form in average.forms.items():
        there = stored.forms.get(name)
        if there is None or there.shape != form.shape:
            raise ValueError(
                f"--average={plugin}: it has {name}, which is no tensor of the module, or of another shape"
            )
        stored.cast[name] = there.dtype
    moving = [name for name in stored.forms if name.endswith(RUNNING) and name not in average.forms]
    if moving:
        raise ValueError(
            f"--average={plugin}: {moving[0]} has statistics of the trained weights, which are not those of the "
            "average: `hookline export` evaluates a run, and exports the average with its own"
        )
    for name in average.forms:
        first = stored.tied.get(name, name)
        for other in [one for one in stored.forms if stored.tied.get(one, one) == first]:
            stored.forms[other], stored.pieces[other] = average.forms[name], average.pieces[name]
            stored.cast[other] = stored.cast[name]


# Folders of Hugging Face --------------------------------------------------------------


def of_folder(path: Path) -> Stored:
    """Return the tensors of a safetensors file, or of a folder of them as Hugging Face writes it.

    Raises:
        ValueError: it is none.
    """
    if path.is_file():
        return _of_files(str(path), [path])
    if not path.is_dir():
        raise ValueError(f"there is no folder or file {path}")
    single = path / "model.safetensors"
    if (path / INDEX).exists():
        try:
            where = json.loads((path / INDEX).read_text())["weight_map"]
            files = sorted({str(file) for file in where.values()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path / INDEX} cannot be understood: {type(error).__name__}: {error}") from error
        missing = [file for file in files if Path(file).name != file or not (path / file).is_file()]
        if missing:
            raise ValueError(
                f"{path / INDEX} lists {', '.join(missing)}, which the folder does not have; copy it whole"
            )
        stored = _of_files(str(path), [path / file for file in files])
        if lacking := sorted(set(where) - set(stored.forms)):
            raise ValueError(f"{path / INDEX} lists {lacking[0]}, and {where[lacking[0]]} has no such tensor")
        return stored
    if single.is_file():
        return _of_files(str(path), [single])
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise ValueError(
            f"{path} holds {pickles[0]}, a pickle, of which no part can be read by itself: "
            f"`hookline checkpoints import {path / pickles[0]} --to {single}` writes it as safetensors"
        )
    raise ValueError(f"{path} has neither model.safetensors nor {INDEX}")


def _of_files(where: str, files: Iterable[Path]) -> Stored:
    stored = Stored(where)
    for file in files:
        for name, (form, begin) in tensors_of_file(Path(os.path.realpath(file))).items():  # of a cache, a link
            if name in stored.forms:
                raise ValueError(f"{where}: {name} stands in two files")
            stored.forms[name] = form
            stored.pieces[name] = [Piece(file, begin, [0] * len(form.shape), form.shape)]
    return stored


def tensors_of_file(path: Path) -> dict[str, tuple[Form, int]]:
    """Return the tensors of a safetensors file by name: the form of each, and the byte at which it begins."""
    head = read_head(path.parent, path.name)
    size = path.stat().st_size
    with open(path, "rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
    tensors = {}
    for name, entry in head.items():
        try:
            form = Form(DTYPES[entry["dtype"]], torch.Size(entry["shape"]))
            first, last = entry["data_offsets"]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path.name}: {name} cannot be read: {type(error).__name__}: {error}") from error
        if not 0 <= first <= last <= size - begin or last - first != form.nbytes or min(form.shape, default=0) < 0:
            raise CheckpointError(f"{path.name}: {name} is not where the head says; the file is damaged")
        tensors[name] = form, begin + first
    return tensors
