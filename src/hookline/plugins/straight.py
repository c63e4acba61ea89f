"""Straight verbs: the bodies of hooks that nobody plugs into stand where they are called.

The specifications are the definition. What is made of them here does the same with fewer calls, and its lines are
theirs: tracebacks, breakpoints and profilers show where the code is written.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any


@functools.lru_cache(maxsize=64)
def straight(module: ModuleType, name: str, plain: frozenset[str]) -> Callable[..., Any]:
    """Return a verb with the bodies of other hooks in the place of their calls, `hook.other(…)`.

    A call is put in where it is a statement, or what one assigns, returns, tests or loops over, an argument of it
    included; then it comes before the rest of that statement. A body that returns from within a loop stays a call.

    Args:
        module: of the specifications, whose names the bodies use.
        name: the verb.
        plain: the hooks whose bodies are all that happens when they are called.
    """
    definitions = _definitions(module)
    made = copy.deepcopy(definitions[name])
    made.decorator_list, made.returns = [], None
    for argument in made.args.args:
        argument.annotation = None
    made.body = _Bodies({other: definitions[other] for other in plain & definitions.keys()}).put_in(_statements(made))
    namespace: dict[str, Any] = {}
    tree = ast.fix_missing_locations(ast.Module([made], []))
    exec(compile(tree, inspect.getfile(module), "exec"), vars(module), namespace)
    return namespace[name]  # type: ignore[no-any-return]


@functools.cache
def _definitions(module: ModuleType) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(inspect.getsource(module))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def _statements(function: ast.FunctionDef) -> list[ast.stmt]:
    """Return a copy of a function's statements, without its docstring."""
    return copy.deepcopy(function.body[ast.get_docstring(function) is not None :])


class _Bodies:
    """The definitions of the hooks whose bodies are put in; each body's names are told apart by a number."""

    def __init__(self, definitions: Mapping[str, ast.FunctionDef]) -> None:
        self.definitions = definitions
        self.count = 0

    def put_in(self, statements: Sequence[ast.stmt]) -> list[ast.stmt]:
        """Return statements with bodies in the place of calls; a value that nobody takes is dropped."""
        made: list[ast.stmt] = []
        for statement in statements:
            for block in ("body", "orelse"):
                if inner := getattr(statement, block, None):
                    setattr(statement, block, self.put_in(inner))
            match statement:
                case ast.Expr() | ast.Assign() | ast.Return() if statement.value is not None:
                    statement.value = self._evaluated(statement.value, made)
                case ast.If():
                    statement.test = self._evaluated(statement.test, made)
                case ast.For():
                    statement.iter = self._evaluated(statement.iter, made)
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Name | ast.Constant)):
                made.append(statement)
        return made or [ast.Pass()]

    def _evaluated(self, value: ast.expr, before: list[ast.stmt]) -> ast.expr:
        """Return an expression whose calls of hooks are replaced by the results of bodies that come before it."""
        if isinstance(value, ast.UnaryOp):
            value.operand = self._evaluated(value.operand, before)
        if not isinstance(value, ast.Call):
            return value
        value.args = [self._evaluated(argument, before) for argument in value.args]
        for keyword in value.keywords:
            keyword.value = self._evaluated(keyword.value, before)
        function = value.func
        if isinstance(function, ast.Attribute) and ast.unparse(function.value).endswith("hook"):
            definition = self.definitions.get(function.attr)
            if definition is not None:
                return self._body(definition, value, before)
        return value

    def _body(self, definition: ast.FunctionDef, call: ast.Call, before: list[ast.stmt]) -> ast.expr:
        """Put the body of a hook before a statement, and return the expression that has its result."""
        self.count += 1
        body, prefix = _statements(definition), f"{definition.name}_{self.count}_"
        names = [node for statement in body for node in ast.walk(statement) if isinstance(node, ast.Name)]
        own = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        meant: dict[str, ast.expr] = {name: ast.Name(prefix + name) for name in own}
        given: list[ast.stmt] = []
        for keyword in call.keywords:
            assert keyword.arg is not None
            if keyword.arg not in own and isinstance(keyword.value, ast.Name | ast.Constant):
                meant[keyword.arg] = keyword.value
            else:
                meant[keyword.arg] = ast.Name(prefix + keyword.arg)
                given.append(_assign(prefix + keyword.arg, keyword.value, call))
        _Renamed(meant).generic_visit(ast.Module(body, []))
        settled = _settled(self.put_in(body) if body else [], f"{prefix}result", call)
        if settled is None:
            return call
        *first, last = settled
        before += [*given, *first]
        if isinstance(last, ast.Assign):
            return last.value
        before.append(last)
        return ast.copy_location(ast.Name(f"{prefix}result", ast.Load()), call)


class _Renamed(ast.NodeTransformer):
    """Puts expressions in the place of names."""

    def __init__(self, meant: Mapping[str, ast.expr]) -> None:
        self.meant = meant

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Return what the name means."""
        meant = copy.copy(self.meant.get(node.id, node))
        if isinstance(meant, ast.Name):
            meant.ctx = node.ctx
        return ast.copy_location(meant, node)


def _settled(body: Sequence[ast.stmt], result: str, call: ast.Call) -> list[ast.stmt] | None:
    """Return a body that assigns its result where it would return; None if it returns from within a loop."""
    for place, statement in enumerate(body):
        rest = body[place + 1 :]
        if isinstance(statement, ast.Return):
            return [*body[:place], _assign(result, statement.value or ast.Constant(None), statement)]
        if any(isinstance(node, ast.Return) for node in ast.walk(statement)):
            if not isinstance(statement, ast.If):
                return None
            then = _settled([*statement.body, *copy.deepcopy(rest)], result, call)
            otherwise = _settled([*statement.orelse, *rest], result, call)
            if then is None or otherwise is None:
                return None
            return [*body[:place], ast.copy_location(ast.If(statement.test, then, otherwise), statement)]
    return [*body, _assign(result, ast.Constant(None), call)]


def _assign(name: str, value: ast.expr, place: ast.AST) -> ast.stmt:
    return ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], value), place)
