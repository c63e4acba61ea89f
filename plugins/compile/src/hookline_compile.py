"""Compile the blocks of a model (`torch.compile`), in place: parameters keep their names."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, find_blocks, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

COMPILER = ("torch._dynamo", "torch._functorch", "torch._inductor")

log = logging.getLogger("hookline.compile")


@dataclass(eq=False)
class Compile(CallbackInterface):
    """Compile the blocks of a model, each at its first call; steps, logging and hooks around them stay Python."""

    blocks: list[str] = field(default_factory=list)
    """Names of the classes whose modules are compiled; empty for what the module's `get_blocks()` answers, and
    where it has none for each submodule of the module that has parameters."""
    backend: str = "inductor"
    """Of torch.compile: inductor, aot_eager, eager, or one that is installed."""
    mode: str | None = None
    """Of inductor: "reduce-overhead", "max-autotune" and others of torch.compile."""
    fullgraph: bool = False
    """Refuse a block that cannot be compiled in one piece, instead of running in Python what is between the pieces."""
    dynamic: bool | None = None
    """Whether to expect other shapes: null compiles for the first, and at the second for all."""

    def __post_init__(self) -> None:
        if self.mode is not None and self.backend != "inductor":
            raise ValueError(f"compile.mode={self.mode!r} is an option of inductor, and compile.backend={self.backend}")

    @hookimpl
    def compile_model(self, trainer: Trainer, model: torch.nn.Module) -> torch.nn.Module:
        codes: dict[str, Any] = {}
        blocks = dict(self._blocks(trainer, model))
        for name, block in blocks.items():
            step = own_function(block.forward, codes.setdefault(repr(block), None))
            codes[repr(block)] = step.__code__
            compiled = torch.compile(
                step, backend=self.backend, mode=self.mode, fullgraph=self.fullgraph, dynamic=self.dynamic
            )
            block.forward = Compiled(f"{name!r} ({type(block).__name__})", block.forward, compiled)
        log.info("compile: %d blocks of %d kinds", len(blocks), len(codes))
        return model

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


class Compiled:
    """A block's forward, compiled; a copy of the block has what it was before."""

    def __init__(self, block: str, forward: Callable[..., Any], compiled: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward, updated=())
        self.block, self.forward, self.compiled = block, forward, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.compiled(*args, **kwargs)
        except Exception as error:
            if type(error).__module__.startswith(COMPILER) or "torch.compile with fullgraph" in str(error):
                error.add_note(
                    f"compile: this is the block {self.block}. Leave it out by naming others in `compile.blocks`; or "
                    "change what the message says; `compile.fullgraph: false` runs in Python what cannot be compiled, "
                    "and `compile.backend: aot_eager` shows whether it is inductor"
                )
            raise

    def __reduce__(self) -> Any:
        return same, (self.forward,)


def same(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return what is given."""
    return forward


def called(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Give the submodules with parameters that a module's steps may call; lists of modules cannot be called."""
    for child in module.children():
        if isinstance(child, (torch.nn.ModuleList, torch.nn.ModuleDict)):
            yield from called(child)
        elif any(True for _ in child.parameters()):
            yield child


def own_function(forward: Callable[..., Any], code: Any) -> Callable[..., Any]:
    """Return a function that calls a forward, with a code object given or of its own.

    torch counts recompilations by code object: without this, a model's Sequentials and checkpointed blocks would share
    one, and all but the first few be left uncompiled; blocks that are alike do share, so that they are compiled once.
    """

    def step(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    step.__code__ = code if code is not None else step.__code__.replace(co_consts=step.__code__.co_consts)
    return step
