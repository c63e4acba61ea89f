"""Where documents come from: files, and shards that a library reads."""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from hookline import nearest


class Shards(Protocol):
    """A source: its shards by number, each read from its beginning to its end."""

    names: list[str]
    """The names of the shards, in an order that never changes."""

    def stamp(self, number: int) -> str | None:
        """Return what tells that a shard has been written anew, such as its size and time; None if nothing does."""

    def read(self, number: int) -> Iterator[Any]:
        """Yield the documents of a shard, the same each time: texts, bytes, or token ids."""


class Files:
    """Files as shards: `.jsonl` has a document in each line, `.npy` token ids; any other file is one text.

    Args:
        files: a pattern such as `data/*.jsonl`, or a list of paths and patterns. With `.gz` a text is unpacked.
        text: the field of the text in a line of JSON.
        end: the id that ends a document in files of token ids; None if each file is one document.
    """

    def __init__(self, files: str | list[str], text: str = "text", end: int | None = None) -> None:
        patterns = [files] if isinstance(files, str) else list(files)
        found = [glob.glob(one, recursive=True) or glob.glob(glob.escape(one)) for one in patterns]
        for pattern, paths in zip(patterns, found, strict=True):
            if not paths:
                raise ValueError(f"corpus: no file is named {pattern!r}, seen from {os.getcwd()}")
        self.names = sorted({path for paths in found for path in paths if os.path.isfile(path)})
        self.text, self.end = text, end

    def stamp(self, number: int) -> str | None:
        return stamp_of(self.names[number])

    def read(self, number: int) -> Iterator[Any]:
        path = self.names[number]
        kind = path.removesuffix(".gz")
        if path.endswith(".npy"):
            yield from parted(np.load(path, allow_pickle=False), self.end)
            return
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            if not kind.endswith(".jsonl"):
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield field_of(json.loads(line), self.text)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from error


class WebShards:
    """Shards that WebDataset reads, wherever it can: on a disk, over a network, through a pipe.

    Args:
        urls: as WebDataset takes them, `data/{000..099}.tar`, or a list.
        text: the extension of the text or of the token ids in a sample: `txt`, `npy`, `json`.
    """

    def __init__(self, urls: str | list[str], text: str = "txt") -> None:
        from webdataset.shardlists import expand_urls  # type: ignore[import-untyped]

        self.names = expand_urls(urls) if isinstance(urls, str) else list(urls)
        self.text = text

    def stamp(self, number: int) -> str | None:
        path = self.names[number]
        return stamp_of(path) if os.path.exists(path) else None

    def read(self, number: int) -> Iterator[Any]:
        import webdataset  # type: ignore[import-untyped]

        samples = webdataset.WebDataset(
            self.names[number], shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False, seed=0
        )
        for sample in samples:
            packed = field_of(sample, self.text)
            yield np.load(io.BytesIO(packed), allow_pickle=False) if self.text.endswith("npy") else packed


class HuggingFace:
    """The shards of a stream of Hugging Face `datasets`, not shuffled: what it maps and filters stays.

    Args:
        stream: an `IterableDataset`; `table.to_iterable_dataset(num_shards=…)` makes one of a table.
        text: the column of the text, or of token ids.
    """

    def __init__(self, stream: Any, text: str = "text") -> None:
        if not hasattr(stream, "num_shards"):
            raise ValueError(
                f"corpus: a {type(stream).__name__} is no stream with shards; give an IterableDataset of `datasets`: "
                "load_dataset(…, streaming=True), or table.to_iterable_dataset(num_shards=…)"
            )
        self.stream, self.text = stream, text
        self.names = [f"shard {number} of {stream.num_shards}" for number in range(stream.num_shards)]

    def stamp(self, number: int) -> str | None:
        return None

    def read(self, number: int) -> Iterator[Any]:
        one = self.stream.shard(num_shards=len(self.names), index=number)
        for rows in one.iter(batch_size=256):  # iter(one) would give a loading worker its part alone
            yield from field_of(rows, self.text)


class Mosaic:
    """The shards of MosaicML Streaming: it downloads them, checks them, and keeps as many as its cache may hold.

    Args:
        dataset: a `StreamingDataset`.
        text: the column of the text, or of token ids.
    """

    def __init__(self, dataset: Any, text: str = "text") -> None:
        self.dataset, self.text = dataset, text
        self.ends = np.cumsum(dataset.samples_per_shard).tolist()
        self.names = [f"shard {number} of {len(self.ends)}" for number in range(len(self.ends))]

    def stamp(self, number: int) -> str | None:
        return None

    def read(self, number: int) -> Iterator[Any]:
        for sample in range(self.ends[number - 1] if number else 0, self.ends[number]):
            yield field_of(self.dataset[sample], self.text)


def shards_of(given: Any) -> Any:
    """Return the shards that a user means: a pattern of files, a stream of a library, or an object with shards.

    Raises:
        ValueError: it is nothing of these.
    """
    if isinstance(given, (str, list, tuple)):
        return Files(given if isinstance(given, str) else list(given))
    if all(hasattr(given, name) for name in ("names", "stamp", "read")):
        return given
    if hasattr(given, "samples_per_shard"):
        return Mosaic(given)
    return HuggingFace(given)


def stamp_of(path: str) -> str:
    """Return the size of a file and the time when it was written."""
    found = os.stat(path)
    return f"{found.st_size} bytes at {found.st_mtime_ns}"


def parted(ids: np.ndarray[Any, Any], end: int | None) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the documents in an array of token ids, each with the id that ends it."""
    if end is None:
        yield ids
        return
    begin = 0
    for stop in (*(np.flatnonzero(ids == end) + 1).tolist(), len(ids)):
        if stop > begin:
            yield ids[begin:stop]
        begin = stop


def field_of(sample: Any, name: str) -> Any:
    """Return a field of a sample.

    Raises:
        ValueError: it has none of this name.
    """
    try:
        return sample[name]
    except (KeyError, TypeError):
        names = sorted(map(str, sample)) if hasattr(sample, "keys") else []
        offered = f"; it has {', '.join(names)}" if names else f", but is a {type(sample).__name__}"
        raise ValueError(f"a document has no field {name!r}{offered}{nearest(name, names)}") from None
