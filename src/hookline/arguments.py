"""Hold plain values against annotations: what a class takes, and what a configuration gives it."""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import difflib
import enum
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hookline.installed import nearest
from hookline.masking import mask, redact

Parameters = Mapping[str, inspect.Parameter]

TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
LISTS = (list, tuple, set, frozenset, Sequence, collections.abc.Iterable, collections.abc.Collection)
BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
MAPPINGS = (dict, Mapping, collections.abc.MutableMapping)
NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?(inf|nan)", re.I)


class Misfit(ValueError):
    """A value that is not of the annotated type; the message is a hint, or empty."""


def parameters_of(target: Any) -> Parameters:
    """Return the parameters of a class or function, with their annotations as types.

    An annotation that is missing or cannot be resolved is `Any`. A builtin without a signature takes anything.
    """
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):
        return {"any": inspect.Parameter("any", inspect.Parameter.VAR_KEYWORD)}
    return {name: one.replace(annotation=_type_of(one, target)) for name, one in signature.parameters.items()}


def _type_of(parameter: inspect.Parameter, target: Any) -> Any:
    called: Any = getattr(target, "__init__", target) if isinstance(target, type) else target
    names = getattr(inspect.unwrap(called), "__globals__", {})
    for home in target.__mro__ if dataclasses.is_dataclass(target) and isinstance(target, type) else ():
        if parameter.name in inspect.get_annotations(home):  # the generated __init__ knows the names of another module
            names = vars(sys.modules[home.__module__])
            break
    annotated = types.SimpleNamespace(__annotations__={"it": parameter.annotation})
    with contextlib.suppress(Exception):  # a name that only type checkers see, say
        return Any if parameter.annotation is parameter.empty else typing.get_type_hints(annotated, names)["it"]
    return Any


def check_names(where: str, taker: str, parameters: Parameters, given: Mapping[str, Any]) -> None:
    """Refuse values that nobody takes, and parameters without a value.

    Raises:
        ValueError: there is one; the message has its key, and what there is.
    """
    open_ended = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    known = [name for name, one in parameters.items() if one.kind is not one.VAR_KEYWORD]
    unnamed = [name for name in known if parameters[name].kind in BY_PLACE]
    for name in given:
        if name not in known and not open_ended:
            raise ValueError(f"{where}.{name}: unknown key{nearest(name, known)}; {taker} takes {listed(name, known)}")
        if name in unnamed and not open_ended:
            raise ValueError(f"{where}.{name}: {taker} takes {name} by place alone, which a configuration cannot give")
    needed = [name for name in known if parameters[name].kind is not inspect.Parameter.VAR_POSITIONAL]
    missing = [name for name in needed if parameters[name].default is inspect.Parameter.empty and name not in given]
    if missing:
        wanted = ", ".join(f"{name!r} ({spell_type(parameters[name].annotation)})" for name in missing)
        raise ValueError(f"{where}: {taker}: missing a required argument: {wanted}")


def make(target: Any, given: Mapping[str, Any], where: str) -> Any:
    """Call a class or function with values by name, as its parameters are annotated.

    Raises:
        ValueError: it takes other names or types, or refuses a value with a `ValueError` of its own.
    """
    taker, parameters = getattr(target, "__name__", str(target)), parameters_of(target)
    check_names(where, taker, parameters, given)
    values = typed(where, taker, parameters, given)
    try:
        return target(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def listed(word: str, known: Sequence[str]) -> str:
    """Return the known words as a list for a message, those near to a word first."""
    return ", ".join(dict.fromkeys([*difflib.get_close_matches(word, known, n=5), *known])) or "no keys"


def typed(where: str, taker: str, parameters: Parameters, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given values as their parameters are annotated.

    Args:
        where: the key of the node in the configuration, for messages.
        taker: the name of what takes the values, for messages.
        parameters: what `parameters_of` returns.
        given: values by name.

    Raises:
        ValueError: a value is of another type; the message has its key, the type and the value.
    """
    made = dict(given)
    for name in parameters.keys() & given.keys():
        kind, default, value = parameters[name].annotation, parameters[name].default, given[name]
        if type(value) is type(default) and value == default:
            continue
        try:
            made[name] = fit(value, kind, f"{where}.{name}")
        except Misfit as error:
            shown = redact(spell(mask({name: value})[name]))
            raise ValueError(
                f"{where}.{name}: {taker} takes {name}: {spell_type(kind)}, but got {shown}{error}"
            ) from None
    return made


# One value ----------------------------------------------------------------------------


def fit(value: Any, kind: Any, where: str) -> Any:
    """Return a value as its annotation wants it; a type that is not known here takes any value.

    Raises:
        Misfit: it is of another type.
    """
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if isinstance(kind, typing.NewType) or origin is typing.Annotated:
        return fit(value, inner[0] if inner else kind.__supertype__, where)
    if kind in (Any, object) or (
        isinstance(value, Mapping) and "_target_" in value
    ):  # what that makes is not known yet
        return value
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, inner, where)
    if origin is typing.Literal:
        return _choice(value, {str(one): one for one in inner})
    if origin in (bool, int, float, str, Path):
        return _scalar(value, origin)
    if origin in LISTS:
        return _items(value, origin, inner, where)
    if origin in MAPPINGS and isinstance(value, Mapping):
        keys, values = inner or (Any, Any)
        return {fit(key, keys, where): fit(one, values, f"{where}.{key}") for key, one in value.items()}
    return _object(value, origin, where)


def _one_of(value: Any, kinds: Sequence[Any], where: str) -> Any:
    """Fit a value to the type of these that it is of already, else to the first that it fits; text comes last."""
    errors: list[ValueError] = []
    for kind in [one for one in kinds if type(value) is one] or sorted(kinds, key=lambda kind: kind is str):
        try:
            return fit(value, kind, where)
        except ValueError as error:
            errors.append(error)
    raise max(errors, key=lambda error: len(str(error)))  # which knows the most


def _choice(value: Any, choices: Mapping[str, Any]) -> Any:
    """Return the one of some choices that a value is, or names."""
    for word, choice in choices.items():
        if word == value or (type(choice) is type(value) and choice == value):
            return choice
    raise Misfit(f"{nearest(value, choices) if isinstance(value, str) else ''}; there are {', '.join(choices)}")


def _scalar(value: Any, kind: type) -> Any:
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    if kind in (str, Path) and type(value) is int:
        return kind(str(value))
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is bool and type(value) in (int, str) and str(value).lower() in TRUTHS:
        return TRUTHS[str(value).lower()]
    if kind is float and type(value) is int:
        return float(value)
    if kind in (int, float) and isinstance(value, str) and NUMBER.fullmatch(value):  # of an environment variable, say
        with contextlib.suppress(ValueError):
            return kind(value)
    if kind in (str, Path) and isinstance(value, (bool, float)):
        why = "; YAML takes a bare yes, no, on and off for true or false" if isinstance(value, bool) else ""
        raise Misfit(f"{why}; write a text in quotes")
    raise Misfit


def _items(value: Any, kind: Any, inner: Sequence[Any], where: str) -> Any:
    if not isinstance(value, (list, tuple)):  # an object that was made, or no list at all
        if isinstance(value, kind) and not isinstance(value, (str, Mapping)):
            return value
        raise Misfit
    fixed = kind is tuple and Ellipsis not in inner and bool(inner)
    if fixed and len(value) != len(inner):
        raise Misfit(f"; these are {len(value)} values")
    kinds = inner if fixed else [inner[0] if inner else Any] * len(value)
    made = [fit(one, each, f"{where}.{at}") for at, (one, each) in enumerate(zip(value, kinds, strict=True))]
    return kind(made) if kind in (tuple, set, frozenset) else made


def _object(value: Any, kind: Any, where: str) -> Any:
    """Fit a value to a class that is none of Python's plain ones."""
    if not isinstance(kind, type) or kind is type or typing.Protocol in kind.__bases__ or typing.is_typeddict(kind):
        return value
    if issubclass(kind, enum.Enum):
        return _choice(value, dict(kind.__members__) | {str(one.value): one for one in kind})
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return make(kind, value, where)
    if isinstance(value, kind):
        return value
    plain = isinstance(value, (bool, int, float, str, list, Mapping)) and kind not in (type(None), *MAPPINGS)
    raise Misfit("; an object is a mapping with `_target_`, the dotted path of what makes it" if plain else "")


def spell(value: Any) -> str:
    """Return a value as YAML writes it."""
    return json.dumps(value, ensure_ascii=False, default=lambda one: f"an object of {type(one).__qualname__}")


def spell_type(kind: Any) -> str:
    """Return a type as Python writes it, with null for None."""
    return re.sub(r"\bNone\b", "null", re.sub(r"^Optional\[(.*)\]$", r"\1 | None", inspect.formatannotation(kind)))
