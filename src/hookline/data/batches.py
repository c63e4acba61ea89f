"""Batches: their move to the device, and their number of samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with all its tensors on a device.

    Goes through dictionaries, lists, tuples, named tuples and dataclasses, and calls `.to` of every object that has
    it; other objects stay as they are.
    """
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if hasattr(batch, "to") and callable(batch.to):
        return batch.to(device)
    if isinstance(batch, Mapping):
        moved = {key: to_device(value, device) for key, value in batch.items()}
        return moved if type(batch) is dict else type(batch)(moved)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: to_device(getattr(batch, f.name), device) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **fields)
    return batch


# Samples ------------------------------------------------------------------------------


def count_samples(batch: Any) -> int:
    """Return the likely number of samples of a batch, without its loader; see `counted`."""
    return counted(batch)[0]


def counted(batch: Any, given: Iterable[tuple[Any, int | None]] = ()) -> tuple[int, str]:
    """Return how many samples a batch holds, and why that may be wrong, "" if it is certain.

    The loader's number counts, unless the tensors of the batch agree on fewer: then its collation has dropped some.
    For a batch from elsewhere it is a guess: the first dimension of the tensors, or the number of items.

    Args:
        batch: a batch of a loader.
        given: the last batches of loaders, with their numbers of samples.
    """
    first = None  # of the commonest batches, tensors of one first dimension, without many calls
    if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], torch.Tensor) and batch[0].ndim:
        first = batch[0].shape[0]
        for other in batch[1:]:
            if not isinstance(other, torch.Tensor) or not other.ndim or other.shape[0] != first:
                first = None
    for other, samples in given:
        if other is batch and samples is not None:
            return samples if samples == first else left_of(batch, samples), ""
    return guess(batch) if first is None else (first, "")


def left_of(batch: Any, samples: int) -> int:
    """Return how many samples of a batch are left after its collation."""
    if batch is None:
        return 0
    tensors = list(tensors_in(batch))
    firsts = {first_of(tensor) for tensor in tensors}
    fewer = len(firsts) == 1 and min(firsts) < samples
    if not fewer or any(len(items) == samples for items in lists_in(batch)):
        return samples
    if any(tensor.ndim > 1 and samples in tensor.shape[1:2] for tensor in tensors if not nested(tensor)):
        return samples  # another dimension is that of the samples, time is the first
    return firsts.pop()


def guess(batch: Any) -> tuple[int, str]:
    """Return how many samples a batch seems to hold, and why that may be wrong."""
    if batch is None:
        return 0, ""
    columns = isinstance(batch, (list, tuple))  # else of fields, which may be nested
    tensors = list(tensors_in(batch, depth=1)) or ([] if columns else list(tensors_in(batch)))
    if tensors:
        firsts = list(dict.fromkeys(map(first_of, tensors)))
        return firsts[0], f"tensors in it begin with dimensions {firsts}" if len(firsts) > 1 else ""
    values = inner_of(batch)
    if not values:
        is_one = not hasattr(batch, "__len__") or isinstance(batch, (str, Mapping)) or getattr(batch, "ndim", 1) == 0
        return (1 if is_one else len(batch)), ""
    lists = [value for value in values if isinstance(value, (list, tuple))]
    if not columns:
        inner, doubt = guess(lists[0]) if lists else guess(values[0])
        return (len(lists[0]) if lists else inner), doubt or (f"a {type(batch).__name__} without a tensor in it")
    if len(values) == 1:
        return guess(values[0])
    lengths = {len(value) for value in lists}
    if len(lists) < len(values) or len(lengths) > 1:
        fields = all(isinstance(value, (int, float)) or getattr(value, "ndim", 1) == 0 for value in values)
        return len(values), f"its {len(values)} numbers may be as many samples, or one" if fields else ""
    alike = all(len({type(item) for item in value}) == 1 for value in lists)
    rows, width = len(values), lengths.pop()
    doubt = f"it has {rows} lists of {width} items, each of one kind" if alike and rows != width else ""
    return (width if alike and isinstance(batch, tuple) else rows), doubt  # zip(*samples) makes tuples


def tensors_in(value: Any, depth: int = 9) -> Iterator[Any]:
    """Yield the tensors and arrays in a batch that have a first dimension."""
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        yield value.data[: int(value.batch_sizes[0])]
    elif isinstance(value, torch.Tensor) or (hasattr(value, "shape") and hasattr(value, "dtype")):
        if value.ndim:
            yield value
    elif depth:
        for inner in inner_of(value):
            yield from tensors_in(inner, depth - 1)


def lists_in(value: Any) -> Iterator[Any]:
    """Yield a batch and its parts that are lists."""
    if isinstance(value, (list, tuple)):
        yield value
    for inner in inner_of(value):
        yield from lists_in(inner)


def inner_of(value: Any) -> list[Any]:
    """Return the parts of a batch or of a part of it."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return list(vars(value).values())
    return []


def first_of(tensor: Any) -> int:
    """Return the first dimension of a tensor or an array, nested tensors too."""
    return tensor.size(0) if isinstance(tensor, torch.Tensor) else tensor.shape[0]


def nested(tensor: Any) -> bool:
    """Tell whether a tensor is nested: a list of tensors of several lengths."""
    return isinstance(tensor, torch.Tensor) and tensor.is_nested
