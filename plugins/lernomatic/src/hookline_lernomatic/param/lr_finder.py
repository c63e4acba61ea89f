"""The search of a range of learning rates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hookline import copy_state, kept_rng

if TYPE_CHECKING:
    from hookline_lernomatic.train.trainer import Trainer

METHODS = ("min_loss", "max_range", "laplace", "sobel", "max_acc")


class LogFinder:
    """Trains a little with a learning rate that rises by equal factors, and says from where to where it is worth it.

    Weights, optimizers and random states are afterwards what they were.

    Args:
        trainer: whose model, data, loss and optimizer it is.
        lr_min: the first learning rate.
        lr_max: the last.
        num_iters: batches to train on.
        method: how the range is read off the smoothed losses. "min_loss" ends where they are lowest, "sobel" where they
            fall most steeply, "laplace" where their fall bends up most, "max_acc" where the accuracy on a batch is
            highest; each begins at a tenth of that. "max_range" is the longest stretch over which they fall.
        smooth: how much of each smoothed loss is the one before, from 0 to below 1.

    Raises:
        ValueError: a value that cannot be.
    """

    def __init__(
        self,
        trainer: Trainer,
        lr_min: float = 1e-6,
        lr_max: float = 1.0,
        num_iters: int = 100,
        method: str = "min_loss",
        smooth: float = 0.8,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}")
        if not 0 < lr_min < lr_max:
            raise ValueError(f"lr_min={lr_min} and lr_max={lr_max} must be above 0, and in order")
        if num_iters < 4:
            raise ValueError(f"num_iters={num_iters} must be at least 4")
        if not 0 <= smooth < 1:
            raise ValueError(f"smooth={smooth} must be from 0 to below 1")
        self.trainer, self.method, self.smooth = trainer, method, smooth
        self.rates = [lr_min * (lr_max / lr_min) ** (number / (num_iters - 1)) for number in range(num_iters)]
        self.losses: list[float] = []
        """Of each iteration, smoothed; shorter than `rates` where the loss left what is worth looking at."""
        self.accuracies: list[float] = []

    def find(self) -> tuple[float, float]:
        """Return the lowest and the highest learning rate that are worth it.

        Raises:
            ValueError: the losses tell nothing, or there are no accuracies for "max_acc".
        """
        trainer = self.trainer
        nets = [model.net for model in trainer.models().values()]
        parts: list[Any] = [*nets, *trainer.optimizers().values()]
        kept = copy_state([part.state_dict() for part in parts])
        modes = [net.training for net in nets]
        try:
            with kept_rng():
                self._try_rates()
        finally:
            for part, state in zip(parts, kept, strict=True):
                part.load_state_dict(state)
            for net, mode in zip(nets, modes, strict=True):
                net.train(mode)
                net.zero_grad()
        return self._read()

    def _try_rates(self) -> None:
        trainer = self.trainer
        for model in trainer.models().values():
            model.set_train()
        self.losses, self.accuracies = [], []
        batches = iter(trainer.train_loader)
        mean = 0.0
        for number, rate in enumerate(self.rates):
            batch = next(batches, None)
            if batch is None:
                batches = iter(trainer.train_loader)
                batch = next(batches)
            for optimizer in trainer.optimizers().values():
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad()
            loss, output, target = trainer.batch_loss(tuple(part.to(trainer.device) for part in batch))
            mean = self.smooth * mean + (1 - self.smooth) * loss.item()
            smoothed = mean / (1 - self.smooth ** (number + 1))
            if not smoothed < 4 * min([*self.losses, smoothed]):  # it has left for good, or is NaN
                break
            self.losses.append(smoothed)
            if output.ndim == 2 and target.ndim == 1 and not target.is_floating_point():
                self.accuracies.append((output.argmax(dim=1) == target).float().mean().item())
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in trainer.optimizers().values():
                optimizer.step()

    def _read(self) -> tuple[float, float]:
        if len(self.losses) < 4:
            raise ValueError(
                f"the loss left after {len(self.losses)} of {len(self.rates)} iterations: begin lower than "
                f"{self.rates[0]:g}"
            )
        if self.method == "max_range":
            first, last = _longest_fall(self.losses)
            return self.rates[first], self.rates[last]
        losses = torch.tensor(self.losses)
        slopes = losses[1:] - losses[:-1]
        if self.method == "max_acc":
            if len(self.accuracies) < len(self.losses):
                raise ValueError('method="max_acc" needs targets that are classes; take another')
            at = int(torch.tensor(self.accuracies).argmax())
        elif self.method == "min_loss":
            at = int(losses.argmin())
        elif self.method == "sobel":
            at = int(slopes.argmin()) + 1
        else:
            at = int((slopes[1:] - slopes[:-1]).argmax()) + 1
        return max(self.rates[at] / 10, self.rates[0]), self.rates[at]


def _longest_fall(losses: list[float]) -> tuple[int, int]:
    """Return where the longest stretch of falling losses begins and ends."""
    best, first = (0, 0), 0
    for index in range(1, len(losses)):
        if losses[index] >= losses[index - 1]:
            first = index
        elif index - first > best[1] - best[0]:
            best = first, index
    return best
