"""Load batches before they are needed, and move them to the device while the step before runs."""

from __future__ import annotations

import collections
import contextlib
import copy
import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from hookline import CallbackInterface, Stage, hookimpl, hookspecs

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"


@dataclass(eq=False)
class Prefetch(CallbackInterface):
    """Load batches ahead, and move them to the device while the step before runs.

    A `DataLoader` without workers gets one. On CUDA its batches are pinned, and copied on a stream of their own.
    """

    batches: int = 2
    """How many batches are loaded, and are on the device, before they are needed."""

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ValueError(
                f"prefetch.batches={self.batches} must be at least 1; `plugins.prefetch: null` turns it off"
            )
        self._begin()

    def _begin(self) -> None:
        self._lanes: dict[Stage, Lane] = {}
        self._served: dict[tuple[Stage, str], tuple[Any, Any]] = {}  # the user's loader, and what is iterated for it
        self._open: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()
        self._stream: torch.cuda.Stream | None = None

    @hookimpl
    def on_begin_run(self, trainer: Trainer) -> None:
        self._begin()
        if trainer.device.type == "cuda":
            self._stream = torch.cuda.Stream(trainer.device)  # type: ignore[no-untyped-call]

    @hookimpl
    def on_end_run(self) -> None:
        for one in [*self._open]:  # else the traceback of an error would keep its worker
            one.close()
        self._begin()

    # Loading --------------------------------------------------------------------------

    @hookimpl
    def setup_loader(self, trainer: Trainer, loader: Any, stage: Stage, key: str) -> Any:
        given, served = self._served.get((stage, key), (None, None))
        if given is not loader:
            served = with_worker(loader, self.batches, trainer.device.type == "cuda")
            self._served[stage, key] = loader, served
        return hookspecs.setup_loader(trainer=trainer, loader=served, stage=stage, key=key)

    @hookimpl(wrapper=True)
    def fetch_batches(self, trainer: Trainer, stage: Stage) -> Generator[None, Any, Iterator[tuple[Any, Any]]]:
        fetched = yield
        lane = self._lanes[stage] = Lane(trainer, stage, self.batches, self._stream)
        made = ahead(fetched, self.batches, lane)
        self._open.add(made)
        return made

    # Moving ---------------------------------------------------------------------------

    @hookimpl
    def prepare_batch(self, trainer: Trainer, batch: Any, stage: Stage) -> Any:
        lane = self._lanes.get(stage)
        if lane is None or not lane.has(batch):  # a part of a batch, or one that another plugin has made
            return hookspecs.prepare_batch(trainer=trainer, batch=batch, stage=stage)
        return lane.take(batch)


def with_worker(loader: Any, batches: int, pin: bool) -> Any:
    """Return a loader that loads in another process, and a copy of the user's where that is changed.

    A thread would not do: loading seeds the random numbers of the process for each batch, from which training draws at
    the same time.
    """
    if type(loader) is not DataLoader:
        return loader
    streams = isinstance(loader.dataset, IterableDataset)  # of which a worker would draw other random numbers
    if (loader.num_workers or streams) and (loader.pin_memory or not pin):
        return loader
    other = copy.copy(loader)
    other.pin_memory = loader.pin_memory or pin
    if not (loader.num_workers or streams):
        other.num_workers, other.prefetch_factor = 1, batches
    return other


def ahead(fetched: Iterator[tuple[Any, Any]], batches: int, lane: Lane) -> Generator[tuple[Any, Any], None, None]:
    """Yield pairs of a loader, with as many more loaded; an error of the loader comes where its batch would."""
    waiting: collections.deque[tuple[Any, Any]] = collections.deque()
    error: Exception | None = None
    while True:
        while len(waiting) <= batches:
            try:
                waiting.append(next(fetched))
            except StopIteration:
                break
            except Exception as raised:
                error, fetched = raised, iter(())
                break
            lane.add(waiting[-1][1])
        if not waiting:
            break
        yield waiting.popleft()
    if error is not None:
        raise error


class Lane:
    """Moves the batches of a loader to the device in their order, a few before they are needed.

    Args:
        trainer: whose device it is.
        stage: of the loader.
        batches: how many are on the device before they are needed.
        stream: of CUDA, for the copies; None where the device has none.
    """

    def __init__(self, trainer: Trainer, stage: Stage, batches: int, stream: torch.cuda.Stream | None) -> None:
        self.trainer, self.stage, self.batches, self.stream = trainer, stage, batches, stream
        known = batches + 1 + (trainer.window_size if stage is Stage.TRAIN else 0)
        # Bounded, since who passes over batches never takes them.
        self.known: collections.deque[list[Any]] = collections.deque(maxlen=known)
        """A row for each batch that is to come: the batch, whether it is moved, as what, and when it is there."""

    def add(self, batch: Any) -> None:
        """Take a batch that was loaded behind the others."""
        self.known.append([batch, False, None, None])
        self._move()

    def has(self, batch: Any) -> bool:
        """Tell whether a batch is one of those to come."""
        return any(row[0] is batch for row in self.known)

    def take(self, batch: Any) -> Any:
        """Return a batch on the device, and move the next one; those before it are dropped."""
        while self.known[0][0] is not batch:
            self.known.popleft()
        if not self.known[0][1]:
            self._copy(self.known[0])
        _, _, moved, there = self.known.popleft()
        if there is not None:
            torch.cuda.current_stream(self.trainer.device).wait_event(there)
        self._move()
        return moved

    def _move(self) -> None:
        for row in list(self.known)[: self.batches]:
            if not row[1]:
                self._copy(row)

    def _copy(self, row: list[Any]) -> None:
        """Copy a batch to the device.

        The copy begins behind all that was asked of the device so far. So it may lie where a tensor lay that nobody
        holds any more, though steps that are still under way read that.
        """
        stream, device = self.stream, self.trainer.device
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            moved = hookspecs.prepare_batch(trainer=self.trainer, batch=row[0], stage=self.stage)
        row[1:] = True, moved, None if stream is None else stream.record_event()
