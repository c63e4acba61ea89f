"""The hooks, read from the source of `hookspecs.py`, without importing torch."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Hook:
    """One hook, as its source defines it."""

    name: str
    kind: str
    signature: str
    arguments: tuple[str, ...]
    answers: str
    doc: str
    section: str


def read_hooks() -> list[Hook]:
    """Return every hook in the order of the source, which is the order of the loop."""
    source = (Path(__file__).parent.parent / "hookspecs.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    hooks = []
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        marks = [ast.unparse(mark) for mark in node.decorator_list]
        kind = (
            "verb"
            if any(mark.startswith("verb") for mark in marks)
            else "event"
            if any(mark.startswith("event") for mark in marks)
            else None
        )
        if kind is None:
            continue
        above = [line for line in lines[: node.lineno] if line.startswith("# ") and line.endswith("---")]
        arguments = [argument.arg for argument in node.args.args]
        typed = ", ".join(ast.unparse(argument) for argument in node.args.args)
        answers = ast.unparse(node.returns) if node.returns and kind == "verb" else ""
        signature = f"{node.name}({typed})" + (f" -> {answers}" if answers else "")
        doc = inspect.cleandoc(ast.get_docstring(node) or "")
        section = above[-1].strip("# -")
        hooks.append(Hook(node.name, kind, signature, tuple(arguments), answers, doc, section))
    return hooks


def render(hook: Hook) -> str:
    """Return the text that `hookline hooks NAME` prints."""
    kind = f"{hook.kind}, returns {hook.answers}" if hook.answers else hook.kind
    return f"{hook.signature}\n\n{kind}; {hook.section.lower()}\n\n{hook.doc}"


def render_reference() -> str:
    """Return the page `docs/hooks.md`: every hook with its arguments, its kind, its result and its purpose."""
    parts = [REFERENCE]
    section = ""
    for hook in read_hooks():
        if hook.section != section:
            section = hook.section
            parts.append(f"## {section}")
        kind = f"Verb, returns `{hook.answers}`." if hook.kind == "verb" else "Event."
        parts.append(f"### `{hook.name}({', '.join(hook.arguments)})` {{ #{hook.name} }}\n\n{kind}")
        parts.append(f"```text\n{hook.signature}\n```\n\n{hook.doc}")
    return "\n\n".join(parts)


REFERENCE = """\
<!-- Written by `python -m hookline.cli.hooks > docs/hooks.md`. Do not edit. -->

# Hooks

Every hook, read from the source of `hookline.hookspecs`. [The loop](loop.md) shows when the trainer reaches each one;
[writing a plugin](writing-a-plugin.md) shows how to implement one.

The trainer calls an **event** (`on_*`) for every plugin that implements it, and ignores what they return. A **verb**
happens once and returns a result; the body of its function in `hookline.hookspecs` is the default. An implementation
is a method marked `@hookimpl` that names any of the arguments, in any order. `hookline hooks NAME` prints one of these
entries."""


if __name__ == "__main__":
    print(render_reference())
