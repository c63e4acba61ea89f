"""The run's private loaders: they leave the user's objects unchanged, start at a place, and seed their own RNG."""

from __future__ import annotations

import collections
import copy
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from hookline.counters import Cursor
from hookline.data.cursor import mix
from hookline.data.sampling import Agree, Batches, Sharded, arguments_of, is_shared, length
from hookline.data.seeding import InitWorker, SeededDataset, seeded

log = logging.getLogger("hookline.data")
SKIPPING = (
    "the training loader is a stream: its first %d batches are loaded and dropped to come to where the run was cut. "
    "This is exact if the stream gives the same each time"
)
STATEFUL = (
    "the training loader is a stream, and goes on from its own state. This is exact if that holds all: the buffers of "
    "shuffled streams of Hugging Face are not in it, so let a DataLoader of torch, which has no state, batch these"
)


STILL = {type(iter([])), type(iter(())), type(iter({}.values())), itertools.repeat}
"""Iterators of Python's own over what is there already: no code of anybody runs in them, so nothing is drawn."""


class RunLoader:
    """A private loader for one stage of one run; the user's loader does not change.

    Other attributes come from the user's loader. `given` gets the last batches with their numbers of samples, if the
    loader knows them.

    Args:
        loader: the user's.
        cursor: the place to start, and the epoch.
        share: this rank's share of the data.
        shares: the number of shares.
        sampler: the sampler class that the module got for this loader.
        patience: seconds to wait for a batch of loading workers, 0 for ever; the loader's own `timeout` wins.
        agree: see `Batches`.
        given: gets batches and their numbers of samples.
        say: gets warnings about the loader.
        name: the name of the loader, for messages.
        fetch: see the verb `fetch_batches`; a batch is `given`, and counts, when it comes out of it.
    """

    def __init__(
        self,
        loader: Any,
        cursor: Cursor,
        share: int = 0,
        shares: int = 1,
        sampler: type | None = None,
        patience: float = 0,
        agree: Agree = list,  # type: ignore[assignment]
        given: collections.deque[Any] | None = None,
        say: Callable[[str], None] = log.warning,
        name: str = "loader",
        fetch: Callable[[Iterator[Any]], Iterator[Any]] = iter,
    ) -> None:
        own = isinstance(loader, Sharded)
        self.loader, self.cursor, self.share = loader.loader if own else loader, cursor, share
        loader = self.loader
        self.given = collections.deque(maxlen=1) if given is None else given
        self._say, self._name, self._fetch = say, name, fetch
        self.states: collections.deque[tuple[int, Any]] | None = None
        """States of a stateful loader after each of the last batches; only if a plugin saves."""
        self._private: DataLoader[Any] | None = None
        self._generator = torch.Generator() if getattr(loader, "generator", None) is None else None
        self._view: SeededDataset | None = None
        self._batches: Batches | None = None
        cursor.begin_loader(length(getattr(loader, "dataset", None)))
        if is_indexed(loader):
            self._batches = Batches(loader, cursor, share, shares, agree, sampler, own)
            self._index(loader, self._batches, patience)
            return
        if shares > 1 and not own and not is_shared(loader, share, shares):
            raise ValueError(refusal(loader))
        if type(loader) is DataLoader:
            self._stream(loader, patience)

    def _index(self, loader: DataLoader[Any], batches: Batches, patience: float) -> None:
        arguments = self._arguments(loader, patience)
        batched, timeout = loader.batch_sampler is not None, arguments["timeout"]
        view = self._view = SeededDataset(loader.dataset, loader.collate_fn, batched, self.cursor.seed, timeout)
        if loader.num_workers:
            view.epoch.share_memory_()  # type: ignore[no-untyped-call]
        arguments["collate_fn"] = tuple  # leaves the pair of a number and a collated batch as it is
        arguments["worker_init_fn"] = InitWorker(loader.worker_init_fn)
        arguments |= {"batch_sampler": batches} if batched else {"batch_size": None, "sampler": batches}
        self._private = DataLoader(view, **arguments)  # type: ignore[arg-type]

    def _stream(self, loader: DataLoader[Any], patience: float) -> None:
        arguments = self._arguments(loader, patience)
        arguments |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        arguments["collate_fn"] = Counted(loader.collate_fn, loader.batch_size is not None)
        self._private = DataLoader(loader.dataset, **arguments)

    def _arguments(self, loader: DataLoader[Any], patience: float) -> dict[str, Any]:
        arguments = arguments_of(loader, "batch_size", "drop_last")
        if loader.num_workers and not loader.timeout:
            arguments["timeout"] = patience
        self.timeout = arguments["timeout"]
        if self._generator is not None:  # else `iter(loader)` would draw from the global RNG
            arguments["generator"] = self._generator
        return arguments

    def place(self) -> None:
        """Start at the cursor, which may have moved."""
        if self._batches is not None:
            self.cursor.settle_place()

    @property
    def own_order(self) -> str:
        """The name of a sampler of the user's that may not draw the same again; else ""."""
        return "" if self._batches is None or self._batches.repeatable else self._batches.name

    @property
    def deals_batches(self) -> bool:
        """Whether ranks take whole batches in turn, not samples."""
        if self._batches is not None:
            return not self._batches.batched
        return getattr(self.loader, "batch_size", None) is None

    def __len__(self) -> int:
        # torch would remember `len` of a stream, and warn later in its own words
        known: Any = self._private if self._view is not None else self.loader
        return len(copy.copy(known) if known is self.loader and isinstance(known, DataLoader) else known)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        cursor = self.cursor
        if isinstance(self.loader, (list, tuple)):
            return itertools.islice(self.loader, cursor.position, None)
        if self._generator is not None:
            self._generator.manual_seed(mix(cursor.seed, cursor.epoch, self.share))
        if self._view is None:
            return self._streamed()
        self._view.epoch.fill_(cursor.epoch)
        return self._indexed(self._private)

    def _indexed(self, pairs: Any) -> Iterator[Any]:
        begin = place = self.cursor.position
        for samples, batch in self._fetch(iter(pairs)):
            place += 1
            self.given.append((batch, samples))
            yield batch
        self._compare(begin, place)

    def _compare(self, begin: int, end: int) -> None:
        """Warn if a loader gave more or fewer batches than its length, after a whole epoch."""
        said = length(self)
        if begin == 0 and said not in (None, end):
            self._say(f"the {self._name} says that it has {said} batches, and gave {end}; what was given counts")

    def _streamed(self) -> Iterator[Any]:
        """Yield the batches of a stream from the cursor on."""
        place = self.cursor.position
        for (samples, state), batch in self._fetch(self._stream_from(place)):
            place += 1
            if self.states is not None:
                self.states.append((place, state))
            if self._private is not None:
                self.given.append((batch, samples))
            yield batch

    def _stream_from(self, skipped: int) -> Iterator[tuple[Any, Any]]:
        """Yield each batch of a stream behind its number of samples and the state of the loader after it.

        Seeds the RNG of this process for each batch, unless nobody can draw.
        """
        cursor, place = self.cursor, 0
        load_state = getattr(self.loader, "load_state_dict", None)
        if cursor.loader_state is not None and load_state is not None:
            load_state(cursor.take_loader_state())
            place = skipped
            log.warning(STATEFUL)
        elif skipped:
            log.warning(SKIPPING, skipped)
        source: Any = self.loader if self._private is None else self._private
        seed = mix(cursor.seed, cursor.epoch, self.share)
        iterator = seeded(seed, iter, source)
        still = type(iterator) in STILL
        while True:
            try:
                batch = next(iterator) if still else seeded(mix(seed, place), next, iterator)
            except StopIteration:
                break
            place += 1
            state = None if self.states is None else self.loader.state_dict()
            if place > skipped:
                samples, batch = (None, batch) if self._private is None else batch
                yield (samples, state), batch
        self._compare(skipped, place)


class Counted:
    """Collates a batch, and adds its number of samples."""

    def __init__(self, collate: Callable[[Any], Any], batched: bool) -> None:
        self.collate, self.batched = collate, batched

    def __call__(self, samples: Any) -> tuple[int | None, Any]:
        return len(samples) if self.batched else None, self.collate(samples)


def is_indexed(loader: Any) -> bool:
    """Tell whether a loader reads a data set by index, in torch's way, so that it can start anywhere."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    own = type(loader).__iter__ is DataLoader.__iter__ and type(loader)._get_iterator is DataLoader._get_iterator
    return own or is_stateful(loader)  # a loader of torchdata, which iterates the same and can save its place


def is_stateful(loader: Any) -> bool:
    """Tell whether a loader can save and load its place."""
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))


def refusal(loader: Any) -> str:
    """Return why a loader cannot be used on several ranks."""
    return (
        f"ranks would all be given the same batches: this loader ({type(loader).__name__}) is a stream, of which "
        "nobody says which part is whose. Where each rank's gives its own part, say so by hookline.sharded(loader); "
        "hookline.shard(items, trainer.share, trainer.shares) takes one rank's part where a data set iterates. Or "
        "give a DataLoader of a map-style data set, which is shared as it is"
    )


def warn_of_order(name: str) -> None:
    """Warn that a resume in mid-epoch is not exact."""
    warnings.warn(
        f"the training loader draws its order from a sampler of its own ({name}): training works, but the "
        "order may not be a function of (seed, epoch), so after a resume in mid-epoch the rest of that "
        "epoch may come in another order, and some samples twice or not at all. Pass "
        "`sampler=sampler(dataset)` in get_train_dataloader for an exact resume, or give the sampler a "
        "set_epoch(epoch) on which alone its order depends.",
        stacklevel=2,
    )
