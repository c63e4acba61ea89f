"""Files of predictions: their rows are written block by block."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import torch

Rows = Mapping[str, Any]
"""By name of the output a tensor, or a list: of tensors, where shapes differ, or of plain data."""
Blocks = Callable[[], Iterator[Rows]]


Kind = tuple[torch.dtype | None, tuple[int, ...]]
"""The dtype and the shape of a row; None and () of plain data."""


class Column(NamedTuple):
    """What the rows of an output have in common."""

    dtype: torch.dtype | None
    """None for plain data."""
    shape: tuple[int, ...] | None
    """Of a row, with -1 where rows differ; None if they differ in the number of dimensions."""


Columns = Mapping[str, Column]
SMALL = [torch.bfloat16, *(kind for name, kind in vars(torch).items() if name.startswith("float8"))]
LACKING = {
    "npy": SMALL,
    "safetensors": [torch.complex128],
    "parquet": [*SMALL, torch.complex64, torch.complex128],
    "jsonl": [torch.complex64, torch.complex128],
}


def column_of(name: str, kinds: Collection[Kind]) -> Column:
    """Return what the rows of several batches have in common.

    Raises:
        ValueError: they are of several kinds.
    """
    dtypes = {dtype for dtype, _ in kinds}
    if len(dtypes) > 1:
        raise ValueError(f"predict_step returned {name!r} as {' and '.join(sorted(map(str, dtypes)))}; return one kind")
    (dtype,) = dtypes
    shapes = {shape for _, shape in kinds}
    if len({len(shape) for shape in shapes}) > 1:
        return Column(dtype, None)
    return Column(dtype, tuple(sizes[0] if len({*sizes}) == 1 else -1 for sizes in zip(*shapes, strict=True)))


def check(form: str, columns: Columns) -> None:
    """Refuse outputs that a format cannot hold.

    Raises:
        ValueError: the output, and what to do.
    """
    for name, (dtype, shape) in columns.items():
        if dtype in LACKING[form]:
            raise ValueError(
                f"predict_writer.format={form} has no {dtype}, which {name!r} is: let predict_step return another "
                "dtype, as `.float()` makes it, or choose another format"
            )
        dense = form in ("npy", "safetensors")
        if (dense and (dtype is None or shape is None or -1 in shape)) or (form == "parquet" and shape is None):
            kind = "is no tensor" if dtype is None else "has rows of several shapes"
            raise ValueError(
                f"predict_writer.format={form} cannot hold {name!r}, which {kind}: choose format: "
                f"{'parquet or ' * dense}jsonl. What is predicted by now is kept for it"
            )


def write_npy(new: Path, columns: Columns, total: int, blocks: Blocks) -> None:
    """Write a folder with one file for each output."""
    import numpy as np

    new.mkdir()
    maps: dict[str, Any] = {}
    for name, (dtype, row) in columns.items():
        path, shape = new / f"{quote(name, safe=' ')}.npy", (total, *(row or ()))
        kind = torch.empty(0, dtype=dtype).numpy().dtype
        if math.prod(shape):
            maps[name] = np.lib.format.open_memmap(path, "w+", kind, shape)
        else:
            np.save(path, np.empty(shape, kind))
    _fill({name: torch.from_numpy(one) for name, one in maps.items()}, blocks)
    for one in maps.values():
        one.flush()


def write_safetensors(new: Path, columns: Columns, total: int, blocks: Blocks) -> None:
    """Write one file, from outputs that are on the disk before."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(dir=new.parent, prefix=".new-") as folder:
        maps = {}
        for number, (name, (dtype, row)) in enumerate(columns.items()):
            size = total * math.prod(row or ())
            file = f"{folder}/{number}"
            flat = torch.from_file(file, shared=True, size=size, dtype=dtype) if size else torch.empty(0, dtype=dtype)
            maps[name] = flat.view(total, *(row or ()))
        _fill(maps, blocks)
        save_file(maps, new, {"format": "pt"})


def _fill(outputs: Mapping[str, torch.Tensor], blocks: Blocks) -> None:
    begin = 0
    for rows in blocks():
        for name, output in outputs.items():
            output[begin : begin + len(rows[name])] = rows[name]
        begin += len(next(iter(rows.values())))


def write_jsonl(new: Path, columns: Columns, total: int, blocks: Blocks) -> None:
    """Write one line for each sample."""
    with new.open("w", encoding="utf-8") as file:
        for rows in blocks():
            for row in zip(*([plain(one) for one in rows[name]] for name in rows), strict=True):
                file.write(json.dumps(dict(zip(rows, row, strict=True)), ensure_ascii=False) + "\n")


def write_parquet(new: Path, columns: Columns, total: int, blocks: Blocks) -> None:
    """Write one file; a row of a tensor becomes a number, a list or a list of lists."""
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    texts = [name for name, column in columns.items() if column.dtype is None]
    found = [pa.schema([(name, pa.infer_type(rows[name])) for name in texts]) for rows in blocks()] if texts else []
    try:
        inferred = pa.unify_schemas([pa.schema([]), *found], promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"predict_writer.format=parquet: {error}; return items of one kind, or choose jsonl") from None
    fields = []
    for name, (dtype, shape) in columns.items():
        kind = inferred.field(name).type if dtype is None else pa.from_numpy_dtype(str(dtype).partition(".")[2])
        for _ in shape or ():
            kind = pa.list_(kind)
        fields.append((name, kind))
    schema = pa.schema(fields)
    with parquet.ParquetWriter(new, schema) as writer:
        for rows in blocks():
            writer.write_table(pa.table([_arrow(rows[name], kind) for name, kind in fields], schema=schema))
            pa.default_memory_pool().release_unused()  # else it may keep what blocks before needed


def _arrow(values: Any, kind: Any) -> Any:
    """Return rows as an array of Arrow, without a Python object for each number."""
    import pyarrow as pa

    if not isinstance(values, torch.Tensor):
        if values and isinstance(values[0], torch.Tensor):
            return pa.concat_arrays([_arrow(row[None], kind) for row in values])
        return pa.array(values, kind)
    array = pa.array(values.reshape(-1).numpy())
    for place in range(values.ndim - 1, 0, -1):
        offsets = torch.arange(math.prod(values.shape[:place]) + 1, dtype=torch.int32) * values.shape[place]
        array = pa.ListArray.from_arrays(pa.array(offsets.numpy()), array)
    return array


def plain(value: Any) -> Any:
    """Return a row as plain data.

    Raises:
        TypeError: it is of another kind.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if hasattr(value, "tolist"):  # of torch, of numpy
        return value.tolist()
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(
        f"predict_step returned a list with a {type(value).__name__} in it, which no file of predictions holds: return "
        "numbers, texts, tensors, or lists and dictionaries of them"
    )


WRITERS = {"npy": write_npy, "safetensors": write_safetensors, "parquet": write_parquet, "jsonl": write_jsonl}
SUFFIXES = {"npy": "", "safetensors": ".safetensors", "parquet": ".parquet", "jsonl": ".jsonl"}
