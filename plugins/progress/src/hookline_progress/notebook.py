"""A part of a notebook's output that is replaced in place."""

from __future__ import annotations

import io
import uuid

from rich.console import Console, RenderableType

WIDTH = 100
PAGE = '<pre style="white-space:pre;overflow-x:auto;line-height:normal">{code}</pre>'


class Area:
    """One output of the cell under way; each `show` replaces what the one before has put there."""

    def __init__(self) -> None:
        self._id = uuid.uuid4().hex
        self._shown = False

    def show(self, *parts: RenderableType) -> None:
        """Show these, one below the other, as HTML and, for who has none, as plain text."""
        from IPython.display import display  # type: ignore[import-not-found,unused-ignore]

        console = Console(file=io.StringIO(), record=True, width=WIDTH, force_jupyter=False, highlight=False)
        console.print(*parts, sep="\n", crop=False)
        html = console.export_html(inline_styles=True, code_format=PAGE, clear=False)
        display(
            {"text/html": html, "text/plain": console.export_text()},
            raw=True,
            display_id=self._id,
            update=self._shown,
        )
        self._shown = True
