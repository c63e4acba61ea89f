"""Hugging Face's format: what a module says of itself there, and its names of tensors in both directions."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from hookline_checkpoint.storage import PLAIN

METHOD = "get_hf_format"
"""The method by which a module says so."""
KEYS = ("config", "names", "files")
CONFIG = "config.json"
OPTIONS = ("to", "dim", "sizes", "view", "order")

Get = Callable[[str], torch.Tensor]


class Rule(NamedTuple):
    """How tensors of the module are called there, and what lies between the two; of one side there is one tensor."""

    own: tuple[str, ...]
    theirs: tuple[str, ...]
    """Nothing for what is not there."""
    dim: int
    """Along which several are one."""
    sizes: tuple[int, ...] | None
    """Of the several in the one; None for equal parts."""
    view: tuple[int, ...] | None
    """What each is looked at as before its dimensions change places."""
    order: tuple[int, ...] | None
    """Of the dimensions there; None where they stay."""

    # A tensor there from those of the module, and back --------------------------------

    def there(self, own: Sequence[str], place: int, get: Get) -> torch.Tensor:
        """Return the tensor at this place there."""
        if len(own) > 1:
            return torch.cat([self._turned(get(name)) for name in own], self.dim)
        whole = get(own[0])
        return self._turned(whole if len(self.theirs) == 1 else self._parts(whole, len(self.theirs))[place])

    def here(self, theirs: Sequence[str], place: int, get: Get, sizes: Sequence[int]) -> torch.Tensor:
        """Return the tensor of the module at this place; `sizes` are those of all of its own along `dim`."""
        if len(theirs) > 1:
            return torch.cat([self._back(get(name)) for name in theirs], self.dim)
        whole = get(theirs[0])
        return self._back(whole if len(self.own) == 1 else torch.split(whole, list(sizes), self.dim)[place])

    @property
    def is_plain(self) -> bool:
        """Tell whether the two differ in their names alone."""
        return len(self.own) == len(self.theirs) == 1 and self.order is None

    def _parts(self, whole: torch.Tensor, count: int) -> Sequence[torch.Tensor]:
        size = whole.shape[self.dim]
        sizes = self.sizes or [size // count] * count
        if sum(sizes) != size:
            raise ValueError(f"{self.own[0]} has {size} in dimension {self.dim}, and the parts are {[*sizes]}")
        return torch.split(whole, list(sizes), self.dim)

    def _turned(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.order is None:
            return tensor
        if self.view is None:
            return tensor.permute(self.order)
        return tensor.reshape(self.view).permute(self.order).reshape(tensor.shape)

    def _back(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.order is None:
            return tensor
        inverse = [self.order.index(dim) for dim in range(len(self.order))]
        if self.view is None:
            return tensor.permute(inverse)
        shape = tensor.new_empty(tensor.shape, device="meta").reshape(self.view).permute(self.order).shape
        return tensor.reshape(shape).permute(inverse).reshape(tensor.shape)


SAME = Rule(("*",), ("*",), 0, None, None, None)
"""Of a module that says nothing: its names are those there."""

# What a module says -------------------------------------------------------------------


def described(module: Any) -> dict[str, Any] | None:
    """Return what a module says of itself, checked, as plain data; None where it says nothing.

    Raises:
        ValueError: it cannot be used.
    """
    if not hasattr(module, METHOD):
        return None
    said, where = getattr(module, METHOD)(), f"{type(module).__name__}.{METHOD}()"
    if not isinstance(said, Mapping) or not isinstance(said.get("config"), Mapping) or set(said) - set(KEYS):
        raise ValueError(f"{where} must return a mapping with `config`, and perhaps `names` and `files`")
    try:
        config = json.loads(json.dumps(said["config"], allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: `config` is what {CONFIG} holds, plain data: {error}") from error
    files = dict(said.get("files", {}))
    for name, content in files.items():
        if not isinstance(name, str) or not PLAIN.fullmatch(name) or not isinstance(content, (str, bytes)):
            raise ValueError(f"{where}: `files` are texts or bytes by plain file names, and {name!r} is not")
    names = said.get("names", {"*": "*"})
    return {"config": config, "names": [_rule(own, to, where)._asdict() for own, to in names.items()], "files": files}


def rules_of(said: Mapping[str, Any]) -> list[Rule]:
    """Return the rules in what `described` returned, also when it was stored meanwhile."""
    rules = []
    for one in said["names"]:
        options: dict[str, Any] = {key: tuple(kept) if isinstance(kept, list) else kept for key, kept in one.items()}
        rules.append(Rule(**options))
    return rules


def _rule(own: Any, given: Any, where: str) -> Rule:
    options = dict(given) if isinstance(given, Mapping) else {"to": given}
    if unknown := set(options) - set(OPTIONS):
        raise ValueError(f"{where}: {own!r} has {', '.join(sorted(unknown))}; there are {', '.join(OPTIONS)}")
    to = options.get("to")
    ours, theirs = _texts(own, where), () if to is None else _texts(to, where)
    if len(ours) > 1 and len(theirs) != 1:
        raise ValueError(f"{where}: {own!r} are several tensors, so they become one, and {to!r} is not one name")
    if len({text.count("*") for text in (*ours, *theirs)}) > 1:
        raise ValueError(f"{where}: {own!r} and {to!r} must have equally many *, each of which stands for the same")
    lists = {key: None if options.get(key) is None else tuple(options[key]) for key in ("sizes", "view", "order")}
    if lists["view"] is not None and lists["order"] is None:
        raise ValueError(f"{where}: {own!r} has `view` without `order`, which changes nothing; give both, or none")
    return Rule(ours, theirs, options.get("dim", 0), **lists)


def _texts(given: Any, where: str) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else given
    if not isinstance(texts, (tuple, list)) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: {given!r} is no name and no tuple or list of names")
    return tuple(texts)


# Names --------------------------------------------------------------------------------


class Origin(NamedTuple):
    """Where a tensor comes from: by which rule, which one of it, and the names on the other side."""

    rule: Rule
    place: int
    names: tuple[str, ...]


def names_there(rules: Sequence[Rule], own: Iterable[str]) -> dict[str, Origin]:
    """Return the names that tensors of a module have there, in their order.

    Raises:
        ValueError: a tensor has none, or two have one; or one lacks that belongs to another, or that a rule names.
    """
    own = dict.fromkeys(own)
    there: dict[str, Origin] = {}
    met: set[Rule] = set()
    for name in own:
        rule, _, stars = _find(rules, name)
        met.add(rule)
        needed = tuple(_filled(pattern, stars) for pattern in rule.own)
        if lacking := [other for other in needed if other not in own]:
            raise ValueError(f"{lacking[0]} is not stored, and {name} goes with it into {rule.theirs[0]}")
        for index, pattern in enumerate(rule.theirs if name == needed[0] else ()):
            theirs = _filled(pattern, stars)
            if theirs in there:
                raise ValueError(f"{there[theirs].names[0]} and {name} would both be {theirs}: correct {METHOD}()")
            there[theirs] = Origin(rule, index, needed)
    unmet = [rule.own[0] for rule in rules if rule not in met and rule.theirs and "*" not in rule.own[0]]
    if unmet:
        raise ValueError(
            f"{METHOD}() of the module names {unmet[0]}, and the checkpoint does not have it "
            f"({len(unmet)} in all): it does not hold the whole model, as that of a run with adapters does not"
        )
    return there


def names_here(rules: Sequence[Rule], own: Iterable[str]) -> dict[str, Origin]:
    """Return for each tensor of a module what it is made of; nothing for what is not there.

    Raises:
        ValueError: no rule has a name for one.
    """
    here = {}
    for name in own:
        rule, index, stars = _find(rules, name)
        here[name] = Origin(rule, index, tuple(_filled(pattern, stars) for pattern in rule.theirs))
    return here


def own_names(origin: Origin, name: str) -> list[str]:
    """Return the names of all tensors of the module that are made of the same as the one of this name."""
    stars = _stars(origin.rule.own[origin.place], name) or ()
    return [_filled(pattern, stars) for pattern in origin.rule.own]


def _find(rules: Sequence[Rule], name: str) -> tuple[Rule, int, tuple[str, ...]]:
    for rule in rules:
        for index, pattern in enumerate(rule.own):
            stars = _stars(pattern, name)
            if stars is not None:
                return rule, index, stars
    patterns = [pattern for rule in rules for pattern in rule.own]
    near = "".join(f"; nearest is {one!r}" for one in difflib.get_close_matches(name, patterns, n=1, cutoff=0.0))
    raise ValueError(f"{METHOD}() of the module has no name for {name}{near}: give it one, or None to leave it out")


def _stars(pattern: str, name: str) -> tuple[str, ...] | None:
    """Return what the stars of a pattern stand for in a name; None where it does not fit."""
    if "*" not in pattern:
        return () if pattern == name else None
    match = re.fullmatch("(.+)".join(map(re.escape, pattern.split("*"))), name)
    return match.groups() if match else None


def _filled(pattern: str, stars: Sequence[str]) -> str:
    first, *others = pattern.split("*")
    return first + "".join(star + text for star, text in zip(stars, others, strict=True))
