"""Compile the blocks of a model, or the whole window (`torch.compile`): parameters keep their names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, find_blocks, hookimpl, nearest
from hookline_compile.compiled import Compiled, own_function
from hookline_compile.window import CompiledStep, compile_function, compile_optimizer

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

SCOPES = ("blocks", "window")

log = logging.getLogger("hookline.compile")


@dataclass(eq=False)
class Compile(CallbackInterface):
    """Compile the blocks of a model, or all that a training step computes; logging and hooks stay Python."""

    blocks: list[str] = field(default_factory=list)
    """Names of the classes whose modules are compiled; empty for what the module's `get_blocks()` answers, and
    where it has none for each submodule of the module that has parameters."""
    backend: str = "inductor"
    """Of torch.compile: inductor, aot_eager, eager, or one that is installed."""
    mode: str | None = None
    """Of inductor: "reduce-overhead", "max-autotune" and others of torch.compile."""
    fullgraph: bool = False
    """Refuse a block, or a `train_step`, that cannot be compiled in one piece, instead of running in Python what is
    between the pieces."""
    dynamic: bool | None = None
    """Whether to expect other shapes: null compiles for the first, and at the second for all."""
    scope: str = "blocks"
    """blocks, or window: `train_step` with its loss and its backward, what other plugins compute on tensors in a step,
    and the step of each optimizer."""

    def __post_init__(self) -> None:
        if self.mode is not None and self.backend != "inductor":
            raise ValueError(f"compile.mode={self.mode!r} is an option of inductor, and compile.backend={self.backend}")
        if self.scope not in SCOPES:
            raise ValueError(
                f"compile.scope={self.scope!r} must be one of {', '.join(SCOPES)}{nearest(self.scope, SCOPES)}"
            )
        if self.scope == "window" and self.blocks:
            raise ValueError(
                f"compile.blocks={self.blocks} names what compile.scope: blocks compiles; compile.scope: window "
                "compiles train_step, whatever it calls"
            )
        if self.scope == "blocks":
            self.on_begin_train = self.compile_function = None  # type: ignore[method-assign,assignment]

    def _options(self) -> dict[str, Any]:
        """Return the arguments of torch.compile."""
        return {"backend": self.backend, "mode": self.mode, "fullgraph": self.fullgraph, "dynamic": self.dynamic}

    @hookimpl
    def compile_model(self, trainer: Trainer, model: torch.nn.Module) -> torch.nn.Module:
        if self.scope == "window":
            self._train_step = CompiledStep(trainer, self._options())
            trainer.module.train_step = self._train_step  # type: ignore[method-assign]
            return model
        codes: dict[str, Any] = {}
        blocks = dict(self._blocks(trainer, model))
        for name, block in blocks.items():
            step = own_function(block.forward, codes.setdefault(repr(block), None))
            codes[repr(block)] = step.__code__
            advice = f"this is the block {name!r} ({type(block).__name__}). Leave it out by naming others in"
            block.forward = Compiled(
                block.forward, torch.compile(step, **self._options()), f"{advice} `compile.blocks`"
            )
        log.info("compile: %d blocks of %d kinds", len(blocks), len(codes))
        return model

    @hookimpl
    def compile_function(self, trainer: Trainer, function: Callable[..., Any]) -> Callable[..., Any]:
        return compile_function(trainer, function, self._options())

    @hookimpl
    def on_begin_train(self, trainer: Trainer) -> None:
        shared = [name for name, weight in trainer.module.named_parameters() if hasattr(weight, "device_mesh")]
        if shared:
            raise ValueError(
                f"compile.scope='window' cannot compile weights that are shared out over ranks, as {shared[0]} is; "
                "take compile.scope: blocks"
            )
        for optimizer in trainer.optimizers:
            compile_optimizer(trainer, self._train_step, optimizer, self._options())

    def _blocks(self, trainer: Trainer, model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
        """Give the blocks by name, none of them within another.

        Raises:
            ValueError: a name of `blocks` is that of no module, or there is nothing to compile.
        """
        blocks = find_blocks(trainer, model, "compile.blocks", self.blocks)
        if not blocks:
            parts = list(called(model))
            blocks = {name: module for name, module in model.named_modules() if any(module is part for part in parts)}
        if not blocks:
            raise ValueError(
                f"compile: {type(model).__name__} has no submodule with parameters, so there is nothing to compile; "
                "assign the model to it as a torch.nn.Module"
            )
        within: set[int] = set()
        for name, block in blocks.items():
            if id(block) not in within:
                within.update(map(id, block.modules()))
                yield name, block


def called(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Give the submodules with parameters that a module's steps may call; lists of modules cannot be called."""
    for child in module.children():
        if isinstance(child, (torch.nn.ModuleList, torch.nn.ModuleDict)):
            yield from called(child)
        elif any(True for _ in child.parameters()):
            yield child
