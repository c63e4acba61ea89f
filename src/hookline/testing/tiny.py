"""A small deterministic module with everything that makes a resume hard, and a hand-written loop for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from hookline.counters import Cursor
from hookline.data import sampler_class
from hookline.interfaces import ModuleInterface, Stage
from hookline.marks import hookimpl
from hookline.outputs import Outputs, as_outputs
from hookline.randomness import set_seed
from hookline.trainer import Trainer


class TinyModule(ModuleInterface):
    """A regression on 8 numbers, with dropout, batch norm, Adam and a scheduler per step.

    `seen` lists the ids of the samples of each training batch, in order.
    """

    def __init__(self, samples: int = 50, dropout: float = 0.2, lr: float = 1e-2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(samples, 8, generator=generator)
        self.targets = self.inputs.sum(dim=1, keepdim=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(
                torch.nn.Linear(8, 16),
                torch.nn.BatchNorm1d(16),
                torch.nn.ReLU(),
                torch.nn.Dropout(dropout),
                torch.nn.Linear(16, 1),
            )
        self.lr = lr
        self.seen: list[list[int]] = []

    def train_step(
        self, global_step: int, batch: Any, device: torch.device | str | int
    ) -> torch.Tensor | tuple[Any, ...]:
        """Return the loss and the predictions."""
        inputs, targets, ids = batch
        self.seen.append(ids.tolist())
        predictions = self.net(inputs)
        return torch.nn.functional.mse_loss(predictions, targets), predictions

    def val_step(
        self, global_step: int, batch: Any, device: torch.device | str | int
    ) -> torch.Tensor | tuple[Any, ...]:
        """Return the loss, the predictions and the targets."""
        inputs, targets, _ = batch
        predictions = self.net(inputs)
        return torch.nn.functional.mse_loss(predictions, targets), predictions, targets

    test_step = val_step

    def predict_step(self, global_step: int, batch: Any, device: torch.device | str | int) -> Any:
        """Return the predictions."""
        return self.net(batch[0])

    def get_train_dataloader(self, sampler: type, batch_size: int) -> Any:
        """Return the samples with their ids."""
        dataset = TensorDataset(self.inputs, self.targets, torch.arange(len(self.inputs)))
        return DataLoader(dataset, batch_size=batch_size, sampler=sampler(dataset))

    def get_val_dataloaders(self, sampler: type, batch_size: int) -> Any:
        """Return the same samples in order."""
        return self.get_train_dataloader(sampler, batch_size)

    get_test_dataloaders = get_val_dataloaders
    get_predict_dataloaders = get_val_dataloaders

    def get_optimizers_schedulers(
        self, estimated_global_steps_per_epoch: int | None, epochs: int
    ) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """Return Adam and a cosine over the whole run."""
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        steps = (estimated_global_steps_per_epoch or 1) * epochs
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)]


class PlainModule(TinyModule):
    """The same without batch norm, which takes the statistics of one rank's part of a batch.

    Several ranks then train what one trains, but for rounding.
    """

    def __init__(self, dropout: float = 0.0, samples: int = 48) -> None:
        super().__init__(samples, dropout)
        del self.net[1]


class ByClosure:
    """Gives the optimizer a closure over the window, as LBFGS wants: mix it in before a module."""

    @hookimpl
    def update(self, trainer: Trainer, window: Sequence[Any]) -> list[Outputs]:
        """Take one step, in which the optimizer runs the window as often as it likes."""
        outputs: list[Outputs] = []

        def closure() -> torch.Tensor:
            trainer.zero_grad()
            outputs[:] = trainer.hook.run_window(trainer=trainer, window=window)
            loss: torch.Tensor = outputs[0][0]
            return loss

        trainer.step(closure=closure)
        return outputs


def tiny_trainer(
    plugins: Sequence[Any] | Mapping[str, Any] = (), module: ModuleInterface | None = None, **options: Any
) -> Trainer:
    """Return a trainer of a `TinyModule` (two epochs of 7 steps, the last batch short), with your plugins."""
    defaults: dict[str, Any] = {"epochs": 2, "train_batch_size": 8, "val_batch_size": 8, "device": "cpu"}
    return Trainer(module or TinyModule(), plugins, **(defaults | options))


def hand_written_loop(
    module: ModuleInterface,
    epochs: int = 2,
    batch_size: int = 8,
    window: int = 1,
    seed: int = 0,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    step: Callable[[torch.optim.Optimizer], Any] = lambda optimizer: optimizer.step(),
    forward: Callable[[Callable[[], Any]], Any] = lambda call: call(),
) -> list[float]:
    """Train a module with a hand-written loop; return the loss of each micro-batch.

    A trainer with the same options must give the same bits.

    Args:
        module: trained in place.
        epochs: number of epochs.
        batch_size: of one micro-batch.
        window: micro-batches per optimizer step; the last window of an epoch may be shorter.
        seed: as the option of the trainer.
        backward: called with the loss of a micro-batch, already divided by its window.
        step: called with each optimizer when the gradients are complete; False if the weights did not change.
        forward: calls the model's forward (under autocast, say).
    """
    from hookline.data import mix

    set_seed(mix(seed, 0))
    cursor = Cursor(seed=seed)
    sampler = sampler_class(cursor, shuffle=True, share=0, shares=1)
    batches = len(module.get_train_dataloader(sampler=sampler, batch_size=batch_size))  # type: ignore[arg-type]
    optimizers, schedulers = module.get_optimizers_schedulers(-(-batches // window), epochs)
    module.train()
    losses, global_step = [], 0
    for epoch in range(epochs):
        cursor.begin_epoch(epoch)
        loader = module.get_train_dataloader(sampler=sampler, batch_size=batch_size)
        loader.generator = torch.Generator()  # type: ignore[attr-defined]  # else iter() draws from the global one
        iterator = iter(loader)
        while taken := list(itertools.islice(iterator, window)):
            for batch in taken:
                arguments = {"global_step": global_step + 1, "batch": batch, "device": "cpu"}
                returned = forward(lambda: module(stage=Stage.TRAIN, **arguments))  # noqa: B023
                loss = as_outputs(returned, "train_step")[0]
                losses.append(loss.item())
                backward(loss / len(taken) if len(taken) > 1 else loss)
            stepped = [step(optimizer) for optimizer in optimizers]
            if False not in stepped:
                for scheduler in schedulers:
                    scheduler.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
            global_step += 1
    return losses
