"""What is checked: a plugin, how to make it, and the trainings it takes part in."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hookline.installed import name_of
from hookline.testing.tiny import tiny_trainer
from hookline.trainer import Trainer


@dataclass(frozen=True)
class Subject:
    """A plugin under test."""

    plugin_class: type
    make: Callable[[], Any]
    """Makes a fresh plugin; importable by its name for the check `ranks`."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """Options of the plugin."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the trainer."""
    beside: Sequence[Callable[[], Any]] = ()
    """Make the plugins whose order with this one must not count; the kit's own join them."""
    readme: str | None = None
    """The text of the README."""

    @property
    def name(self) -> str:
        """The plugin's name in a configuration."""
        return name_of(self.plugin_class)

    @property
    def fields(self) -> list[dataclasses.Field[Any]]:
        """The fields that are options."""
        return [one for one in dataclasses.fields(self.plugin_class) if one.init]

    def trainer(self, *plugins: Any, module: Any = None, **options: Any) -> Trainer:
        """Return a tiny trainer with these plugins, in this order, and the subject's options.

        The plugin under test has its own name, the others are named `check.NAME`.
        """
        named: dict[str, Any] = {}
        for plugin in plugins:
            name = name_of(type(plugin))
            named[name if isinstance(plugin, self.plugin_class) else f"check.{name}"] = plugin
        return tiny_trainer(named, module, **{**self.options, **options})

    def train(self, *plugins: Any, module: Any = None, **options: Any) -> Trainer:
        """Train, and return the trainer."""
        trainer = self.trainer(*plugins, module=module, **options)
        trainer.train()
        return trainer

    @contextmanager
    def in_a_folder(self) -> Iterator[Subject]:
        """Give the same subject with a folder for its runs, which is removed afterwards."""
        with tempfile.TemporaryDirectory(prefix="hookline-check-") as folder:
            options = {"runs_folder": str(Path(folder) / "runs"), **self.options}
            yield replace(self, options=options)


Function = Callable[[Subject], None]


@dataclass(frozen=True)
class Check:
    """One named check of a plugin."""

    name: str
    about: str
    """What the plugin must keep, in one sentence."""
    function: Function
    quick: bool
    """Whether `check_plugin` does it unless told otherwise."""

    def __call__(self, subject: Subject) -> None:
        """Do it.

        Raises:
            AssertionError: the plugin does not keep it; the message says what, and where.
        """
        with subject.in_a_folder() as inside:
            self.function(inside)


def check(about: str, quick: bool = True) -> Callable[[Function], Check]:
    """Make a function `check_NAME` the check of that name."""
    return lambda function: Check(function.__name__.removeprefix("check_"), about, function, quick)
