"""A `forward` of a module's own beside the one by which the loop calls its steps."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any


def wraps_steps(forward: Any) -> bool:
    """Tell whether a `forward` takes the loop's arguments: it names `stage`, or passes on all that it is given."""
    signature = inspect.signature(forward)
    try:
        signature.bind(None, stage=None, global_step=None, batch=None, device=None)
    except TypeError:
        return False
    inner = getattr(getattr(forward, "__code__", None), "co_freevars", ())
    return "stage" in signature.parameters or "__class__" in inner  # of super()


def beside(found: Sequence[Any], loops: Callable[..., Any], stages: type) -> Callable[..., Any] | None:
    """Return a `forward` that is the module's own, and the steps where the loop calls it; None if it needs none.

    Args:
        found: each `forward` of a class and its bases, in the order in which they are looked up.
        loops: the one of all modules.
        stages: the type of the first argument of the loop's calls.
    """
    own = next((one for one in found if not wraps_steps(one)), None)
    if own is None or hasattr(found[0], "steps"):
        return None
    steps = next((one for one in found if one is not own and (hasattr(one, "steps") or wraps_steps(one))), loops)

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **given: Any) -> Any:
        stage = given.get("stage", args[0] if args else None)
        return (steps if isinstance(stage, stages) else own)(self, *args, **given)

    forward.steps = steps  # type: ignore[attr-defined]
    return forward
