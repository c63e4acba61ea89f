"""What is searched: `key=uniform(0,1)` and the like, read without executing anything."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from hookline import nearest

KINDS = ("uniform", "loguniform", "int", "logint", "choice")
CALL = re.compile(r"(\w+)\((.*)\)", re.S)

Space = dict[str, BaseDistribution]


def split(words: Sequence[str]) -> tuple[Space, list[str]]:
    """Return what is searched by key, and the other words.

    Raises:
        ValueError: a word that cannot be read, or none that searches.
    """
    space: Space = {}
    others = []
    for word in words:
        key, _, text = word.partition("=")
        call = CALL.fullmatch(text.strip())
        if call is None:
            others.append(word)
            continue
        if key in space:
            raise ValueError(f"{key} is searched twice; write it once")
        space[key] = distribution(word, call[1], call[2])
    if not space:
        raise ValueError(
            "there is nothing to search: write at least one KEY=KIND(…), such as "
            "'module.lr=loguniform(1e-4,1e-1)'; the kinds are " + ", ".join(KINDS)
        )
    return space, others


def distribution(word: str, kind: str, inside: str) -> BaseDistribution:
    """Return the distribution that a word says.

    Raises:
        ValueError: it says none; the message has the word.
    """
    try:
        if kind == "choice":
            return CategoricalDistribution(choices(inside))
        if kind not in KINDS:
            raise ValueError(f"there is no kind {kind!r}{nearest(kind, KINDS)}; there are {', '.join(KINDS)}")
        bounds = inside.split(",")
        if len(bounds) != 2:
            raise ValueError(f"{kind} takes two numbers, the lowest and the highest value")
        if kind in ("int", "logint"):
            return IntDistribution(int(bounds[0]), int(bounds[1]), log=kind == "logint")
        low, high = map(float, bounds)
        if not math.isfinite(low) or not math.isfinite(high):
            raise ValueError(f"{kind} takes finite numbers")
        return FloatDistribution(low, high, log=kind == "loguniform")
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{word!r} cannot be searched: {error}") from error


def choices(inside: str) -> list[Any]:
    """Return the values of a choice, which are written in YAML."""
    values = OmegaConf.to_container(OmegaConf.create(f"[{inside}]"), resolve=False)
    assert isinstance(values, list)
    for value in values:
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise ValueError(f"{value!r} is neither a number nor a text, true, false or null")
    if len(set(values)) < len(values) or not values:
        raise ValueError("choice takes values that differ from each other, at least one")
    return values


def first(space: Space) -> dict[str, Any]:
    """Return one value of each: the lowest, or the first choice."""
    return {key: one.choices[0] if isinstance(one, CategoricalDistribution) else one.low for key, one in space.items()}  # type: ignore[attr-defined]


def overrides(values: Mapping[str, Any]) -> list[str]:
    """Return values as `hookline fit` takes them; JSON is YAML, and keeps every bit of a number."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
