"""Go on where memory runs out: split micro-batches into smaller parts, with the gradients of the whole."""

from __future__ import annotations

import dataclasses
import logging
import traceback
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, Stage, hookimpl, hookspecs, kept_rng

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

log = logging.getLogger("hookline.oom")


@dataclass(eq=False)
class Oom(CallbackInterface):
    """Split micro-batches that do not fit into memory in two, again and again, and go on with the smaller size.

    The losses of the parts are weighted, so that the gradient is that of the whole micro-batch. Before it trains on a
    window with more numbers than any before, it tries it without counting it.
    """

    def __post_init__(self) -> None:
        self.limit: int | None = None
        """The most samples that pass the model at once, if memory ran out."""
        self._again = False  # whether this plugin has called `run_window` itself
        self._largest = 0  # numbers of the largest micro-batch that fitted
        self._windows = 0  # that have been trained: the optimizer has its states from the second on
        self._share = 1.0  # of the part under way in its micro-batch

    @hookimpl
    def on_setup(self) -> None:
        self.limit = None

    @hookimpl
    def on_begin_train(self, trainer: Trainer) -> None:
        self._largest = self._windows = 0
        if trainer.world_size > 1:
            raise ValueError(
                "oom works in one process: with several ranks, one that runs out of memory would let the others wait "
                "for its gradients without an end. Find a size that fits on all ranks with batch_find, or give "
                "accumulate a smaller micro_batch_size"
            )

    # A window -------------------------------------------------------------------------

    @hookimpl(wrapper=True, tryfirst=True)
    def run_window(self, trainer: Trainer, window: Sequence[Any]) -> Generator[None, Any, Any]:
        if self._again or trainer.window.begun:  # of a run that was cut: it is completed as it was begun
            return (yield)
        numbers = max(map(numbers_in, window))
        self._windows += 1
        if numbers > self._largest or self._windows <= 2:
            self._try(trainer, window)
            self._largest = max(numbers, self._largest)
        try:
            return (yield)
        except torch.OutOfMemoryError as error:
            self._halve(trainer, window, error)
        trainer.say_once(
            "memory ran out in a window whose size had fitted before, so it was not tried first: what the module had "
            "logged and counted of it until then counts twice"
        )
        while True:
            try:
                return self._run(trainer, window)
            except torch.OutOfMemoryError as error:
                self._halve(trainer, window, error)

    def _try(self, trainer: Trainer, window: Sequence[Any]) -> None:
        """Run a window without counting it, in smaller and smaller parts until it fits."""
        fits = False
        while not fits:
            with kept_rng(), trainer.idling():
                try:
                    self._run(trainer, window)
                    fits = True
                except torch.OutOfMemoryError as error:
                    self._halve(trainer, window, error)
                except BaseException as error:
                    if not hasattr(error, "outputs"):
                        raise
                    fits = True  # the run is to be cut within this window: the real pass does it
            trainer.module.zero_grad()

    def _run(self, trainer: Trainer, window: Sequence[Any]) -> Any:
        self._again = True
        trainer.window.begin_micro_batch(0)
        try:
            return trainer.hook.run_window(trainer=trainer, window=window)
        finally:
            self._again = False

    def _halve(self, trainer: Trainer, window: Sequence[Any], error: torch.OutOfMemoryError) -> None:
        """Halve the most samples that pass the model at once, and free what the failed pass has left.

        Raises:
            torch.OutOfMemoryError: it was a single sample.
        """
        sizes = [max(parts_of(self._samples(trainer, batch), self.limit)) for batch in window]
        if max(sizes) <= 1:
            error.add_note("oom cannot split it any more: a single sample does not fit")
            raise error
        self.limit = (max(sizes) + 1) // 2
        traceback.clear_frames(error.__traceback__)  # which hold the activations
        trainer.module.zero_grad()
        if not trainer.on_cpu:
            torch.get_device_module(trainer.device).empty_cache()
        log.warning("memory ran out: at most %d samples pass the model at once from now on", self.limit)

    def _samples(self, trainer: Trainer, batch: Any) -> int:
        samples: int = trainer.hook.count_samples(trainer=trainer, batch=batch, stage=Stage.TRAIN)
        return samples

    # A micro-batch --------------------------------------------------------------------

    @hookimpl
    def forward_backward(self, trainer: Trainer, batch: Any, index: int, size: int) -> tuple[Any, ...]:
        samples = 0 if self.limit is None else self._samples(trainer, batch)
        sizes = parts_of(samples, self.limit)
        if len(sizes) == 1:
            return hookspecs.forward_backward(trainer=trainer, batch=batch, index=index, size=size)
        ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
        parts = [part_of(batch, end - own, end, samples) for own, end in zip(sizes, ends, strict=True)]
        weights: Sequence[float] = sizes
        if trainer.plugins.heard["get_weight"]:
            weigh = trainer.hook.get_weight
            weights = [float(weigh(trainer=trainer, batch=part, stage=Stage.TRAIN)) for part in parts]
        shares = [weight / (sum(weights) or 1.0) for weight in weights]
        rows = []
        try:
            for part, self._share in zip(parts, shares, strict=True):
                row = hookspecs.forward_backward(trainer=trainer, batch=part, index=index, size=size)
                rows.append([value.detach() if isinstance(value, torch.Tensor) else value for value in row])
        finally:
            self._share = 1.0
        nothing = torch.zeros_like(rows[0][0])
        loss = sum((row[0] * share for row, share in zip(rows, shares, strict=True) if share), nothing)
        if not trainer.plugins.collecting:
            return (loss,)
        return (loss, *(joined(values, sizes, shares) for values in list(zip(*rows, strict=True))[1:]))

    @hookimpl(wrapper=True)
    def scale_loss(self) -> Generator[None, torch.Tensor, torch.Tensor]:
        loss = yield
        if self._share == 1:
            return loss
        # The mean of nothing is NaN, and so are its gradients; the whole micro-batch would have had none from it.
        return loss * self._share if self._share else torch.zeros_like(loss).requires_grad_()

    # State ----------------------------------------------------------------------------

    def get_state(self) -> dict[str, int]:
        """Return the limit, if memory ran out."""
        return {} if self.limit is None else {"limit": self.limit}

    def update_state(self, state: dict[str, int]) -> None:
        """Take it back."""
        self.limit = state["limit"]


def parts_of(samples: int, limit: int | None) -> list[int]:
    """Return the sizes of the fewest parts within a limit, which differ by one sample at most."""
    parts = 1 if limit is None else max(-(-samples // limit), 1)
    return [samples // parts + (place < samples % parts) for place in range(parts)]


def numbers_in(value: Any) -> int:
    """Return how many numbers the tensors in a batch hold."""
    if isinstance(value, torch.Tensor):
        return value.numel()
    return sum(map(numbers_in, inner_of(value)))


def inner_of(value: Any) -> list[Any]:
    """Return the parts of a container."""
    if isinstance(value, Mapping):
        return list(value.values())
    if dataclasses.is_dataclass(value):
        return list(vars(value).values())
    return list(value) if isinstance(value, (list, tuple)) else []


def part_of(value: Any, begin: int, end: int, samples: int) -> Any:
    """Return some samples of a batch: of its tensors by their first dimension, of lists by their items.

    Raises:
        ValueError: something in it has not as many items as the batch has samples.
    """

    def part(inner: Any) -> Any:
        return part_of(inner, begin, end, samples)

    if getattr(value, "shape", ())[:1] == (samples,):
        return value[begin:end]
    if isinstance(value, Mapping):
        made = {key: part(inner) for key, inner in value.items()}
        return made if type(value) is dict else type(value)(made)  # type: ignore[call-arg]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{name: part(inner) for name, inner in vars(value).items()})
    if isinstance(value, (list, tuple)):
        columns = any(isinstance(inner, torch.Tensor) and inner.shape[:1] == (samples,) for inner in value)
        if len(value) == samples and not columns:
            return type(value)(value[begin:end])
        items = [part(inner) for inner in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if value is None or isinstance(value, (bool, int, float, str)) or getattr(value, "ndim", 1) == 0:
        return value
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    raise ValueError(
        f"oom cannot split a batch of {samples} samples with a {type(value).__name__}{shape} in it: the first "
        "dimension of each tensor must be that of the samples, and each list have one item a sample. Give smaller "
        "micro-batches by accumulate"
    )


def joined(values: Sequence[Any], sizes: Sequence[int], shares: Sequence[float]) -> Any:
    """Return one output of a micro-batch from those of its parts: samples behind each other, numbers as their mean.

    Raises:
        ValueError: outputs that are neither.
    """
    first = values[0]
    if all(isinstance(value, torch.Tensor) and value.shape[:1] == (n,) for value, n in zip(values, sizes, strict=True)):
        return torch.cat(list(values))
    if isinstance(first, (float, int)) or getattr(first, "ndim", 1) == 0:
        return sum(value * share for value, share in zip(values, shares, strict=True))
    if isinstance(first, Mapping):
        return {key: joined([value[key] for value in values], sizes, shares) for key in first}
    if isinstance(first, (list, tuple)):
        if [len(value) for value in values] == list(sizes) and not any(map(torch.is_tensor, first)):
            return type(first)(item for value in values for item in value)
        return type(first)(joined(column, sizes, shares) for column in zip(*values, strict=True))
    if first is None:
        return None
    shape = f" of shape {tuple(first.shape)}" if hasattr(first, "shape") else ""
    raise ValueError(
        f"oom cannot put together an output of train_step, a {type(first).__name__}{shape}, of parts of {list(sizes)} "
        "samples: return tensors with a first dimension of samples, or numbers"
    )
