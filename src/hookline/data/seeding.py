"""The randomness of loading: it depends only on the seed and the place in the data."""

from __future__ import annotations

import faulthandler
import functools
import hashlib
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import get_worker_info

from hookline.data.cursor import mix

PYTHON: Any = random.seed.__self__  # type: ignore[attr-defined]  # the generator of the module's functions
WORDS: Any = super(random.Random, PYTHON)  # the same, without the calls of Python that only keep `gauss_next`


def seeded(seed: int, function: Callable[..., Any], *given: Any) -> Any:
    """Return what a function answers under a seed of torch's CPU generator, Python and numpy; restore them afterwards.

    About 20 us, mostly Python's own RNG. One call and no block, because each batch is loaded by it.
    """
    numpy: Any = sys.modules.get("numpy")
    kept = torch.default_generator.get_state(), WORDS.getstate(), PYTHON.gauss_next
    if numpy:  # swapping the generator is 15 times cheaper than saving and restoring its state
        bits = numpy.random.get_bit_generator()
        numpy.random.set_bit_generator(_bits_of_loading(numpy))
        numpy.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    WORDS.seed(seed)
    PYTHON.gauss_next = None
    try:
        return function(*given)
    finally:
        torch.default_generator.set_state(kept[0])
        WORDS.setstate(kept[1])
        PYTHON.gauss_next = kept[2]
        if numpy:
            numpy.random.set_bit_generator(bits)


@functools.cache
def _bits_of_loading(numpy: Any) -> Any:
    return numpy.random.MT19937()


class States:
    """RNG states that start from a seed and continue where they stopped; about 100 us each time."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._left: tuple[Any, Any, Any] | None = None

    def under_way(self, function: Callable[..., Any], *given: Any) -> Any:
        """Return what a function answers with torch's CPU generator, Python and numpy in these states."""
        return seeded(self.seed, self._go_on, function, *given)

    def _go_on(self, function: Callable[..., Any], *given: Any) -> Any:
        numpy = sys.modules.get("numpy")
        if self._left is not None:
            torch.default_generator.set_state(self._left[0])
            random.setstate(self._left[1])
            if numpy and self._left[2] is not None:
                numpy.random.set_state(self._left[2])
        answer = function(*given)
        bits = numpy.random.get_state() if numpy else None
        self._left = torch.default_generator.get_state(), random.getstate(), bits
        return answer


class SeededDataset:
    """A map-style data set for the run's private loader: it loads and collates each batch under its own seed.

    Only the private loader uses it: in workers too the user's code finds its own data set. An index comes with the
    place of its batch in the epoch; a batch leaves with its number of samples, None if unknown. An exception names the
    samples that were loading, and a late worker prints where it is.
    """

    def __init__(
        self, dataset: Any, collate: Callable[[Any], Any] | None, batched: bool, seed: int, patience: float
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.batched = batched  # whether an index is that of a batch to collate
        self.seed = seed
        self.epoch = torch.zeros(1, dtype=torch.int64)  # shared with workers, which may outlive an epoch
        self._patience = patience  # seconds that the main process waits for a worker's batch; 0 for ever
        self._under_way: Any = None  # in a watched worker: start time and indices of the current load, or ()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, placed: tuple[int, Any]) -> tuple[int | None, Any]:
        place, index = placed
        indices = index if isinstance(index, (list, tuple)) and index else [index]
        if self._patience and get_worker_info() is not None:
            if self._under_way is None:
                threading.Thread(target=_watch, args=[self], daemon=True).start()
            self._under_way = time.monotonic(), indices
        try:
            batch = seeded(mix(self.seed, self.epoch.tolist()[0], place), self._load, index)
            return (len(index) if isinstance(index, list) else None), batch
        except StopIteration as error:
            raise ValueError(  # a RuntimeError would look like Python's own
                f"the data set raised StopIteration while loading {_name(indices)}; it would end the epoch in silence"
            ) from error
        except Exception as error:
            error.add_note(f"while loading {_name(indices)}")
            raise
        finally:
            self._under_way = self._under_way and ()  # None stays None: no watcher yet

    __getitems__ = __getitem__  # by this name torch asks for a batch

    def _load(self, index: Any) -> Any:
        if not self.batched:
            return self.dataset[index]
        load = getattr(self.dataset, "__getitems__", None)
        loaded = load(index) if load else [self.dataset[one] for one in index]
        return loaded if self.collate is None else self.collate(loaded)


def mark_of(dataset: Any, seed: int) -> str | None:
    """Return a hash of a data set's first and last sample; None if it has none or they are not plain data."""
    try:
        return seeded(seed, lambda: _hash([dataset[0], dataset[len(dataset) - 1]]))  # type: ignore[no-any-return]
    except Exception:  # of any kind: it does not give samples by index
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
    """Starts a loading worker with the user's own data set, as in a loader of the user's."""

    def __init__(self, begin: Callable[[int], Any] | None) -> None:
        self.begin = begin

    def __call__(self, worker: int) -> None:
        info: Any = get_worker_info()
        object.__setattr__(info, "dataset", info.dataset.dataset)  # WorkerInfo is frozen
        if self.begin is not None:
            self.begin(worker)


def _watch(view: SeededDataset) -> None:
    """Let this worker print its traceback shortly before the main process stops waiting for its batch.

    A Python thread, because `faulthandler.dump_traceback_later` blocks for ever in a process that was forked from one
    where it is armed. The thread cannot run while C code holds the interpreter.
    """
    while True:
        time.sleep(view._patience / 10)
        under_way = view._under_way
        if under_way and time.monotonic() - under_way[0] > 0.8 * view._patience:
            view._under_way = ()  # print once per batch
            print(f"still loading {_name(under_way[1])}; trainer.loader_timeout is near:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr)  # raises, and ends this thread, if stderr is not a file


def _name(indices: Sequence[Any]) -> str:
    shown = ", ".join(map(repr, indices[:8])) + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")
    return f"samples [{shown}]" + (f" (loading worker {worker.id})" if (worker := get_worker_info()) else "")
