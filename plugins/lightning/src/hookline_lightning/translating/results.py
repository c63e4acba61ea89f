"""What `validate` and `test` return and print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

TITLES = {"validate": "Validate metric", "test": "Test metric"}
MARK = "/dataloader_idx_"


def results_of(metrics: Mapping[str, float]) -> list[dict[str, float]]:
    """Return the metrics of each loader; those of no loader are in all of them."""
    numbers = [int(name.rpartition(MARK)[2]) for name in metrics if name.rpartition(MARK)[2].isdigit() and MARK in name]
    if not numbers:
        return [dict(metrics)]
    of_all = {name: value for name, value in metrics.items() if MARK not in name and f"{name}{MARK}0" not in metrics}
    return [
        {**{name: value for name, value in metrics.items() if name.endswith(f"{MARK}{number}")}, **of_all}
        for number in range(max(numbers) + 1)
    ]


def table_of(word: str, results: Sequence[Mapping[str, float]]) -> str:
    """Return the metrics as a table, one column for each loader."""
    plain = [{name.partition(MARK)[0]: value for name, value in one.items()} for one in results]
    names = sorted({name for one in plain for name in one})
    heads = [TITLES[word], *(f"DataLoader {number}" for number in range(len(plain)))]
    rows = [[name, *(repr(one[name]) if name in one else "" for one in plain)] for name in names]
    widths = [max(len(row[place]) for row in [heads, *rows]) for place in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *rows]]
    return "\n".join([lines[0].rstrip(), "-" * len(lines[0]), *(line.rstrip() for line in lines[1:])])
