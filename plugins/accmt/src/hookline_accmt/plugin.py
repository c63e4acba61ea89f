"""The plugin: what a run of ACCMT's is told that no other plugin is."""

from __future__ import annotations

import dataclasses
import os
import pkgutil
import shutil
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hookline
from hookline import CallbackInterface, Trainer, hookimpl, instantiate
from hookline.files import clear, replacing
from hookline_accmt import data
from hookline_accmt.bridge import Bridge
from hookline_accmt.hyperparameters import HyperParameters
from hookline_accmt.module import AcceleratorModule
from hookline_accmt.status import Place


@dataclass(eq=False)
class Accmt(CallbackInterface):
    """Train an `AcceleratorModule`.

    A dataset is described by `_target_` and its arguments, a function by its dotted path.
    """

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
        if self.dataloader_num_workers < 0:
            raise ValueError(f"accmt.dataloader_num_workers={self.dataloader_num_workers} must be at least 0")
        self.made: dict[str, Any] = {"train_dataset": None, "val_dataset": None}
        self.use(sampler=_found("sampler", self.sampler), collate_fn=_found("collate_fn", self.collate_fn))
        self.place = Place()
        self.zeroed: list[str] = []  # parameters whose gradient stays when it is cleared
        self._bridge: Bridge | None = None

    def use(self, **objects: Any) -> None:
        """Take objects in place of descriptions: datasets, samplers and collate functions."""
        for name, given in objects.items():
            if name == "collate_fn":
                given = data.collate_of(given)
            elif name == "sampler":
                given = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
            self.made[name] = given

    @hookimpl(wrapper=True)
    def adapt_module(self, trainer: Trainer) -> Generator[None, Any, Any]:
        module = yield
        if isinstance(module, AcceleratorModule):
            module = self._bridge = Bridge(module, self, trainer)
        return module

    @hookimpl(tryfirst=True)
    def on_setup(self, trainer: Trainer) -> None:
        if self._bridge is None:
            return
        for name in ("train_dataset", "val_dataset"):
            described = getattr(self, name)
            if described is not None:
                hookline.set_seed(trainer.options.seed)
                self.made[name] = instantiate(described, f"accmt.{name}")
        self._bridge.set_up(trainer)
        hps, options = self.hyperparameters, trainer.options
        if hps is not None:
            if options.epochs is None and options.max_steps is None and options.max_time is None:
                options.epochs = hps.epochs
            window: int = trainer.hook.get_window_size(trainer=trainer)
            options.train_batch_size = hps.batch_size * trainer.shares * window
            options.val_batch_size = hps.val_batch_size

    @hookimpl
    def on_checkpoint(self, path: Path, kind: str) -> None:
        """Have the model that was saved in `model_path`, too; without room for a copy, where the disk is the same."""
        if self.model_path is None or kind != "model" or self._bridge is None:
            return
        folder = Path(self.model_path)
        folder.mkdir(parents=True, exist_ok=True)
        there = folder / path.name
        if there.exists() and not (there / "model.json").is_file():
            raise ValueError(f"{there} holds something else than a model of a run before; move it away")
        clear(folder)
        with replacing(there) as new:
            shutil.copytree(path, new, copy_function=_link)
            configuration: Any = getattr(self._bridge.model, "config", None)
            if hasattr(configuration, "save_pretrained"):
                configuration.save_pretrained(new)

    # State ----------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return where training is."""
        if self._bridge is None:
            return {}
        named = self._bridge.named_parameters() if not self.set_to_none else ()
        return {
            "place": dataclasses.asdict(self.place),
            "zeroed": [name for name, parameter in named if parameter.grad is not None],
        }

    def update_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        for name, value in state["place"].items():
            setattr(self.place, name, value)
        self.zeroed = list(state["zeroed"])


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


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one that has no links
        shutil.copy2(source, target)
