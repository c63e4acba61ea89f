"""Several processes of one run on this machine, as a launcher would start them."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from hookline.testing.faults import Child, Outcome


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Outcome]:
    """Run a function once on each rank, with torchrun's environment variables; return the outcomes.

    Args:
        function: importable by its name.
        world_size: the number of processes.
        args: its arguments, which can be pickled.
        timeout: seconds for all processes together.

    Raises:
        TimeoutError: a process has not ended; all were killed.
    """
    ranks = Ranks(function, world_size, *args)
    return ranks.wait(timeout)


def on_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 100.0, **keywords: Any
) -> list[Any]:
    """Run a function once on each rank; return what it returned on each.

    Args:
        function: importable by its name.
        world_size: how many processes.
        args: its arguments, which can be pickled.
        timeout: seconds for all of them together.
        keywords: more of its arguments.

    Raises:
        AssertionError: a rank has failed; with what all of them wrote.
        TimeoutError: one has not ended; all were killed.
    """
    outcomes = run_ranks(functools.partial(function, **keywords), world_size, *args, timeout=timeout)
    told = "\n".join(f"--- rank {rank}: {one.code}\n{one.output}" for rank, one in enumerate(outcomes))
    assert not any(outcome.code for outcome in outcomes), told
    return [outcome.value for outcome in outcomes]


class Ranks:
    """The processes of one run; `children` are by rank. They meet at a store in this process."""

    def __init__(self, function: Callable[..., Any], world_size: int, *args: Any) -> None:
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        said = {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(self._store.port),
            "WORLD_SIZE": str(world_size),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        places = [{**said, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
        self.children = [Child(_as_rank, place, function, args) for place in places]

    def wait(self, timeout: float = 60.0) -> list[Outcome]:
        """Return the outcomes.

        Raises:
            TimeoutError: a process has not ended.
        """
        deadline = time.monotonic() + timeout
        outcomes, late = [], []
        for rank, child in enumerate(self.children):
            try:
                outcomes.append(child.wait(max(deadline - time.monotonic(), 0.1)))
            except TimeoutError as error:
                late.append(f"rank {rank}: {error}")
        if late:
            raise TimeoutError("\n".join(late))
        return outcomes


def _as_rank(environment: Mapping[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    os.environ.update(environment)
    return function(*args)
