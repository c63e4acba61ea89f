"""The current window: the micro-batches of one optimizer step (gradient accumulation)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hookline.interfaces import Stage
from hookline.outputs import Outputs

if TYPE_CHECKING:
    from hookline.run import Run


class Window:
    """Knows how many micro-batches make an optimizer step, the weight of each, and the current one."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.size = 1
        """Micro-batches of one optimizer step; the last window of an epoch may have fewer."""
        self.padding = 0
        """Micro-batches at the end of this window that only keep ranks in step; their outputs are dropped."""
        self.begun: list[Outputs] = []
        """The outputs of the finished micro-batches, if a run was cut within a window; else empty."""
        self.weights: list[float] = []
        """The weight of each micro-batch in a mean: its samples, or the result of `get_weight`."""
        self.parts: list[float] | None = None
        """The factor of each micro-batch's loss in the window, if `get_weight` has a performer; else None."""
        self._index: int | None = None  # of the current micro-batch

    def resize(self, size: int) -> None:
        """Set the number of micro-batches of the next windows."""
        self.size = size

    def pad(self, micro_batches: int) -> None:
        """State that the last micro-batches of the next window only keep ranks in step."""
        self.padding = micro_batches

    @property
    def micro_batch_size(self) -> int:
        """Samples of one micro-batch on one rank.

        Raises:
            ValueError: the samples of a step do not divide equally.
        """
        total, shares = self.run.options.train_batch_size, self.run.shares
        parts = shares * self.size
        if total % parts:
            raise ValueError(
                f"train_batch_size={total} cannot be shared equally by {shares} rank(s) × "
                f"{self.size} micro-batch(es) = {parts}; it leaves {total % parts} over"
            )
        return int(total // parts)

    # A window -------------------------------------------------------------------------

    def begin(self, batches: Sequence[Any]) -> int:
        """Begin with the first micro-batch; return the number of samples of all of them."""
        run, samples = self.run, 0
        self.weights, self.parts, self._index = [], None, 0
        for batch in batches:
            count = run.hook.count_samples(trainer=run, batch=batch, stage=Stage.TRAIN)
            samples += count
            self.weights.append(float(count))
        if run.plugins.heard["get_weight"]:
            self._weigh(batches)
        return samples

    def end(self) -> None:
        """Leave the window."""
        self._index = None

    def begin_micro_batch(self, index: int) -> None:
        """Go to a micro-batch, whose weight applies to means from here on."""
        self._index = index

    @property
    def weight(self) -> float:
        """The weight of a value logged in the current micro-batch."""
        return 1.0 if self._index is None or self._index >= len(self.weights) else self.weights[self._index]

    def _weigh(self, batches: Sequence[Any]) -> None:
        """Get the weight of each micro-batch, and its factor in the window of all ranks."""
        run, real = self.run, len(batches) - self.padding
        for index, batch in enumerate(batches):
            asked = index < real
            self.weights[index] = (
                float(run.hook.get_weight(trainer=run, batch=batch, stage=Stage.TRAIN)) if asked else 0.0
            )
        total = sum(self.weights)
        if run.world_size > 1:
            value = torch.tensor(total, dtype=torch.float64)
            total = run.hook.all_reduce(trainer=run, value=value, op="sum").item()
        self.parts = [weight * run.shares / total if total else 0.0 for weight in self.weights]

    # A window that was cut --------------------------------------------------------------

    def cut(self, outputs: Sequence[Outputs]) -> None:
        """Keep the finished part of a window that another run will continue."""
        self.begun = list(outputs)

    def go_on(self) -> list[Outputs]:
        """Return the finished outputs of a window that was cut, and forget them."""
        begun, self.begun = self.begun, []
        return begun
