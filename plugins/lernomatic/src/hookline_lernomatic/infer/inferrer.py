"""Inference with a model from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hookline_lernomatic.model.common import LernomaticModel, model_from


class Inferrer:
    """Gives what a model makes of data, without gradients and in eval mode.

    Args:
        model: a model, unless `load_model` brings one.
        device_id: of a CUDA device; -1 for the CPU.
    """

    def __init__(self, model: LernomaticModel | None = None, device_id: int = -1) -> None:
        self.model, self.device_id = model, device_id
        self._init_device()
        self._send_to_device()

    def __repr__(self) -> str:
        return type(self).__name__

    def _init_device(self) -> None:
        self.device = torch.device("cpu" if self.device_id < 0 else f"cuda:{self.device_id}")

    def _send_to_device(self) -> None:
        """Bring the model to the device; a subclass with several models brings those."""
        if self.model is not None:
            self.model.send_to(self.device)

    def get_model(self) -> LernomaticModel | None:
        """Return the model; None where there is none yet."""
        return self.model

    def load_model(self, fname: str | Path, model_key: str = "model") -> None:
        """Take a model of a checkpoint that a trainer has saved.

        Args:
            fname: the checkpoint.
            model_key: the name of the trainer's attribute that the model was.

        Raises:
            ValueError: its class may not be imported (`allow_import`), or is not there.
        """
        self.model = model_from(torch.load(fname, map_location="cpu", weights_only=True)[model_key])
        self._send_to_device()

    def forward(self, X: torch.Tensor) -> Any:
        """Return what the model makes of a batch.

        Raises:
            RuntimeError: there is no model yet.
        """
        if self.model is None:
            raise RuntimeError("Inferrer has no model yet: call load_model(file), or give it one")
        self.model.set_eval()
        with torch.no_grad():
            return self.model.forward(X.to(self.device))
