"""Save the whole state of a run, and go on with it exactly where it was.

Each file imports those above it alone:

| files | what each is for |
|---|---|
| `storage` | names of checkpoints, and how they are read: only what is whole |
| `writing`, `lock`, `background` | write and remove them; one writer for a run folder; a save in a thread |
| `tensors`, `refusals`, `codec` | tensors as safetensors, what is refused, and a state taken apart into both and JSON |
| `headers`, `stored` | which tensors there are; each of them read by itself |
| `sharded`, `layout` | those that ranks share; which section is in which file |
| `fingerprint`, `retention`, `resuming` | what a manifest says; which checkpoints stay; which one a run goes on with |
| `hf`, `initial` | names of tensors in Hugging Face's format; weights that a run begins with |
| `plugin` | the hooks: when to save and what to take |
| `compare`, `export`, `foreign` | two checkpoints; weights for other programs, and of other programs |
| `commands`, `verify_resume` | the commands `hookline checkpoints` and `hookline verify-resume` |
"""

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
