"""Find the largest micro-batch that fits into memory, and accumulate gradients up to the batch that was asked for."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, Stage, copy_state, hookimpl, kept_rng

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

log = logging.getLogger("hookline.batch_find")


@dataclass(eq=False)
class BatchFind(CallbackInterface):
    """Try sizes of micro-batches before the first step, and train with the largest that fits on every rank.

    `trainer.train_batch_size` remains the samples of one step over all ranks; the window gets as many micro-batches as
    that takes. What was tried leaves no trace.
    """

    memory: float = 0.9
    """The share of a CUDA device's memory that the tried sizes may use."""
    smallest: int = 2
    """The smallest micro-batch to try; layers such as batch norm cannot train on a single sample."""

    def __post_init__(self) -> None:
        if not 0 < self.memory <= 1:
            raise ValueError(f"batch_find.memory={self.memory} must be above 0 and at most 1, such as 0.9")
        if self.smallest < 1:
            raise ValueError(f"batch_find.smallest={self.smallest} must be at least 1 sample")
        self.size: int | None = None
        """Samples of a micro-batch on one rank, once they are found."""

    @hookimpl
    def on_setup(self) -> None:
        self.size = None

    @hookimpl
    def get_window_size(self) -> int:
        return 1  # until the size is known

    @hookimpl(tryfirst=True)
    def on_begin_train(self, trainer: Trainer) -> None:
        if self.size is not None:  # of a resumed run
            share = share_of(trainer)
            fitting = [size for size in divisors(share) if size <= self.size]
            self.size = fitting[-1]  # another one only on another number of ranks
            use(trainer, self.size)

    @hookimpl(tryfirst=True)
    def on_begin_train_epoch(self, trainer: Trainer) -> None:  # type: ignore[override]
        if self.size is not None:
            return
        if trainer.world_size > 1 and any(hasattr(weight, "device_mesh") for weight in trainer.module.parameters()):
            raise ValueError(
                "batch_find: ranks share the weights here, so all of them are needed in each forward, and a rank that "
                "runs out of memory would hang the others: find the size with ddp or in one process, and give it to "
                "accumulate.micro_batch_size"
            )
        state, totals = copy_state(trainer.hook.get_run_state(trainer=trainer)), trainer.totals
        with kept_rng():
            try:
                with trainer.idling(), limited(trainer.device, self.memory):
                    size = self._search(trainer)
            finally:
                trainer.hook.set_run_state(trainer=trainer, state=state, stage=Stage.TRAIN)
        use(trainer, size)
        if trainer.totals.steps_per_epoch != totals.steps_per_epoch:
            raise ValueError(
                f"batch_find: {size} samples fit, but with them an epoch has {trainer.totals.steps_per_epoch} steps, "
                f"and schedulers were made for {totals.steps_per_epoch}: the loader drops its last batch, which is "
                f"smaller now. Write accumulate.micro_batch_size={size} in place of batch_find"
            )
        self.size = size
        if trainer.rank == 0:
            log.info("micro-batches of %d samples fit: %d of them make a step on each rank", size, trainer.window_size)

    # The search -----------------------------------------------------------------------

    def _search(self, trainer: Trainer) -> int:
        """Return the largest size that fits on all ranks: up by powers of two, then by halves of what is left.

        Raises:
            ValueError: the smallest does not fit.
        """
        share = share_of(trainer)
        sizes = [size for size in divisors(share) if size >= self.smallest] or [share]
        powers = [2**exponent for exponent in range(share.bit_length() + 1)]
        ladder = sorted({max([size for size in sizes if size <= power] or sizes[:1]) for power in powers})
        try:
            self._update(trainer, sizes[0])  # so that the optimizers have their states
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"batch_find: micro-batches of {sizes[0]} sample(s) do not fit into memory, and smaller ones are not "
                f"tried (batch_find.smallest={self.smallest}, train_batch_size={trainer.options.train_batch_size})"
            ) from error
        fits, left = sizes[0], []
        for size in ladder[1:]:
            if not self._fits(trainer, size):
                left = [other for other in sizes if fits < other < size]
                break
            fits = size
        while left:
            middle = len(left) // 2
            if self._fits(trainer, left[middle]):
                fits, left = left[middle], left[middle + 1 :]
            else:
                left = left[:middle]
        return fits

    def _update(self, trainer: Trainer, size: int) -> None:
        """Do one update of one micro-batch."""
        window = [batch_of(trainer, size)]
        trainer.window.begin(window)
        try:
            trainer.hook.update(trainer=trainer, window=window)
        finally:
            trainer.window.end()

    def _fits(self, trainer: Trainer, size: int) -> bool:
        """Tell whether forward and backward of this size fit on all ranks, beside the gradients of a window."""
        batch, fits = batch_of(trainer, size), True
        trainer.window.begin([batch])
        try:
            for _ in range(2):  # the first of several in a window, so that no rank waits for another in it
                trainer.hook.forward_backward(trainer=trainer, batch=batch, index=0, size=2)
        except torch.OutOfMemoryError:
            fits = False
        trainer.window.end()
        trainer.module.zero_grad()
        if not trainer.on_cpu:
            torch.get_device_module(trainer.device).empty_cache()
        value = torch.tensor(float(fits))
        return bool(trainer.hook.all_reduce(trainer=trainer, value=value, op="min").item())

    # State ----------------------------------------------------------------------------

    def get_state(self) -> dict[str, int]:
        """Return the size, once it is found."""
        return {} if self.size is None else {"size": self.size}

    def update_state(self, state: dict[str, int]) -> None:
        """Take it back."""
        self.size = state["size"]


def share_of(trainer: Trainer) -> int:
    """Return the samples of one step on one rank."""
    share: int = trainer.options.train_batch_size // trainer.shares
    return share


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, from the least to the greatest."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def use(trainer: Trainer, size: int) -> Any:
    """Make windows of micro-batches of this size; return a training loader of them."""
    trainer.window.resize(share_of(trainer) // size)
    trainer.loaders.begin_windows(trainer.window_size)
    loader = trainer.training.extra_loader()
    trainer.built.count_totals(loader)
    return loader


def batch_of(trainer: Trainer, size: int) -> Any:
    """Return the first micro-batch of a size.

    Raises:
        ValueError: the loader gives larger ones than it was asked for.
    """
    batch = next(iter(use(trainer, size)))
    samples = trainer.hook.count_samples(trainer=trainer, batch=batch, stage=Stage.TRAIN)
    if samples > size:
        raise ValueError(
            f"batch_find asked the training loader for batches of {size}, and it gave one of {samples}: use the "
            "`batch_size` that get_train_dataloader is called with"
        )
    return batch


@contextlib.contextmanager
def limited(device: torch.device, memory: float) -> Iterator[None]:
    """Let this process use only a share of the memory of a CUDA device within."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(memory, device)
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
