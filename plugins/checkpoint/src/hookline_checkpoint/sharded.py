"""Tensors of which ranks have shares (DTensors): each rank writes its own, and reads what it needs of all.

torch.distributed.checkpoint (DCP) plans: what each rank writes, so that copies are stored once, and which
pieces a share is put together from, whatever the ranks and the mesh. The files are those of `storage`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from hookline.files.weights import Tensors
from hookline_checkpoint.codec import tree_to_bytes
from hookline_checkpoint.headers import SHARES, entries, shares_of
from hookline_checkpoint.storage import CheckpointError, Reader, read, understanding
from hookline_checkpoint.tensors import NATIVE, as_bytes, as_dtype, tensors_in, tensors_to_parts
from hookline_checkpoint.writing import put

Places = dict[MetadataIndex, tuple[str, str, torch.Size]]
"""File, key in it and sizes of each piece."""

BETWEEN = "/"  # part and name of a tensor, in the names that DCP is told


def meet(timeout: float) -> Any:
    """Return a group of all ranks for saving alone: what it does stands in nobody's way.

    Args:
        timeout: seconds that a rank waits for another.
    """
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))


# Write --------------------------------------------------------------------------------


def lead(group: Any, shares: Mapping[str, Tensors], write: Callable[[Any], Path]) -> Path:
    """Have all ranks write a checkpoint, on the one that commits it; return it.

    Args:
        group: what `meet` returned.
        shares: the tensors by part and name, of which this rank has shares.
        write: `writing.write` without its last argument.

    Raises:
        OSError: a rank could not write; nothing else has changed.
        RuntimeError: a rank raised something else, or is gone.
    """
    listening = True  # the others; not while they write, and never again where one of them is gone

    def write_shares(folder: Path) -> Mapping[str, Any]:
        nonlocal listening
        listening = False
        _tell(group, "folder", str(folder))
        try:
            files = _write_shares(group, shares, folder)
        except CheckpointException as error:
            listening = True
            _fail(error)
        listening = True
        return files

    try:
        path = write(write_shares)
    except BaseException as error:
        if listening:
            with contextlib.suppress(Exception):  # this is not what is to be raised
                _tell(group, "OSError" if isinstance(error, OSError) else "error", str(error))
        raise
    _tell(group, "done", "")
    return path


def follow(group: Any, shares: Mapping[str, Tensors]) -> None:
    """Write this rank's share of a checkpoint, where another one commits it; return when it is committed.

    Raises:
        OSError: a rank could not write.
        RuntimeError: a rank raised something else, or is gone.
    """
    kind, text = _hear(group)
    if kind == "folder":
        with contextlib.suppress(CheckpointException):  # all know of it; who commits says so when it is cleaned up
            _write_shares(group, shares, Path(text))
        kind, text = _hear(group)
    if kind != "done":
        raise (OSError if kind == "OSError" else RuntimeError)(text)


def _tell(group: Any, kind: str, text: str) -> None:
    dist.broadcast_object_list([kind, text], src=0, group=group)


def _hear(group: Any) -> list[str]:
    heard: list[Any] = [None, None]
    dist.broadcast_object_list(heard, src=0, group=group)
    return heard


def _write_shares(group: Any, shares: Mapping[str, Tensors], folder: Path) -> Mapping[str, Any]:
    """Write this rank's share with the others; return on the first rank what `put` said of each file by name.

    Raises:
        CheckpointException: on all ranks, where one of them could not.
    """
    tensors = {f"{part}{BETWEEN}{name}": tensor for part, named in shares.items() for name, tensor in named.items()}
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer = _Writer(folder)
    try:
        save(tensors, storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as error:
        own, _ = error.failures.get(dist.get_rank(), (None, None))
        if own is not None and not isinstance(own, Exception):
            raise own from None  # somebody ends this process
        raise
    return writer.files


def _fail(error: CheckpointException) -> NoReturn:
    """Raise what ranks have failed with."""
    raised = {rank: wrapped[0] for rank, wrapped in error.failures.items()}
    said = "; ".join(f"rank {rank}: {one or type(one).__name__}" for rank, one in sorted(raised.items()))
    raise (OSError if all(isinstance(one, OSError) for one in raised.values()) else RuntimeError)(said) from error


class _Writer(StorageWriter):
    """Writes the pieces that DCP has planned for this rank into one safetensors file, and where they are into JSON."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Any] = {}
        """By name what `put` said of each; where the plans of all ranks are made."""

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        pass

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        return [dataclasses.replace(plan, storage_data=shares_of(rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: Any, planner: Any) -> Future[list[WriteResult]]:
        file, pieces, placed = plan.storage_data, {}, []
        for item in plan.items:
            piece = planner.resolve_data(item).detach()
            if piece.numel():
                key = f"{item.index.fqn}{BETWEEN}{','.join(map(str, item.index.offset))}"
                pieces[key] = piece if piece.dtype in NATIVE else as_bytes(piece)
                placed.append((item.index, piece.nbytes, {"sizes": list(piece.shape), "file": file, "key": key}))
        written = put(self.folder / file, tensors_to_parts(pieces)) if pieces else None
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(index, size, (place, written)) for index, size, place in placed])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        index: dict[str, dict[str, Any]] = {}
        for name, about in metadata.state_dict_metadata.items():
            assert isinstance(about, TensorStorageMetadata)
            part, _, rest = name.partition(BETWEEN)
            dtype = about.properties.dtype
            index.setdefault(part, {})[rest] = {
                "dtype": str(dtype).removeprefix("torch."),
                "shape": list(about.size),
                "size": math.prod(about.size) * dtype.itemsize,
                "pieces": [],
            }
        for result in (result for of_rank in results for result in of_rank):
            part, _, rest = result.index.fqn.partition(BETWEEN)
            place, written = result.storage_data
            index[part][rest]["pieces"].append({"offsets": list(result.index.offset or ()), **place})
            self.files[place["file"]] = written
        self.files[SHARES] = put(self.folder / SHARES, [tree_to_bytes(index)])


# Read ---------------------------------------------------------------------------------


def load(
    path: Path, about: Mapping[str, Any], index: Mapping[str, Any], trees: Mapping[str, Any], allocate: Any
) -> dict[str, Tensors]:
    """Return the tensors of a checkpoint that were stored in shares, by part and name.

    Each rank reads by itself what it needs, file by file, and checks a file before it uses any of it.

    Args:
        path: the checkpoint.
        about: its manifest.
        index: what `SHARES` holds.
        trees: the trees of those parts that are wanted.
        allocate: what each is read into; None for whole tensors on the CPU.

    Raises:
        CheckpointError: a file is not what was written, or is not listed, or was not written by this plugin.
    """
    wanted: dict[str, tuple[tuple[Any, ...], TensorStorageMetadata]] = {}
    with understanding():
        known, places = _known(index, sum(entry["size"] for entry in about["files"].values()))
        for part, tree in trees.items():
            for where, tag, name in entries(tree, () if part == "others" else (part,)):
                if tag == "$dtensor":
                    full = f"{part}{BETWEEN}{name}"
                    wanted.setdefault(full, (where, known[full]))
    allocate = allocate or _whole
    loaded = {
        full: allocate(path=where, shape=form.size, dtype=form.properties.dtype)
        for full, (where, form) in wanted.items()
    }
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(loaded, Metadata({**known}), is_coordinator=True)
    pieces: dict[str, dict[str, list[Any]]] = {}
    for item in planner.create_local_plan().items:
        file, key, _ = places[item.storage_index]
        pieces.setdefault(file, {}).setdefault(key, []).append(item)
    for file, items in pieces.items():

        def put_in_place(reader: Reader, items: Mapping[str, list[Any]] = items) -> set[str]:
            placed = set()
            for key, _, tensor in tensors_in(reader, items):
                for item in items[key]:
                    if _put_piece(tensor, item, places[item.storage_index][2], known, planner):
                        placed.add(key)
            return placed

        _, placed = read(path, {file: put_in_place})
        if lacking := items.keys() - placed[file]:
            fqn = items[min(lacking)][0].storage_index.fqn
            raise CheckpointError(f"{file} has no such piece of {fqn} as {SHARES} lists")
    parts: dict[str, Tensors] = {}
    for full, tensor in loaded.items():
        part, _, name = full.partition(BETWEEN)
        parts.setdefault(part, {})[name] = tensor
    return parts


def _put_piece(
    stored: torch.Tensor, item: Any, sizes: torch.Size, known: Mapping[str, TensorStorageMetadata], planner: Any
) -> bool:
    """Copy what a plan takes of a piece to its place; answer whether it is such a piece."""
    dtype = known[item.storage_index.fqn].properties.dtype
    if stored.nbytes != sizes.numel() * dtype.itemsize:
        return False
    piece = as_bytes(stored).view(dtype).reshape(sizes)
    for dim, (begin, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        piece = piece.narrow(dim, begin, length)
    planner.resolve_tensor(item).detach().copy_(piece)
    return True


class Region(NamedTuple):
    """A part of a whole tensor that this rank has: from where on, and its memory."""

    begins: list[int]
    target: torch.Tensor


def regions_of(shares: Mapping[str, torch.Tensor]) -> dict[str, list[Region]]:
    """Return by name which parts of whole tensors this rank has of those that ranks share."""
    known: dict[str, Any] = {
        name: TensorStorageMetadata(
            TensorProperties(share.dtype), share.shape,
            [ChunkStorageMetadata(torch.Size([0] * share.dim()), share.shape)],
        )
        for name, share in shares.items()
    }  # fmt: skip
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(shares), Metadata(known), is_coordinator=True)
    regions: dict[str, list[Region]] = {name: [] for name in shares}
    for item in planner.create_local_plan().items:
        target = planner.resolve_tensor(item).detach()
        regions[item.storage_index.fqn].append(Region(list(item.storage_offsets), target))
    return regions


def take_rows(rows: torch.Tensor, first: int, regions: Iterable[Region]) -> None:
    """Copy what this rank has of some rows of a tensor, the first of which has this number."""
    for begins, target in regions:
        if not rows.dim():
            target.copy_(rows)
            continue
        low, high = max(first, begins[0]), min(first + len(rows), begins[0] + len(target))
        if low < high:
            part = rows[low - first : high - first]
            for dim, (begin, size) in enumerate(zip(begins[1:], target.shape[1:], strict=True), 1):
                part = part.narrow(dim, begin, size)
            target[low - begins[0] : high - begins[0]].copy_(part)


def _whole(path: Any, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def _known(index: Mapping[str, Any], limit: int) -> tuple[dict[str, TensorStorageMetadata], Places]:
    """Return what DCP knows of each tensor, and where the pieces are; `limit` is bytes of the whole checkpoint."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: Places = {}
    for part, named in index.items():
        for name, about in named.items():
            full, dtype, shape = f"{part}{BETWEEN}{name}", as_dtype(about["dtype"]), _size(about["shape"])
            limit -= shape.numel() * dtype.itemsize
            chunks = []
            for piece in about["pieces"]:
                offsets, sizes = _size(piece["offsets"]), _size(piece["sizes"])
                fits = [begin + size <= whole for begin, size, whole in zip(offsets, sizes, shape, strict=True)]
                chunks += [ChunkStorageMetadata(offsets, sizes)] * all(fits)
                places[MetadataIndex(full, offsets)] = _text(piece["file"]), _text(piece["key"]), sizes
            if limit < 0 or sum(chunk.sizes.numel() for chunk in chunks) != shape.numel():
                raise CheckpointError(f"{SHARES} lists other pieces of {name} than the whole of it")
            tensors[full] = TensorStorageMetadata(TensorProperties(dtype), shape, chunks)
    return tensors, places


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise CheckpointError(f"{SHARES} lists {value!r}, which is no name")
    return value


def _size(numbers: Any) -> torch.Size:
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise CheckpointError(f"{SHARES} lists {numbers}, which is no size")
    return torch.Size(numbers)
