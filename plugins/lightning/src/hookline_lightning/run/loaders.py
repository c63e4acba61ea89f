"""Several loaders as one: collections of loaders, and `CombinedLoader` of this package and of the real one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler

import hookline

MODES = ("min_size", "max_size_cycle", "max_size", "sequential")
REPEATABLE = (
    torch.utils.data.SequentialSampler, RandomSampler, torch.utils.data.SubsetRandomSampler,
    torch.utils.data.WeightedRandomSampler,
)  # fmt: skip
SHARDED = type(hookline.sharded([]))
NO_BATCH = object()


class CombinedLoader(Iterable[Any]):
    """Several loaders as one, as in Lightning: iterating gives `(batch, index, index of the loader)`.

    Args:
        iterables: a loader, or a list, a tuple or a mapping of loaders, nested as you like.
        mode: "min_size" ends with the shortest; "max_size_cycle" ends with the longest and begins the others anew;
            "max_size" ends with the longest and gives None for those that are through; "sequential" gives one after
            the other.
    """

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        if mode not in MODES:
            raise ValueError(f"CombinedLoader(mode={mode!r}) must be one of {', '.join(MODES)}")
        self.iterables, self.mode = iterables, mode

    @property
    def flattened(self) -> list[Any]:
        """The loaders, one after the other."""
        return leaves(self.iterables)

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        if self.mode == "sequential":
            for number, loader in enumerate(self.flattened):
                for index, batch in enumerate(loader):
                    yield batch, index, number
        else:
            for index, batch in enumerate(rounds(self.flattened, self.mode)):
                yield rebuilt(self.iterables, iter(batch)), index, 0

    def __len__(self) -> int:
        return length(self.flattened, self.mode)


# Collections ----------------------------------------------------------------------------


def is_collection(given: Any) -> bool:
    """Tell whether this is a collection of loaders; one of plain numbers and texts is an iterable of batches."""
    if isinstance(given, Mapping):
        inner = list(given.values())
    elif isinstance(given, (list, tuple)):
        inner = list(given)
    else:
        return False
    return not all(isinstance(one, (int, float, str)) for one in inner)


def leaves(given: Any) -> list[Any]:
    """Return the loaders of a nested collection, one after the other."""
    if not is_collection(given):
        return [given]
    return [leaf for one in (given.values() if isinstance(given, Mapping) else given) for leaf in leaves(one)]


def rebuilt(given: Any, values: Iterator[Any]) -> Any:
    """Return a collection with these values in the places of the loaders."""
    if not is_collection(given):
        return next(values)
    if isinstance(given, Mapping):
        made = {key: rebuilt(one, values) for key, one in given.items()}
        return made if type(given) is dict else type(given)(made)  # type: ignore[call-arg]
    inner = [rebuilt(one, values) for one in given]
    return type(given)(*inner) if hasattr(given, "_fields") else type(given)(inner)


def combination(given: Any) -> tuple[Any, str | None]:
    """Return the collection and the mode of a `CombinedLoader`, of this package or of the real one; else None."""
    kind = type(given)
    if isinstance(given, CombinedLoader):
        return given.iterables, given.mode
    if kind.__name__ == "CombinedLoader" and kind.__module__.startswith(("lightning.pytorch", "pytorch_lightning")):
        return given.iterables, given._mode
    return given, None


def length(loaders: Sequence[Any], mode: str) -> int:
    """Return how many batches several loaders give together.

    Raises:
        TypeError: nobody knows.
    """
    sizes = [len(loader) for loader in loaders]
    return sum(sizes) if mode == "sequential" else min(sizes) if mode == "min_size" else max(sizes)


def rounds(loaders: Sequence[Iterable[Any]], mode: str) -> Iterator[list[Any]]:
    """Yield a batch of each loader at a time; None for one that is through, where the mode says so.

    Raises:
        ValueError: a loader that shall begin anew has nothing.
    """
    iterators = [iter(loader) for loader in loaders]
    through = [False] * len(loaders)
    while True:
        batches: list[Any] = []
        for number, iterator in enumerate(iterators):
            batch = next(iterator, NO_BATCH)
            if batch is NO_BATCH:
                through[number] = True
                if mode == "min_size" or all(through):
                    return
                batch = None
                if mode == "max_size_cycle":
                    iterators[number] = iter(loaders[number])
                    batch = next(iterators[number], NO_BATCH)
                    if batch is NO_BATCH:
                        raise ValueError(f"loader {number} of several has no batch, so it cannot be begun anew")
            batches.append(batch)
        yield batches


# One loader of several ------------------------------------------------------------------


def joined(given: Any, shares: int = 1, shuffle: bool = True) -> Any:
    """Return one loader for a collection of them or a `CombinedLoader`; any other loader as it is.

    Loaders of map-style data sets become one that can begin anywhere, and whose batches ranks take in turn; with one
    that can only be iterated among them, it is a stream.

    Args:
        given: what the user gave.
        shares: among how many ranks the data are shared.
        shuffle: whether loaders that shuffle do so.

    Raises:
        ValueError: a mode or a loader that cannot be.
    """
    tree, mode = combination(given)
    if mode is None and not is_collection(tree):
        return given
    mode = mode or "max_size_cycle"
    if mode == "sequential":
        raise ValueError(
            "train_dataloader is a CombinedLoader(mode='sequential'), with which nothing can be trained, as in "
            f"Lightning; take one of {', '.join(MODES[:3])}, or a ConcatDataset"
        )
    loaders = leaves(tree)
    for loader in loaders:
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            raise ValueError(f"among several training loaders is a {type(loader).__name__}, which gives no batches")
    if not loaders:
        raise ValueError("train_dataloader is a collection without a loader")
    _agree_on_shares(loaders, shares)
    if all(map(_is_indexed, loaders)):
        return _indexed(tree, loaders, mode, shuffle)
    stream = Stream(tree, loaders, mode)
    return hookline.sharded(stream) if all(isinstance(one, SHARDED) for one in loaders) else stream


def in_turn(given: Any, predicting: bool = False) -> list[Any]:
    """Return the loaders of an evaluation, which come one after the other; or one of several at a time.

    Raises:
        ValueError: a mode in which nothing is predicted.
    """
    tree, mode = combination(given)
    if mode in (None, "sequential"):
        return leaves(tree)
    if predicting:
        raise ValueError(
            f"predict_dataloader is a CombinedLoader(mode={mode!r}); predictions are made with mode='sequential' "
            "alone, as in Lightning"
        )
    return [joined(given)]


def _agree_on_shares(loaders: Sequence[Any], shares: int) -> None:
    alone = [not isinstance(one, SHARDED) and not _replicas(one) for one in loaders]
    if shares > 1 and len({*alone}) > 1:
        raise ValueError(
            "of several training loaders some give this rank's share alone and some do not: let all of them do so "
            "(a DistributedSampler, hookline.sharded), or none"
        )


def _replicas(loader: Any) -> bool:
    samplers = [getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    return any(getattr(one, "num_replicas", 1) != 1 for one in samplers)


def _is_indexed(loader: Any) -> bool:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    try:
        len(loader)
    except TypeError:
        return False
    return type(loader).__iter__ is DataLoader.__iter__


def _indexed(tree: Any, loaders: Sequence[DataLoader[Any]], mode: str, shuffle: bool) -> DataLoader[Any]:
    sources = [_source(loader, shuffle) for loader in loaders]
    repeatable = all(map(_is_repeatable, sources))
    workers = max(loader.num_workers for loader in loaders)
    begin = [loader.worker_init_fn for loader in loaders if loader.worker_init_fn is not None]
    parts = [Part(loader.dataset, loader.collate_fn, loader.batch_sampler is not None) for loader in loaders]
    return DataLoader(
        Batches(tree, parts),
        batch_size=None,
        sampler=(Draws if repeatable else OwnDraws)(sources, mode),
        collate_fn=as_it_is,
        num_workers=workers,
        pin_memory=any(loader.pin_memory for loader in loaders),
        timeout=max(loader.timeout for loader in loaders),
        worker_init_fn=BeginAll(begin) if begin else None,
        persistent_workers=bool(workers) and any(loader.persistent_workers for loader in loaders),
        prefetch_factor=max(loader.prefetch_factor or 2 for loader in loaders) if workers else None,
        multiprocessing_context=next((one for loader in loaders if (one := loader.multiprocessing_context)), None),
    )


def _source(loader: DataLoader[Any], shuffle: bool) -> Any:
    """Return what draws the indices of the loader's batches."""
    if loader.batch_sampler is None:
        return loader.sampler
    if not shuffle and type(loader.batch_sampler) is BatchSampler and type(loader.sampler) is RandomSampler:
        return BatchSampler(range(len(loader.dataset)), loader.batch_sampler.batch_size, loader.drop_last)  # type: ignore[arg-type]
    return loader.batch_sampler


def _is_repeatable(source: Any) -> bool:
    if type(source) is BatchSampler:
        return _is_repeatable(source.sampler)
    if isinstance(source, (range, list, tuple)) or callable(getattr(source, "set_epoch", None)):
        return True
    return type(source) in REPEATABLE and getattr(source, "generator", None) is None


@dataclasses.dataclass
class Part:
    """One of several loaders, as far as its batches are made from indices."""

    dataset: Any
    collate: Callable[[Any], Any]
    batched: bool

    def batch(self, drawn: Any) -> Any:
        """Return the batch of these indices; None of None."""
        if drawn is None:
            return None
        if not self.batched:
            return self.collate(self.dataset[drawn])
        load = getattr(self.dataset, "__getitems__", None)
        return self.collate(load(drawn) if load else [self.dataset[index] for index in drawn])


class Batches(Dataset[Any]):
    """Batches of several loaders, by what their samplers have drawn for each."""

    def __init__(self, tree: Any, parts: Sequence[Part]) -> None:
        self.shape = rebuilt(tree, itertools.repeat(...))  # workers need not the loaders
        self.datasets = list(parts)
        """Under this name the run finds data sets that want to know the epoch."""

    def __getitem__(self, drawn: tuple[Any, ...]) -> Any:
        return rebuilt(self.shape, (part.batch(one) for part, one in zip(self.datasets, drawn, strict=True)))


class OwnDraws(Sampler[Any]):
    """What the samplers of several loaders draw for each batch; among them is one with an order of its own."""

    def __init__(self, sources: Sequence[Any], mode: str) -> None:
        self.datasets, self.mode = list(sources), mode
        """The samplers; under this name the run finds those that want to know the epoch or have a share."""

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return map(tuple, rounds(self.datasets, self.mode))

    def __len__(self) -> int:
        return length(self.datasets, self.mode)


class Draws(OwnDraws):
    """Draws that depend on the epoch and on torch's random state alone."""

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the run tells the samplers themselves."""


class Stream:
    """Batches of several loaders of which one can only be iterated."""

    def __init__(self, tree: Any, loaders: Sequence[Any], mode: str) -> None:
        self.tree, self.datasets, self.mode = tree, list(loaders), mode

    def __iter__(self) -> Iterator[Any]:
        return (rebuilt(self.tree, iter(batches)) for batches in rounds(self.datasets, self.mode))

    def __len__(self) -> int:
        return length(self.datasets, self.mode)


class BeginAll:
    """Calls the `worker_init_fn` of each of several loaders."""

    def __init__(self, begin: Sequence[Callable[[int], Any]]) -> None:
        self.begin = list(dict.fromkeys(begin))

    def __call__(self, worker: int) -> None:
        for begin in self.begin:
            begin(worker)


def as_it_is(batch: Any) -> Any:
    """Return a batch that is already collated."""
    return batch


def batch_size(given: Any) -> int:
    """Return the samples of a batch of a loader, of several of the first; 1 where it does not say."""
    first = next(iter(leaves(combination(given)[0])), None)
    found = getattr(first, "batch_size", None) or getattr(getattr(first, "batch_sampler", None), "batch_size", None)
    return found if isinstance(found, int) else 1
