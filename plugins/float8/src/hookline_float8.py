"""Multiply in float8 in the linear layers of a model, forward and backward, with torchao."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, hookimpl, nearest

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

RECIPES = {"tensorwise": (8, 9), "rowwise": (9, 0), "rowwise_with_gw_hp": (9, 0)}  # with the CUDA device each needs
MULTIPLE = 16  # what the kernels want both sides of a weight to be a multiple of

log = logging.getLogger("hookline.float8")


@dataclass(eq=False)
class Float8(CallbackInterface):
    """Multiply in float8 in linear layers; weights, gradients and optimizer states stay as they are.

    Weights, inputs and gradients are scaled and rounded to float8 for each multiplication, with new scales each time.
    """

    recipe: str = "tensorwise"
    """What shares a scale: "tensorwise" a whole tensor, "rowwise" a row of it; "rowwise_with_gw_hp" is rowwise, and
    leaves the gradients of weights in their precision."""
    layers: Any = "*"
    """Names of linear layers or of modules with all that is in them, or a list of names; `*` and `?` stand for
    others."""
    skip: Any = None
    """Names of those that stay as they are, written alike: the last layer of a language model, say."""
    emulate: bool | None = None
    """Whether to round to float8 and multiply in the tensors' own precision; null where the device has no kernels."""

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            more = "; torchao has no mxfp8 that keeps weights as they are" if self.recipe.startswith("mx") else ""
            raise ValueError(f"float8.recipe={self.recipe!r} must be one of {', '.join(RECIPES)}{more}")
        self._layers, self._skip = names_in("layers", self.layers), names_in("skip", self.skip)
        if not self._layers:
            raise ValueError("float8.layers is empty: name layers, write '*' for all, or turn the plugin off")

    @hookimpl(wrapper=True)  # around adapters, which are layers too
    def convert_model(self, trainer: Trainer) -> Generator[None, torch.nn.Module, torch.nn.Module]:
        model = yield
        chosen, left = self._choose(model)
        if trainer.rank == 0:
            log.info("float8: %d layers, %s: %s", len(chosen), self.recipe, ", ".join(chosen))
            if left:
                said = ", ".join(f"{name} ({why})" for name, why in left.items())
                trainer.say_once(f"float8 leaves {said} as they are; name them in float8.skip to hear of it no more")
        emulate = self.emulate
        if emulate is None:
            emulate = not has_kernels(trainer.device, self.recipe)
            if emulate and trainer.rank == 0:
                trainer.say_once(
                    f"float8: {describe(trainer.device)} has no float8 kernels for {self.recipe}, so products are "
                    "emulated: rounded in the same way, and slower than without the plugin"
                )
        float8 = import_float8()
        config = dataclasses.replace(float8.Float8LinearConfig.from_recipe_name(self.recipe), emulate=emulate)
        float8.convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in chosen)
        return model

    def _choose(self, model: torch.nn.Module) -> tuple[list[str], dict[str, str]]:
        """Return the names of layers to convert, and of those that cannot be, each with the reason.

        Raises:
            ValueError: a name is that of no linear layer.
        """
        linear = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
        for option, patterns in (("layers", self._layers), ("skip", self._skip)):
            for pattern in patterns:
                if not any(matches([pattern], name) for name in linear):
                    raise ValueError(
                        f"float8.{option}: {pattern!r} names no linear layer{nearest(pattern, list(linear))}"
                    )
        named = [name for name in linear if matches(self._layers, name) and not matches(self._skip, name)]
        left = {name: why for name in named if (why := obstacle(linear[name]))}
        return [name for name in named if name not in left], left


def names_in(option: str, given: Any) -> list[str]:
    """Return the names in an option that may be one name, a list of names or null."""
    names = [given] if isinstance(given, str) else list(given or [])
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"float8.{option}={given!r} must be a name or a list of names")
    return names


def matches(patterns: list[str], name: str) -> bool:
    """Tell whether a layer, or a module that it is in, has a name that one of the patterns stands for."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


def obstacle(layer: torch.nn.Linear) -> str:
    """Return why a layer cannot multiply in float8; "" if it can."""
    if type(layer) is not torch.nn.Linear:
        return f"a {type(layer).__name__}, which has a forward of its own"
    if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
        return f"{layer.in_features} to {layer.out_features} features, not multiples of {MULTIPLE}"
    return ""


def has_kernels(device: torch.device, recipe: str) -> bool:
    """Tell whether a device multiplies in float8 by itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= RECIPES[recipe]


def describe(device: torch.device) -> str:
    """Return what a device is."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the device {device.type}"


def import_float8() -> Any:
    """Import torchao, whose own notes (of kernels for devices that are not there) do not concern the user.

    Raises:
        ValueError: it cannot be imported.
    """
    try:
        with quiet("torchao", "torch.utils._pytree"):
            return importlib.import_module("torchao.float8")
    except ImportError as error:
        raise ValueError(f"float8: torchao cannot be imported ({error}): pip install 'torchao>=0.18,<0.19'") from error


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Let loggers log errors alone."""
    loggers = [(logger := logging.getLogger(name), logger.level) for name in names]
    try:
        for logger, _ in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in loggers:
            logger.setLevel(level)
