"""Save the whole state of a run, and go on with it exactly where it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hookline_checkpoint.storage import CheckpointError as CheckpointError

if TYPE_CHECKING:
    from hookline_checkpoint.plugin import Checkpoint as Checkpoint

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the plugin, and torch with it, when it is asked for: the commands that list and verify need neither."""
    if name != "Checkpoint":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hookline_checkpoint.plugin import Checkpoint

    return Checkpoint
