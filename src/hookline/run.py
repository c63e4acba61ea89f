"""What the parts of a run need of the trainer that holds them."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from hookline.counters import Best, Counters, Cursor
from hookline.interfaces import ModuleInterface, Stage
from hookline.options import Options


class Run(Protocol):
    """A run as its parts see it: its properties and the place of this process in it. The trainer is one."""

    options: Options
    config: dict[str, Any]
    plugins: Any
    hook: Any
    """Calls a hook: `run.hook.NAME(trainer=run, …)`."""
    module: ModuleInterface
    device: torch.device
    rank: int
    world_size: int
    share: int
    shares: int
    counters: Counters
    cursor: Cursor
    best: Best
    idle: bool

    @property
    def stage(self) -> Stage: ...
    @property
    def global_step(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def window_size(self) -> int: ...
    @property
    def micro_batch_size(self) -> int: ...
    def log(self, **values: Any) -> None: ...
    def due(self, cadence: str | None) -> bool: ...
    def say_once(self, text: str, about: str = "") -> None: ...
