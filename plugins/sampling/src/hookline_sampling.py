"""Draw the samples of training by weight, class, temperature, length or difficulty."""

from __future__ import annotations

import hashlib
import math
import pkgutil
from collections.abc import Generator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from hookline import CallbackInterface, Stage, hookimpl, nearest

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

KINDS = {  # with the options that only they have
    "balanced": ("samples",),
    "weighted": ("samples",),
    "temperature": ("samples", "temperature"),
    "length": ("bucket",),
    "curriculum": ("begin", "until"),
}


@dataclass(eq=False)
class Sampling(CallbackInterface):
    """Draw the samples of training by weight, class, temperature, length or difficulty.

    One order for all ranks, a function of (seed, epoch), of which each rank takes its share.
    """

    kind: str = "balanced"
    """How to draw: balanced, weighted, temperature, length or curriculum."""
    by: Any = "targets"
    """Where the value of each sample is: a name, an index, or a function of the data set."""
    samples: int | None = None
    """Draws of an epoch over all ranks; null for as many as the data set has samples."""
    temperature: float = 2.0
    """Draw a class of n samples in proportion to n ** (1 / temperature)."""
    bucket: int = 100
    """Sort so many batches by length at once."""
    begin: float = 0.2
    """Share of the data, the easiest, in the first epoch."""
    until: int = 10
    """Epochs until all data are drawn."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"sampling.kind={self.kind!r} must be one of {', '.join(KINDS)}{nearest(self.kind, KINDS)}"
            )
        for field in fields(self)[2:]:
            if field.name not in KINDS[self.kind] and getattr(self, field.name) != field.default:
                having = " or ".join(kind for kind, options in KINDS.items() if field.name in options)
                raise ValueError(
                    f"sampling.{field.name} does nothing with kind={self.kind}: leave it out, or set kind to {having}"
                )
        for name in ("samples", "bucket", "until"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"sampling.{name}={getattr(self, name)} must be at least 1")
        if not self.temperature > 0:
            raise ValueError(
                f"sampling.temperature={self.temperature} must be above 0; 1 keeps the data as they are, .inf balances"
            )
        if not 0 < self.begin <= 1:
            raise ValueError(f"sampling.begin={self.begin} is a share of the data: above 0, at most 1")

    # The order ------------------------------------------------------------------------

    @hookimpl
    def on_setup(self) -> None:
        """Begin anew: an object may have been another trainer's before."""
        self._aside = False  # whether another plugin wants the order of the data set
        self._drawn: str | None = None  # a hash of all that the order depends on, besides (seed, epoch)
        self._before: str | None = None  # that of the epoch under way

    @hookimpl(wrapper=True, tryfirst=True)
    def get_sampler(self, trainer: Trainer, stage: Stage) -> Generator[None, Any, Any]:
        sampler = yield
        if stage is not Stage.TRAIN:
            return sampler
        self._aside = not sampler.shuffle
        if self._aside:
            trainer.say_once("sampling does nothing: another plugin wants the samples in the order of the data set")
            return sampler
        plugin = self

        class Drawn(sampler):  # type: ignore[misc, valid-type]
            def __init__(self, data_source: Any) -> None:
                super().__init__(data_source)
                if type(self).order is not Drawn.order:
                    raise ValueError(
                        "sampling and another plugin both decide the order of samples: turn one of them off"
                    )
                self.values = plugin._read(trainer, data_source)
                self.length = plugin.samples or len(data_source)

            def order(self) -> torch.Tensor:
                return plugin._order(trainer, self.values, self.length, self.cursor.epoch, self.generator())

        return Drawn

    def _read(self, trainer: Trainer, dataset: Any) -> torch.Tensor:
        """Return the value of each sample, and remember what the order depends on."""
        where = f"sampling.by={self.by!r}"
        values = numbers(find(dataset, self.by, trainer.module, where), where, self.kind in ("balanced", "temperature"))
        if values.shape != (len(dataset),) or not len(dataset):
            raise ValueError(
                f"{where} must give one value for each of the {len(dataset)} samples; it gave {tuple(values.shape)}"
            )
        if not values.isfinite().all():
            raise ValueError(f"{where}: the value of sample {int((~values.isfinite()).nonzero()[0])} is not finite")
        if self.kind == "weighted" and ((values < 0).any() or not values.sum() > 0):
            raise ValueError(f"{where}: weights must be at least 0 and not all 0; the smallest is {values.min():g}")
        size = trainer.micro_batch_size * trainer.shares if self.kind == "length" else None
        said = [(field.name, getattr(self, field.name)) for field in fields(self) if field.name != "by"]
        self._drawn = hashlib.blake2b(values.numpy().tobytes() + repr((said, size)).encode(), digest_size=8).hexdigest()
        return values

    def _order(
        self, trainer: Trainer, values: torch.Tensor, draws: int, epoch: int, generator: torch.Generator
    ) -> torch.Tensor:
        if self.kind == "length":
            return by_length(values, trainer.micro_batch_size * trainer.shares, self.bucket, generator)
        if self.kind == "curriculum":
            share = min(1.0, self.begin + (1 - self.begin) * epoch / self.until)
            return easiest(values, math.ceil(share * draws), generator)
        if self.kind != "weighted":
            _, which, counts = torch.unique(values, return_inverse=True, return_counts=True)
            power = -1.0 if self.kind == "balanced" else 1 / self.temperature - 1
            values = counts.double().pow(power)[which]
        return torch.multinomial(values, draws, replacement=True, generator=generator)

    # Checks ---------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def setup_loader(self, trainer: Trainer, loader: Any, stage: Stage) -> Generator[None, Any, Any]:
        made = yield
        if stage is Stage.TRAIN and not self._aside:
            self._check(trainer, getattr(loader, "batch_size", None), type(loader).__name__)
        return made

    def _check(self, trainer: Trainer, batch_size: int | None, name: str) -> None:
        """Refuse a loader that is not drawn from, and ranks that differ; tell a resume that cannot be exact."""
        if self._drawn is None:
            raise ValueError(
                f"sampling: the {name} of {type(trainer.module).__name__}.get_train_dataloader() has an order of its "
                "own, so nothing would be drawn: return a DataLoader(dataset, batch_size, sampler=sampler(dataset))"
            )
        if self.kind == "length" and batch_size != trainer.micro_batch_size:
            raise ValueError(
                f"sampling.kind=length makes batches of {trainer.micro_batch_size}, and the loader has {batch_size}: "
                "pass it the batch_size that get_train_dataloader receives"
            )
        if trainer.world_size > 1 and len({*trainer.hook.all_gather(trainer=trainer, value=self._drawn)}) > 1:
            raise ValueError(
                f"sampling.by={self.by!r} gives other values on other ranks, so their shares would overlap"
            )
        if trainer.position and self._before != self._drawn:
            trainer.say_once(
                "sampling draws otherwise than before the resume (other options, values or batch size): in the rest of "
                "this epoch some samples may come twice or not at all"
            )
        self._before = self._drawn

    def get_state(self) -> dict[str, Any]:
        """Return what the order of this epoch depends on, as a hash."""
        return {} if self._drawn is None else {"drawn": self._drawn}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take it back, to compare it."""
        self._before = state.get("drawn")


def by_length(lengths: torch.Tensor, size: int, bucket: int, generator: torch.Generator) -> torch.Tensor:
    """Return an order in which each batch has similar lengths; the rest, a short batch of any lengths, is last."""
    order = torch.randperm(len(lengths), generator=generator)
    full = len(order) - len(order) % size
    parts = [part[lengths[part].argsort(stable=True)] for part in torch.split(order[:full], bucket * size)]
    batches = torch.cat([*parts, order[:0]]).view(-1, size)
    return torch.cat([batches[torch.randperm(len(batches), generator=generator)].flatten(), order[full:]])


def easiest(difficulty: torch.Tensor, number: int, generator: torch.Generator) -> torch.Tensor:
    """Return an order of the easiest samples, each as often as any other within one, as long as the data set."""
    chosen = difficulty.argsort(stable=True)[:number].sort().values
    turns = [chosen[torch.randperm(number, generator=generator)] for _ in range(math.ceil(len(difficulty) / number))]
    return torch.cat(turns)[: len(difficulty)]


# Values -------------------------------------------------------------------------------


def find(dataset: Any, by: Any, module: torch.nn.Module, where: str) -> list[Any]:
    """Return the value of each sample: from the data set, from a method of the module, or from a function.

    Raises:
        ValueError: there is no such thing.
    """
    function = by if callable(by) else None
    if isinstance(by, str) and "." in by:
        try:
            function = pkgutil.resolve_name(by)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{where} cannot be imported: {error}") from error
    elif function is None:
        found = column(dataset, by)
        if found is not None:
            return found
        function = getattr(module, str(by), None)
    if callable(function):
        return plain(function(dataset))
    raise ValueError(
        f"{where}: the {type(dataset).__name__} has no such attribute or column, and {type(module).__name__} no such "
        "method. Give an attribute or a column of the data set, an index into a TensorDataset, a method of the module "
        "that takes the data set, or the dotted path of such a function"
    )


def column(dataset: Any, by: str | int) -> list[Any] | None:
    """Return an attribute or a column of a data set, through subsets and concatenations; None if it has none."""
    if isinstance(dataset, Subset):
        whole = column(dataset.dataset, by)
        return None if whole is None else [whole[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [column(part, by) for part in dataset.datasets]
        return None if None in parts else [value for part in parts for value in part or []]
    if isinstance(by, int):
        tensors = dataset.tensors if isinstance(dataset, TensorDataset) else ()
        return plain(tensors[by]) if by < len(tensors) else None
    columns = getattr(dataset, "column_names", None) or ()
    found = dataset[by] if by in columns else getattr(dataset, by, None)
    return None if found is None or callable(found) else plain(found)


def plain(values: Any) -> list[Any]:
    """Return values as a list."""
    return list(values.tolist() if hasattr(values, "tolist") else values)


def numbers(values: list[Any], where: str, classes: bool) -> torch.Tensor:
    """Return values as numbers; texts are numbered where they are classes.

    Raises:
        ValueError: they are something else.
    """
    if classes and values and all(isinstance(value, str) for value in values):
        places = {text: place for place, text in enumerate(sorted({*values}))}
        values = [places[text] for text in values]
    try:
        return torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where} gives no numbers, but values such as {str(values[0])[:60]!r}: {error}") from error
