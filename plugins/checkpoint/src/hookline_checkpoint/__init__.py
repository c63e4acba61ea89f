"""Save the whole state of a run, and go on with it exactly where it was."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hookline_checkpoint.storage import CheckpointError as CheckpointError

if TYPE_CHECKING:
    from hookline_checkpoint.foreign import ForeignError as ForeignError
    from hookline_checkpoint.foreign import load_foreign as load_foreign
    from hookline_checkpoint.plugin import Checkpoint as Checkpoint

__version__ = "0.1.0"
PLACES = {"Checkpoint": "plugin", "ForeignError": "foreign", "load_foreign": "foreign"}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for: the commands that list and verify need none of it."""
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{PLACES[name]}"), name)
