"""Plugins: made of their names, checked, registered, ordered, called, and named where something is raised.

- `manager`: who implements what, in which order, and what follows from it.
- `checks`: what is refused at registration.
- `routes`: the shortest way to each hook; `observers` and their failures; `blame`.
- `build`: plugin objects of names and options.
"""

from hookline.plugins.build import build, describe, options_of
from hookline.plugins.manager import CORE, MODULE, PluginManager
from hookline.plugins.observers import FAILURES_ALLOWED, is_observer
from hookline.plugins.seed import SEED

__all__ = [
    "CORE",
    "FAILURES_ALLOWED",
    "MODULE",
    "SEED",
    "PluginManager",
    "build",
    "describe",
    "is_observer",
    "options_of",
]
