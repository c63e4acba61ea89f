"""The search of a range of learning rates."""

from __future__ import annotations

import itertools
import math
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hookline import copy_state, kept_rng, nearest
from hookline_lernomatic.model.common import networks

if TYPE_CHECKING:
    from hookline_lernomatic.train.trainer import Trainer

METHODS = ("max_acc", "thresh_acc", "min_loss", "max_range", "laplace", "sobel")
KERNELS = {"laplace": (-1.0, 4.0, -1.0), "sobel": (1.0, 0.0, -1.0)}
UNREAD = {"gamma": 0.999995, "grad_thresh": 0.002, "lr_mult": 0.0, "num_iter": 0}
"""Arguments that LERNOMATIC takes and never reads, with the values of the attributes."""
KEPT = (
    *("smooth_loss_history", "log_lr_history", "acc_history", "best_loss", "best_loss_idx", "best_acc", "best_acc_idx"),
    *("lr_min", "lr_max", "num_epochs", "explode_thresh", "beta", "lr_min_factor", "lr_max_scale"),
    *("lr_select_method", "lr_trunc", "max_batches", "acc_test", "print_every", "verbose", "expr_id", *UNREAD),
)  # fmt: skip


class LRFinder:
    """What a search of learning rates has found, and the range that is read off it.

    Args:
        trainer: whose model, data, loss and optimizer it is; None to load what another has found.
        lr_min: the first learning rate.
        lr_max: the last.
        num_epochs: the most passes over the training data.
        max_batches: batches of one pass; 0 for all.
        explode_thresh: the search ends where the smoothed loss is this many times the lowest.
        beta: how much of each smoothed loss is the one before, from 0 to below 1.
        acc_test: measure the accuracy on the validation data before each step.
        lr_select_method: how the range is read: up to where the accuracy is highest ("max_acc") or the smoothed loss
            lowest ("min_loss"), or up to the last rate ("max_range"); or from the first to the last rate whose accuracy
            is above 85 % of the highest ("thresh_acc"), is a peak ("laplace") or falls steeply ("sobel").
        lr_max_scale: the exponent of the rate found, times this, is that of the highest.
        lr_min_factor: the exponent of the highest rate, times this, is that of the lowest.
        lr_trunc: rates at both ends that "laplace" and "sobel" do not look at for the highest value.
        print_every: iterations from one printed line to the next.
        verbose: print them.
        expr_id: a name that is saved with it.
        unread: arguments that LERNOMATIC has and never reads; a warning says so.

    Raises:
        TypeError: an unknown argument, with the nearest.
        ValueError: a value that cannot be.
    """

    def __init__(
        self,
        trainer: Trainer | None,
        *,
        lr_min: float = 1e-6,
        lr_max: float = 1.0,
        num_epochs: int = 8,
        max_batches: int = 0,
        explode_thresh: float = 4.0,
        beta: float = 0.999,
        acc_test: bool = True,
        lr_select_method: str = "max_acc",
        lr_max_scale: float = 1.0,
        lr_min_factor: float = 2.0,
        lr_trunc: int = 10,
        print_every: int = 20,
        verbose: bool = False,
        expr_id: str | None = None,
        **unread: Any,
    ) -> None:
        for name in unread:
            if name not in UNREAD:
                raise TypeError(f"{self!r} has no argument {name!r}{nearest(name, KEPT)}")
            warnings.warn(f"{self!r}: {name} has no effect, here as in LERNOMATIC", stacklevel=2)
        if lr_select_method not in METHODS:
            raise ValueError(f"lr_select_method={lr_select_method!r} must be one of {', '.join(METHODS)}")
        if not 0 < lr_min < lr_max:
            raise ValueError(f"lr_min={lr_min} and lr_max={lr_max} must be above 0, and in order")
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta} must be from 0 to below 1")
        if not acc_test and lr_select_method not in ("min_loss", "max_range"):
            raise ValueError(
                f"acc_test=False measures no accuracies, and lr_select_method={lr_select_method!r} reads them"
            )
        self.trainer, self.lr_min, self.lr_max, self.num_epochs = trainer, lr_min, lr_max, num_epochs
        self.max_batches, self.explode_thresh, self.beta, self.acc_test = max_batches, explode_thresh, beta, acc_test
        self.lr_select_method, self.lr_max_scale, self.lr_min_factor = lr_select_method, lr_max_scale, lr_min_factor
        self.lr_trunc, self.print_every, self.verbose, self.expr_id = lr_trunc, print_every, verbose, expr_id
        vars(self).update(UNREAD | unread)
        self.lr_mult: float
        """The factor from one rate to the next."""
        self._forget()

    def __repr__(self) -> str:
        return type(self).__name__

    def _forget(self) -> None:
        self.smooth_loss_history: list[float] = []
        self.log_lr_history: list[float] = []
        """The exponents, to the base of 10, of the learning rates that were tried."""
        self.acc_history: list[float] = []
        self.best_loss, self.best_loss_idx, self.best_acc, self.best_acc_idx = math.inf, 0, 0.0, 0

    def check_loaders(self) -> Trainer:
        """Return the trainer.

        Raises:
            ValueError: it lacks data, or there is none.
        """
        trainer = self.trainer
        if trainer is None or trainer.train_loader is None:
            raise ValueError(f"{self!r} has no {'trainer' if trainer is None else 'training data'} to search with")
        if self.acc_test and trainer.val_loader is None:
            raise ValueError(
                f"{self!r} measures accuracies on validation data, and the trainer has none: give it val_dataset, or "
                'acc_test=False with lr_select_method="min_loss"'
            )
        return trainer

    def find(self) -> tuple[float, float]:
        """Search, and return the range."""
        raise NotImplementedError(f"{self!r}.find() is to search")

    # What was found -------------------------------------------------------------------

    def get_lr_history(self) -> list[float] | None:
        """Return the exponents of the rates that were tried; None before a search."""
        return self.log_lr_history or None

    def get_lr_range(self) -> tuple[float, float]:
        """Return the lowest and the highest learning rate that are worth it.

        Raises:
            ValueError: nothing was searched yet, or nothing found.
        """
        logs = self.log_lr_history
        if not logs:
            raise ValueError(f"{self!r} has tried no learning rate yet: call find()")
        method = self.lr_select_method
        ends = {"max_acc": self.best_acc_idx, "min_loss": self.best_loss_idx, "max_range": -1}
        if method in ends:
            high = logs[ends[method]] * self.lr_max_scale
            low = high * self.lr_min_factor
        else:
            low, high = (logs[place] for place in self._places(method))
        if low >= high:
            warnings.warn(
                f"{self!r} found no range: 10 to the {high:.3g} is highest and 10 to the {low:.3g} lowest. Where the "
                "highest rate is 1 or more, its exponent times lr_min_factor is not below it: search to a lower lr_max",
                stacklevel=2,
            )
        return 10**low, 10**high

    def _places(self, method: str) -> tuple[int, int]:
        """Return the first and the last place that stands out in the accuracies."""
        seen = torch.tensor(self.acc_history, dtype=torch.float64)
        share, within = 0.85, seen
        if method in KERNELS:
            kernel = torch.tensor(KERNELS[method], dtype=torch.float64)
            # the accuracies go on beyond their ends as they are there, so that an end is no edge
            ends = torch.nn.functional.pad(seen[None, None], (1, 1), mode="replicate")
            seen = torch.nn.functional.conv1d(ends, kernel[None, None])[0, 0]
            share, within = 0.9, seen[self.lr_trunc : len(seen) - self.lr_trunc]
        if not len(within) or not within.max() > 0:
            raise ValueError(f"lr_select_method={method!r} finds nothing in {len(seen)} accuracies: take another")
        places = (seen > share * within.max()).nonzero().flatten().tolist()
        return places[0], places[-1]

    # Files ----------------------------------------------------------------------------

    def get_params(self) -> dict[str, Any]:
        """Return what was asked and found, as plain data."""
        return {name: getattr(self, name) for name in KEPT}

    def save(self, filename: str | Path) -> None:
        """Write what was asked and found to a file that `torch.load` reads."""
        torch.save(self.get_params(), filename)

    def load(self, filename: str | Path) -> None:
        """Take what another search has written by `save`.

        Raises:
            ValueError: it is another file, such as a pickle of LERNOMATIC.
        """
        if not zipfile.is_zipfile(filename):
            raise ValueError(
                f"{filename} was not written by save() of hookline_lernomatic; the files of LERNOMATIC are pickles, "
                "which would run code, and are not read"
            )
        vars(self).update(torch.load(filename, weights_only=True))

    # Pictures -------------------------------------------------------------------------

    def plot_lr_vs_acc(self, ax: Any, title: str | None = None, log: bool = False) -> None:
        """Draw the accuracies over the rates on axes of matplotlib, with the range."""
        self._plot(ax, self.acc_history, "Accuracy", title, log)

    def plot_lr_vs_loss(self, ax: Any, title: str | None = None, log: bool = False) -> None:
        """Draw the smoothed losses over the rates on axes of matplotlib, with the range."""
        self._plot(ax, self.smooth_loss_history, "Smooth loss", title, log)

    def _plot(self, ax: Any, values: list[float], name: str, title: str | None, log: bool) -> None:
        if not values:
            raise ValueError(f"{self!r} has nothing to draw: call find(), for accuracies with acc_test=True")
        ax.plot([at if log else 10**at for at in self.log_lr_history], values)
        for rate, label in zip(self.get_lr_range(), ("lr_min", "lr_max"), strict=True):
            ax.axvline(x=math.log10(rate) if log else rate, color="r", label=label)
        ax.set_xlabel("Learning rate")
        ax.set_ylabel(name)
        ax.set_title(title or f"{name} vs. learning rate [{self.lr_select_method}]")


class LogFinder(LRFinder):
    """Trains a little with a learning rate that rises by equal factors, from `lr_min` to `lr_max`.

    It takes as many iterations as the training data have batches.
    Weights, optimizers, modes and random states are afterwards what they were.
    """

    def find(self) -> tuple[float, float]:
        """Search, and return the range: the lowest and the highest learning rate that are worth it.

        Raises:
            ValueError: there are no data, or nothing was found.
        """
        trainer = self.check_loaders()
        nets = [net for model in trainer.models().values() for net in networks(model).values()]
        parts: list[Any] = [*nets, *trainer.optimizers().values()]
        kept = copy_state([part.state_dict() for part in parts])
        modes = [(module, module.training) for net in nets for module in net.modules()]
        try:
            with kept_rng():
                self._try_rates(trainer)
        finally:
            for part, state in zip(parts, kept, strict=True):
                part.load_state_dict(state)
            for module, mode in modes:
                module.training = mode
            for net in nets:
                net.zero_grad()
        return self.get_lr_range()

    def _try_rates(self, trainer: Trainer) -> None:
        self._forget()
        steps = len(trainer.train_loader)
        self.lr_mult = (self.lr_max / self.lr_min) ** (1 / steps)
        mean, first, last = 0.0, math.log10(self.lr_min), math.log10(self.lr_max)
        for index, batch in enumerate(itertools.islice(self._batches(trainer), steps + 1)):
            exponent = first + (last - first) * index / steps
            trainer.set_learning_rate(10**exponent)
            for model in trainer.models().values():
                model.set_train()
            for optimizer in trainer.optimizers().values():
                optimizer.zero_grad()
            loss = trainer.batch_loss(to_device(batch, trainer))[0]
            mean = self.beta * mean + (1 - self.beta) * loss.item()
            smooth = mean / (1 - self.beta ** (index + 1))
            if smooth < self.best_loss:
                self.best_loss, self.best_loss_idx = smooth, index
            if self.acc_test:
                self._take_accuracy(trainer, index)
            self.smooth_loss_history.append(smooth)
            self.log_lr_history.append(exponent)
            if self.verbose and index % self.print_every == 0:
                print(
                    f"[FIND_LR] : {index}/{steps}, loss {smooth:.6f} (best {self.best_loss:.6f}), lr {10**exponent:g}"
                )
            if not smooth <= self.explode_thresh * self.best_loss:  # it has left for good, or is NaN
                if index < 3:
                    raise ValueError(f"the loss left after {index} iterations: begin lower than lr_min={self.lr_min:g}")
                break
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in trainer.optimizers().values():
                optimizer.step()

    def _batches(self, trainer: Trainer) -> Iterator[Any]:
        """Yield the batches of the passes."""
        for _ in range(self.num_epochs):
            yield from itertools.islice(trainer.train_loader, self.max_batches or None)

    def _take_accuracy(self, trainer: Trainer, index: int) -> None:
        """Measure the accuracy on the validation data with the weights of now."""
        for model in trainer.models().values():
            model.set_eval()
        right = samples = 0
        with torch.no_grad():
            for batch in trainer.val_loader:
                _, output, target = trainer.batch_loss(to_device(batch, trainer))
                if output.ndim != 2 or target.ndim != 1 or target.is_floating_point():
                    raise ValueError(
                        f"{self!r} measures accuracies, which needs outputs (samples, classes) and targets that are "
                        'classes: give acc_test=False with lr_select_method="min_loss"'
                    )
                right += int((output.argmax(dim=1) == target).sum())
                samples += len(target)
        self.acc_history.append(right / samples)
        if self.acc_history[-1] > self.best_acc:
            self.best_acc, self.best_acc_idx = self.acc_history[-1], index


def to_device(batch: Any, trainer: Trainer) -> tuple[Any, ...]:
    """Return a batch on the device of a trainer."""
    return tuple(part.to(trainer.device) for part in batch)


def lr_finder_auto_load(filename: str | Path) -> LRFinder:
    """Return a finder with what another has written by `save`."""
    finder = LogFinder(None)
    finder.load(filename)
    return finder
