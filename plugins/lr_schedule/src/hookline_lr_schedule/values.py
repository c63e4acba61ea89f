"""Values that follow a schedule of torch without being a learning rate: they move, save and resume as schedulers do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hookline import nearest
from hookline_lr_schedule.clock import MOMENTS
from hookline_lr_schedule.phases import Phase

Make = Callable[[torch.optim.Optimizer], Any]
Put = Callable[[float], None]


class Value:
    """A scheduler of anything: the rate of a stand-in optimizer, from 1 on, says how far a value has come.

    Args:
        optimizer: the optimizer whose steps move it.
        make: makes torch's scheduler for the stand-in.
        apply: sets the value where it belongs, by the rate of the stand-in.
        length: the moves after which it stands still; None for no end.
        elapsed: returns the seconds of the run, if it follows the time.
        seconds: the longest time of the run.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        make: Make,
        apply: Put,
        length: int | None = None,
        elapsed: Callable[[], float] | None = None,
        seconds: float | None = None,
    ) -> None:
        self.optimizer = optimizer
        self._make, self._apply, self._length, self._elapsed, self._seconds = make, apply, length, elapsed, seconds
        self._begin(0)

    def _begin(self, moves: int) -> None:
        self.last_epoch = 0
        self._stand_in = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        self._scheduler = self._make(self._stand_in)
        self._stand_in.step()  # of nothing; torch wants it before its scheduler
        self._move_to(moves)

    def _move_to(self, moves: int) -> None:
        end = moves if self._length is None else min(moves, self._length)
        while self.last_epoch < end:
            self._scheduler.step()
            self.last_epoch += 1
        self.last_epoch = max(moves, self.last_epoch)
        self._apply(self._stand_in.param_groups[0]["lr"])

    def step(self) -> None:
        """Move on by one, or to where the time is."""
        self._move_to(self.last_epoch + 1 if self._elapsed is None else max(self.last_epoch, self._moment()))

    def _moment(self) -> int:
        assert self._elapsed is not None
        assert self._seconds is not None
        return int(MOMENTS * min(self._elapsed() / self._seconds, 1))

    def state_dict(self) -> dict[str, Any]:
        """Return how far it has come."""
        return {"moves": self.last_epoch, "seconds": self._seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin anew and move there, as it is built now; with another limit of time, to the share of that."""
        same = self._elapsed is None or state["seconds"] == self._seconds
        self._begin(state["moves"] if same else self._moment())


def setters_of_groups(optimizers: Sequence[torch.optim.Optimizer], key: str, where: str) -> list[tuple[Put, Any]]:
    """Return for each group what sets `key` ("betas.0" for an item), and its value now.

    Raises:
        ValueError: a group has no such number.
    """
    name, _, item = key.partition(".")
    found: list[tuple[Put, Any]] = []
    for optimizer, number in ((o, number) for o in optimizers for number in range(len(o.param_groups))):
        group = optimizer.param_groups[number]
        known = [option for option in group if option not in ("params", "initial_lr")]
        if name not in known:
            raise ValueError(
                f"{where}: the optimizer's groups have no {name!r}{nearest(name, known)}; they have {', '.join(known)}"
            )
        now = group[name]
        if item and not (item.isdigit() and isinstance(now, (list, tuple)) and int(item) < len(now)):
            raise ValueError(f"{where}: {name} is {now!r}, which has no item {item}")
        put = functools.partial(_put, optimizer, number, name, int(item) if item else None)
        found.append((put, now[int(item)] if item else now))
    return found


def _put(optimizer: torch.optim.Optimizer, number: int, name: str, item: int | None, value: float) -> None:
    group = optimizer.param_groups[number]  # looked up anew: a state that is loaded brings other dictionaries
    group[name] = value if item is None else (*group[name][:item], value, *group[name][item + 1 :])


def setters_of_module(module: torch.nn.Module, path: str, where: str) -> list[tuple[Put, Any]]:
    """Return what sets an attribute of the module or of a part of it, and its value now.

    Raises:
        ValueError: there is no such part or attribute.
    """
    home, _, name = path.rpartition(".")
    try:
        part = module.get_submodule(home)
    except AttributeError as error:
        raise ValueError(f"{where}: {error}") from error
    if not hasattr(part, name):
        raise ValueError(f"{where}: {type(part).__name__} has no attribute {name!r}{nearest(name, vars(part))}")
    return [(functools.partial(setattr, part, name), getattr(part, name))]


def blend(setters: list[tuple[Put, Any]], phase: Phase, where: str) -> Callable[[float], None]:
    """Return what sets `to + (from - to) * rate`; a function's rate is the value itself unless it has these.

    Raises:
        ValueError: what is there is no number.
    """
    begin = phase.options.get("from", 1.0 if phase.name == "function" else None)
    end = phase.options.get("to", 0.0)
    for _, now in setters:
        if begin is None and (isinstance(now, bool) or not isinstance(now, (int, float))):
            raise ValueError(f"{where} is {now!r}, no number that a schedule could move")
    pairs = [(put, now if begin is None else begin) for put, now in setters]

    def apply(rate: float) -> None:
        for put, first in pairs:
            put(end + (first - end) * rate)

    return apply
