"""Running reductions of logged values: kept on their device, copied off it once per flush."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from hookline.outputs import kept

REDUCTIONS = ("mean", "sum", "min", "max", "last")
FOLD_AT = 256  # values before they are folded into one: memory does not grow with the interval

_COMBINE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": torch.sum,
    "sum": torch.sum,
    "min": torch.amin,
    "max": torch.amax,
    "last": lambda values: values[-1],
}

_NOTHING = {"mean": 0.0, "sum": 0.0, "min": math.inf, "max": -math.inf, "last": math.nan}
Number = float | int | torch.Tensor
AllReduce = Callable[..., torch.Tensor]


class Reduction:
    """A running mean, sum, minimum, maximum or last value of numbers on any device.

    It keeps tensors as they are until there are `FOLD_AT` of them: folding then costs a few kernels
    for all of them. Sums are in float64, unless the device lacks it.
    """

    __slots__ = ("_pending", "_value", "_weight", "_weights", "reduce", "sync")

    def __init__(self, reduce: str = "mean", sync: bool = False) -> None:
        self.reduce = reduce
        self.sync = sync
        self._pending: list[Number] = []
        self._weights: list[float] = []
        self._value: torch.Tensor | None = None
        self._weight = 0.0

    def add(self, value: Number, weight: float = 1.0) -> None:
        """Add one number; a tensor must be detached and of shape ()."""
        self._pending.append(value)
        self._weights.append(weight)
        if len(self._pending) >= FOLD_AT:
            self._fold()

    def add_sum(self, total: torch.Tensor, weight: float) -> None:
        """Add a weighted sum of numbers, of shape () and `wide`, with the sum of its weights, to a mean."""
        self._fold()
        self._value = total if self._value is None else self._value + total
        self._weight += weight

    def _fold(self) -> None:
        if self.reduce == "mean":  # the mean of nothing is NaN, with weight 0
            self._pending = [value for value, weight in zip(self._pending, self._weights, strict=True) if weight]
            self._weights = [weight for weight in self._weights if weight]
        if not self._pending:
            return
        values, weight = stacked(self._pending), sum(self._weights)
        if self.reduce == "mean" and weight != len(values):
            values = wide(values)
            values = values * torch.tensor(self._weights, dtype=values.dtype, device=values.device)
        self._pending, self._weights = [], []
        self._combine(values, weight)

    def _combine(self, values: torch.Tensor, weight: float) -> None:
        values = wide(values)
        if self._value is not None and self.reduce != "last":
            values = torch.cat([self._value.reshape(1).to(values), values])
        self._value = _COMBINE[self.reduce](values)
        self._weight += weight

    def value(self, all_reduce: AllReduce | None = None) -> torch.Tensor:
        """Return the reduced value, a tensor of shape () on its device; over all ranks if `sync` is set."""
        self._fold()
        if self._value is None:  # only other ranks have values
            self._value = torch.tensor(_NOTHING[self.reduce], dtype=torch.float64)
        value, weight = self._value, torch.full_like(self._value, self._weight)
        if self.sync and all_reduce is not None and self.reduce != "last":
            op = "sum" if self.reduce == "mean" else self.reduce
            value, weight = all_reduce(value=torch.stack([value, weight]), op=op)
        return value / weight if self.reduce == "mean" else value

    def get_state(self) -> dict[str, Any]:
        """Return it as data, with pending values unfolded: folding earlier would round differently."""
        return {
            "reduce": self.reduce,
            "sync": self.sync,
            "value": self._value,
            "weight": self._weight,
            "pending": [v.clone() if isinstance(v, torch.Tensor) else v for v in self._pending],
            "weights": list(self._weights),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Reduction:
        """Make a reduction from what `get_state` returned."""
        reduction = cls(state["reduce"], state["sync"])
        reduction._value, reduction._weight = state["value"], state["weight"]
        reduction._pending, reduction._weights = list(state["pending"]), list(state["weights"])
        return reduction


def stacked(numbers: Sequence[Number]) -> torch.Tensor:
    """Return numbers as one tensor, on their device; those of Python and those that were loaded are on the CPU."""
    tensors = [one if isinstance(one, torch.Tensor) else torch.tensor(one, dtype=torch.float64) for one in numbers]
    device = next((one.device for one in tensors if one.device.type != "cpu"), torch.device("cpu"))
    return torch.stack([one.to(device, non_blocking=True) for one in tensors])


def wide(values: torch.Tensor) -> torch.Tensor:
    """Return numbers in the widest floating type of their device, so that long sums stay exact."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


class LogBuffer:
    """Reductions by name, until they are collected."""

    def __init__(self) -> None:
        self.reductions: dict[str, Reduction] = {}

    def __bool__(self) -> bool:
        return bool(self.reductions)

    def reduction(self, name: str, reduce: str = "mean") -> Reduction:
        """Return the reduction of a name; its first value makes it."""
        found = self.reductions.get(name)
        if found is None:
            found = self.reductions[name] = Reduction(reduce)
        elif found.reduce != reduce:
            raise ValueError(
                f"{name!r} is logged with reduce={found.reduce!r} and with reduce={reduce!r} before "
                "one flush; use one of them, or two names"
            )
        return found

    def synced(self) -> dict[str, str]:
        """Return the kinds of the reductions that go over all ranks, by name."""
        return {name: reduction.reduce for name, reduction in self.reductions.items() if reduction.sync}

    def agree(self, ranks: Iterable[Mapping[str, str]]) -> None:
        """Reduce over all ranks what any rank reduces so, in the same order; `ranks` has each rank's `synced`."""
        for synced in ranks:
            for name, reduce in synced.items():
                self.reduction(name, reduce).sync = True
        self.reductions = dict(sorted(self.reductions.items()))

    def clear(self) -> None:
        """Forget everything."""
        self.reductions.clear()

    def collect(self, all_reduce: AllReduce | None = None) -> dict[str, torch.Tensor]:
        """Return the values by name and clear the buffer."""
        values = {name: reduction.value(all_reduce) for name, reduction in self.reductions.items()}
        self.clear()
        return values

    def get_state(self) -> dict[str, Any]:
        """Return the values that are not collected yet."""
        return {name: reduction.get_state() for name, reduction in self.reductions.items()}

    def update_state(self, state: Mapping[str, Any]) -> None:
        """Load what `get_state` returned."""
        self.reductions = {name: Reduction.from_state(kept) for name, kept in state.items()}


def is_number(value: Any) -> bool:
    """Tell whether a value can be logged: a number, or a tensor or an array of one element."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float)) or (hasattr(value, "item") and getattr(value, "size", 0) == 1)


def as_number(name: str, value: Any) -> Number:
    """Return a value to log, detached, as it is now.

    Raises:
        TypeError: the value is not one number.
    """
    if isinstance(value, torch.Tensor) and value.numel() == 1:  # the common case, in one call
        return kept(value).reshape(())
    if is_number(value):
        return float(value)
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    raise TypeError(
        f"log({name}=…) takes one number, not a {type(value).__name__}{shape}; reduce it first, or "
        "hand it to log_object(name, value)"
    )


def to_floats(values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Copy values off their devices, with one copy per device."""
    by_device: dict[torch.device, list[str]] = {}
    for name, value in values.items():
        by_device.setdefault(value.device, []).append(name)
    floats: dict[str, float] = {}
    for names in by_device.values():
        stacked = torch.stack([values[name] for name in names])
        floats.update(zip(names, stacked.tolist(), strict=True))
    return {name: floats[name] for name in values}
