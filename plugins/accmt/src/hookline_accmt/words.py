"""Errors in the words of a program for ACCMT, where plugins speak of their own options."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from hookline_accmt.names import plugin_class

ARGUMENTS = {
    "accumulate.steps": "grad_accumulation_steps",
    "checkpoint.every": "checkpoint_every",
    "clip.max_norm": "clip_grad",
    "model_saving.above": "model_saving_above",
    "model_saving.below": "model_saving_below",
    "model_saving.max_shard_size": "max_shard_size",
    "model_saving.mode": "the comparator of a Metric",
    "model_saving.policy": "model_saving",
    "accmt.dataloader_num_workers": "dataloader_num_workers",
    "accmt.model_path": "model_path",
}
"""Which argument of the trainer an option of a plugin is."""
OPTION = re.compile(rf"\b({'|'.join(map(re.escape, ARGUMENTS))})\b")


@contextlib.contextmanager
def own_words() -> Iterator[None]:
    """Have errors that hookline raises within name arguments of the trainer in place of options of plugins."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if raised_by_hookline(error) and error.args and isinstance(error.args[0], str):
            error.args = (OPTION.sub(lambda match: ARGUMENTS[match[1]], error.args[0]), *error.args[1:])
        raise


def raised_by_hookline(error: BaseException) -> bool:
    """Tell whether an error was raised by hookline or a plugin of it, and not by what they call."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    home = "" if traceback is None else str(traceback.tb_frame.f_globals.get("__name__"))
    return home.partition(".")[0].startswith("hookline")


def check_options(plugins: Mapping[str, Any]) -> None:
    """Make each plugin of a trainer once, so that what cannot be is known before there is a module.

    Raises:
        TypeError, ValueError: an option that cannot be, by the name of the trainer's argument.
    """
    with own_words():
        for name, options in plugins.items():
            plugin_class(name, name)(**options)
