"""The hooks, read from the source of `hookspecs.py`: no torch is imported for it."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Hook:
    """One hook as it is written down."""

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
        kind = "verb" if "verb" in marks else "event" if any(mark.startswith("event") for mark in marks) else None
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
    """Return all that is said of one hook."""
    kind = f"{hook.kind}, answers {hook.answers}" if hook.answers else hook.kind
    return f"{hook.signature}\n\n{kind}; {hook.section.lower()}\n\n{hook.doc}"


def render_reference() -> str:
    """Return the page `docs/hooks.md`: every hook with its arguments, its kind, its answer and what it is for."""
    parts = [REFERENCE]
    section = ""
    for hook in read_hooks():
        if hook.section != section:
            section = hook.section
            parts.append(f"## {section}")
        kind = f"Verb, answers `{hook.answers}`." if hook.kind == "verb" else "Event."
        parts.append(f"### `{hook.name}({', '.join(hook.arguments)})` {{ #{hook.name} }}\n\n{kind}")
        parts.append(f"```text\n{hook.signature}\n```\n\n{hook.doc}")
    return "\n\n".join(parts)


REFERENCE = """\
<!-- Written by `python -m hookline.cli.hooks > docs/hooks.md`. Do not edit. -->

# Hooks

Every hook, read from the source of `hookline.hookspecs`. When each is reached is shown on [the loop](loop.md);
how to implement one, on [writing a plugin](writing-a-plugin.md).

An **event** (`on_*`) is told to everyone, and answers are dropped. A **verb** is done once and answers; in
`hookline.hookspecs` the body of its function is how the core does it. An implementation is a method marked `@hookimpl`
that names any of the arguments, in any order. `hookline hooks NAME` prints one of these entries."""


if __name__ == "__main__":
    print(render_reference())
