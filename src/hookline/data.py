"""Data: the resumable sampler, the place in the epoch, the randomness of loading, batches to the device."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import hashlib
import itertools
import logging
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, SequentialSampler, get_worker_info

from hookline.schedule import seconds

log = logging.getLogger("hookline.data")

CHUNK = 4096  # indices turned into Python integers at a time


def mix(*parts: object) -> int:
    """Return one seed that depends on all parts, the same on every machine; 63 bits."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclasses.dataclass
class Cursor:
    """The place in the data: which epoch, and how much of it has been trained on."""

    seed: int = 0
    epoch: int = 0
    position: int = 0
    """Batches of this epoch trained on, by each rank (not batches fetched)."""
    consumed: int = 0
    """Samples of this epoch drawn for them, over all ranks."""
    draw: int = 0
    """Samples that one batch draws over all ranks; 0 where the loader does not say."""
    samples: int | None = None
    """Samples of the data set; None where nobody can know."""
    generator: torch.Generator = dataclasses.field(default_factory=torch.Generator)
    """What loaders seed their workers from."""
    warned: bool = False

    def begin_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self.epoch, self.position, self.consumed = epoch, 0, 0


class ResumableSampler(Sampler[int]):
    """Samples a data set in an order that depends on nothing but (seed, epoch).

    The order is one stateless permutation; ranks take strided shares of what lies behind
    the cursor, so a resumed epoch skips by index, loads nothing, and may run on another
    number of ranks. A subclass bound to a run (`sampler_class`) is handed to the module's
    `get_*_dataloader`, where `sampler(dataset)` is all that is needed.
    """

    cursor: Cursor
    shuffle: bool
    share: int
    shares: int

    def __init__(self, data_source: Any) -> None:
        self.length = len(data_source)

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(mix(self.cursor.seed, self.cursor.epoch))
            order = torch.randperm(self.length, generator=generator)
        else:
            order = torch.arange(self.length)
        share = order[self.cursor.consumed + self.share :: self.shares]
        for chunk in torch.split(share, CHUNK):
            yield from chunk.tolist()

    def __len__(self) -> int:
        """Return the samples of a whole epoch on this rank, wherever the cursor stands."""
        return len(range(self.share, self.length, self.shares))


def sampler_class(cursor: Cursor, shuffle: bool, share: int, shares: int) -> type[ResumableSampler]:
    """Return a sampler class that is bound to the cursor of a run and to this rank's share of the data."""
    bound = {"cursor": cursor, "shuffle": shuffle, "share": share, "shares": shares}
    return type("RunSampler", (ResumableSampler,), bound)


# Loaders ------------------------------------------------------------------------------


def with_sampler(loader: Any, sampler: type[Sampler[Any]]) -> Any:
    """Return a loader that was made without knowing of the run, drawing by the sampler class that the run hands out.

    For adapters of interfaces that are not handed a sampler. A `DataLoader` that goes through its data in their order
    does so here too, one that shuffles does as the run does; each rank then takes its share. What draws in another
    way (a sampler or a loader of the user's own, an iterable) is returned as it is.
    """
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        return loader
    own, batches = loader.sampler, loader.batch_sampler
    shuffles = (
        type(own) is torch.utils.data.RandomSampler and not own.replacement and own.num_samples == len(own.data_source)
    )
    if not (shuffles or type(own) is SequentialSampler) or type(batches) not in (BatchSampler, type(None)):
        return loader
    drawn = sampler if shuffles else type(sampler.__name__, (sampler,), {"shuffle": False})
    names = (
        "dataset", "batch_size", "num_workers", "collate_fn", "pin_memory", "drop_last", "timeout", "worker_init_fn",
        "multiprocessing_context", "prefetch_factor", "persistent_workers", "pin_memory_device", "in_order",
    )  # fmt: skip
    made = {name: getattr(loader, name) for name in names}
    return DataLoader(sampler=drawn(loader.dataset), **made)


def length(loader: Any) -> int | None:
    """Return how many batches a loader gives, or None where it does not know."""
    try:
        return len(loader)
    except TypeError:
        return None


def make_resumable(loader: Any, cursor: Cursor, shares: int, timeout: str | None = None) -> Any:
    """Prepare a training loader so that iterating it begins at the cursor.

    A `DataLoader` of a map-style data set is prepared in place: it skips by index, and what
    its data set and its collation draw at random is seeded by (seed, epoch, first index of
    the batch), so that it neither disturbs the run nor depends on the number of workers.
    Anything else is iterated from its beginning, and the batches before the cursor dropped.
    """
    cursor.draw = 0
    cursor.samples = length(getattr(loader, "dataset", None))
    if isinstance(loader, DataLoader):
        seed_loading(loader, cursor, timeout)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        if cursor.position:
            log.warning(
                "the training loader is a stream: its first %d batches are loaded and dropped to come to where the run "
                "was cut. This is exact if the stream gives the same each time; what it draws at random in this "
                "process is not repeated",
                cursor.position,
            )
        return _FromCursor(loader, cursor)
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if isinstance(sampler, _FromCursor):
        return loader
    plain = loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler
    if plain and isinstance(loader.sampler, ResumableSampler):
        cursor.draw = (loader.batch_size or 1) * shares
        cursor.position = cursor.consumed // cursor.draw  # the batches of before may have been of another size
        return loader
    if not cursor.warned and not (plain and isinstance(loader.sampler, SequentialSampler)):
        cursor.warned = True
        warnings.warn(
            "the training loader draws its order from a sampler of its own "
            f"({type(loader.sampler if plain else loader.batch_sampler).__name__}): training works, but the "
            "order is not a function of (seed, epoch), so after a resume in mid-epoch the rest of that "
            "epoch comes in another order, and some samples come twice or not at all. Pass "
            "`sampler=sampler(dataset)` in get_train_dataloader for an exact resume.",
            stacklevel=2,
        )
    vars(loader)["sampler" if loader.batch_sampler is None else "batch_sampler"] = _FromCursor(sampler, cursor)
    return loader


def seed_loading(loader: DataLoader[Any], cursor: Cursor, timeout: str | None = None) -> None:
    """Make what happens while a loader loads a function of (seed, epoch, index) alone.

    `iter(loader)` would also draw from the global random state, so the loader gets a
    generator of its own. The data set stays the user's object behind a view. Its workers
    are waited for no longer than `timeout`, unless the loader has one of its own.
    """
    if timeout is not None and loader.num_workers and not loader.timeout:
        loader.timeout = seconds(timeout)
    if loader.generator is None:
        loader.generator = cursor.generator
    if loader.generator is cursor.generator:
        cursor.generator.manual_seed(mix(cursor.seed, cursor.epoch))
    if isinstance(loader.dataset, IterableDataset):
        return
    view: Any = loader.dataset
    if not isinstance(view, _SeededDataset):
        collate = loader.collate_fn if loader.batch_sampler is not None else None
        # DataLoader forbids to set `dataset`; the view answers to all that the data set does.
        vars(loader)["dataset"] = view = _SeededDataset(loader.dataset, collate, cursor.seed, loader.timeout)
        if collate is not None:
            loader.collate_fn = _collated_already
        if loader.num_workers:
            view.epoch.share_memory_()
    view.epoch.fill_(cursor.epoch)


class _SeededDataset:
    """A view of a map-style data set that loads and collates under a seed of the batch's own.

    An error says which samples were loaded, and a worker that is late with a batch says where it is.
    """

    def __init__(self, dataset: Any, collate: Callable[[Any], Any] | None, seed: int, patience: float) -> None:
        self.dataset = dataset
        self.collate = collate
        self.seed = seed
        self.epoch = torch.zeros(1, dtype=torch.int64)  # shared with workers, who may outlive an epoch
        self._patience = patience  # seconds that the main process waits for a batch of workers; 0 for ever
        self._under_way: Any = None  # in a worker that is watched: since when it loads what, or ()

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        with _loading(self, indices):
            load = getattr(self.dataset, "__getitems__", None)
            loaded = load(indices) if load else [self.dataset[index] for index in indices]
            return loaded if self.collate is None else self.collate(loaded)

    def __getitem__(self, index: Any) -> Any:
        with _loading(self, index):
            return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":  # not there yet while a worker unpickles it
            raise AttributeError(name)
        return getattr(self.dataset, name)


@contextlib.contextmanager
def _loading(view: _SeededDataset, index: Any) -> Iterator[None]:
    """Seed torch's CPU generator, Python and numpy for a batch, and put them back afterwards; watch over a worker.

    About 20 us, most of it Python's own. A worker has its random states to itself, and puts nothing back.
    """
    indices = index if isinstance(index, (list, tuple)) and index else [index]
    seed = mix(view.seed, view.epoch.tolist()[0], indices[0])
    numpy = sys.modules.get("numpy")
    worker = get_worker_info()
    if worker is None:
        kept = torch.default_generator.get_state(), random.getstate()
        if numpy:  # exchanging the generator is 15 times cheaper than reading and writing its state
            kept_bits = numpy.random.get_bit_generator()
            numpy.random.set_bit_generator(_bits_of_loading(numpy))
    elif view._patience:
        if view._under_way is None:
            threading.Thread(target=_watch, args=[view], daemon=True).start()
        view._under_way = time.monotonic(), indices
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if numpy:
        numpy.random.seed(seed % 2**32)
    try:
        yield
    except Exception as error:
        error.add_note(f"while loading {_name(indices)}")
        raise
    finally:
        view._under_way = view._under_way and ()  # None stays None: nobody watches yet
        if worker is None:
            torch.default_generator.set_state(kept[0])
            random.setstate(kept[1])
            if numpy:
                numpy.random.set_bit_generator(kept_bits)


@functools.cache
def _bits_of_loading(numpy: Any) -> Any:
    return numpy.random.MT19937()


def _watch(view: _SeededDataset) -> None:
    """Have this worker write where it is, shortly before the main process gives up waiting for its batch.

    A thread of Python's, because `faulthandler.dump_traceback_later` blocks for ever in a process that
    was forked from one where it is armed. It cannot speak while code in C holds the interpreter.
    """
    while True:
        time.sleep(view._patience / 10)
        under_way = view._under_way
        if under_way and time.monotonic() - under_way[0] > 0.8 * view._patience:
            view._under_way = ()  # said once a batch
            print(f"still loading {_name(under_way[1])}; trainer.loader_timeout is near:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr)  # an error, and the end of this, where stderr is no file


def _name(indices: Sequence[Any]) -> str:
    shown = ", ".join(map(repr, indices[:8])) + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")
    return f"samples [{shown}]" + (f" (loading worker {worker.id})" if (worker := get_worker_info()) else "")


def _collated_already(batch: Any) -> Any:
    return batch


class _FromCursor:
    """Any iterable begun at the cursor: indices that lie before it are drawn and not loaded, batches are dropped."""

    def __init__(self, iterable: Iterable[Any], cursor: Cursor) -> None:
        self.iterable = iterable
        self.cursor = cursor

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.iterable), self.cursor.position, None)

    def __len__(self) -> int:
        return len(self.iterable)  # type: ignore[arg-type]  # TypeError is the answer "unknown"


# Batches ------------------------------------------------------------------------------


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with every tensor in it on a device.

    Goes through dictionaries, lists, tuples, named tuples and dataclasses, and calls the
    `.to` of whatever has one; leaves the rest alone.
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


def count_samples(batch: Any) -> int:
    """Return how many samples a batch holds: the first dimension of the first tensor in it.

    A batch without a tensor counts its items, an object that has none counts as one.
    """
    if isinstance(batch, (list, tuple)):
        if batch and isinstance(batch[0], torch.Tensor) and batch[0].ndim:  # the commonest, in one call
            return batch[0].shape[0]
        values: Iterable[Any] = batch
    elif isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.ndim else 1
    elif isinstance(batch, Mapping):
        values = batch.values()
    elif dataclasses.is_dataclass(batch):
        values = vars(batch).values()
    else:
        return 1
    first = next(iter(values), None)
    if isinstance(first, (torch.Tensor, list, tuple, Mapping)) or dataclasses.is_dataclass(first):
        return count_samples(first)
    return len(batch) if isinstance(batch, (list, tuple)) else 1
