"""Where runs differ: parameters, versions and metrics. Imports nothing heavy."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hookline.commands import table
from hookline_runs.layout import number
from hookline_runs.records import COUNTERS, Run

LOWER_IS_BETTER = re.compile(r"(?i)(^|[_/-])(\w*loss|error|nll|mse|mae|rmse|perplexity|ppl|wer|cer)($|[_/-])")


@dataclass
class Difference:
    """What differs between runs; numbers are told against the first."""

    runs: Mapping[str, Run]
    """By label."""

    def as_json(self) -> dict[str, Any]:
        """Return it for machines."""
        parameters, equal = self.parameters()
        metrics = {name: dict(self.metric(name)) for name in self.names()}
        return {"parameters": parameters, "equal_parameters": equal, "versions": self.versions(), "metrics": metrics}

    def parameters(self) -> tuple[dict[str, dict[str, str]], int]:
        """Return the parameters that differ, where they are set, and how many are equal."""
        known = {label: dict(flatten(run.config)) for label, run in self.runs.items()}
        differing = _differing(known)
        return differing, len({name for values in known.values() for name in values} - set(differing))

    def versions(self) -> dict[str, dict[str, str]]:
        """Return the revision and the versions that differ."""
        revisions = {label: {"revision": run.revision} if run.revision else {} for label, run in self.runs.items()}
        return _differing({label: {**revisions[label], **run.versions} for label, run in self.runs.items()})

    def names(self) -> list[str]:
        """Return the names of all metrics."""
        logged = (row for run in self.runs.values() for row in _rows(run))
        return [name for name in dict.fromkeys(name for row in logged for name in row) if name not in COUNTERS]

    def metric(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Give what a metric came to in each run that has it: its last and its best value, and where."""
        first: dict[str, Any] | None = None
        best = min if is_better_lower(name) else max
        for label, run in self.runs.items():
            points = [(row[name], row["step"]) for row in _rows(run) if name in row]
            if not points:
                continue
            value, step = best((p for p in points if not math.isnan(p[0])), key=lambda p: p[0], default=points[-1])
            told = {"last": points[-1][0], "last_step": points[-1][1], "best": value, "best_step": step}
            if first is None:
                first = told
            else:
                told |= {f"{key}_difference": told[key] - first[key] for key in ("last", "best")}
            yield label, told

    def render(self, width: int) -> str:
        """Return a page of so many columns."""
        parameters, equal = self.parameters()
        title = f"parameters that differ ({len(parameters)}; {equal} are equal)"
        parts = [[title, *self._side_by_side("parameter", parameters, width)]]
        if versions := self.versions():
            parts.append(["versions that differ", *self._side_by_side("of", versions, width)])
        cells = []
        for name in self.names():
            said = f"{name} ({'lowest' if is_better_lower(name) else 'highest'})"
            for label, told in self.metric(name):
                last, best = (_signed(told.get(f"{key}_difference")) for key in ("last", "best"))
                line = [number(told["last"]), last, str(told["last_step"])]
                cells.append([said, label, *line, number(told["best"]), best, str(told["best_step"])])
                said = ""
        if cells:
            header = ["metric (its best)", "run", "last", "difference", "at step", "best", "difference", "at step"]
            parts.append(table(header, cells, right=range(2, 8)))
        else:
            parts.append(["no metrics were logged"])
        return "\n\n".join("\n".join(lines) for lines in parts)

    def _side_by_side(self, head: str, differing: Mapping[str, Mapping[str, str]], width: int) -> list[str]:
        """Lay out values in a column for each run; those that are too long for that below one another."""
        if not differing:
            return []
        room = (width - max(map(len, differing))) // len(self.runs) - 2
        cells, long = [], []
        for name, values in differing.items():
            line = [values.get(label, "-") for label in self.runs]
            if max(map(len, line)) <= max(room, max(map(len, self.runs))):
                cells.append([name, *line])
            else:
                long += [name, *(f"  {label}: {value}" for label, value in zip(self.runs, line, strict=True))]
        return [*(table([head, *self.runs], cells) if cells else []), *long]


def is_better_lower(name: str) -> bool:
    """Tell by its name whether a metric's best value is the lowest, as for a loss, or the highest."""
    return LOWER_IS_BETTER.search(name) is not None


def flatten(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Give the dotted names of a configuration and their values as text."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value if isinstance(value, str) else json.dumps(value)


def _differing(known: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Return what is not the same everywhere: by name, and then by label where it is known."""
    names = dict.fromkeys(name for values in known.values() for name in values)
    by_name = {name: {label: values[name] for label, values in known.items() if name in values} for name in names}
    return {name: told for name, told in by_name.items() if len(told) < len(known) or len({*told.values()}) > 1}


def _rows(run: Run) -> Iterator[Mapping[str, float | int]]:
    """Give what the training logged, and behind it the tests on their own."""
    yield from run.rows
    yield from (values for stage, values in run.evaluations if stage == "test")


def _signed(difference: float | None) -> str:
    if difference is None:
        return ""
    return number(difference) if difference < 0 or math.isnan(difference) else f"+{number(difference)}"
