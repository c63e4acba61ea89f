"""The outputs of a step: brought into one form, and collected only as far as plugins take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Outputs = tuple[Any, ...]


def as_outputs(returned: Any, step: str) -> Outputs:
    """Return the outputs of a step as a tuple.

    Raises:
        TypeError: a dictionary, because its order would decide which output is the loss.
    """
    if isinstance(returned, torch.Tensor):
        return (returned,)
    if returned is None:
        return ()
    if isinstance(returned, dict):
        raise TypeError(
            f"{step} returned a dict with keys {list(returned)}: return the tensors themselves, "
            "the loss first (and `self.log(name=value)` what only wants to be seen)"
        )
    return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)


def with_loss(returned: Any) -> Outputs:
    """Return the outputs of `train_step` as a tuple that begins with the loss.

    Raises:
        TypeError: it does not begin with a loss that has a graph.
    """
    outputs = (returned,) if isinstance(returned, torch.Tensor) else as_outputs(returned, "train_step")
    loss = outputs[0] if outputs else None
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise TypeError(
            "the first output of train_step must be the loss, a tensor of one element that "
            f"requires grad; it is {_describe(loss)}"
        )
    return outputs


def kept(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor without its graph, safe from later in-place changes.

    Copies it, on its device, if that may happen: a parameter, a buffer, a batch, or a view of one. No other tensor
    shares memory with a fresh result of a computation.
    """
    fresh = value.grad_fn is not None and not value._is_view()  # does not share memory; torch has no public test
    return value.detach() if fresh else value.detach().clone()


class WindowCut(BaseException):
    """Leaves a half-done window of a run that will be resumed; not an `Exception`, so that no code catches it."""

    def __init__(self, outputs: list[Outputs]) -> None:
        super().__init__()
        self.outputs = outputs


class Collector:
    """Collects the outputs of many batches, the first `room` of each, without a copy or a sync.

    Tensors stay detached on their own device; only `collate` concatenates them.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.rows: list[Outputs] = []

    def add(self, outputs: Outputs) -> None:
        """Keep the outputs of one micro-batch."""
        self.rows.append(detached(outputs[: self.room]))

    def collate(self) -> list[Any]:
        """Return one item per output and forget the rows."""
        rows, self.rows = self.rows, []
        return collate(rows)


def collate(rows: Sequence[Outputs]) -> list[Any]:
    """Combine rows of outputs, column by column.

    Scalar tensors become a vector; other tensors are concatenated along their first dimension. Other values, and
    tensors whose other dimensions differ, become a list.
    """
    if len(rows) == 1:  # the common case, one micro-batch: no copy
        return [
            [value] if not isinstance(value, torch.Tensor) else value if value.ndim else value.reshape(1)
            for value in rows[0]
        ]
    return [_column(values) for values in zip(*rows, strict=True)]


def detached(outputs: Outputs) -> Outputs:
    """Return outputs with their tensors detached, safe from later in-place changes; see `kept`."""
    return tuple([kept(value) if isinstance(value, torch.Tensor) else value for value in outputs])


def _column(values: Sequence[Any]) -> Any:
    if not all(isinstance(value, torch.Tensor) for value in values):
        return list(values)
    if all(value.ndim == 0 for value in values):
        return torch.stack(list(values))
    if len({(value.ndim, value.shape[1:]) for value in values}) > 1:
        return list(values)
    return torch.cat(list(values))


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, requires_grad={value.requires_grad}"
    return "missing" if value is None else f"a {type(value).__name__}"
