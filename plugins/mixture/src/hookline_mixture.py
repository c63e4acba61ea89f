"""Train on several data sets at once."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from hookline import CallbackInterface, hookimpl, nearest

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

KINDS = ("mixed", "one", "each")
UNTIL = ("longest", "shortest")
TAKEN = (
    "drop_last", "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
    "prefetch_factor", "persistent_workers",
)  # fmt: skip
"""Arguments of the first loader that the joined one has too."""


@dataclass(eq=False)
class Mixture(CallbackInterface):
    """Train on several data sets at once, which `get_train_dataloader` returns by key.

    One order for all ranks, a function of (seed, epoch), of which each rank takes its share.
    """

    batches: str = "mixed"
    """What is in a batch: samples of all sources (mixed), of one source (one), or a batch of each source (each)."""
    weights: dict[str, float] = field(default_factory=dict)
    """How much of each source; none: as much as it has, with `each` as many samples of all."""
    until: str = "longest"
    """When an epoch ends: when the longest source is through (shorter ones are repeated), or the shortest."""

    def __post_init__(self) -> None:
        for name, words in (("batches", KINDS), ("until", UNTIL)):
            word = getattr(self, name)
            if word not in words:
                raise ValueError(f"mixture.{name}={word!r} must be one of {', '.join(words)}{nearest(word, words)}")
        for key, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"mixture.weights.{key}={weight} must be above 0; leave a source out in the module")
            if self.batches == "each" and weight != int(weight):
                raise ValueError(
                    f"mixture.weights.{key}={weight}: with batches=each it is how many times as many samples a batch "
                    "of this source has, a whole number"
                )

    @hookimpl
    def on_setup(self) -> None:
        """Begin anew: an object may have been another trainer's before."""
        self._mixed: list[Any] = []  # what the order depends on, besides (seed, epoch)
        self._before: list[Any] = []  # that of the epoch under way

    @hookimpl
    def on_begin_train(self, trainer: Trainer) -> None:
        if not self._mixed:
            trainer.say_once(
                "mixture does nothing: get_train_dataloader returned one loader. Return several by key, "
                '{"first": …, "second": …}'
            )

    @hookimpl
    def join_loaders(self, trainer: Trainer, loaders: Mapping[str, Any], sampler: Any) -> Any:
        parts = {key: part_of(key, loader, trainer.micro_batch_size, sampler) for key, loader in loaders.items()}
        collate = Collate(self.batches, {key: collate for key, (_, collate) in parts.items()})
        sources = Sources([dataset for dataset, _ in parts.values()])
        size = trainer.micro_batch_size * trainer.shares
        lengths = {key: len(dataset) for key, (dataset, _) in parts.items()}
        draws = self.draws(lengths, size)
        self._compare(trainer, [self.batches, list(lengths.items()), list(draws.items()), size])

        class Mixed(sampler):  # type: ignore[misc]
            def __init__(self, data_source: Any, kind: str) -> None:
                super().__init__(data_source)
                self.kind, total = kind, sum(draws.values())
                self.length = total // sum(multiples) if kind == "each" else total

            def order(self) -> torch.Tensor:
                generator = self.generator() if self.shuffle else None
                return order(self.kind, [*lengths.values()], [*draws.values()], multiples, size, generator)

        multiples = [int(self.weights.get(key, 1)) for key in lengths]
        first = next((loader for loader in loaders.values() if isinstance(loader, DataLoader)), None)
        taken = {} if first is None else {name: getattr(first, name) for name in TAKEN}
        drawn = Mixed(sources, self.batches)
        return DataLoader(sources, trainer.micro_batch_size, sampler=drawn, collate_fn=collate, **taken)

    def draws(self, lengths: Mapping[str, int], size: int) -> dict[str, int]:
        """Return how many samples of each source an epoch has; with `one` they fill batches of all ranks together.

        Raises:
            ValueError: weights and sources do not fit, or one gives nothing.
        """
        if self.weights and self.weights.keys() != lengths.keys():
            raise ValueError(
                f"mixture.weights has {list(self.weights)}, and get_train_dataloader returned {list(lengths)}: give a "
                "weight to each of them"
            )
        each, longest = self.batches == "each", self.until == "longest"
        weights = self.weights or ({**dict.fromkeys(lengths, 1)} if each else dict(lengths))
        turns = {key: length / weights[key] for key, length in lengths.items() if length}
        if len(turns) < len(lengths):
            raise ValueError(f"mixture: a source is empty; get_train_dataloader returned {dict(lengths)} samples")
        epoch = max(turns.values()) if longest else min(turns.values())
        if each:
            rows = math.ceil(epoch) if longest else int(epoch)
            draws = {key: rows * int(weight) for key, weight in weights.items()}
        else:
            draws = {key: round(epoch * weight) for key, weight in weights.items()}
        if self.batches == "one":
            draws = {key: (-(-n // size) if longest else n // size) * size for key, n in draws.items()}
        for key, number in draws.items():
            if not number:
                raise ValueError(
                    f"mixture: nothing of {key!r} ({lengths[key]} samples) would be in an epoch with "
                    f"batches={self.batches}, until={self.until} and {size} samples to a batch of all ranks: take "
                    "until=longest, or other weights"
                )
        return draws

    # State ----------------------------------------------------------------------------

    def _compare(self, trainer: Trainer, mixed: list[Any]) -> None:
        """Tell a resume that cannot be exact."""
        self._mixed = data_of(mixed)
        if trainer.position and self._before != self._mixed:
            trainer.say_once(
                "mixture mixes otherwise than before the resume (other sources, weights or batch size): in the rest of "
                "this epoch some samples may come twice or not at all"
            )
        self._before = self._mixed

    def get_state(self) -> dict[str, Any]:
        """Return what the order of this epoch depends on."""
        return {"mixed": self._mixed}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take it back, to compare it."""
        self._before = data_of(state["mixed"])


def data_of(value: Any) -> Any:
    """Return data with lists in the place of tuples, as a checkpoint has them."""
    return [data_of(part) for part in value] if isinstance(value, (list, tuple)) else value


def part_of(key: str, given: Any, batch_size: int, sampler: type) -> tuple[Any, Callable[[Any], Any]]:
    """Return the data set of a source, and what collates its samples.

    Raises:
        ValueError: it has no samples by index, an order of its own, or another batch size.
    """
    dataset = given.dataset if isinstance(given, DataLoader) else given
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ValueError(
            f"mixture: the source {key!r} ({type(given).__name__} of {type(dataset).__name__}) has no samples by "
            "index, so no place in it can be resumed from: give a map-style data set, or mix streams with their own "
            "library and return one loader"
        )
    if not isinstance(given, DataLoader):
        return dataset, default_collate
    inner: Any = given.sampler if type(given.batch_sampler) is BatchSampler else given.batch_sampler
    if not isinstance(inner, (sampler, SequentialSampler)) and not shuffles(inner):
        raise ValueError(
            f"mixture: the loader {key!r} has an order of its own ({type(inner).__name__}), which mixing would lose: "
            "pass it sampler=sampler(dataset), or return the data set alone"
        )
    if given.batch_size != batch_size:
        raise ValueError(
            f"mixture: the loader {key!r} makes batches of {given.batch_size} instead of {batch_size}: pass it the "
            "batch_size that get_train_dataloader receives; mixture.weights says how much of a source there is"
        )
    return dataset, given.collate_fn


def shuffles(sampler: Any) -> bool:
    """Tell whether a sampler gives each sample once."""
    return (
        isinstance(sampler, RandomSampler)
        and not sampler.replacement
        and sampler.num_samples == len(sampler.data_source)
    )


# Order --------------------------------------------------------------------------------


def order(
    kind: str, lengths: list[int], draws: list[int], multiples: list[int], size: int, generator: torch.Generator | None
) -> torch.Tensor:
    """Return the places of an epoch in the concatenated sources; with `each`, rows of places.

    Each source is shuffled, and again whenever it is repeated; without a generator all is in order.
    """

    def shuffled(number: int) -> torch.Tensor:
        return torch.arange(number) if generator is None else torch.randperm(number, generator=generator)

    begin, places = 0, []
    for length, number in zip(lengths, draws, strict=True):
        turns = [shuffled(length) for _ in range(-(-number // length))]
        places.append(torch.cat(turns)[:number] + begin)
        begin += length
    if kind == "each":
        return torch.cat([part.view(-1, wide) for part, wide in zip(places, multiples, strict=True)], dim=1)
    if kind == "mixed":
        return torch.cat(places)[shuffled(sum(draws))]
    return torch.cat(places).view(-1, size)[shuffled(sum(draws) // size)].flatten()


class Sources(ConcatDataset[Any]):
    """The data sets after one another; a sample comes with the number of its source, a row as a list of samples."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, list):
            return [self[place] for place in index]
        return bisect.bisect_right(self.cumulative_sizes, index), super().__getitem__(index)  # type: ignore[no-untyped-call]


class Collate:
    """Collates the samples of each source as its loader does; by key, unless samples are mixed.

    Raises:
        ValueError: samples are to be mixed, and loaders collate them differently.
    """

    def __init__(self, kind: str, collates: Mapping[str, Callable[[Any], Any]]) -> None:
        self.kind, self.collates = kind, list(collates.items())
        if kind == "mixed" and any(collate != self.collates[0][1] for collate in collates.values()):
            raise ValueError(
                "mixture.batches=mixed puts samples of all sources into one batch, and the loaders "
                f"{', '.join(collates)} differ in collate_fn: give them the same one, or set batches to one or each"
            )

    def __call__(self, samples: list[Any]) -> Any:
        if self.kind == "mixed":
            return self.collates[0][1]([sample for _, sample in samples])
        rows = samples if self.kind == "each" else [samples]
        by_source: dict[int, list[Any]] = {}
        for row in rows:
            for source, sample in row:
                by_source.setdefault(source, []).append(sample)
        return {self.collates[source][0]: self.collates[source][1](found) for source, found in by_source.items()}
