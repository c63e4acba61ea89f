"""`hookline plan --schedule`: what the schedulers of a configuration do over the run, as a picture."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hookline.cadence import seconds
from hookline.randomness import kept_rng
from hookline.schedulers import is_plateau

MOMENTS = 1000  # steps that are drawn of a run of unknown length
BARS = " ▁▂▃▄▅▆▇█"
WIDTH, HEIGHT = 64, 8  # of a picture in the terminal
NOTES = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")  # of torch's schedulers for themselves


class Line(NamedTuple):
    """A number of parameter groups at each step."""

    name: str
    values: list[float]


def follow(trainer: Any) -> tuple[list[Line], list[str]]:
    """Build what a run trains, and move its schedulers as many times as it will; no step is trained.

    Returns:
        One line for each course that a number takes, and what cannot be known.
    """
    with kept_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the optimizer has not stepped
        trainer.training.build()
        steps, per_epoch = trainer.totals.steps, trainer.totals.steps_per_epoch
        steps = MOMENTS if steps is None else steps
        limit = trainer.options.max_time
        rows = []
        for step in range(1, steps + 1):
            rows.append(dict(numbers(trainer.optimizers)))
            if limit is not None:
                trainer.counters.seconds = seconds(limit) * step / steps
            for when in ("step", "epoch"):
                if when == "step" or (per_epoch and step % per_epoch == 0):
                    trainer.hook.step_schedulers(trainer=trainer, when=when, optimizers=trainer.optimizers, metrics={})
    return lines_of(rows), list(unknown(trainer))


def unknown(trainer: Any) -> Iterator[str]:
    """Yield what a picture cannot show."""
    for scheduler, when, metric in trainer.schedulers:
        if metric is not None or is_plateau(scheduler):
            yield f"{type(scheduler).__name__} follows {metric} after each {when}: drawn as if it never moved"
        elif when == "validation":
            yield f"{type(scheduler).__name__} moves after each validation: drawn as if it never moved"
    if trainer.totals.steps is None:
        yield f"the number of steps is unknown: drawn as if there were {MOMENTS}"
    if trainer.options.max_time is not None:
        yield f"max_time={trainer.options.max_time}: drawn as if all steps together took that time"


def numbers(optimizers: Sequence[Any]) -> Iterator[tuple[tuple[str, str], float]]:
    """Yield the numbers of each group, by their name and by the place of the group."""
    for index, optimizer in enumerate(optimizers):
        for number, group in enumerate(optimizer.param_groups):
            of = type(optimizer).__name__ + (f" {index}" if len(optimizers) > 1 else "")
            place = f"{of} {group.get('name', number)}" if len(optimizer.param_groups) > 1 else of
            for name, value in group.items():
                many = isinstance(value, (tuple, list)) and name != "params"
                items = {f"{name}.{n}": one for n, one in enumerate(value)} if many else {name: value}
                for full, one in items.items():
                    if name == "lr" or (isinstance(one, (int, float)) and not isinstance(one, bool)):
                        yield (full, place), float(one)


def lines_of(rows: Sequence[Mapping[tuple[str, str], float]]) -> list[Line]:
    """Return the learning rates, and the other numbers that change; groups that take the same course are one line."""
    courses: dict[tuple[str, tuple[float, ...]], list[str]] = {}
    for name, place in rows[0] if rows else ():
        values = tuple(row[name, place] for row in rows)
        if name == "lr" or (name not in NOTES and len(set(values)) > 1):
            courses.setdefault((name, values), []).append(place)
    return [Line(f"{name} of {', '.join(places)}", [*values]) for (name, values), places in courses.items()]


def draw(line: Line) -> Iterator[str]:
    """Yield the rows of a picture of characters."""
    values, count = line.values, len(line.values)
    columns = [values[min(column * count // WIDTH, count - 1)] for column in range(WIDTH)]
    low, high = min(values), max(values)
    low = 0.0 if 0 < low < high / 2 or low == high > 0 else low
    heights = [round(8 * HEIGHT * (value - low) / ((high - low) or 1)) for value in columns]
    yield f"{line.name}: {values[0]:.3g} at the first step, {values[-1]:.3g} at the last"
    for row in reversed(range(HEIGHT)):
        label = f"{high:.3g}" if row == HEIGHT - 1 else f"{low:.3g}" if row == 0 else ""
        yield f"{label:>9} │" + "".join(BARS[max(0, min(8, height - 8 * row))] for height in heights).rstrip()
    yield f"{'':>9} └{'─' * WIDTH}"
    yield f"{'':>11}1{count:>{WIDTH - 1}}"


def save(lines: Sequence[Line], notes: Sequence[str], file: Path) -> None:
    """Draw the lines into a file.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"--schedule {file} needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(8, 2.5 * max(len(lines), 1)), layout="constrained")
    for axes, line in zip(figure.subplots(len(lines), squeeze=False).flat, lines, strict=True):
        axes.plot(range(1, len(line.values) + 1), line.values)
        axes.set(title=line.name, xlabel="optimizer step")
    figure.supxlabel("\n".join(notes), fontsize="small")
    figure.savefig(file)


def show(trainer: Any, file: str, as_json: bool) -> None:
    """Print what the schedulers of a run do, or draw it into a file; "-" is the terminal."""
    lines, notes = follow(trainer)
    if file != "-":
        save(lines, notes, Path(file))
        print(f"wrote {file}")
    elif as_json:
        print(json.dumps({line.name: line.values for line in lines}))
    else:
        print(*(row for line in lines for row in [*draw(line), ""]), *(f"note: {note}" for note in notes), sep="\n")
