"""`hookline new plugin NAME` and `hookline init NAME`: a whole folder, ready to use and test."""

from __future__ import annotations

import importlib.util
import keyword
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path


def new_plugin(name: str, folder: Path) -> Path:
    """Write the skeleton of a plugin and return its folder.

    Raises:
        ValueError: an invalid name, or a folder that exists already.
    """
    word = _word(name, "plugin")
    names = {
        "CLASS": "".join(part.capitalize() for part in word.split("_")),
        "MODULE": f"hookline_{word}",
        "WORD": word,
        "DIST": f"hookline-{name.replace('_', '-')}",
    }
    return _write(folder / name, PLUGIN, {f"PLUGIN_{key}": text for key, text in names.items()})


def new_project(name: str, folder: Path) -> Path:
    """Write a project that trains at once and return its folder.

    Raises:
        ValueError: an invalid name, or one that hides a module, or a folder that exists already.
    """
    word = _word(name, "project")
    target = folder / name
    taken = word in ("tests", "runs") or keyword.iskeyword(word)
    if taken or (not target.exists() and importlib.util.find_spec(word) is not None):
        raise ValueError(f"{name!r} cannot be a project's name: Python knows {word!r} as something else; take another")
    return _write(target, PROJECT, {"PROJECT_WORD": word, "PROJECT_NAME": name.replace("_", "-")})


def _word(name: str, kind: str) -> str:
    """Return the name as Python writes it."""
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name):
        raise ValueError(f"{name!r} cannot be a {kind}'s name: use lower-case words joined by '-' or '_'")
    return name.replace("-", "_")


def _write(target: Path, files: Mapping[str, str], names: Mapping[str, str]) -> Path:
    """Write the files of a template into a new folder, with these names in place of those of the template."""
    if target.exists():
        raise ValueError(f"{target} is there already")
    template = resources.files("hookline.cli") / "template"
    for path, kept in files.items():
        text = (template / kept).read_text(encoding="utf-8")
        for placeholder, name in names.items():
            text, path = text.replace(placeholder, name), path.replace(placeholder, name)
        written = target / path
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(text, encoding="utf-8")
    return target


PLUGIN = {  # file of the new plugin: file of the template
    "pyproject.toml": "pyproject.toml.txt",
    "README.md": "README.md.txt",
    "PUBLISHING.md": "PUBLISHING.md.txt",
    "noxfile.py": "noxfile.py.txt",
    ".github/workflows/tests.yml": "ci.yml.txt",
    "src/PLUGIN_MODULE.py": "plugin.py.txt",
    "tests/test_PLUGIN_WORD.py": "test.py.txt",
}
PROJECT = {
    "pyproject.toml": "project.pyproject.toml.txt",
    "README.md": "project.README.md.txt",
    ".gitignore": "project.gitignore.txt",
    "run.yaml": "project.run.yaml.txt",
    "PROJECT_WORD/__init__.py": "project.init.py.txt",
    "PROJECT_WORD/data.py": "project.data.py.txt",
    "PROJECT_WORD/module.py": "project.module.py.txt",
    "tests/test_PROJECT_WORD.py": "project.test.py.txt",
}
