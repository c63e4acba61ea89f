"""Give groups of parameters options of their own: no decay on norms and biases, rates by layer, patterns by name."""

from __future__ import annotations

import fnmatch
import logging
import math
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, find_blocks, hookimpl, nearest

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

log = logging.getLogger("hookline.param_groups")

Made = tuple[list[torch.optim.Optimizer], list[Any]]


@dataclass(eq=False)
class ParamGroups(CallbackInterface):
    """Regroup the parameters of the optimizers: no decay on norms and biases, rates by layer, patterns by name."""

    no_decay: bool = True
    """Whether norms, biases and other parameters of fewer than two dimensions get no weight decay."""
    layer_decay: float | None = None
    """Each layer has the rate of the layer above it, times this; null for one rate."""
    layers: list[str] = field(default_factory=list)
    """Names of the classes that are layers; if empty, the module's `get_blocks()` gives them."""
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options by pattern of names; a later pattern overrides earlier ones and what is above."""

    def __post_init__(self) -> None:
        if self.layer_decay is None:
            self.on_setup = None  # type: ignore[assignment]  # hides the method
        elif not 0 < self.layer_decay <= 1:
            raise ValueError(f"param_groups.layer_decay={self.layer_decay} must be above 0 and at most 1, such as 0.75")
        if self.layers and self.layer_decay is None:
            raise ValueError("param_groups.layers says what a layer is for param_groups.layer_decay, which is not set")
        for pattern, options in self.groups.items():
            if not isinstance(options, dict) or not options or "params" in options:
                raise ValueError(
                    f"param_groups.groups.{pattern}={options!r} must be options of the optimizer, such as {{lr: 1e-5}}"
                )
        self._regrouped: list[torch.optim.Optimizer] = []
        self._layers: list[str] = []

    @hookimpl
    def on_setup(self, trainer: Trainer) -> None:
        """Find the layers while they have their own classes: some ways to share a model give them others."""
        found = find_blocks(trainer, trainer.module, "param_groups.layers", self.layers)
        self._layers = [name for name in found if not any(name.startswith(f"{outer}.") for outer in found)]
        if not self._layers:
            raise ValueError(
                "param_groups.layer_decay needs to know the layers: name their class in param_groups.layers, or give "
                f"{type(trainer.module).__name__} a method get_blocks() that returns them"
            )

    @hookimpl(wrapper=True, trylast=True)
    def setup_optimizers(self, trainer: Trainer) -> Generator[None, Made, Made]:
        """Regroup, before others of the plugins look at the optimizers."""
        optimizers, schedulers = yield
        names = {id(weight): name for name, weight in trainer.module.named_parameters()}
        held = [names.get(id(weight), "") for o in optimizers for group in o.param_groups for weight in group["params"]]
        for pattern in self.groups:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in held):
                raise ValueError(
                    f"param_groups.groups.{pattern} matches no parameter of an optimizer{nearest(pattern, held)}; they "
                    f"are {', '.join(held[:8])}{' …' if len(held) > 8 else ''}"
                )
        factors = self._factors(trainer.module)
        norms = {id(weight) for weight in trainer.module.parameters() if weight.ndim < 2} | weights_of_norms(
            trainer.module
        )
        self._regrouped = [one for one in optimizers if self._regroup(one, names, factors, norms)]
        if trainer.rank == 0:
            for group in (group for one in self._regrouped for group in one.param_groups):
                said = {key: group[key] for key in ("lr", "weight_decay") if key in group}
                log.info("group %s: %d parameters, %s", group["name"], len(group["params"]), said)
        return optimizers, schedulers

    @hookimpl(wrapper=True, specname="setup_optimizers")
    def refuse_schedulers(self, trainer: Trainer) -> Generator[None, Made, Made]:
        """Refuse schedulers that were made for the groups as they were."""
        optimizers, schedulers = yield
        for entry in schedulers:
            scheduler = entry[0] if isinstance(entry, tuple) else entry
            if getattr(scheduler, "optimizer", None) in self._regrouped:
                raise ValueError(
                    f"param_groups: {type(trainer.module).__name__}.get_optimizers_schedulers returned "
                    f"{type(scheduler).__name__}, made for the groups as they were; return no schedulers there, and "
                    "name plugin lr_schedule, e.g. `plugins: {lr_schedule: {replace: true}}`"
                )
        return optimizers, schedulers

    def _factors(self, module: torch.nn.Module) -> dict[str, tuple[str, float]]:
        """Return the layer of each parameter, and the factor of its rate; without `layer_decay` none."""
        if self.layer_decay is None:
            return {}
        found, begun, last = {}, False, len(self._layers) + 1
        for name, _ in module.named_parameters():
            layers = [number for number, layer in enumerate(self._layers, 1) if name.startswith(f"{layer}.")]
            begun = begun or bool(layers)
            depth = layers[0] if layers else last if begun else 0
            found[name] = f"layer {depth}", self.layer_decay ** (last - depth)
        return found

    def _regroup(self, optimizer: torch.optim.Optimizer, names: dict[int, str], factors: Any, norms: set[int]) -> bool:
        """Split each group by what its parameters are given; return whether any differs from what it was."""
        made: dict[Any, dict[str, Any]] = {}
        for number, group in enumerate(optimizer.param_groups):
            rate = group.get("initial_lr", group["lr"])
            for place, weight in enumerate(group["params"]):
                words, own = self._options(names.get(id(weight), ""), group, rate, factors)
                if self.no_decay and id(weight) in norms and group.get("weight_decay") and "weight_decay" not in own:
                    words, own = [*words, "no_decay"], {**own, "weight_decay": 0.0}
                key = number, *words, *map(str, own.items())
                if key not in made:
                    kept = {name: value for name, value in group.items() if name != "initial_lr"}
                    name = " ".join([*([group["name"]] if "name" in group else []), *words]) or "rest"
                    made[key] = {**kept, "lr": rate, **own, "name": name, "params": [], "own": own}
                    made[key] |= {"param_names": []} if "param_names" in group else {}
                made[key]["params"].append(weight)
                if "param_names" in group:
                    made[key]["param_names"].append(group["param_names"][place])
        owns = [group.pop("own") for group in made.values()]
        if not any(owns):
            return False
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("param_groups: LBFGS takes all parameters as one group; take another optimizer")
        optimizer.param_groups[:] = made.values()
        return True

    def _options(self, name: str, group: Any, rate: float, factors: Any) -> tuple[list[str], dict[str, Any]]:
        """Return the words of the group that a parameter belongs to, and its options."""
        layer, factor = factors.get(name, ("", 1.0))
        words, own = [layer] if layer else [], {}
        if not math.isclose(factor, 1.0):
            own["lr"] = rate * factor
        for pattern, options in self.groups.items():
            if fnmatch.fnmatchcase(name, pattern):
                _refuse_unknown(pattern, options, group)
                words, own = [*words, pattern], {**own, **options}
        return words, own


def _refuse_unknown(pattern: str, options: dict[str, Any], group: dict[str, Any]) -> None:
    known = [name for name in group if name not in ("params", "param_names", "initial_lr")]
    for option in options:
        if option not in known:
            raise ValueError(
                f"param_groups.groups.{pattern}.{option}: the optimizer has no such option{nearest(option, known)}; "
                f"its groups have {', '.join(known)}"
            )


def weights_of_norms(module: torch.nn.Module) -> set[int]:
    """Return the ids of the parameters of all modules whose class is named as a norm."""
    norms = [part for part in module.modules() if "Norm" in type(part).__name__]
    return {id(weight) for part in norms for weight in part.parameters(recurse=False)}
