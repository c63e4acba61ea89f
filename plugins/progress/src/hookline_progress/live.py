"""A display on a terminal that others write to as well: processes of other ranks, workers, libraries in C."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.control import Control
from rich.live import Live
from rich.live_render import LiveRender
from rich.segment import ControlType, Segment


class Parked(Live):
    """Rich's display, which leaves the cursor above what it has drawn instead of below.

    A line that somebody else writes thus comes before it, is not wiped away, and does not shift what is drawn next.
    """

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Return what to write: what is there is erased, and the display comes below what is said."""
        if not self.console.is_interactive:
            return super().process_renderables(renderables)
        # What rich has drawn, and how high it is, it keeps here alone.
        self._live_render.set_renderable(self.renderable)  # rich does so in `refresh` alone
        written = [Erase(), *renderables, self._live_render]
        # What `stop` draws last it takes away itself, and begins to do so from below.
        return [*written, Up(self._live_render)] if self.is_started else written


class Erase:
    """Erases from the beginning of this line to the end of the screen."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Return the control sequence, for which rich has no name."""
        yield Segment("\r\x1b[J", None, [(ControlType.CARRIAGE_RETURN,)])


@dataclass
class Up:
    """Brings the cursor to the beginning of what has been drawn."""

    drawn: LiveRender

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Return the control sequence, when it is known how high that is."""
        up = self.drawn.last_render_height - 1
        yield Control(*([(ControlType.CURSOR_UP, up)] if up > 0 else []), ControlType.CARRIAGE_RETURN)
