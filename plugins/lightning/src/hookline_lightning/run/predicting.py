"""What writers of predictions are told: of which samples each is."""

from __future__ import annotations

from typing import Any

import hookline
from hookline import CallbackInterface, hookimpl
from hookline_lightning.run.bridge import Bridge


class Predicted(CallbackInterface):
    """Keeps the places in the data of each batch that is predicted, and for writers of epochs what was predicted."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self._keeps = any(str(getattr(one, "interval", "")) != "batch" for one in bridge.view.callbacks)
        self._done = 0

    @hookimpl(tryfirst=True)
    def on_begin_predict_epoch(self, trainer: hookline.Trainer, key: str) -> None:
        view = self.bridge.view
        if trainer.shares > 1:
            raise ValueError(
                "a BasePredictionWriter with several ranks: which samples a rank has is not told here; name the plugin "
                "predict_writer, which writes them in the order of the data"
            )
        if key in ("default", "dataloader_idx_0"):
            view.predictions, view.indices = [], []
        self._done = 0
        view.predictions.append([])
        view.indices.append([])

    @hookimpl(tryfirst=True)
    def on_end_predict_step(self, outputs: Any, batch: Any) -> None:
        view, size = self.bridge.view, hookline.count_samples(batch)
        view.indices[-1].append(list(range(self._done, self._done + size)))
        self._done += size
        if self._keeps:
            view.predictions[-1].append(outputs)
