"""Graph breaks: where compiled code falls apart into pieces, with Python between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hookline import Trainer


class Breaks:
    """Tells once, after the call that found them, at which lines compiled code breaks, and why.

    Args:
        what: is compiled.
    """

    def __init__(self, what: str) -> None:
        from torch._dynamo.utils import graph_break_reasons  # torch._dynamo is slow to import

        self.what, self.all = what, graph_break_reasons
        self.seen = len(self.all)

    def begin(self) -> None:
        """Leave out what others have compiled since."""
        self.seen = len(self.all)

    def tell(self, trainer: Trainer) -> None:
        """Warn of the breaks since `begin`."""
        if len(self.all) == self.seen:
            return
        new, self.seen = self.all[self.seen :], len(self.all)
        for line in dict.fromkeys(map(described, new)):
            trainer.say_once(f"compile: {self.what} breaks into pieces at {line}")


def described(found: Any) -> str:
    """Return the line of a graph break, in the user's code where the stack has some, and the reason."""
    own = [frame for frame in found.user_stack if "/torch/" not in frame.filename]
    frame = (own or found.user_stack)[-1]
    said = [line.strip() for line in found.reason.splitlines() if line.strip()]
    why = next((line.removeprefix("Explanation: ") for line in said if line.startswith("Explanation: ")), said[0])
    return f"{frame.filename}:{frame.lineno} ({(frame.line or frame.name).strip()}): {why}"
