"""The cost of a step, in counts that do not depend on the machine."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.utils._python_dispatch import TorchDispatchMode  # sees every operation; torch documents it under this name


class Budget(NamedTuple):
    """Counts of one training step."""

    calls: float
    """Calls of Python functions."""
    syncs: float
    """Copies of a value off its device that wait for it (`aten::_local_scalar_dense`)."""


def calls_per_step(run: Callable[[int], Any], few: int = 40, many: int = 140) -> Budget:
    """Return the cost of one step of a loop, without its setup.

    Args:
        run: does the whole run over a number of steps; called with both numbers of steps, and the
            difference in counts is divided by that in steps.
        few: steps of the short run.
        many: steps of the long run.
    """
    for _ in range(2):  # the first run imports, which empties caches; the second fills them
        run(few)
    calls = count_calls(lambda: run(many)) - count_calls(lambda: run(few))
    syncs = count_syncs(lambda: run(many)) - count_syncs(lambda: run(few))
    return Budget(calls / (many - few), syncs / (many - few))


def count_calls(function: Callable[[], Any]) -> int:
    """Return how many Python functions a call calls."""
    count = 0

    def profile(frame: Any, happening: str, argument: Any) -> None:
        nonlocal count
        count += happening == "call"

    gc.collect()  # else finalizers of earlier objects would count
    gc.disable()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def count_syncs(function: Callable[[], Any]) -> int:
    """Return how many values a call copies off their device one by one, waiting for each."""

    class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
        count: int = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func.name() == "aten::_local_scalar_dense"
            return func(*args, **(kwargs or {}))

    with Counter() as counter:  # type: ignore[no-untyped-call]
        function()
    return int(counter.count)
