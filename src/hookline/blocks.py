"""The blocks of a model: the modules that plugins treat one at a time, to save memory or to compile them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hookline.trainer import Trainer


def find_blocks(
    trainer: Trainer, model: torch.nn.Module, option: str, names: Sequence[str]
) -> dict[str, torch.nn.Module]:
    """Return the blocks of a model by name, in its order, the outer before the inner.

    Args:
        trainer: whose module is asked for `get_blocks()`, if it has it, where no class is named.
        model: where they are looked for.
        option: where the names stand, for messages: `plugin.option`.
        names: of the classes whose modules are blocks.

    Raises:
        ValueError: a name is that of no module, or `get_blocks()` answers what is no part of the model.
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
