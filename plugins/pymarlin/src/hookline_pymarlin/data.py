"""Data before training: processors, and who hands out data sets."""

from __future__ import annotations

import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any


class DataProcessor(ABC):
    """Makes one part of the data ready."""

    @abstractmethod
    def process(self) -> Any:
        """Do it; return what `analyze` or the caller needs."""

    def analyze(self) -> None:
        """Look at what was made."""


class DataInterface:
    """Hands out data sets, made ready by processors."""

    def get_train_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """Return the data to train on."""
        raise NotImplementedError(f"{type(self).__name__} has no get_train_dataset")

    def get_val_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """Return the data to validate on."""
        raise NotImplementedError(f"{type(self).__name__} has no get_val_dataset")

    def process_data(self, *processors: DataProcessor) -> list[Any]:
        """Have processors work one after the other, each looked at when it is done; return what they return."""
        done = []
        for processor in processors:
            done.append(processor.process())
            processor.analyze()
        return done

    def multi_process_data(self, processors: Sequence[DataProcessor], process_count: int | None = None) -> list[Any]:
        """Have processors do their work in processes; return what they return, in their order.

        Args:
            processors: each is pickled into a process; `analyze` is called here, on the object that was given.
            process_count: as many as the machine has cores unless given.
        """
        with multiprocessing.get_context("spawn").Pool(process_count) as pool:
            done = pool.map(_process, processors)
        for processor in processors:
            processor.analyze()
        return done


def _process(processor: DataProcessor) -> Any:
    return processor.process()
