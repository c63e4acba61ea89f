"""What the programs of these tests share: modules that keep what they are given, and ranks that run many programs."""

import random
import warnings

import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from hookline import CallbackInterface, ModuleInterface, Trainer, hookimpl
from hookline.testing import on_ranks
from hookline.testing.faults import PRELOADED

PRELOADED += ["hookline_ddp", "hookline_distributed", "torch.nn.parallel.distributed"]


class Ids(Dataset):
    """Numbers that are their own samples, each with what loading has drawn for it."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor(float(index)), torch.rand(())


class Stream(IterableDataset):
    """The same numbers, in their order."""

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return ((torch.tensor(float(index)), torch.rand(())) for index in range(self.length))


class Seen(ModuleInterface):
    """Trains and validates on whatever its loaders give, and keeps it: `seen` by epoch, `validated` by evaluation.

    `gathered` has the ids of all ranks, as an evaluation collates them. The loss is the mean of the ids, so that of a
    validation is known beforehand.

    Args:
        train: makes the training loader of sampler and batch size, or is it.
        val: the same for validation; None for no validation.
    """

    def __init__(self, train, val=None):
        super().__init__()
        self.net = torch.nn.Linear(1, 1)
        self.loaders = train, val
        self.seen, self.draws, self.validated, self.gathered = {}, [], [], []

    def ids(self, batch):
        ids = batch[0] if isinstance(batch, (list, tuple)) else batch
        return ids.reshape(-1)

    def train_step(self, global_step, batch, device):
        self.seen.setdefault(self.trainer.epoch, []).append(self.ids(batch).int().tolist())
        self.draws += batch[1].reshape(-1).tolist() if isinstance(batch, (list, tuple)) else []
        return self.net(self.ids(batch)[:, None]).mean() * 0 + self.ids(batch).mean()

    def val_step(self, global_step, batch, device):
        self.validated[-1].append(self.ids(batch).int().tolist())
        return self.ids(batch).double().mean(), self.ids(batch)

    def on_end_val_epoch(self, global_step, losses, ids=None, key="default"):
        self.gathered = ids.int().tolist() if isinstance(ids, torch.Tensor) else []

    @hookimpl
    def on_begin_val_epoch(self):
        self.validated.append([])

    def get_train_dataloader(self, sampler, batch_size):
        return self.loaders[0](sampler, batch_size) if callable(self.loaders[0]) else self.loaders[0]

    def get_val_dataloaders(self, sampler, batch_size):
        return self.loaders[1](sampler, batch_size) if callable(self.loaders[1]) else self.loaders[1]

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), lr=0.1)], []


class Keep(CallbackInterface):
    """Keeps what is logged, as pairs (step, metrics)."""

    def __init__(self):
        self.rows = []

    @hookimpl
    def on_log(self, metrics, global_step):
        self.rows.append((global_step, dict(metrics)))

    def get(self, name):
        return [(step, metrics[name]) for step, metrics in self.rows if name in metrics]


def train(module, plugins=(), **options):
    """Train on the CPU; return the trainer."""
    trainer = Trainer(module, plugins, **{"device": "cpu", "train_batch_size": 4, "val_batch_size": 4, **options})
    trainer.train()
    return trainer


def own_loop(loader, epochs=1):
    """Return the ids that the loop which the user would have written gets of a loader, by epoch and batch."""
    seen = {}
    for epoch in range(epochs):
        for part in (loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset"))):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        batches = (batch[0] if isinstance(batch, (list, tuple)) else batch for batch in loader)
        seen[epoch] = [batch.reshape(-1).int().tolist() for batch in batches]
    return seen


def flat(batches):
    """Return the ids of batches in one list, sorted: how often each was there."""
    return sorted(index for batch in batches for index in batch)


def attributes(loader):
    """Return all that a loader and what it draws from have, but the epoch, which the user has asked to be told."""
    found = {"itself": loader}
    for name in ("sampler", "batch_sampler", "dataset", "loader"):
        found[name] = getattr(loader, name, None)
    return {
        (part, name): value if isinstance(value, (int, float, str, bool, type(None))) else id(value)
        for part, owner in found.items()
        for name, value in getattr(owner, "__dict__", {}).items()
        if name != "epoch"
    }


def two(function, *args, timeout=100.0):
    """Run a function on two ranks; return what it returned on each."""
    return on_ranks(function, 2, *args, timeout=timeout)


def tried(program, *args):
    """Return what a program returns, or the error that it is refused with."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return program(*args)
        except (ValueError, TypeError) as error:
            return f"{type(error).__name__}: {error}"


class ByEpoch(torch.utils.data.Sampler):
    """A sampler of the user's, whose order is by epoch."""

    def __init__(self, length):
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(random.Random(self.epoch).sample(range(self.length), self.length))

    def __len__(self):
        return self.length


class Regression(ModuleInterface):
    """What is to be learned are the sums of three numbers, of 40 samples; the steps are others' to write."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(40, 3, generator=generator)
        self.data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = torch.nn.Linear(3, 1)
