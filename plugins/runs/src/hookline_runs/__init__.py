"""Keep the record of a run in its folder, and look at runs: list, show, compare and plot them, or follow them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hookline_runs.records import Run as Run
from hookline_runs.records import Session as Session
from hookline_runs.records import history as history
from hookline_runs.records import list_runs as list_runs
from hookline_runs.records import read_run as read_run

if TYPE_CHECKING:
    from hookline_runs.jsonl import Jsonl as Jsonl
    from hookline_runs.report.inline import show as show

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the plugin, which needs torch, and what makes pages, when they are asked for: reading needs neither."""
    if name == "Jsonl":
        from hookline_runs.jsonl import Jsonl

        return Jsonl
    if name == "show":
        from hookline_runs.report.inline import show

        return show
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
