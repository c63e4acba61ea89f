"""Find a learning rate: try rising rates before training, and leave no trace."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, Stage, copy_state, hookimpl, kept_rng
from hookline.files import make_folder, replacing
from hookline_lr_find.curve import draw, save_picture

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

log = logging.getLogger("hookline.lr_find")


@dataclass(frozen=True)
class Point:
    """One step of the sweep."""

    rate: float
    loss: float
    smoothed: float


@dataclass(frozen=True)
class Found:
    """The result of a sweep."""

    suggestion: float | None
    """The rate at which the loss falls most steeply; None if it does not fall."""
    diverged: bool
    """Whether the sweep ended early because the loss diverged."""
    points: list[Point]


@dataclass(eq=False)
class LrFind(CallbackInterface):
    """Try rising learning rates before the first step, draw the losses, and suggest a rate; then train as if without.

    Each step of the sweep is a whole update with the next rate. The largest rate of the optimizers' groups is swept,
    and the others keep their proportion to it. Afterwards the whole run is put back.
    """

    low: float = 1e-7
    """The first rate."""
    high: float = 10.0
    """The last rate, if the loss does not diverge before."""
    steps: int = 100
    """Updates from the first to the last."""
    scale: str = "exponential"
    """"exponential": each rate is the last one times a factor; "linear": plus a number."""
    smoothing: float = 0.9
    """The share of the losses before in the smoothed loss; 0 smooths nothing."""
    diverged: float | None = 4.0
    """End the sweep when the smoothed loss is above its minimum times this; null to go on. NaN always ends it."""

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(f"lr_find.low={self.low} must be above 0 and below lr_find.high={self.high}, both finite")
        if self.steps < 2:
            raise ValueError(f"lr_find.steps={self.steps} must be at least 2")
        if self.scale not in ("exponential", "linear"):
            raise ValueError(f"lr_find.scale={self.scale!r} must be one of exponential, linear")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"lr_find.smoothing={self.smoothing} must be from 0 to below 1, such as 0.9")
        if self.diverged is not None and not self.diverged > 1:
            raise ValueError(f"lr_find.diverged={self.diverged} must be above 1, or null never to end early")
        self.found: Found | None = None
        """The result, once the sweep is done."""

    @hookimpl
    def on_setup(self) -> None:
        self.found = None

    @hookimpl  # behind those who choose the size of micro-batches, tryfirst
    def on_begin_train_epoch(self, trainer: Trainer) -> None:  # type: ignore[override]
        if self.found is not None or trainer.global_step or trainer.position or trainer.window.begun:
            return  # a resumed run
        state = copy_state(trainer.hook.get_run_state(trainer=trainer))
        with kept_rng():
            try:
                with trainer.idling():
                    points = list(self._sweep(trainer))
            finally:
                trainer.hook.set_run_state(trainer=trainer, state=state, stage=Stage.TRAIN)
        self.found = Found(steepest(points), len(points) < self.steps, points)
        if trainer.rank == 0:
            self._report(trainer, self.found)

    # The sweep ------------------------------------------------------------------------

    def _sweep(self, trainer: Trainer) -> Iterator[Point]:
        """Yield a point for each update, until the loss diverges."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        before = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        bases = [float(group.get("initial_lr", group["lr"])) for group in groups]
        if not max(bases) > 0:
            raise ValueError("lr_find: all learning rates of the optimizers are 0, so none can be swept")
        windows, mean, least = windows_of(trainer), 0.0, math.inf
        for step in range(self.steps):
            rate = self._rate(step)
            for group, values, base in zip(groups, before, bases, strict=True):
                group.update(values)  # schedulers have moved them
                set_rate(group, rate * base / max(bases))
            loss = try_step(trainer, next(windows))
            mean = self.smoothing * mean + (1 - self.smoothing) * loss
            smoothed = mean / (1 - self.smoothing ** (step + 1))
            least = min(least, smoothed)
            too_high = self.diverged is not None and smoothed > self.diverged * least > 0
            if too_high or not math.isfinite(loss):
                return
            yield Point(rate, loss, smoothed)

    def _rate(self, step: int) -> float:
        part = step / (self.steps - 1)
        if self.scale == "linear":
            return self.low + (self.high - self.low) * part
        return float(self.low * (self.high / self.low) ** part)

    def _report(self, trainer: Trainer, found: Found) -> None:
        """Log the suggestion and the curve, and write them into the folder of the run."""
        log.info("%s\n%s", said(found), "\n".join(draw(found.points, found.suggestion)))
        folder = trainer.run_dir / "lr_find"
        make_folder(folder)
        with replacing(folder / "points.json") as new:
            new.write_text(json.dumps(dataclasses.asdict(found), indent=2))
        try:
            save_picture(folder / "curve.png", found.points, found.suggestion)
        except ValueError as error:
            log.info("%s", error)


def windows_of(trainer: Trainer) -> Iterator[list[Any]]:
    """Yield windows of training data, the epoch from its beginning again when it is over."""
    while True:
        batches, window = iter(trainer.training.extra_loader()), None
        while window := trainer.hook.take_window(trainer=trainer, batches=batches):
            yield window


def try_step(trainer: Trainer, window: list[Any]) -> float:
    """Do one update; return the mean loss of its samples, over all ranks."""
    trainer.window.begin(window)
    try:
        outputs = trainer.hook.update(trainer=trainer, window=window)
        real = len(window) - trainer.padding
        pairs = list(zip(outputs[:real], trainer.window.weights, strict=False))
    finally:
        trainer.window.end()
    total = torch.zeros(2, dtype=torch.float64)
    for row, weight in pairs:
        if weight:  # the mean of nothing is NaN
            total += torch.tensor([row[0].detach().item() * weight, weight], dtype=torch.float64)
    total = trainer.hook.all_reduce(trainer=trainer, value=total, op="sum")
    return float(total[0] / total[1])


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the learning rate of a group, in place where it is a tensor."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def steepest(points: list[Point]) -> float | None:
    """Return the rate at which the loss falls most steeply by the logarithm of the rate; None if it does not fall.

    A straight line goes through the losses of each fifth of the points that follow each other. The rate in the middle
    of the steepest line counts, of those whose slope is beyond three of its standard errors.
    """
    size = max(len(points) // 5, 4)
    if len(points) < size:
        return None
    x = torch.tensor([math.log(point.rate) for point in points], dtype=torch.float64).unfold(0, size, 1)
    y = torch.tensor([point.loss for point in points], dtype=torch.float64).unfold(0, size, 1)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    spread = x.square().sum(1)
    slopes = (x * y).sum(1) / spread
    errors = ((y - slopes[:, None] * x).square().sum(1) / (size - 2) / spread).sqrt()
    slopes[slopes > -3 * errors] = math.inf  # also a fall by chance
    place = int(slopes.argmin())
    return points[place + size // 2].rate if slopes[place] < 0 else None


def said(found: Found) -> str:
    """Return a result in one sentence."""
    end = f"{len(found.points)} rates tried" + (", then the loss diverged" if found.diverged else "")
    if found.suggestion is None:
        return f"no learning rate to suggest, since the loss falls nowhere by more than chance: {end}"
    return f"suggested learning rate {found.suggestion:.3g}, where the loss falls most steeply: {end}"
