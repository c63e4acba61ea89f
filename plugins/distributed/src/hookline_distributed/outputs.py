"""What ranks have collected of their shares, in the order of the data set."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch


def to_host(column: Any) -> Any:
    """Return a collated output where it can be sent."""
    return column.cpu() if isinstance(column, torch.Tensor) else column


def interleaved(columns: Sequence[Any], device: torch.device) -> Any:
    """Return the items of all ranks, the first of each, then the second of each, and so on."""
    order = sorted((place, rank) for rank, column in enumerate(columns) for place in range(len(column)))
    if all(isinstance(column, torch.Tensor) for column in columns):
        starts = list(itertools.accumulate((len(column) for column in columns), initial=0))
        return torch.cat(list(columns))[[starts[rank] + place for place, rank in order]].to(device)
    return [columns[rank][place] for place, rank in order]
