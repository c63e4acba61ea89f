"""The history of a trainer: losses by iteration, accuracies by epoch, and whatever a subclass keeps beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hookline_lernomatic.train.setup import Setup, length


class History(Setup):
    """Keeps every attribute whose name ends with `_history` or `_iter` and that holds numbers, and `best_acc`."""

    def get_loss_history(self) -> torch.Tensor:
        """Return the losses of training so far."""
        return self.loss_history[: self.loss_iter]

    def get_val_loss_history(self) -> torch.Tensor:
        """Return the losses of validations so far."""
        return self.val_loss_history[: self.val_loss_iter]

    def get_acc_history(self) -> torch.Tensor:
        """Return the accuracies so far."""
        return self.acc_history[: self.acc_iter]

    def get_cur_loss(self) -> float | None:
        """Return the last loss; None before the first."""
        return self.loss_history[self.loss_iter - 1].item() if self.loss_iter else None

    def get_cur_val_loss(self) -> float | None:
        """Return the last loss of a validation; None before the first."""
        return self.val_loss_history[self.val_loss_iter - 1].item() if self.val_loss_iter else None

    def get_cur_acc(self) -> float | None:
        """Return the last accuracy; None before the first."""
        return float(self.acc_history[self.acc_iter - 1]) if self.acc_iter else None

    def get_cur_epoch_loss(self) -> torch.Tensor:
        """Return the losses of the last epoch's worth of iterations."""
        return self.get_loss_history()[-length(self.train_loader) :]

    def get_cur_epoch_val_loss(self) -> torch.Tensor:
        """Return the losses of the last validation."""
        return self.get_val_loss_history()[-length(self.val_loader) :]

    def set_num_epochs(self, num_epochs: int) -> None:
        """Have training go on to another epoch, keeping the history."""
        self.num_epochs = num_epochs

    def make_room(self, name: str, more: int) -> None:
        """Lengthen a history, where it is this class's, so that it can take some more values."""
        history, count = getattr(self, name, None), getattr(self, name.replace("history", "iter"), 0)
        if isinstance(history, torch.Tensor) and count + more > len(history):
            setattr(self, name, torch.cat([history, history.new_zeros(count + more - len(history))]))

    def make_room_for_epochs(self, epochs: int) -> None:
        """Lengthen the whole history by what these epochs will add."""
        for name, loader in (
            ("loss_history", self.train_loader),
            ("val_loss_history", self.val_loader),
            ("acc_history", self.val_loader),
        ):
            self.make_room(name, length(loader) * epochs)

    def get_history(self) -> dict[str, Any]:
        """Return losses, accuracies and how many of them there are, as tensors and numbers."""
        kept = {}
        for name, value in vars(self).items():
            if name.endswith(("_history", "_iter")) or name == "best_acc":
                value = torch.as_tensor(value) if _is_array(value) else value
                if isinstance(value, (int, float, torch.Tensor)):
                    kept[name] = value
        return kept

    def set_history(self, history: Mapping[str, Any]) -> None:
        """Take them back; what is longer here keeps its length."""
        for name, value in history.items():
            here = getattr(self, name, None)
            if isinstance(value, torch.Tensor):
                value = _put(value, torch.as_tensor(here) if _is_array(here) else here)
                value = value.numpy() if _is_array(here) else value
            setattr(self, name, value)

    def save_history(self, fname: str | Path) -> None:
        """Write the history to a file that `torch.load` reads."""
        torch.save(self.get_history(), fname)

    def load_history(self, fname: str | Path) -> None:
        """Take the history of a file."""
        self.set_history(torch.load(fname, weights_only=True))


def _is_array(value: Any) -> bool:
    """Tell whether a value is an array of numpy, in which subclasses of LERNOMATIC keep histories of their own."""
    return hasattr(value, "__array__") and not isinstance(value, torch.Tensor)


def _put(kept: torch.Tensor, here: Any) -> torch.Tensor:
    """Return a kept history with the device and at least the length of the one that is here."""
    if not isinstance(here, torch.Tensor):
        return kept
    kept = kept.to(here.device)
    return torch.cat([kept, here.new_zeros(max(len(here) - len(kept), 0))])
