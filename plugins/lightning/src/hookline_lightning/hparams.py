"""Parameters that modules and data modules keep of themselves: `save_hyperparameters`, `hparams`."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import inspect
from collections.abc import Iterable, Mapping, MutableMapping
from types import FrameType
from typing import Any

from hookline_lightning.files.plain import AttributeDict


class HasHparams:
    """Keeps what its `__init__` was called with."""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **options: Any) -> Any:
        """Return one that is made with saved parameters, a module with saved weights; see `reading`."""
        return importlib.import_module("hookline_lightning.files.reading").load_from_checkpoint(
            cls, checkpoint_path, *args, **options
        )

    @property
    def hparams(self) -> Any:
        """What `save_hyperparameters` kept; the user may change it."""
        return vars(self).setdefault("_hparams", AttributeDict())

    @property
    def hparams_initial(self) -> Any:
        """A copy of what `save_hyperparameters` kept, without later changes."""
        return copy.deepcopy(vars(self).get("_hparams_initial", AttributeDict()))

    def save_hyperparameters(
        self, *names: Any, ignore: str | Iterable[str] | None = None, frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:  # fmt: skip
        """Keep the arguments of `__init__`, or of them those named, or the mapping or namespace that is given.

        Args:
            names: of arguments, or one object that has parameters.
            ignore: names that are not kept.
            frame: of the `__init__`; that of the caller unless given.
            logger: whether trackers get the parameters, where they take some.

        Raises:
            ValueError: a name that is no argument of `__init__`, or an object that is no collection of parameters.
        """
        self._log_hyperparams = logger
        if len(names) == 1 and not names[0]:
            return  # a collection that is empty
        objects = [name for name in names if not isinstance(name, str)]
        wanted = [name for name in names if isinstance(name, str)]
        given: dict[str, Any] = {}
        if wanted or not objects:
            here = inspect.currentframe()
            arguments = _arguments(self, frame or (here.f_back if here else None))
            for name in wanted:
                if name not in arguments:
                    raise ValueError(f"save_hyperparameters({name!r}): __init__ has only {', '.join(arguments)}")
            given = {name: arguments[name] for name in wanted or arguments}
        for one in objects:
            self._take(one)
        self.hparams.update(given)
        for name in {ignore} if isinstance(ignore, str) else {*(ignore or ())}:  # those of a base class, too
            self.hparams.pop(name, None)
        self._hparams_initial = copy.deepcopy(self.hparams)

    def _take(self, given: Any) -> None:
        if isinstance(given, (dict, argparse.Namespace)):
            self.hparams.update(given if isinstance(given, dict) else vars(given))
        elif dataclasses.is_dataclass(given) and not isinstance(given, type):
            self.hparams.update({field.name: getattr(given, field.name) for field in dataclasses.fields(given)})
        elif isinstance(given, MutableMapping) and not self.hparams:
            self._hparams = given  # such as a tree of OmegaConf, which stays one
        elif isinstance(given, Mapping):
            self.hparams.update(given)
        else:
            raise ValueError(
                f"save_hyperparameters({given!r}): a {type(given).__name__} is no collection of parameters; give a "
                "dict, a Namespace, a dataclass or a configuration of OmegaConf"
            )


def _arguments(owner: Any, frame: FrameType | None) -> dict[str, Any]:
    """Return the arguments of an object's `__init__`, those of the classes that derive from the caller's included."""
    if dataclasses.is_dataclass(owner):
        return {field.name: getattr(owner, field.name) for field in dataclasses.fields(owner) if field.init}
    written = [inspect.unwrap(vars(kind)["__init__"]) for kind in type(owner).__mro__ if "__init__" in vars(kind)]
    codes = {getattr(function, "__code__", None) for function in written}
    found: dict[str, Any] = {}
    inside = False
    while frame is not None:
        names, _, keywords, values = inspect.getargvalues(frame)
        if frame.f_code in codes and values[names[0]] is owner:
            inside = True
            found.update({name: values[name] for name in names[1:]}, **(values[keywords] if keywords else {}))
        elif inside:
            break
        frame = frame.f_back
    return found
