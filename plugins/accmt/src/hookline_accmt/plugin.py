"""The plugin: it has the core train an `AcceleratorModule`."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hookline
from hookline import Trainer, hookimpl, instantiate
from hookline_accmt.bridge import Bridge
from hookline_accmt.module import AcceleratorModule
from hookline_accmt.options import Options
from hookline_accmt.saving import put_model, refuse_taken


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
        policy = getattr(trainer.plugins.get_plugin("model_saving"), "policy", None)
        if self.model_path is not None and policy is not None:
            refuse_taken(self.model_path, policy)
        hps, options = self.hyperparameters, trainer.options
        if hps is not None:
            if options.epochs is None and options.max_steps is None and options.max_time is None:
                options.epochs = hps.epochs
            window: int = trainer.hook.get_window_size(trainer=trainer)
            options.train_batch_size = hps.batch_size * trainer.shares * window
            options.val_batch_size = hps.val_batch_size

    @hookimpl
    def on_checkpoint(self, path: Path, kind: str) -> None:
        """Have the model that was saved in `model_path`, too."""
        if self.model_path is not None and kind == "model" and self._bridge is not None:
            put_model(path, Path(self.model_path), self._bridge.model)

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
