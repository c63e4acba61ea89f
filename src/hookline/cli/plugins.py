"""`hookline plugins`: what is installed, with its problems; what one plugin does; whether its files were changed.

The list and the problems in it are read from metadata: nothing of a plugin is imported, and no torch.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import dataclasses
import hashlib
import importlib.util
import inspect
import itertools
import json
import textwrap
from importlib import metadata
from pathlib import Path
from typing import Any

from hookline.cli.hooks import read_hooks
from hookline.commands import table
from hookline.installed import check_requirements, claims, distribution, installed, load, nearest


def show(options: argparse.Namespace) -> int:
    """Print the installed plugins, or one of them."""
    if options.what is not None:
        told = describe(options.what)
        print(json.dumps(told, indent=2) if options.json else _as_text(told))
        return 0
    rows = [_row(point) for points in claims().values() for point in points]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    shown = ["plugin", "distribution", "version", "class", *["problem"] * any(row["problem"] for row in rows)]
    print(*table(shown, [[row[key] for key in shown] for row in rows]), sep="\n")
    return 0


def _row(point: metadata.EntryPoint) -> dict[str, str]:
    """Return what the metadata say of a plugin, and what keeps a run from using it, as far as they tell."""
    dist = point.dist
    return {
        "plugin": point.name,
        "distribution": dist.name if dist else "",
        "version": dist.version if dist else "",
        "class": point.value,
        "problem": _problem(point),
    }


def _problem(point: metadata.EntryPoint) -> str:
    others = [one for one in claims()[point.name] if one is not point]
    if others:
        return f"{' and '.join(map(distribution, others))} brings this name too; uninstall one, or name it by its class"
    try:
        check_requirements(point)
        if importlib.util.find_spec(point.module.partition(".")[0]) is None:
            return f"there is no module {point.module}; install {distribution(point)} again"
    except ValueError as error:
        return str(error)
    return ""


# One plugin ---------------------------------------------------------------------------


def describe(name: str) -> dict[str, Any]:
    """Return what a plugin does: its documentation, options and hooks.

    Raises:
        ValueError: it is not installed, or cannot be imported.
    """
    plugin_class = load(name)
    point = installed().get(name)
    return {
        "plugin": name,
        "distribution": distribution(point) if point else "",
        "class": f"{plugin_class.__module__}:{plugin_class.__qualname__}",
        "does": inspect.getdoc(plugin_class) or "",
        "observer": getattr(plugin_class, "observer", False) is True,
        "requires": list(getattr(plugin_class, "requires", ())),
        "options": _options(plugin_class),
        "hooks": _hooks(plugin_class),
    }


def _options(plugin_class: type) -> list[dict[str, Any]]:
    if not dataclasses.is_dataclass(plugin_class):
        return []
    said = {name: text for owner in reversed(plugin_class.__mro__) for name, text in _docstrings(owner).items()}
    return [
        {
            "option": field.name,
            "type": field.type if isinstance(field.type, str) else inspect.formatannotation(field.type),
            "default": _default(field),
            "does": said.get(field.name, ""),
        }
        for field in dataclasses.fields(plugin_class)
        if field.init
    ]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else repr(field.default)


def _docstrings(owner: type) -> dict[str, str]:
    """Return the texts below the fields of a class; none if it has no source."""
    if owner is object:
        return {}
    with contextlib.suppress(OSError, TypeError, SyntaxError):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        body = getattr(node, "body", [])
        return {
            here.target.id: inspect.cleandoc(below.value.value)
            for here, below in itertools.pairwise(body)
            if isinstance(here, ast.AnnAssign) and isinstance(here.target, ast.Name)
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(below.value.value, str)
        }
    return {}


def _hooks(plugin_class: type) -> list[dict[str, str]]:
    """Return the hooks that a class implements, in the order of the loop, then those that are not hookline's own."""
    from hookline.interfaces import CallbackInterface
    from hookline.marks import PROJECT
    from hookline.plugins import SEED

    kinds = {hook.name: hook.kind for hook in read_hooks()}
    found: dict[str, str] = {}
    for attribute in dir(plugin_class):
        method = getattr(plugin_class, attribute, None)
        marked = getattr(method, f"{PROJECT}_impl", None)
        if isinstance(marked, dict) and not attribute.startswith(("_call_on_", "_spread_on_")):
            hook = marked["specname"] or attribute
            does = "wraps" if marked["wrapper"] else "does" if kinds.get(hook) == "verb" else "hears"
            found[hook] = does
        elif attribute in SEED and method is not None and method is not getattr(CallbackInterface, attribute):
            found[attribute] = "hears"
    order = list(kinds)
    names = sorted(found, key=lambda hook: order.index(hook) if hook in kinds else len(order))
    return [{"hook": hook, "does": found[hook]} for hook in names]


def _as_text(told: dict[str, Any]) -> str:
    lines = [f"{told['plugin']}: {told['does']}", "", f"{told['distribution']}, {told['class']}"]
    if told["observer"]:
        lines.append("only watches: its failures end no run")
    if told["requires"]:
        lines.append(f"requires {', '.join(told['requires'])}")
    lines += ["", "options:" if told["options"] else "no options"]
    for option in told["options"]:
        lines.append(f"  {option['option']}: {option['type']} = {option['default']}")
        lines += textwrap.wrap(option["does"], 100, initial_indent="      ", subsequent_indent="      ")
    lines += ["", "hooks:" if told["hooks"] else "no hooks"]
    lines += [f"  {hook['does']:5} {hook['hook']}" for hook in told["hooks"]]
    return "\n".join(lines)


# Verify -------------------------------------------------------------------------------


def verify(options: argparse.Namespace) -> int:
    """Compare the files of plugins with their RECORD, and import those that are as installed; 1 if one is not well.

    Raises:
        ValueError: there is no such plugin.
    """
    points = [point for points in claims().values() for point in points if options.what in (None, point.name)]
    if not points:
        raise ValueError(f"no plugin named {options.what!r} is installed{nearest(options.what, claims())}")
    rows = []
    for point in points:
        files, wrong = compare(point.dist) if point.dist else ("no distribution", True)
        problem = _problem(point)
        if not wrong and not problem:  # what was changed by others is not executed
            problem = _import_error(point)
        rows.append({**_row(point), "files": files, "problem": problem, "well": not wrong and not problem})
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        shown = ["plugin", "distribution", "version", "files", *["problem"] * any(row["problem"] for row in rows)]
        print(*table(shown, [[str(row[key]) for key in shown] for row in rows]), sep="\n")
    return 0 if all(row["well"] for row in rows) else 1


def _import_error(point: metadata.EntryPoint) -> str:
    try:
        load(point.name)
    except ValueError as error:
        return str(error)
    return ""


def compare(dist: metadata.Distribution) -> tuple[str, bool]:
    """Return what became of a distribution's files since it was installed, and whether that is wrong."""
    origin = json.loads(dist.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        return f"editable, {origin.get('url', '')}: not compared", False
    changed, missing, same = [], [], 0
    for file in dist.files or ():
        if file.hash is None:  # RECORD itself, and what Python has compiled
            continue
        try:
            digest = hashlib.new(file.hash.mode, Path(file.locate()).read_bytes()).digest()
        except OSError:
            missing.append(str(file))
            continue
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value:
            same += 1
        else:
            changed.append(str(file))
    said = [f"{word}: {', '.join(names)}" for word, names in (("changed", changed), ("missing", missing)) if names]
    if not said and not same:
        return "no RECORD of its files: not compared", True
    return "; ".join(said) or f"{same} as installed", bool(said)
