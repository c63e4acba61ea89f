"""The files of a trainer: models, optimizers, history and parameters, of which a training is begun elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hookline_lernomatic.model.common import load_into, model_from, networks_of
from hookline_lernomatic.train.history import History

PARAMS = (
    *("num_epochs", "learning_rate", "momentum", "weight_decay", "loss_function", "optim_function", "cur_epoch"),
    *("iter_per_epoch", "save_every", "print_every", "batch_size", "val_batch_size", "shuffle"),
)  # fmt: skip


class Checkpoints(History):
    """Saves and loads the files that LERNOMATIC writes."""

    def get_trainer_params(self) -> dict[str, Any]:
        """Return the parameters that a checkpoint holds; a subclass may add some."""
        return {name: getattr(self, name) for name in PARAMS}

    def set_trainer_params(self, params: Mapping[str, Any]) -> None:
        """Take the parameters of a checkpoint, and make device and loaders anew by them."""
        for name in PARAMS:
            if name in params:
                setattr(self, name, params[name])
        self._init_device()
        self._init_dataloaders()

    def save_checkpoint(self, fname: str | Path) -> None:
        """Write models, optimizers, history and parameters to a file, of which models are made without their class."""
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers().items()}
        torch.save(
            {
                **{name: model.get_params() for name, model in self.models().items()},
                "optim": optimizers["optimizer"] if set(optimizers) == {"optimizer"} else optimizers,
                "history": self.get_history(),
                "trainer_params": self.get_trainer_params(),
            },
            fname,
        )

    def load_checkpoint(self, fname: str | Path) -> None:
        """Take models, optimizers, history and parameters of a file; `train` goes on with the epoch after it.

        For a start from a file of another run, or of LERNOMATIC. A run that was cut goes on exactly where it was by
        `resume`.

        Raises:
            ValueError: a class may not be imported (`allow_import`), or is not there; or the file lacks a model.
        """
        kept = torch.load(fname, map_location="cpu", weights_only=True)
        self.set_trainer_params(kept["trainer_params"])
        self._take_models(kept, fname)
        optim = kept["optim"]  # of the one optimizer, or of each by name
        optim = {"optimizer": optim} if "param_groups" in optim else optim
        for name, optimizer in self.optimizers().items():
            if name not in optim:
                raise ValueError(f"{fname} has no state of the optimizer {name!r}; it has {', '.join(optim)}")
            optimizer.load_state_dict(optim[name])
        self.start_epoch = self.cur_epoch
        self.set_history(kept.get("history", {}))

    def load_model_checkpoint(self, fname: str | Path) -> None:
        """Take the models of a file alone."""
        self._take_models(torch.load(fname, map_location="cpu", weights_only=True), fname)

    def _take_models(self, kept: Mapping[str, Any], fname: str | Path) -> None:
        """Load weights into the models that there are, and make those that there are not."""
        models = self.models()
        if missing := [name for name in models if not isinstance(kept.get(name), Mapping)]:
            raise ValueError(f"{fname} has no {' and no '.join(missing)}; it has {', '.join(kept)}")
        before = networks_of(models)
        for name, params in kept.items():
            if name in models:
                load_into(models[name], params)
            elif isinstance(params, Mapping) and "model_import_path" in params:
                setattr(self, name, model_from(params))
        if networks_of(self.models()) != before or not self.optimizers():  # there are other parameters
            self._init_optimizer()
        self._send_to_device()
