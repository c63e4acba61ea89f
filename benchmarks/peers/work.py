"""What every framework is given: the same model, batches, loss, optimizer and seed."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Timed(nn.Module):
    """A network that tells the time at each call: when steps begin, in whatever loop it is.

    Args:
        net: gives logits for inputs.
        heard: is told.
    """

    def __init__(self, net: nn.Module, heard: Callable[[float], None]) -> None:
        super().__init__()
        self.net, self.heard = net, heard

    def forward(self, inputs: Tensor) -> Tensor:
        self.heard(time.perf_counter())
        logits: Tensor = self.net(inputs)
        return logits


@dataclass(frozen=True)
class Work:
    """One row of the table.

    Args:
        name: of the row.
        net: makes the network, under the seed.
        batches: gives this many batches of (inputs, targets), an iterable that has a length; with ranks, it takes what
            makes a sampler of a data set.
        steps: batches of a run that is timed.
        turns: how often it is timed, in a row, while the loop by hand varies little.
        counted: batches of the two runs whose difference is what a step costs in counts. It is a multiple of 50
            optimizer steps, after which values are logged, but for the transformer: its steps are slow.
        accumulate: batches of one optimizer step.
        features: also an accuracy, clipping to 1.0, a progress bar, a line in a file every 50 steps, a checkpoint.
        callbacks: this many callbacks that do nothing at the end of a step.
        ranks: processes that average gradients by gloo, each with its share of the batches.
        folder: where a run may write.
        heard: is told the time at each call of the network.
    """

    name: str
    net: Callable[[], nn.Module]
    batches: Callable[..., Any]
    steps: int = 1000
    turns: int = 7
    counted: tuple[int, int] = (50, 150)
    accumulate: int = 1
    features: bool = False
    callbacks: int = 0
    ranks: int = 1
    folder: Path = Path(".")
    heard: Callable[[float], Any] = float

    def model(self) -> Timed:
        """Return the network, the same each time."""
        torch.manual_seed(1)
        return Timed(self.net(), self.heard)

    def loader(self, sampler: Callable[[Any], Any] | None = None) -> Any:
        """Return the batches of a run, of all ranks unless a sampler shares them out."""
        return self.batches(self.steps * self.ranks, sampler) if self.ranks > 1 else self.batches(self.steps)

    @staticmethod
    def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the quickest optimizer there is: it shows a loop at its worst."""
        return torch.optim.SGD(parameters, lr=0.01)

    @staticmethod
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, targets)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Send what frameworks say to nowhere, but let them say it: that is a part of the cost."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def done(way: Callable[[Work], Any], work: Work) -> Any:
    """Do a work in a folder of its own, in silence; return what it gives."""
    with tempfile.TemporaryDirectory() as folder, silence():
        return way(replace(work, folder=Path(folder)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )


class Transformer(nn.Module):
    """Ten million parameters: six layers of width 368 over 64 tokens, and one class for the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 368)
        layer = nn.TransformerEncoderLayer(368, 8, 1472, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(368, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(self.embedding(tokens)).mean(1))
        return logits


VECTORS = torch.randn(32, 32, generator=torch.Generator().manual_seed(2)), torch.arange(32) % 10


class Stream:
    """Gives the same batch, again and again, by an iterator of which nobody knows whether it draws random numbers.

    Args:
        count: of its batches.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return itertools.repeat(VECTORS, self.count)


def vectors(count: int) -> list[tuple[Tensor, ...]]:
    return [VECTORS] * count


def tokens(count: int) -> list[tuple[Tensor, ...]]:
    given = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(2)), torch.arange(4)
    return [given] * count


class Loaded:
    """Gives the loader that a user would write.

    Args:
        shape: of one input.
        workers: processes that load.
    """

    def __init__(self, *shape: int, workers: int = 0) -> None:
        self.shape, self.workers = shape, workers

    def __call__(self, count: int, sampler: Callable[[Any], Any] | None = None) -> DataLoader[tuple[Tensor, ...]]:
        inputs = torch.rand(32 * count, *self.shape, generator=torch.Generator().manual_seed(2))
        data = TensorDataset(inputs, torch.arange(32 * count) % 10)
        return DataLoader(data, 32, num_workers=self.workers, sampler=sampler(data) if sampler else None)


WORKS = {
    work.name: work
    for work in (
        Work("mlp", mlp, vectors),
        Work("stream", mlp, Stream),
        Work("cnn", cnn, Loaded(1, 8, 8)),
        Work("cnn-workers", cnn, Loaded(1, 8, 8, workers=2)),
        Work("transformer", Transformer, tokens, steps=4, turns=3, counted=(2, 6)),
        Work("features", mlp, vectors, features=True),
        Work("accumulate", mlp, vectors, accumulate=4, counted=(200, 400)),
        Work("validate", mlp, vectors),
        Work("callbacks", mlp, vectors, callbacks=100),
        Work("ranks", mlp, Loaded(32), ranks=2),
    )
}
"""The rows, by name. `validate` evaluates, all others train."""
