"""`hookline new plugin NAME`: a plugin's whole folder, ready to install and test."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path


def new_plugin(name: str, folder: Path) -> Path:
    """Write the skeleton of a plugin and return its folder.

    Raises:
        ValueError: an invalid name, or a folder that exists already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name):
        raise ValueError(f"{name!r} cannot be a plugin's name: use lower-case words joined by '-' or '_'")
    word = name.replace("-", "_")
    target = folder / name
    if target.exists():
        raise ValueError(f"{target} is there already")
    class_name = "".join(part.capitalize() for part in word.split("_"))
    template = resources.files("hookline.cli") / "template"
    for path, kept in TEMPLATE.items():
        text = (template / kept).read_text(encoding="utf-8")
        text = text.replace("PLUGIN_CLASS", class_name).replace("PLUGIN_MODULE", f"hookline_{word}")
        text = text.replace("PLUGIN_WORD", word).replace("PLUGIN_DIST", f"hookline-{name.replace('_', '-')}")
        written = target / path.replace("WORD", word)
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(text, encoding="utf-8")
    return target


TEMPLATE = {  # file of the new plugin: file of the template
    "pyproject.toml": "pyproject.toml.txt",
    "README.md": "README.md.txt",
    "src/hookline_WORD.py": "plugin.py.txt",
    "tests/test_WORD.py": "test.py.txt",
}
