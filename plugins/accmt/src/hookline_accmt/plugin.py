"""The plugin: it has the core train an `AcceleratorModule`."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hookline
from hookline import Trainer, hookimpl, instantiate
from hookline.files import clear, replacing
from hookline_accmt.bridge import Bridge
from hookline_accmt.module import AcceleratorModule
from hookline_accmt.options import Options


@dataclass(eq=False)
class Accmt(Options):
    """Train an `AcceleratorModule`.

    A dataset is described by `_target_` and its arguments, a function by its dotted path.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._bridge: Bridge | None = None

    @hookimpl(wrapper=True)
    def adapt_module(self, trainer: Trainer) -> Generator[None, Any, Any]:
        module = yield
        if isinstance(module, AcceleratorModule):
            names = {"__module__": type(module).__module__, "__qualname__": type(module).__qualname__}
            kind = type(type(module).__name__, (Bridge,), names)  # so that all who name it name the user's class
            module = self._bridge = kind(module, self, trainer)
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
        self._refuse_others(trainer)
        hps, options = self.hyperparameters, trainer.options
        if hps is not None:
            if options.epochs is None and options.max_steps is None and options.max_time is None:
                options.epochs = hps.epochs
            window: int = trainer.hook.get_window_size(trainer=trainer)
            options.train_batch_size = hps.batch_size * trainer.shares * window
            options.val_batch_size = hps.val_batch_size

    def _refuse_others(self, trainer: Trainer) -> None:
        """Refuse before training what could not be saved after the first evaluation.

        Raises:
            ValueError: something else lies where a model shall be.
        """
        policy = getattr(trainer.plugins.get_plugin("model_saving"), "policy", None)
        if self.model_path is None or policy is None:
            return
        folder = Path(self.model_path).absolute()
        above = next(path for path in (folder, *folder.parents) if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            why = "nothing can be written into it" if above.is_dir() else "it is no folder"
            raise ValueError(f"model_path={self.model_path!r} cannot hold a model: {above} stands there, and {why}")
        for name in [policy] if isinstance(policy, str) else policy:
            refuse_other(folder / re.sub(r"[^\w.-]", "_", name))

    @hookimpl
    def on_checkpoint(self, path: Path, kind: str) -> None:
        """Have the model that was saved in `model_path`, too; without room for a copy, where the disk is the same."""
        if self.model_path is None or kind != "model" or self._bridge is None:
            return
        folder = Path(self.model_path)
        folder.mkdir(parents=True, exist_ok=True)
        there = folder / path.name
        refuse_other(there)
        clear(folder)
        with replacing(there) as new:
            shutil.copytree(path, new, copy_function=_link)
            configuration: Any = getattr(self._bridge.model, "config", None)
            if hasattr(configuration, "save_pretrained"):
                configuration.save_pretrained(new)

    @hookimpl(wrapper=True)
    def get_mode(self, trainer: Trainer, metric: str) -> Generator[None, str, str]:
        """Return what a Metric says of its values, then what others know, and else that the largest is the best."""
        own = {one.main_metric: one.mode for one in self.metrics}
        name = metric.removeprefix("val_")
        said = own.get(metric, own.get(name))
        try:
            known = yield
        except ValueError:
            if said is None and (self._bridge is None or name == metric):
                raise
            known = "max"
            if said is None:
                trainer.say_once(
                    f"nobody knows whether the largest or the smallest {name!r} is the best: the largest is taken, as "
                    f'ACCMT does; metrics=[Metric({name!r}, comparator="<")] says otherwise',
                    about=f"the best {name.removeprefix('val_')}",
                )
        return known if said is None else said

    # State ----------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return where training is."""
        if self._bridge is None:
            return {}
        named = self._bridge.named_parameters() if not self.set_to_none else ()
        return {
            "place": dataclasses.asdict(self.place),
            "own": self.status.own(),
            "zeroed": [name for name, parameter in named if parameter.grad is not None],
        }

    def update_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        for name, value in state["place"].items():
            setattr(self.place, name, value)
        self.zeroed = list(state["zeroed"])
        self.status.update(state.get("own", {}))


def refuse_other(folder: Path) -> None:
    """Refuse a folder that a model would replace, and that holds something else.

    Raises:
        ValueError: what is there was not written here.
    """
    if folder.exists() and not (folder / "model.json").is_file():
        raise ValueError(
            f"{folder} holds something else than a model that was saved here, such as one of ACCMT, and a model is to "
            "be saved there: move it away, or give another model_path"
        )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one that has no links
        shutil.copy2(source, target)
