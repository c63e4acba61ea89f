"""Loaders: datasets, samplers and collate functions of the user's, drawn by the sampler of the run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from hookline import kept_rng, set_seed


class Chain:
    """Calls one collate function after the other."""

    def __init__(self, functions: Sequence[Callable[[Any], Any]]) -> None:
        self.functions = functions

    def __call__(self, batch: Any) -> Any:
        for function in self.functions:
            batch = function(batch)
        return batch


def collate_of(given: Any) -> Callable[[Any], Any] | None:
    """Return one function for what is given, one or a list of several.

    Raises:
        TypeError: one that cannot be called.
    """
    functions = list(given) if isinstance(given, (list, tuple)) else [given]
    for function in functions if given is not None else ():
        if not callable(function):
            raise TypeError(f"collate_fn: {function!r} is no function of a list of samples")
    return None if given is None else Chain(functions) if len(functions) > 1 else functions[0]


def check_dataset(name: str, dataset: Any) -> None:
    """Refuse what is no dataset, or an empty one.

    Raises:
        TypeError, ValueError: what it is.
    """
    kind = type(dataset).__name__
    if isinstance(dataset, DataLoader):
        method = {"train_dataset": "get_train_dataloader", "val_dataset": "get_validation_dataloader"}[name]
        raise TypeError(
            f"{name} is a {kind}: give the dataset itself, or return the loader from the module's {method}()"
        )
    if isinstance(dataset, (dict, str)) or not (
        isinstance(dataset, IterableDataset) or (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"))
    ):
        raise TypeError(
            f"{name} is a {kind}, and no dataset: it needs __getitem__ and __len__, or is an IterableDataset"
        )
    if not isinstance(dataset, IterableDataset) and not len(dataset):
        raise ValueError(f"{name} is empty")


def loader(
    dataset: Any,
    batch_size: int,
    sampler: type[torch.utils.data.Sampler[Any]],
    shuffle: bool,
    samplers: Sequence[Any] = (),
    **options: Any,
) -> DataLoader[Any]:
    """Return the loader of a dataset: in its order, shuffled by the run, or drawn by samplers of the user's.

    Raises:
        TypeError: samplers for a dataset that is iterated.
    """
    if isinstance(dataset, IterableDataset):
        if samplers:
            raise TypeError("sampler has nothing to draw from an IterableDataset, which gives samples by itself")
        return DataLoader(dataset, batch_size, **options)
    if samplers:
        drawn: Any = drawn_by(sampler, samplers)(dataset)
    else:
        drawn = type(sampler.__name__, (sampler,), {"shuffle": shuffle})(dataset)
    return DataLoader(dataset, batch_size, sampler=drawn, **options)


def drawn_by(sampler: Any, given: Sequence[Any]) -> Any:
    """Return a sampler class that draws what samplers of the user's give, one after the other.

    What they draw at random is a function of the run's seed and the epoch, so that a resumed run draws the same; ranks
    take shares of it.
    """

    class Drawn(sampler):  # type: ignore[misc]
        shuffle = False

        def __init__(self, data_source: Any) -> None:
            made = [isinstance(one, type) or (callable(one) and not hasattr(one, "__iter__")) for one in given]
            self.samplers = [one(data_source) if make else one for one, make in zip(given, made, strict=True)]
            for one in self.samplers:
                if not hasattr(one, "__iter__") or not hasattr(one, "__len__"):
                    raise TypeError(f"sampler: {one!r} must give indices and have a length, or be made of the dataset")
            super().__init__(range(sum(map(len, self.samplers))))

        def __iter__(self) -> Iterator[int]:
            order: list[int] = []
            with kept_rng():
                set_seed(hash((self.cursor.seed, self.cursor.epoch)) % 2**63)
                for one in self.samplers:
                    if hasattr(one, "set_epoch"):
                        one.set_epoch(self.cursor.epoch)
                    generator = getattr(one, "generator", None)
                    if isinstance(generator, torch.Generator):
                        generator.manual_seed(random.getrandbits(63))
                    order += one
            if order and not isinstance(order[0], (int, torch.Tensor)):
                raise TypeError(
                    f"sampler: it gives {order[0]!r}; samplers give single indices, a batch is made of them"
                )
            for place in super().__iter__():
                yield int(order[place])

    return Drawn
