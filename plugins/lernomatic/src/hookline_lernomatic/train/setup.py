"""What a trainer of LERNOMATIC makes in its `__init__`: device, optimizer, loaders, and room for its history."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch.utils.data import DataLoader

import hookline
from hookline_lernomatic.model.common import LernomaticModel


class Setup:
    """The attributes of a trainer, and the `_init_*` that a subclass may override, in the order of their calls."""

    model: LernomaticModel | None
    optimizer: Any
    criterion: Any
    device: torch.device
    device_id: int
    num_epochs: int
    start_epoch: int
    cur_epoch: int
    iter_per_epoch: int
    learning_rate: float
    momentum: float
    weight_decay: float
    loss_function: str
    optim_function: str
    batch_size: int
    val_batch_size: int
    test_batch_size: int
    shuffle: bool
    num_workers: int
    drop_last: bool
    train_dataset: Any
    val_dataset: Any
    test_dataset: Any
    train_loader: Any
    val_loader: Any
    test_loader: Any
    save_every: int
    print_every: int
    lr_scheduler: Any
    mtm_scheduler: Any
    tb_writer: Any
    loss_history: torch.Tensor
    val_loss_history: torch.Tensor
    acc_history: torch.Tensor
    loss_iter: int
    val_loss_iter: int
    acc_iter: int
    best_acc: float

    def _init_device(self) -> None:
        self.device = torch.device("cpu" if self.device_id < 0 else f"cuda:{self.device_id}")

    def _init_optimizer(self) -> None:
        """Make the loss and the optimizer of their names; there is none without a model."""
        self.criterion = _named(torch.nn, self.loss_function, "loss_function")()
        self.optimizer = None
        if self.model is not None:
            kind = _named(torch.optim, self.optim_function, "optim_function")
            options = {"lr": self.learning_rate, "weight_decay": self.weight_decay, "momentum": self.momentum}
            taken = inspect.signature(kind).parameters
            given = {name: value for name, value in options.items() if name in taken}
            for name, usual in (("weight_decay", 1e-5), ("momentum", 0.5)):
                if name not in taken and options[name] != usual:
                    warnings.warn(f"{name}={options[name]} has no effect: {kind.__name__} has none", stacklevel=4)
            self.optimizer = kind(self.model.get_model_parameters(), **given)

    def _init_dataloaders(self) -> None:
        """Make a loader of each data set; None where there is none."""
        self.train_loader = self._loader(self.train_dataset, self.batch_size, self.shuffle, self.drop_last)
        self.val_loader = self._loader(self.val_dataset, self.val_batch_size)
        self.test_loader = self._loader(self.test_dataset, self.test_batch_size)

    def _loader(self, dataset: Any, batch_size: int, shuffle: bool = False, drop_last: bool = False) -> Any:
        if dataset is None:
            return None
        return DataLoader(dataset, batch_size, shuffle=shuffle, drop_last=drop_last, num_workers=self.num_workers)

    def _init_history(self) -> None:
        """Make room for losses by iteration, on the device, and accuracies by epoch."""
        self.loss_iter, self.val_loss_iter, self.acc_iter = 0, 0, 0
        self.loss_history = torch.zeros(length(self.train_loader) * self.num_epochs, device=self.device)
        self.val_loss_history = torch.zeros(length(self.val_loader) * self.num_epochs, device=self.device)
        self.acc_history = torch.zeros(length(self.val_loader) * self.num_epochs, dtype=torch.float64)

    def _send_to_device(self) -> None:
        for model in self.models().values():
            model.send_to(self.device)

    def models(self) -> dict[str, LernomaticModel]:
        """Return the models by the names of their attributes."""
        return {name: value for name, value in vars(self).items() if isinstance(value, LernomaticModel)}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by the names of their attributes; steps of the first are counted."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.optim.Optimizer)}


def length(loader: Any) -> int:
    """Return how many batches a loader has; 0 for None."""
    return 0 if loader is None else len(loader)


def _named(module: Any, name: str, argument: str) -> Any:
    found = getattr(module, name, None)
    if not isinstance(found, type):
        names = [one for one in dir(module) if isinstance(getattr(module, one), type)]
        raise ValueError(f"{argument}={name!r} is no class of {module.__name__}{hookline.nearest(name, names)}")
    return found
