"""Randomness: seeds, and the RNG states of a process and of a run."""

from __future__ import annotations

import contextlib
import hashlib
import random
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hookline.run import Run


def set_seed(seed: int) -> None:
    """Seed torch (every device), Python and, if it is imported, numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def generator(trainer: Run, name: str, *, of_rank: bool = False) -> torch.Generator:
    """Return a generator on the CPU for random numbers of this step.

    It depends on the run's seed, the name and the step, so nothing has to be saved for a resume, and other random
    numbers stay what they are. A second one of the same name gives the same numbers in the same step.

    Args:
        trainer: the trainer.
        name: what tells the numbers from others, such as `"mine.noise"`.
        of_rank: other numbers on each rank; else all ranks get the same.
    """
    told = (trainer.options.seed, name, trainer.counters.global_step, trainer.rank if of_rank else None)
    digest = hashlib.blake2b(repr(told).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _accelerator() -> tuple[str, Any, list[tuple[int, ...]]]:
    """Return the accelerator that is there: its type, its functions, and what says to them which of its devices."""
    cuda = torch.cuda.is_available()  # `torch.accelerator` does not know the CUDA device of tests
    if not cuda and not torch.accelerator.is_available():
        return "", None, []
    kind = "cuda" if cuda else torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
    module = torch.get_device_module(kind)
    return kind, module, [()] if kind == "mps" else [(index,) for index in range(module.device_count())]


def get_rng_state() -> dict[str, Any]:
    """Return this process's RNG states as tensors and plain data."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
    }
    kind, module, devices = _accelerator()
    if devices:
        state[kind] = [module.get_rng_state(*device) for device in devices]
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
    """Restore this process's RNG states."""
    torch.set_rng_state(state["torch"])
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    kind, module, devices = _accelerator()
    for device, kept in zip(devices, state.get(kind, ()), strict=False):
        module.set_rng_state(kept, *device)
    if "numpy" in state:
        import numpy

        own = state["numpy"]
        words = own["words"].numpy().astype("uint32")
        numpy.random.set_state((own["kind"], words, own["position"], own["has_gauss"], own["cached"]))


@contextlib.contextmanager
def kept_rng() -> Iterator[None]:
    """Restore this process's RNG states at the end of the block, whatever it draws."""
    state = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


class Randomness:
    """The RNG states of a run, which are separate from those of the process around it."""

    def __init__(self) -> None:
        self.restored: Mapping[str, Any] | None = None
        """The states of a loaded checkpoint, until training continues from them."""
        self._own: Mapping[str, Any] | None = None  # between two runs

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Draw from the run's own states within the block; afterwards restore those of the process."""
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
        """Return the states of the run, during it or between two."""
        return self.restored or self._own or get_rng_state()

    def update_state(self, states: Mapping[str, Any] | None) -> None:
        """Keep loaded states for `go_on`; None means the current ones."""
        self.restored = states or get_rng_state()

    def go_on(self) -> bool:
        """Set the loaded states, if there are any; return whether there were."""
        if self.restored is None:
            return False
        set_rng_state(self.restored)
        return True

    def forget_restored(self) -> None:
        """Forget the loaded states: training has continued from them."""
        self.restored = None
