"""Randomness: seeds, and the random states of a process and of a run."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def set_seed(seed: int) -> None:
    """Seed torch (every device), Python and, where it is loaded, numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def get_rng_state() -> dict[str, Any]:
    """Return this process's random states as tensors and plain data."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        kind, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
        state["numpy"] = {
            "kind": kind,
            "words": torch.tensor(keys.tolist()),
            "position": position,
            "has_gauss": has_gauss,
            "cached": cached,
        }
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put this process's random states back."""
    torch.set_rng_state(state["torch"])
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state:
        import numpy

        numpy.random.set_state(
            (
                state["numpy"]["kind"],
                state["numpy"]["words"].numpy().astype("uint32"),
                state["numpy"]["position"],
                state["numpy"]["has_gauss"],
                state["numpy"]["cached"],
            )
        )


@contextlib.contextmanager
def kept_rng() -> Iterator[None]:
    """Have this process's random states afterwards what they were, whatever is drawn within."""
    state = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


class Randomness:
    """The random states of a run, which are not those of the process around it."""

    def __init__(self) -> None:
        self.restored: Mapping[str, Any] | None = None
        """Those of a state that was put back, until training goes on from it."""
        self._own: Mapping[str, Any] | None = None  # while the run is not under way

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Draw from the run's own states within, and from those of the process afterwards, as if nothing was drawn."""
        outside = get_rng_state()
        if self._own is not None:
            set_rng_state(self._own)
            self._own = None
        try:
            yield
        finally:
            self._own = get_rng_state()
            set_rng_state(outside)

    def get_state(self) -> Mapping[str, Any]:
        """Return the states of the run, whether it is under way or not."""
        return self.restored or self._own or get_rng_state()

    def update_state(self, states: Mapping[str, Any] | None) -> None:
        """Take states back, for `go_on`; None stands for those that are there."""
        self.restored = states or get_rng_state()

    def go_on(self) -> bool:
        """Draw from here on from the states that were put back, if any were; return whether."""
        if self.restored is None:
            return False
        set_rng_state(self.restored)
        return True

    def forget_restored(self) -> None:
        """Let the states that were put back go: training has gone on from them."""
        self.restored = None
