"""The small things that programs for ACCMT name: which errors are handled, what is monitored, the seed."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import hookline

_seed = [0]  # of the trainers that are made from here on


def set_seed(seed: int) -> None:
    """Seed all random states of this process, and the runs of trainers that are made from here on."""
    _seed[0] = seed
    hookline.set_seed(seed)


def current_seed() -> int:
    """Return the last seed that was set; 0 before."""
    return _seed[0]


class Handler(enum.Enum):
    """Which errors lead to a checkpoint before they end the run."""

    KEYBOARD = 1
    CUDA_OUT_OF_MEMORY = 2
    ANY = 3
    ALL = 4

    @property
    def kind(self) -> str:
        """What the plugin guard calls it."""
        return {"KEYBOARD": "keyboard", "CUDA_OUT_OF_MEMORY": "out_of_memory"}.get(self.name, "any")


@dataclass
class Monitor:
    """What is logged."""

    learning_rate: bool = False
    train_loss: bool = True
    validation_loss: bool = True
    additional_metrics: bool = True
    grad_norm: bool = False
    gpu_utilization: bool = False
    cpu_utilization: bool = False

    @classmethod
    def of(cls, given: Any) -> Monitor:
        """Return what is given, an object or its fields by name.

        Raises:
            TypeError: a name that is none, with the nearest that is, or a value that is neither true nor false.
        """
        if isinstance(given, cls):
            made = given
        elif isinstance(given, Mapping):
            refuse_unknown("monitor", given, [field.name for field in fields(cls)])
            made = cls(**given)
        else:
            raise TypeError(f"monitor={given!r} must be a Monitor or a mapping of its fields")
        for name, value in vars(made).items():
            if not isinstance(value, bool):
                raise TypeError(f"monitor: {name}={value!r} must be true or false")
        return made


def refuse_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names that are none.

    Raises:
        TypeError: the first of them, with the nearest that is one.
    """
    names = list(known)
    for name in given:
        if name not in names:
            same = [other for other in names if other.lower() == name.lower()]
            raise TypeError(
                f"{where} has no {name!r}{hookline.nearest(name, same or names)}; it has {', '.join(names) or 'none'}"
            )
