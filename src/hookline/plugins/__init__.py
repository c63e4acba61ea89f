"""Plugins: built, checked, registered, ordered and called; exceptions name the plugin that raised them.

- `manager`: which plugin implements which hook, in which order, and what follows from it.
- `checks`: mistakes that registration refuses.
- `routes`: the fastest call of each hook; `observers` and their failures; `blame`.
- `build`: plugin objects from names and options.
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
