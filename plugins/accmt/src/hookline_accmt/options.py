"""What a run of ACCMT's is told that no other plugin is."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from typing import Any

from hookline import CallbackInterface, instantiate
from hookline_accmt import data
from hookline_accmt.hyperparameters import HyperParameters
from hookline_accmt.metrics import Metric
from hookline_accmt.status import Place, StatusDict


@dataclass(eq=False)
class Options(CallbackInterface):
    """The options of the plugin, and what is made of them."""

    hps: Any = None
    """Hyperparameters, or the path of a file with them; null for a module with `get_optimizer`, by the trainer's
    own batch sizes and epochs."""
    model_path: str | None = None
    """Folder for the model, `<policy>` in it; null to leave it in the folder of the run alone."""
    train_dataset: Any = None
    """What to train on; null for a module with `get_train_dataloader`."""
    val_dataset: Any = None
    """What to validate on; null for a module with `get_validation_dataloader`, or for no validation."""
    shuffle_train: bool = True
    """Shuffle what is trained on."""
    shuffle_validation: bool = False
    """Shuffle what is validated on, alike each time."""
    sampler: Any = None
    """What draws the indices of training, or a list of them, drawn one after the other; each an iterable of indices
    with a length, or a function that makes it of the dataset; ranks take shares of what is drawn."""
    collate_fn: Any = None
    """A function that makes a batch of a list of samples, or a list of functions, each given what the one before
    returned; a module's own goes before."""
    dataloader_pin_memory: bool = True
    """Load into memory from which copies to CUDA are quick."""
    dataloader_num_workers: int = 0
    """Processes that load; 0 to load in this one."""
    set_to_none: bool = True
    """Clear gradients by removing them; false leaves zeros."""

    def __post_init__(self) -> None:
        self.hyperparameters = None if self.hps is None else HyperParameters.read(self.hps)
        if type(self.dataloader_num_workers) is not int or self.dataloader_num_workers < 0:
            raise ValueError(
                f"accmt.dataloader_num_workers={self.dataloader_num_workers!r} must be a whole number, at least 0"
            )
        self.made: dict[str, Any] = {"train_dataset": None, "val_dataset": None}
        self.use(sampler=_found("sampler", self.sampler), collate_fn=_found("collate_fn", self.collate_fn))
        self.place = Place()
        self.status = StatusDict()
        self.metrics: list[Metric] = []
        self.zeroed: list[str] = []  # parameters whose gradient stays when it is cleared

    def use(self, **objects: Any) -> None:
        """Take objects in place of descriptions: datasets, samplers and collate functions."""
        for name, given in objects.items():
            if name == "collate_fn":
                given = data.collate_of(given)
            elif name == "sampler":
                given = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
            self.made[name] = given


def _found(name: str, given: Any) -> Any:
    """Return what a dotted path or a description names; what is an object already comes back."""
    if isinstance(given, list):
        return [_found(name, one) for one in given]
    if isinstance(given, dict):
        return instantiate(given, f"accmt.{name}")
    if not isinstance(given, str):
        return given
    try:
        return pkgutil.resolve_name(given)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"accmt.{name}: {given!r} cannot be imported: {type(error).__name__}: {error}") from error
