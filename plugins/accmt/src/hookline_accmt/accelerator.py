"""What programs ask ACCMT's `accelerator`: which of the processes this one is."""

from __future__ import annotations

import os
from typing import Any

import torch


class Accelerator:
    """The place of this process among those that torchrun or `accelerate launch` has started.

    Training is the business of `Trainer`; the other methods of Accelerate's object are not here.
    """

    @property
    def num_processes(self) -> int:
        """How many there are."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def process_index(self) -> int:
        """Which of them this is."""
        return int(os.environ.get("RANK", "0"))

    @property
    def local_process_index(self) -> int:
        """Which of those on this machine."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def is_main_process(self) -> bool:
        """Whether it is the first."""
        return self.process_index == 0

    @property
    def is_local_main_process(self) -> bool:
        """Whether it is the first on this machine."""
        return self.local_process_index == 0

    @property
    def is_last_process(self) -> bool:
        """Whether it is the last."""
        return self.process_index == self.num_processes - 1

    @property
    def device(self) -> torch.device:
        """Where it trains, unless an option says otherwise."""
        return torch.device("cuda", self.local_process_index) if torch.cuda.is_available() else torch.device("cpu")

    def print(self, *values: Any, **options: Any) -> None:
        """Print on the first of this machine alone."""
        if self.is_local_main_process:
            print(*values, **options)

    def __getattr__(self, name: str) -> Any:
        offered = [one for one, kind in vars(type(self)).items() if isinstance(kind, property)]
        raise AttributeError(
            f"accelerator has no {name!r} here, as the trainer does the work of Accelerate; it has "
            f"{', '.join(sorted(offered))} and print"
        )


accelerator = Accelerator()
