"""Freeze parameters by their names, and unfreeze them in stages."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, every, hookimpl, nearest

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm)

log = logging.getLogger("hookline.freeze")


@dataclass(eq=False)
class Freeze(CallbackInterface):
    """Freeze the parameters whose names match, and unfreeze them in stages.

    A frozen parameter gets no gradient, so the optimizers, which have all parameters, leave it as it is.
    """

    patterns: Any
    """Names of parameters or of modules with all that is in them, or a list of names; `*` and `?` stand for others."""
    unfreeze: dict[str, Any] = dataclasses.field(default_factory=dict)
    """By cadence ("500 steps", "2 epochs"), the names that are trained from then on."""
    batch_norm: str = "eval"
    """Batch norm that is frozen: "eval" keeps its running statistics, "train" goes on with them."""

    def __post_init__(self) -> None:
        self._patterns = names_in("patterns", self.patterns)
        self._stages: list[tuple[str, Any, list[str]]] = []  # counter, number, names
        for text, names in self.unfreeze.items():
            try:
                number, unit = every(text)
                if unit == "epochs" and not isinstance(number, int):
                    raise ValueError(f"{text!r} is a part of an epoch; count steps, or whole epochs")
            except ValueError as error:
                raise ValueError(f"freeze.unfreeze={self.unfreeze!r}: {error}") from None
            counter = "global_step" if unit == "steps" else unit
            self._stages.append((counter, number, names_in("unfreeze", names)))
        if self.batch_norm not in ("eval", "train"):
            raise ValueError(f"freeze.batch_norm={self.batch_norm!r} must be eval or train")
        self.on_setup()
        if not self._stages:
            self.on_boundary = None  # type: ignore[assignment,method-assign]  # hides it: nothing changes

    @hookimpl
    def on_setup(self) -> None:
        """Begin anew: an object may have been another trainer's before."""
        self._parameters: dict[str, torch.nn.Parameter] = {}  # those that it freezes
        self._norms: dict[torch.nn.Module, list[str]] = {}  # batch norm, with its names
        self._reached: list[bool] = []  # by stage, as it stands in the module

    @hookimpl(wrapper=True)
    def setup_optimizers(self, trainer: Trainer) -> Generator[None, tuple[list[Any], list[Any]], Any]:
        """Freeze when the optimizers are made, so that they have what is unfrozen later.

        Raises:
            ValueError: a pattern names nothing, all is frozen, or no optimizer has what is unfrozen.
        """
        optimizers, schedulers = yield
        named = dict(trainer.module.named_parameters())
        for pattern in self._patterns:
            if not any(matches([pattern], name) for name in named):
                raise ValueError(f"freeze.patterns: {pattern!r} names no parameter{nearest(pattern, places_in(named))}")
        chosen = [name for name in named if matches(self._patterns, name)]
        self._parameters = {name: named[name] for name in chosen if named[name].requires_grad}
        if all(matches(self._patterns, name) or not weight.requires_grad for name, weight in named.items()):
            raise ValueError(f"freeze.patterns={self.patterns!r} freezes all that is trained; leave something to train")
        have = {
            id(weight) for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]
        }
        for pattern in (pattern for _, _, names in self._stages for pattern in names):
            thawing = [name for name in self._parameters if matches([pattern], name)]
            if not thawing:
                said = f"names nothing that freeze.patterns freezes{nearest(pattern, places_in(chosen))}"
                raise ValueError(f"freeze.unfreeze: {pattern!r} {said}")
            if without := [name for name in thawing if id(self._parameters[name]) not in have]:
                raise ValueError(
                    f"freeze.unfreeze: no optimizer has {without[0]!r}, so it would not be trained; give the "
                    "optimizers all parameters: what is frozen has no gradient, and they leave it as it is"
                )
        self._norms = {} if self.batch_norm == "train" else norms_of(trainer.module, self._patterns)
        self._apply(trainer)
        return optimizers, schedulers

    @hookimpl(tryfirst=True)
    def on_begin_train(self, trainer: Trainer) -> None:
        self._apply(trainer)

    @hookimpl(trylast=True)
    def on_begin_train_epoch(self, trainer: Trainer) -> None:  # type: ignore[override]
        """Do it once more: the module may have called `train()`, or a state may have been put back."""
        self._apply(trainer)

    @hookimpl
    def on_boundary(self, trainer: Trainer) -> None:
        for (counter, number, _), reached in zip(self._stages, self._reached, strict=True):
            if (getattr(trainer.counters, counter) >= number) != reached:
                self._apply(trainer)
                return

    def _apply(self, trainer: Trainer) -> None:
        """Freeze what is frozen by the counters, which are equal on all ranks, and unfreeze the others."""
        before = self._reached
        self._reached = [getattr(trainer.counters, counter) >= number for counter, number, _ in self._stages]
        stages = zip(self._stages, self._reached, strict=True)
        thawed = [pattern for (_, _, names), reached in stages if reached for pattern in names]
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(matches(thawed, name))
        for norm, names in self._norms.items():
            norm.train(any(matches(thawed, name) for name in names))
        if before != self._reached and trainer.rank == 0:
            frozen = sum(not parameter.requires_grad for parameter in self._parameters.values())
            log.info("%d parameters are frozen from step %d on", frozen, trainer.global_step)


def names_in(option: str, given: Any) -> list[str]:
    """Return the names that an option has, as a list.

    Raises:
        ValueError: they are no names.
    """
    names = [given] if isinstance(given, str) else list(given) if isinstance(given, Sequence) else []
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            f'freeze.{option}: {given!r} must be the name of a parameter or of a module, such as "backbone" or '
            '"layers.*.bias", or a list of them'
        )
    return names


def matches(patterns: Sequence[str], name: str) -> bool:
    """Tell whether a pattern is the name of a parameter, or of a module around it."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


def places_in(names: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Return names, and those of the modules around them."""
    return [*names, *dict.fromkeys(name.rpartition(".")[0] for name in names)]


def norms_of(module: torch.nn.Module, patterns: Sequence[str]) -> dict[torch.nn.Module, list[str]]:
    """Return the batch norm in train mode whose parameters are all frozen; without parameters its statistics count."""
    norms: dict[torch.nn.Module, list[str]] = {}
    for place, norm in module.named_modules():
        if isinstance(norm, NORMS) and norm.training:
            own = [name for name, _ in norm.named_parameters()] or ["running_mean"]
            names = [f"{place}.{name}".replace("_orig_mod.", "") for name in own]
            if all(matches(patterns, name) for name in names):
                norms[norm] = names
    return norms
