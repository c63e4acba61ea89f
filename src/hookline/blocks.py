"""The blocks of a model: modules that plugins process one at a time, to save memory or to compile them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hookline.trainer import Trainer


def find_blocks(
    trainer: Trainer, model: torch.nn.Module, option: str, names: Sequence[str]
) -> dict[str, torch.nn.Module]:
    """Return the blocks of a model by name, in its order, outer blocks before inner ones.

    Args:
        trainer: without `names`, its module's `get_blocks()` gives the blocks, if the method exists.
        model: the model with the blocks.
        option: the option with the names, for messages: `plugin.option`.
        names: names of classes whose modules are blocks.

    Raises:
        ValueError: no module has a class of this name, or `get_blocks()` returned a module outside the model.
    """
    modules = dict(model.named_modules())
    if names:
        found = {type(module).__name__ for module in modules.values()}
        if unknown := sorted({*names} - found):
            raise ValueError(
                f"{option} names {', '.join(unknown)}, and the model has none; it has {', '.join(sorted(found))}"
            )
        return {name: module for name, module in modules.items() if type(module).__name__ in names}
    own = trainer.module
    given = {id(block): block for block in getattr(own, "get_blocks", tuple)()}
    blocks = {name: module for name, module in modules.items() if given.pop(id(module), None) is not None}
    for block in given.values():
        raise ValueError(
            f"{option.partition('.')[0]}: {type(own).__name__}.get_blocks() answers a {type(block).__name__} that is "
            "no part of the model"
        )
    return blocks
