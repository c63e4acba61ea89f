"""What can be seen of a plugin without training: its class, its options, its words, its imports."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import hookline
from hookline.config import merge_schema
from hookline.installed import installed
from hookline.interfaces import CallbackInterface
from hookline.marks import PROJECT
from hookline.plugins import PluginManager, options_of
from hookline.testing.checks.subject import Subject, check

MARKS = {"averages", "hookspecs"}
"""Class attributes that mean something to others; those of the base class are known anyway."""


@check("is a dataclass with identity; its hooks can be called; it can be unregistered")
def check_contract(subject: Subject) -> None:
    """Check the class, and register and unregister one object."""
    plugin_class, name = subject.plugin_class, subject.plugin_class.__name__
    assert issubclass(plugin_class, CallbackInterface), f"{name} must subclass CallbackInterface"
    assert dataclasses.is_dataclass(plugin_class), f"{name} must be a dataclass: its fields are its options"
    assert (plugin_class.__doc__ or "").strip(), f"{name} must say in its docstring what it does"
    plugin, manager = subject.make(), PluginManager()
    if getattr(plugin, "hookspecs", None) is not None:
        manager.add_contract(plugin.hookspecs, f"{name}.hookspecs")
    manager.register(plugin, name)
    manager.unregister(plugin)
    assert not any(manager.heard.values()), f"{name} is heard after it was unregistered"
    subject.train(plugin, max_steps=2)


@check("takes each option from YAML; objects share no value; each option is annotated")
def check_configuration(subject: Subject) -> None:
    """Send the options through YAML, and look at what the class itself holds."""
    plugin_class, name = subject.plugin_class, subject.plugin_class.__name__
    written = OmegaConf.to_yaml(OmegaConf.create(dict(subject.own)))
    given = OmegaConf.to_container(OmegaConf.create(written))
    read: Any = OmegaConf.to_container(merge_schema(f"plugins.{subject.name}", plugin_class, given))
    again = plugin_class(**(dict(subject.own) | read))
    assert options_of(again).keys() == {one.name for one in subject.fields}, f"{name} has other options from YAML"
    inherited = {one for base in plugin_class.__mro__[1:] for one in vars(base)}
    declared = inherited | inspect.get_annotations(plugin_class).keys()
    for attribute, value in vars(plugin_class).items():
        if attribute.startswith("_") or attribute in declared:
            continue
        where = f"{name}.{attribute}"
        assert not isinstance(value, (list, dict, set)), (
            f"{where} is a {type(value).__name__} of the class, which all objects share: make it in __post_init__, or "
            "annotate it with field(default_factory=…)"
        )
        plain = isinstance(value, (bool, int, float, str)) or value is None
        assert not plain or attribute in MARKS, (
            f"{where} = {value!r} has no annotation, so it is no option and no configuration can set it; annotate it, "
            "or begin its name with _"
        )


@check("says below each option what it is; the table of its README has exactly its options")
def check_documentation(subject: Subject) -> None:
    """Read the source of the class and the README."""
    for owner in subject.plugin_class.__mro__:
        if owner.__module__.partition(".")[0] != PROJECT and dataclasses.is_dataclass(owner):
            _look_at_docstrings(owner, {one.name for one in subject.fields})
    if subject.readme is None:
        return
    tables = re.findall(r"^\| option \|.*\n\|[-| ]+\|\n((?:\|.*\n?)*)", subject.readme, re.M)
    cells = [line.split("|")[1] for table in tables for line in table.splitlines()]
    rows = {word for cell in cells for word in re.findall(r"`(\w+)`", cell)}
    fields = {one.name for one in subject.fields}
    said = f"the README's table `| option | … |` has {sorted(rows)}, and the options are {sorted(fields)}"
    assert rows == fields, said


def _look_at_docstrings(owner: type, fields: set[str]) -> None:
    nodes = [node for path in _files_of(owner) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    bodies = [one.body for one in nodes if isinstance(one, ast.ClassDef) and one.name == owner.__name__]
    body = bodies[0] if bodies else []  # of a class that was typed in, nothing can be read
    for here, below in itertools.zip_longest(body, body[1:]):
        if isinstance(here, ast.AnnAssign) and isinstance(here.target, ast.Name) and here.target.id in fields:
            said = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            assert said, f"the option {owner.__name__}.{here.target.id} has no docstring below it"


@check("imports public names of hookline, and no other plugin")
def check_imports(subject: Subject) -> None:
    """Read the source of the plugin's package."""
    package = subject.plugin_class.__module__.partition(".")[0]
    others = {point.value.partition(":")[0].partition(".")[0] for point in installed().values()} - {package}
    for path in _files_of(subject.plugin_class):
        for name in () if path.name.startswith("test_") else _imports_of(path):
            first, *rest = name.split(".")
            assert first not in others, f"{path.name} imports {name}, which is of another plugin: use a hook instead"
            if first == PROJECT and rest and rest[0] != "__version__":
                assert rest[0] in hookline.__all__, f"{path.name} imports {name}, which hookline does not promise"


def _files_of(plugin_class: type) -> list[Path]:
    """Return the files of the plugin's package; if it is in none, the file of its class."""
    package = sys.modules.get(plugin_class.__module__.partition(".")[0])
    if package is not None and hasattr(package, "__path__") and package.__file__:
        return sorted(Path(package.__file__).parent.rglob("*.py"))
    try:
        return [Path(inspect.getsourcefile(plugin_class) or "")]
    except (TypeError, OSError):
        return []  # it was typed in


def _imports_of(path: Path) -> Iterator[str]:
    """Give what a file imports, but for what only types need."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {id(inner) for node in typing for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
