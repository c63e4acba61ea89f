"""Ranks with different amounts of training data: the longer ones are cut short, or the shorter ones kept in step."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, Stage, hookimpl
from hookline_distributed.alike import compare, describe_loader

if TYPE_CHECKING:
    from hookline import Trainer


class Uneven(CallbackInterface):
    """Fill up the windows of ranks that have fewer micro-batches than others, and weigh each by its real samples.

    The gradient of a step is then the mean over all samples that ranks have in it, however they are spread, also over
    the micro-batches of one rank alone. Ranks tell each other what they have only where it may differ: in the
    last steps of an epoch, or in all of them where a loader does not say how long it is, or how large its batches are.

    Args:
        joins: in what only fills up a rank takes part without computing, by the verb `shadow`; else it takes
            a batch at zero weight through the model.
    """

    def __init__(self, joins: bool) -> None:
        self.joins = joins
        self._certain = 0  # batches that each rank has for certain, and full ones
        self._taken = 0
        self._spare: list[Any] = []  # a batch to fill up with
        self._real = 0
        self._factors: list[float] = []
        self._factor = 1.0
        self._correction = 0
        self._others: tuple[Any, ...] | None = None  # outputs besides the loss, as a step without samples has them

    @hookimpl
    def on_begin_train(self, trainer: Trainer) -> None:
        stands = trainer.plugins.performers("shadow") and not trainer.hook.computes_together(trainer=trainer)
        if self.joins and trainer.world_size > 1 and not stands:
            raise ValueError(
                "distributed.uneven=join: no plugin here lets a rank take part in a step without computing it. ddp "
                "does, without find_unused_parameters; fsdp and expert_parallel cannot, since each rank is needed in "
                "every forward: let distributed.uneven=pad have a rank go on with a batch at zero weight"
            )
        if trainer.world_size > 1:
            for name, part in trainer.module.named_modules():
                if isinstance(part, torch.nn.SyncBatchNorm) or getattr(part, "across_ranks", False):
                    raise ValueError(
                        f"distributed.uneven={'join' if self.joins else 'pad'} does not go with the SyncBatchNorm "
                        f"{name}, whose statistics are of the batches of all ranks, those that only fill up too: let "
                        "distributed.uneven=drop leave out what not all ranks have, or take batch norm of each rank"
                    )

    @hookimpl(wrapper=True)
    def setup_loader(self, trainer: Trainer, loader: Any, stage: Stage, key: str) -> Generator[None, Any, Any]:
        given, loader = loader, (yield)
        if stage is not Stage.TRAIN or trainer.world_size == 1:
            return loader
        lengths = lengths_of(trainer, loader, given, key)
        cursor, self._taken, self._certain = trainer.cursor, trainer.position, 0
        if None not in lengths and cursor.draw and cursor.consumed % cursor.draw == 0:
            self._certain = min(lengths) - 1
        return loader if len(set(lengths)) == 1 else Lengthened(loader, max(lengths))

    @hookimpl(wrapper=True)
    def take_window(self, trainer: Trainer) -> Generator[None, list[Any], list[Any]]:
        window = yield
        trainer.window.pad(0)
        self._factors, self._correction = [], 0
        self._real = len(window)
        self._spare = window[-1:] or self._spare
        if self._taken + trainer.window_size > self._certain:
            window = self._agree(trainer, window)
        self._taken += len(window)
        return window

    def _agree(self, trainer: Trainer, window: list[Any]) -> list[Any]:
        """Return a window as long as the longest of all ranks; none where all have come to the end."""
        counts = [trainer.hook.count_samples(trainer=trainer, batch=batch, stage=Stage.TRAIN) for batch in window]
        ranks = trainer.hook.all_gather(trainer=trainer, value=(counts, bool(self._spare)))
        size = max(len(counts) for counts, _ in ranks)
        if not size:
            return window
        if not all(has for _, has in ranks):  # a rank has never had a batch: another gives it one
            batches = trainer.hook.all_gather(trainer=trainer, value=self._spare)
            self._spare = self._spare or next(filter(None, batches))
        total = max(sum(sum(counts) for counts, _ in ranks), 1)
        trainer.window.pad(size - len(window))
        weighed = trainer.plugins.heard["get_weight"]  # then the core weighs what is real, over all ranks
        factors = [1.0 if weighed else count * trainer.world_size * size / total for count in counts]
        self._factors = factors + [0.0] * trainer.padding
        if trainer.shares > 1:  # else the trainer has counted what there is
            nominal = size * trainer.micro_batch_size * trainer.shares
            self._correction = total * trainer.shares // trainer.world_size - nominal
        return window + self._spare * trainer.padding

    @hookimpl(wrapper=True)
    def forward_backward(self, trainer: Trainer, index: int) -> Generator[None, tuple[Any, ...], tuple[Any, ...]]:
        self._factor = self._factors[index] if self._factors else 1.0
        idle = index >= self._real
        shadows = idle and self._others is not None
        with contextlib.ExitStack() as stack:
            if idle:
                stack.enter_context(trainer.idling())
            if shadows:
                stack.enter_context(trainer.hook.shadow(trainer=trainer))
            outputs = yield
        if shadows:
            return (outputs[0], *(self._others or ()))
        if self.joins:
            self._others = tuple(map(without_samples, outputs[1:]))
        return outputs

    @hookimpl(wrapper=True)
    def scale_loss(self) -> Generator[None, torch.Tensor, torch.Tensor]:
        loss = yield
        return loss if self._factor == 1 else loss * self._factor

    @hookimpl(tryfirst=True)
    def on_end_train_step(self, trainer: Trainer) -> None:  # type: ignore[override]
        trainer.counters.samples += self._correction


class Agreed(CallbackInterface):
    """Cuts each window to the shortest of all ranks, while nobody knows how many batches there are: each step waits.

    Args:
        refuses: raises instead.
    """

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses

    @hookimpl(wrapper=True)
    def take_window(self, trainer: Trainer) -> Generator[None, list[Any], list[Any]]:
        window = yield
        sizes = trainer.hook.all_reduce(trainer=trainer, value=torch.tensor([len(window), -len(window)]), op="min")
        least, most = int(sizes[0]), -int(sizes[1])
        if least < most and self.refuses:
            raise ValueError(
                f"a rank has a window of {least} micro-batches and another of {most}, and distributed.uneven=error"
            )
        return window[:least]


class Shortened:
    """A loader of which only the first batches are taken, so that every rank has as many."""

    def __init__(self, loader: Any, batches: int, trainer: Trainer) -> None:
        self.loader, self.batches, self.trainer = loader, batches, trainer

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.loader), max(self.batches - self.trainer.position, 0))


class Lengthened:
    """A loader that says the length of the longest of all ranks."""

    def __init__(self, loader: Any, batches: int) -> None:
        self.loader, self.batches = loader, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


def without_samples(output: Any) -> Any:
    """Return a tensor like an output of a step, of no sample; None for what is no tensor."""
    return output.new_empty((0, *output.shape[1:])) if isinstance(output, torch.Tensor) else None


def length(loader: Any) -> int | None:
    """Return how many batches a loader gives, None where it does not know."""
    try:
        return len(loader)
    except TypeError:
        return None


def lengths_of(trainer: Trainer, loader: Any, given: Any, key: str) -> list[Any]:
    """Return how many batches the training loader of each rank gives, None where none of them knows.

    Args:
        trainer: whose ranks they are.
        loader: what is iterated.
        given: what the module made.
        key: its key.

    Raises:
        ValueError: they are of different kinds or share out different data sets; some know it, and some do not.
    """
    lengths: list[int | None] = compare(trainer, "training loader", describe_loader(given, key), length(loader))
    if None in lengths and len(set(lengths)) > 1:
        raise ValueError(
            f"the ranks have {listed(lengths)} batches: the training loader must know its length on all, or on none"
        )
    return lengths


def listed(lengths: list[int | None]) -> str:
    """Return numbers of batches in words."""
    return ", ".join("an unknown number of" if length is None else str(length) for length in lengths)
