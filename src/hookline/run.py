"""What the parts of a run ask of the trainer that holds them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from hookline.counters import Best, Counters, Cursor, Totals
from hookline.interfaces import Loader, ModuleInterface, Stage
from hookline.options import Options
from hookline.schedules import Scheduled


class Run(Protocol):
    """A run, as its parts see it: what it consists of and where it is. Its owner is the trainer."""

    options: Options
    module: ModuleInterface
    model: torch.nn.Module
    device: torch.device
    rank: int
    world_size: int
    share: int
    shares: int
    hook: Any
    """Calls a hook: `run.hook.NAME(trainer=run, …)`."""
    plugins: Any
    config: dict[str, Any]
    counters: Counters
    cursor: Cursor
    best: Best
    totals: Totals
    optimizers: list[torch.optim.Optimizer]
    schedulers: list[Scheduled]
    stage: Stage
    followed: dict[str, str]
    """Metrics that schedulers follow, and which scheduler does."""
    idle: bool

    @property
    def global_step(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def metrics(self) -> dict[str, float]: ...
    @property
    def weight(self) -> float: ...
    @property
    def micro_batch_size(self) -> int: ...
    @property
    def window_size(self) -> int: ...
    def get_loaders(self, stage: Stage) -> dict[str, Loader]: ...
    def say_once(self, text: str, about: str = "") -> None: ...
    def staged(self, stage: Stage) -> AbstractContextManager[None]: ...
    def set_up_model(self) -> None: ...
    def set_up_optimizers(self) -> None: ...
    def plan(self, totals: Totals) -> None: ...
