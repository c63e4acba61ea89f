"""The outputs of a step: brought into one form, and collected only as far as they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
            f"requires grad; it is {_describe(loss)}. Return it without .item() or .detach(), not "
            "under torch.no_grad(), and computed by parameters that require gradients"
        )
    return outputs


def kept(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor without its graph, safe from later in-place changes.

    Copies it, on its device, if that may happen: a parameter, a buffer, a batch, or a view of one. No other tensor
    shares memory with a fresh result of a computation.
    """
    fresh = value.grad_fn is not None and not value._is_view()  # does not share memory; torch has no public test
    return value.detach() if fresh else (value.detach() if value.requires_grad else value).clone()


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


def collate(rows: Sequence[Outputs], alone: bool = False) -> list[Any]:
    """Combine rows of outputs, column by column.

    Scalar tensors become a vector; other tensors are concatenated along their first dimension. Other values, and
    tensors whose other dimensions differ, become a list.

    Args:
        rows: the outputs of each batch.
        alone: there is never more than one row, so scalar tensors stay what they are.
    """
    if len(rows) == 1:  # the common case, one micro-batch: no copy
        return [
            [value] if not isinstance(value, torch.Tensor) else value if value.ndim or alone else value.reshape(1)
            for value in rows[0]
        ]
    return [_column(values) for values in zip(*rows, strict=True)]


class Kept(Outputs):
    """Outputs of a step, of which all behind the loss are `kept` already."""


def detached(outputs: Outputs) -> Outputs:
    """Return outputs with their tensors detached, safe from later in-place changes; see `kept`."""
    return tuple([kept(value) if isinstance(value, torch.Tensor) else value for value in outputs])


def first(outputs: Outputs, room: int) -> Outputs:
    """Return the first `room` outputs of a step, detached; what is kept already is not copied again."""
    if type(outputs) is Kept:
        return (kept(outputs[0]), *outputs[1:room])
    return detached(outputs[:room])


# Predictions --------------------------------------------------------------------------


def named_rows(outputs: Any, samples: int) -> dict[str, Any]:
    """Return the outputs of one prediction by name: tensors and lists, with one row for each sample.

    A tensor, an array or a list alone is named "prediction". A tuple or a mapping holds several outputs, at any depth:
    `{"a": (x, y)}` gives "a.0" and "a.1". None is no output. Tensors are detached and on their device.

    Args:
        outputs: what `predict_step` returned for a batch.
        samples: the samples of the batch: `len(places)` in `on_end_predict_step`.

    Raises:
        TypeError: an output that has no rows.
        ValueError: an output with another number of rows, or two of one name.
    """
    rows: dict[str, Any] = {}
    for name, value in _leaves(outputs, ""):
        name = name or "prediction"
        if not isinstance(value, (torch.Tensor, list)) and hasattr(value, "__array__"):
            value = torch.as_tensor(value)
        if not isinstance(value, (torch.Tensor, list)) or getattr(value, "ndim", 1) == 0:
            raise TypeError(
                f"predict_step returned {_describe(value)} as {name!r}, which has no row for each sample: return "
                "tensors whose first dimension is that of the samples, or lists with an item for each"
            )
        if len(value) != samples:
            raise ValueError(
                f"predict_step returned {len(value)} rows as {name!r} for a batch of {samples} samples: return one row "
                "for each sample (a tuple for several outputs, a list for what has another length for each), or a "
                "method count_samples(self, batch) of the module, marked @hookimpl, says how many samples there are"
            )
        if name in rows:
            raise ValueError(f"predict_step returned two outputs of the name {name!r}; name one of them otherwise")
        rows[name] = value.detach() if isinstance(value, torch.Tensor) else value
    return rows


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, tuple) else None
    if inner is not None:
        for key, one in inner:
            yield from _leaves(one, f"{name}.{key}" if name else str(key))
    elif value is not None:
        yield name, value


class Predictions:
    """Collects the predictions of one loader on the host, and puts those of all ranks together."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self.batches: list[dict[str, Any]] = []
        self.form: Any = None

    def add(self, outputs: Any, places: Sequence[int]) -> None:
        """Keep the outputs of one batch."""
        rows = named_rows(outputs, len(places))
        if self.batches and rows.keys() != self.batches[0].keys():
            raise ValueError(f"predict_step returned {[*rows]} for a batch, and {[*self.batches[0]]} for the first")
        self.form = _emptied(outputs)
        self.places += places
        self.batches.append({name: kept(row).cpu() if torch.is_tensor(row) else row for name, row in rows.items()})

    def own(self) -> tuple[list[int], Any, dict[str, list[Any]]]:
        """Return what this rank has: places, the form of the outputs, and rows of all batches by name."""
        names = self.batches[0] if self.batches else ()
        return self.places, self.form, {name: [batch[name] for batch in self.batches] for name in names}


def merged(ranks: Sequence[tuple[list[int], Any, dict[str, list[Any]]]]) -> Any:
    """Return the predictions of ranks, in the order of their places and in the form of one batch; None if none."""
    some = [rank for rank in ranks if rank[0]]
    places = [place for own, _, _ in some for place in own]
    order = sorted(range(len(places)), key=places.__getitem__)
    columns = []
    for name in some[0][2] if some else ():
        column = _column([rows for _, _, named in some for rows in named[name]])
        if not isinstance(column, torch.Tensor):
            column = [row for rows in column for row in rows]
        columns.append(column[order] if isinstance(column, torch.Tensor) else [column[place] for place in order])
    return _filled(some[0][1], iter(columns)) if some else None


def _emptied(value: Any) -> Any:
    """Return outputs without their values."""
    if isinstance(value, Mapping):
        return {key: _emptied(one) for key, one in value.items()}
    return tuple(map(_emptied, value)) if isinstance(value, tuple) else None if value is None else ...


def _filled(form: Any, columns: Iterator[Any]) -> Any:
    if isinstance(form, dict):
        return {key: _filled(one, columns) for key, one in form.items()}
    if isinstance(form, tuple):
        return tuple([_filled(one, columns) for one in form])
    return None if form is None else next(columns)


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
