"""The small things that programs for ACCMT name: which errors are handled, what is monitored, the seed."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib import metadata
from typing import Any

import hookline

_seed = [0]  # of each fit from here on


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
        kinds = {"KEYBOARD": "keyboard", "CUDA_OUT_OF_MEMORY": "out_of_memory", "ANY": "error", "ALL": "any"}
        return kinds[self.name]


class Monitor:
    """What is logged: the options of the plugin monitor, by their names.

    Raises:
        TypeError: a name that is none, or a value that is neither true nor false.
        ValueError: `val_equal_train=False`, values of validation at steps of their own.
    """

    def __init__(self, **wanted: bool) -> None:
        if wanted.pop("val_equal_train", True) is not True:
            raise ValueError(
                "monitor: val_equal_train=False: values of validation lie at the steps of training; leave it out"
            )
        vars(self).update(wanted)
        self.options()

    @classmethod
    def of(cls, given: Any) -> Monitor:
        """Return what is given, an object or its fields by name.

        Raises:
            TypeError: something else, or what `options` refuses.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, Mapping):
            return cls(**given)
        raise TypeError(f"monitor={given!r} must be a Monitor or a mapping of its fields")

    def options(self) -> dict[str, bool]:
        """Return the options of the plugin.

        Raises:
            TypeError: a name that is none, with the nearest that is, or a value that is neither true nor false.
        """
        refuse_unknown("monitor", vars(self), options_of("monitor", "monitor"))
        for name, value in vars(self).items():
            if not isinstance(value, bool):
                raise TypeError(f"monitor: {name}={value!r} must be true or false")
        return {**vars(self)}


def plugin_class(plugin: str, argument: str) -> Any:
    """Return the class of an installed plugin.

    Args:
        plugin: its name.
        argument: what asks for it.

    Raises:
        ValueError: it is not installed.
    """
    found = [*metadata.entry_points(group="hookline.plugins", name=plugin)]
    if not found:
        raise ValueError(f"{argument}: there is no plugin {plugin!r}: `pip install hookline-{plugin}`")
    return found[0].load()


def options_of(plugin: str, argument: str) -> list[str]:
    """Return the options of an installed plugin; arguments and errors are those of `plugin_class`."""
    return [field.name for field in fields(plugin_class(plugin, argument)) if field.init]


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
