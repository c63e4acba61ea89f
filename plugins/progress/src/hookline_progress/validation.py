"""The validations of a run side by side: each metric's value, its change since the last one, and its best."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.box import ROUNDED
from rich.console import Console
from rich.table import Table
from rich.text import Text

BOUNDLESS = 10_000  # columns
WORDS = {  # in a metric's name, that say which of two values is better: below 0 the lower one
    **dict.fromkeys(("loss", "error", "perplexity", "ppl", "nll", "mse", "mae", "rmse", "wer", "cer", "fid"), -1),
    **dict.fromkeys(("accuracy", "acc", "precision", "recall", "f1", "auc", "auroc", "r2"), 1),
    **dict.fromkeys(("iou", "dice", "bleu", "rouge", "psnr", "ssim"), 1),
}


def direction(name: str) -> int:
    """Tell by a metric's words whether a higher value is better (1) or a lower one (-1); 0 where they do not say."""
    words = re.findall(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+", name)
    said = {WORDS[word.lower()] for word in words if word.lower() in WORDS}
    return said.pop() if len(said) == 1 else 0


@dataclass
class Standing:
    """How one metric stands after a validation."""

    value: float
    change: float | None
    """Since the validation before; None where there was none, or one of the two is no finite number."""
    better: bool | None
    """Whether that change is for the better; None where nobody can tell."""
    best: tuple[float, int | None] | None
    """The best value so far and the step it is of, where that is known; None where nobody can tell which is better."""
    is_best: bool
    """Whether that is this value, and for the first time."""


@dataclass
class Validations:
    """The best and the last values of a run's metrics, and which way each of them is better."""

    higher: Collection[str]
    lower: Collection[str]
    best: dict[str, tuple[float, int | None]] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    keys: Collection[str] = ()
    """Those of the loaders, where there are several."""

    def split(self, name: str) -> tuple[str, str]:
        """Return a metric's name without its loader's key, and the key."""
        base, _, key = name.rpartition("/")
        return (base, key) if key in self.keys and base else (name, "")

    def direction(self, name: str) -> int:
        """Tell whether higher (1) or lower (-1) is better; 0 where that is not known."""
        base, _ = self.split(name)
        return 1 if base in self.higher else -1 if base in self.lower else direction(base)

    def take(self, metrics: Mapping[str, float], step: int) -> dict[str, Standing]:
        """Take in a validation; return how each of its metrics stands now."""
        standings = {name: self._stand(name, value, step) for name, value in metrics.items()}
        self.last = dict(metrics)
        return standings

    def _stand(self, name: str, value: float, step: int) -> Standing:
        way = self.direction(name)
        change = value - self.last.get(name, math.nan)
        is_best = way != 0 and way * value > way * self.best.get(name, (-way * math.inf, None))[0]
        if is_best:
            self.best[name] = value, step
        known = math.isfinite(change)
        return Standing(
            value=value,
            change=change if known else None,
            better=way * change > 0 if known and way and change else None,
            best=self.best.get(name),
            is_best=is_best,
        )

    def get_state(self) -> dict[str, Any]:
        """Return what a resumed run goes on with, as plain data."""
        return {"best": {name: list(best) for name, best in self.best.items()}, "last": dict(self.last)}

    def update_state(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self.best = {name: (value, step) for name, (value, step) in state["best"].items()}
        self.last = dict(state["last"])

    def table(self, title: str, standings: Mapping[str, Standing], console: Console, room: int) -> Table:
        """Return a table with a row for each metric, and columns for each of several loaders if they fit in.

        Args:
            title: what stands above it.
            standings: the metrics.
            console: where it shall fit in.
            room: how many rows it may have; what is left out is counted in one more.
        """
        groups: dict[str, dict[str, Standing]] = {key: {} for key in self.keys}
        for name, standing in standings.items():
            base, key = self.split(name)
            groups.setdefault(key or "all", {})[base] = standing
        if len(groups) > 1:
            by_loader = lay_out(title, groups, console, room)
            if console.measure(by_loader, options=console.options.update(width=BOUNDLESS)).maximum <= console.width:
                return by_loader
        return lay_out(title, {"value": standings}, console, room)


def lay_out(title: str, groups: Mapping[str, Mapping[str, Standing]], console: Console, room: int) -> Table:
    """Return a table with a row for each metric and four columns for each group."""
    table = Table(title=title, title_justify="left", title_style="bold", box=ROUNDED, border_style="dim")
    table.add_column("metric", no_wrap=True)
    for name in groups:
        for heading in (name, "change", "best", "at step"):
            table.add_column(heading, justify="right", no_wrap=True)
    mark = " *" if console.options.ascii_only else " ★"
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    for name in names[:room]:
        table.add_row(name, *(cell for group in groups.values() for cell in cells(group.get(name), mark)))
    if names[room:]:
        table.add_row(f"and {len(names[room:])} more", style="dim")
    return table


def cells(standing: Standing | None, mark: str) -> Iterable[Text]:
    """Return what a table says of a metric: value, change, best value, its step."""
    if standing is None:
        return [Text()] * 4
    value = Text(f"{standing.value:.5g}{mark if standing.is_best else ' ' * len(mark)}")
    if standing.is_best:
        value.stylize("bold green")
    colours: dict[bool | None, str] = {True: "green", False: "red", None: ""}
    change = Text("" if standing.change is None else f"{standing.change:+.3g}", style=colours[standing.better])
    best, step = standing.best or ("", None)
    return [value, change, Text(f"{best:.5g}" if best != "" else ""), Text("" if step is None else str(step))]
