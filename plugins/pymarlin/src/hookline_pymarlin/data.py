"""Data before training: processors, and who hands out data sets."""

from __future__ import annotations

import itertools
import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class DistributedPreprocessArguments:
    """Which machine this is among those that share the work of `multi_process_data`."""

    local_rank: int = 0
    global_rank: int = 0
    world_size: int = 1
    node_count: int = 1
    """Machines."""
    local_size: int = 1
    """Processes on each."""
    node_rank: int | None = None
    """This machine; None for `global_rank // local_size`."""


class DataProcessor(ABC):
    """Makes one part of the data ready.

    Args:
        distrib_args: where several machines share the work of `multi_process_data`; else it is all done here.
    """

    distrib_args: DistributedPreprocessArguments | None = None

    def __init__(self, distrib_args: DistributedPreprocessArguments | None = None) -> None:
        self.distrib_args = distrib_args

    @abstractmethod
    def process(self, *args: Any) -> Any:
        """Do it; return what the caller needs."""

    def analyze(self) -> Any:
        """Look at what was made."""

    def process_data(self, *args: Any) -> Any:
        """Call `process` with the arguments, then `analyze`; return what `process` returns."""
        done = self.process(*args)
        self.analyze()
        return done

    def multi_process_data(self, *args: Any, process_count: int = 1) -> list[Any]:
        """Call `process` in several processes, once for each item of the lists among the arguments; then `analyze`.

        Lists of several items go through in parallel; a list of one item, and what is no list, is the same for all
        calls. With `distrib_args`, this machine takes its part of the items.

        Args:
            args: of `process`; at least one is a list.
            process_count: how many processes.

        Returns:
            What the calls return, in order: lists, data sets and the like one behind the other, item by item.

        Raises:
            ValueError: no list, or lists of different lengths.
        """
        with multiprocessing.Pool(process_count) as pool:
            done = pool.starmap(self.process, self._calls(args))
        if any(map(holds_something, done)):
            done = list(itertools.chain.from_iterable(done))
        self.analyze()
        return done

    def _calls(self, args: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Return the arguments of each call."""
        lists = [arg for arg in args if isinstance(arg, list)]
        if not lists:
            raise ValueError(f"{type(self).__name__}.multi_process_data needs a list among its arguments: its items")
        lengths = {len(arg) for arg in lists if len(arg) != 1} or {1}
        if len(lengths) > 1:
            raise ValueError(
                f"{type(self).__name__}.multi_process_data got lists of {sorted(lengths)} items; the items of the "
                "longer ones would be lost: give lists of one length"
            )
        (length,) = lengths
        columns = [arg if isinstance(arg, list) and len(arg) == length else self._alike(arg, length) for arg in args]
        return list(zip(*map(self._of_this_machine, columns), strict=True))

    @staticmethod
    def _alike(arg: Any, length: int) -> list[Any]:
        return length * (arg if isinstance(arg, list) else [arg])

    def _of_this_machine(self, items: list[Any]) -> list[Any]:
        """Return the items that this machine takes: a block of each round of blocks over the machines."""
        machines = self.distrib_args or DistributedPreprocessArguments()
        rank = machines.node_rank
        if rank is None:
            rank = machines.global_rank // machines.local_size
        size = max(len(items) // machines.node_count, 1)
        starts = range(rank * size, len(items), size * machines.node_count)
        return [item for start in starts for item in items[start : start + size]]


class DataInterface:
    """Hands out data sets."""

    def setup_datasets(self, *args: Any, **kwargs: Any) -> None:
        """Make the data sets ready, before training; you call it."""

    def get_train_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """Return the data to train on."""
        raise NotImplementedError(f"{type(self).__name__} has no get_train_dataset")

    def get_val_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """Return the data to validate on."""
        raise NotImplementedError(f"{type(self).__name__} has no get_val_dataset")

    def process_data(self, data_processor: DataProcessor, *args: Any) -> Any:
        """Return `data_processor.process_data(*args)`, as PyMarlin's first versions have it."""
        return data_processor.process_data(*args)

    def multi_process_data(self, data_processor: DataProcessor, *args: Any, process_count: int = 1) -> list[Any]:
        """Return `data_processor.multi_process_data(…)`, as PyMarlin's first versions have it."""
        return data_processor.multi_process_data(*args, process_count=process_count)


def holds_something(done: Any) -> bool:
    """Tell whether a result has items, or is something else than nothing."""
    return bool(len(done)) if hasattr(done, "__len__") else bool(done)
