"""The argument parser of Lightning's first year, and what a script asks of its result."""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STRATEGIES = ("grid_search", "random_search")


class Hparams(argparse.Namespace):
    """Arguments that were parsed; `trials` gives those of a search, one after the other.

    A copy or a pickle of it has the arguments alone.
    """

    __slots__ = ("trials_parser",)  # beside `vars`, which are the arguments

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))

    def trials(self, num: int | None = None) -> Iterator[Hparams]:
        """Yield arguments with other values of those that are tunable.

        Args:
            num: how many; by default, in a grid search, all.
        """
        yield from self.generate_trials(num)

    def generate_trials(self, nb_trials: int | None = None) -> list[Hparams]:
        """Return what `trials` yields, as a list.

        Raises:
            ValueError: the strategy of the parser is none, or is random and no number is given.
        """
        parser: HyperOptArgumentParser | None = getattr(self, "trials_parser", None)
        if parser is None:
            raise ValueError("trials() of a copy of arguments: ask what parse_args returned")
        chosen = combinations(parser.tunable, parser.strategy, nb_trials)
        return [parser.made({**vars(self), **one}) for one in chosen]

    def optimize_parallel(self, *args: Any, **options: Any) -> None:
        """Refuse: processes of a search are started by a plugin."""
        self._refuse("optimize_parallel")

    def optimize_parallel_cpu(self, *args: Any, **options: Any) -> None:
        """Refuse: processes of a search are started by a plugin."""
        self._refuse("optimize_parallel_cpu")

    def optimize_parallel_gpu(self, *args: Any, **options: Any) -> None:
        """Refuse: processes of a search are started by a plugin."""
        self._refuse("optimize_parallel_gpu")

    def optimize_trials_parallel_gpu(self, *args: Any, **options: Any) -> None:
        """Refuse: processes of a search are started by a plugin."""
        self._refuse("optimize_trials_parallel_gpu")

    @staticmethod
    def _refuse(name: str) -> None:
        raise NotImplementedError(
            f"{name}() is not here: `for trial in hparams.trials(n)` tries one after the other, and `hookline sweep` "
            "and the plugin ray start several processes"
        )


class HyperOptArgumentParser(argparse.ArgumentParser):
    """An argument parser whose arguments may have values to search over.

    An option of a parent's may be given anew.

    Args:
        strategy: of a search, "grid_search" or "random_search".
        options: of `argparse.ArgumentParser`.
    """

    def __init__(self, strategy: str = "grid_search", **options: Any) -> None:
        super().__init__(**{"conflict_handler": "resolve", **options})
        self.strategy = strategy
        self.tunable: dict[str, list[Any]] = {}
        """Values to search over, by the name of their argument."""
        self._json_config: str | None = None
        for parent in options.get("parents", ()):
            if isinstance(parent, HyperOptArgumentParser):
                self.tunable.update(parent.tunable)
                self._json_config = self._json_config or parent._json_config

    def opt_list(self, *args: Any, options: Any = None, tunable: bool = False, **more: Any) -> argparse.Action:
        """Add an argument whose values in a search are `options`; else its default or the given value holds."""
        action = self.add_argument(*args, **more)
        if tunable:
            if not options:
                raise ValueError(f"opt_list({args[-1]!r}): a tunable argument needs options")
            self.tunable[action.dest] = list(options)
        return action

    def opt_range(
        self, *args: Any, low: Any = None, high: Any = None, nb_samples: int = 10, tunable: bool = False,
        log_base: float | None = None, **more: Any,
    ) -> argparse.Action:  # fmt: skip
        """Add an argument whose values in a search are `nb_samples` from `low` to `high`, both included.

        Args:
            args: the names of the argument.
            low: the first value.
            high: the last value.
            nb_samples: how many values; with `type=int` equal ones count once.
            tunable: whether a search changes it.
            log_base: for equal ratios in place of equal distances.
            more: as in `add_argument`.
        """
        action = self.add_argument(*args, **more)
        if tunable:
            if low is None or high is None:
                raise ValueError(f"opt_range({args[-1]!r}): a tunable range needs low and high")
            self.tunable[action.dest] = spread(low, high, nb_samples, log_base, more.get("type"))
        return action

    def json_config(self, *args: Any, **more: Any) -> argparse.Action:
        """Add an argument for a JSON file whose values take the place of all others."""
        action = self.add_argument(*args, **more)
        self._json_config = action.dest
        return action

    def parse_args(self, args: Any = None, namespace: Any = None) -> Hparams:  # type: ignore[override]
        """Return the arguments; those in a JSON file win."""
        given = dict(vars(super().parse_args(args, namespace)))
        if self._json_config is not None and given.get(self._json_config):
            given.update(json.loads(Path(given[self._json_config]).read_text(encoding="utf-8")))
        return self.made({"hpc_exp_number": None, **given})

    def made(self, values: dict[str, Any]) -> Hparams:
        """Return arguments that know their parser."""
        hparams = Hparams(**values)
        object.__setattr__(hparams, "trials_parser", self)
        return hparams


def spread(low: Any, high: Any, number: int, log_base: float | None, kind: Callable[[Any], Any] | None) -> list[Any]:
    """Return so many values from low to high, at equal distances, or at equal ratios where there is a base."""
    if log_base is not None and low <= 0:
        raise ValueError(f"opt_range(low={low}, log_base={log_base}): ratios need a range above 0")
    first, last = (low, high) if log_base is None else (math.log(low, log_base), math.log(high, log_base))
    places = [first + (last - first) * index / max(number - 1, 1) for index in range(number)]
    values = places if log_base is None else [log_base**place for place in places]
    return list(dict.fromkeys(round(value) for value in values)) if kind is int else values


def combinations(tunable: dict[str, list[Any]], strategy: str, number: int | None) -> list[dict[str, Any]]:
    """Return combinations of the values: the first of a grid, or different ones at random.

    Raises:
        ValueError: an unknown strategy, or a random one without a number.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} must be one of {', '.join(STRATEGIES)}")
    total = math.prod(len(values) for values in tunable.values())
    if strategy == "random_search" and number is None:
        raise ValueError("random_search needs a number of trials: hparams.trials(20)")
    wanted = total if number is None else min(number, total)
    places = range(wanted) if strategy == "grid_search" else random.sample(range(total), wanted)
    return [_at(place, tunable) for place in places]


def _at(place: int, tunable: dict[str, list[Any]]) -> dict[str, Any]:
    """Return the combination at a place in the grid, whose last argument changes fastest."""
    found: dict[str, Any] = {}
    for name, values in reversed(tunable.items()):
        place, index = divmod(place, len(values))
        found[name] = values[index]
    return found
