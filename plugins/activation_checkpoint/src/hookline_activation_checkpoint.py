"""Forget what the blocks of a model compute in forward, and compute it once more in backward, for less memory."""

from __future__ import annotations

import functools
import logging
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm  # what batch norms of other packages derive from, too
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from hookline import CallbackInterface, find_blocks, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

log = logging.getLogger("hookline.activation_checkpoint")


@dataclass(eq=False)
class ActivationCheckpoint(CallbackInterface):
    """Keep of each block only its inputs, and compute the rest once more in backward, with the same random numbers.

    A run ends with the bits of one without it.
    """

    wrap: list[str] = field(default_factory=list)
    """Names of the classes whose modules are blocks; empty for those that the module's `get_blocks()` answers."""
    every: int = 1
    """Take each so many-th block alone, the first one included."""
    save: list[str] = field(default_factory=list)
    """Operators whose results are kept all the same, such as `mm` or `namespace::name`; the others are cheap."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"activation_checkpoint.every={self.every} must be at least 1")
        self._kept = [overload for name in self.save for overload in overloads(name)]
        self._active = False

    @hookimpl(wrapper=True, tryfirst=True)
    def convert_model(self, trainer: Trainer) -> Generator[None, torch.nn.Module, torch.nn.Module]:
        model = yield
        blocks = list(find_blocks(trainer, model, "activation_checkpoint.wrap", self.wrap).items())[:: self.every]
        options: dict[str, Any] = {"use_reentrant": False}
        if self._kept:
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, self._kept)
        for name, block in blocks:
            for inner, module in block.named_modules(prefix=name):
                if isinstance(module, _BatchNorm) and module.track_running_stats:
                    raise ValueError(
                        f"activation_checkpoint: the block {name!r} has a batch normalization, {inner!r}, which would "
                        "take each batch into its running statistics twice; name other blocks"
                    )
            block.forward = functools.partial(checkpoint, block.forward, **options)
        self._active = bool(blocks)
        if blocks:
            log.info("activation_checkpoint: %d blocks", len(blocks))
        else:
            log.warning(
                "activation_checkpoint: there are no blocks, so it does nothing; name their classes in `wrap`, or have "
                "the module answer them by get_blocks()"
            )
        return model

    @hookimpl(wrapper=True)
    def compile_model(self, trainer: Trainer) -> Generator[None, torch.nn.Module, torch.nn.Module]:
        """Refuse a compiler that would draw other random numbers in backward than in forward.

        Raises:
            ValueError: that of torch which only looks at the code.
        """
        model = yield
        plugins = dict(trainer.plugins.listed())
        for name in trainer.plugins.performers("compile_model"):
            if self._active and getattr(plugins.get(name), "backend", None) == "eager":
                raise ValueError(
                    f"{name}.backend=eager does not repeat random numbers, so dropout in a checkpointed block would "
                    "have wrong gradients; take aot_eager or inductor, or turn activation_checkpoint off"
                )
        return model


def overloads(name: str) -> list[Any]:
    """Return the forms of an operator, `namespace::name` or one of torch's own.

    Raises:
        ValueError: there is none of this name.
    """
    namespace, _, operator = name.rpartition("::")
    packet = getattr(getattr(torch.ops, namespace or "aten"), operator, None)
    if packet is None:
        raise ValueError(
            f"activation_checkpoint.save names {name!r}, which is no operator of torch; write one like mm, addmm, bmm "
            "or namespace::name"
        )
    return [getattr(packet, overload) for overload in packet.overloads()]
