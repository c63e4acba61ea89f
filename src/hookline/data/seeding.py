"""What loading draws at random: a function of the seed and of the place in the data, and of nothing else."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import hashlib
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import get_worker_info

from hookline.data.cursor import mix


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator, Python and numpy for a while, and put them back afterwards.

    About 20 us, most of it Python's own. A worker has its random states to itself, and puts nothing back.
    """
    numpy = sys.modules.get("numpy")
    alone = get_worker_info() is None
    if alone:
        kept = torch.default_generator.get_state(), random.getstate()
        if numpy:  # exchanging the generator is 15 times cheaper than reading and writing its state
            kept_bits = numpy.random.get_bit_generator()
            numpy.random.set_bit_generator(_bits_of_loading(numpy))
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if numpy:
        numpy.random.seed(seed % 2**32)
    try:
        yield
    finally:
        if alone:
            torch.default_generator.set_state(kept[0])
            random.setstate(kept[1])
            if numpy:
                numpy.random.set_bit_generator(kept_bits)


@functools.cache
def _bits_of_loading(numpy: Any) -> Any:
    return numpy.random.MT19937()


class States:
    """Random states that begin with a seed, and go on where they were left; about 100 us each time."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._left: tuple[Any, Any, Any] | None = None

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """Have torch's CPU generator, Python and numpy be in them for a while."""
        with seeded(self.seed):
            numpy = sys.modules.get("numpy")
            if self._left is not None:
                torch.default_generator.set_state(self._left[0])
                random.setstate(self._left[1])
                if numpy and self._left[2] is not None:
                    numpy.random.set_state(self._left[2])
            yield
            bits = numpy.random.get_state() if numpy else None
            self._left = torch.default_generator.get_state(), random.getstate(), bits


class SeededDataset:
    """A map-style data set as the run's own loader sees it: loads and collates each batch under a seed of its own.

    Nobody else meets it: in workers too the user's code finds the data set itself. An index comes with the place of
    its batch in the epoch, and a batch goes with its number of samples, None where nobody has said. An error says
    which samples were loaded, and a worker that is late with a batch says where it is.
    """

    def __init__(self, dataset: Any, collate: Callable[[Any], Any] | None, seed: int, patience: float) -> None:
        self.dataset = dataset
        self.collate = collate
        self.seed = seed
        self.epoch = torch.zeros(1, dtype=torch.int64)  # shared with workers, who may outlive an epoch
        self._patience = patience  # seconds that the main process waits for a batch of workers; 0 for ever
        self._under_way: Any = None  # in a worker that is watched: since when it loads what, or ()

    def __getitems__(self, placed: tuple[int, Sequence[Any]]) -> tuple[int | None, Any]:
        place, indices = placed
        with self._loading(place, indices):
            load = getattr(self.dataset, "__getitems__", None)
            loaded = load(indices) if load else [self.dataset[index] for index in indices]
            return len(indices), loaded if self.collate is None else self.collate(loaded)

    def __getitem__(self, placed: tuple[int, Any]) -> tuple[int | None, Any]:
        place, index = placed
        with self._loading(place, index):
            return (len(index) if isinstance(index, list) else None), self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)

    @contextlib.contextmanager
    def _loading(self, place: int, index: Any) -> Iterator[None]:
        indices = index if isinstance(index, (list, tuple)) and index else [index]
        if self._patience and get_worker_info() is not None:
            if self._under_way is None:
                threading.Thread(target=_watch, args=[self], daemon=True).start()
            self._under_way = time.monotonic(), indices
        try:
            with seeded(mix(self.seed, self.epoch.tolist()[0], place)):
                yield
        except StopIteration as error:
            raise ValueError(  # a RuntimeError would be taken for Python's own
                f"the data set raised StopIteration while loading {_name(indices)}; it would end the epoch in silence"
            ) from error
        except Exception as error:
            error.add_note(f"while loading {_name(indices)}")
            raise
        finally:
            self._under_way = self._under_way and ()  # None stays None: nobody watches yet


def mark_of(dataset: Any, seed: int) -> str | None:
    """Return a mark of a data set's first and last sample, None where it has none or they are not plain data."""
    try:
        with seeded(seed):
            return _hash([dataset[0], dataset[len(dataset) - 1]])
    except Exception:  # of whichever kind: it is no data set of samples by their number
        return None


def _hash(value: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)

    def feed(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            feed(part.detach().cpu().numpy())
        elif hasattr(part, "tobytes"):  # an array, or an image
            digest.update(part.tobytes())
        elif isinstance(part, Mapping):
            for key, inner in part.items():
                feed(key)
                feed(inner)
        elif isinstance(part, (list, tuple)):
            for inner in part:
                feed(inner)
        elif isinstance(part, (str, int, float, bytes, type(None))):
            digest.update(repr(part).encode())
        else:
            raise TypeError(type(part).__name__)

    feed(value)
    return digest.hexdigest()


class InitWorker:
    """Begins a loading worker: it finds the user's own data set, as in a loader of the user's."""

    def __init__(self, begin: Callable[[int], Any] | None) -> None:
        self.begin = begin

    def __call__(self, worker: int) -> None:
        info: Any = get_worker_info()
        object.__setattr__(info, "dataset", info.dataset.dataset)  # frozen, for whom it is made
        if self.begin is not None:
            self.begin(worker)


def _watch(view: SeededDataset) -> None:
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
