"""Data that a call of the trainer is given, and what it returns of a prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hookline import CallbackInterface, hookimpl
from hookline_lightning.module import LightningDataModule


class Predictions(CallbackInterface):
    """Keeps predictions."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[Any]] = {}

    @hookimpl
    def on_end_predict_step(self, outputs: Any, key: str) -> None:
        self.outputs.setdefault(key, []).append(outputs)


class Loaders(LightningDataModule):
    """Loaders that were given as they are."""

    def __init__(self, loaders: Mapping[str, Any]) -> None:
        for stage, loader in loaders.items():
            setattr(self, f"{stage}_dataloader", lambda loader=loader: loader)


def data_of(datamodule: Any, **loaders: Any) -> Any:
    given = {stage: loader for stage, loader in loaders.items() if loader is not None}
    if len(given) == 1 and hasattr(next(iter(given.values())), "prepare_data"):  # Lightning takes it there, too
        datamodule, given = next(iter(given.values())), {}
    if datamodule is not None and given:
        raise ValueError("loaders and a datamodule are given; give one of them")
    return datamodule if datamodule is not None else Loaders(given) if given else None
