"""The plugin: which modules are adapted, and what surrounds their run."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import hookline
from hookline import CallbackInterface, Stage, hookimpl, instantiate, kept_rng, set_seed
from hookline_lightning import early, early_bridge
from hookline_lightning.answers import USUAL
from hookline_lightning.bridge import WORDS, Bridge, call, is_metric, overridden
from hookline_lightning.events import LONG_STEPS, listeners, refuse_unheard
from hookline_lightning.following import Following, Steps
from hookline_lightning.loaders import batch_size, joined
from hookline_lightning.loggers import RunLogger
from hookline_lightning.manual import Manual
from hookline_lightning.members import member
from hookline_lightning.metrics import Metrics
from hookline_lightning.needs import require_loaders, require_methods
from hookline_lightning.overrides import OVERRIDES, TRANSFERS, OwnTransfer, Schedules, written
from hookline_lightning.predicting import Predicted
from hookline_lightning.running import AtLeast
from hookline_lightning.saving import Files
from hookline_lightning.translation import is_of, writes_checkpoints


@dataclass(eq=False)
class Lightning(CallbackInterface):
    """Train modules that are written for Lightning, today's or that of its first year."""

    datamodule: Any = None
    """A LightningDataModule; without one the module has the loaders itself."""
    callbacks: list[Any] = field(default_factory=list)
    """Callbacks of Lightning."""
    val_check_interval: float | None = None
    """Validate after this fraction of an epoch's batches, in place of `evaluate_every`."""
    hparams: dict[str, Any] = field(default_factory=dict)
    """Parameters that trackers show as part of the configuration; `hookline_lightning.Trainer` fills them in."""

    def __post_init__(self) -> None:
        if self.val_check_interval is not None and not 0 < self.val_check_interval <= 1:
            raise ValueError(
                f"lightning.val_check_interval={self.val_check_interval} must be above 0 and at most 1; for a number "
                'of batches write trainer.evaluate_every: "100 batches"'
            )
        self._bridge: Any = None
        self._clipping: tuple[float | None, str | None] = (None, None)
        self._given: Any = USUAL
        self._loggers: list[Any] | None = None
        self._ckpt_path: str | None = None

    @hookimpl(wrapper=True)
    def adapt_module(self, trainer: hookline.Trainer, module: Any) -> Generator[None, Any, Any]:
        adapted = yield
        if isinstance(adapted, hookline.ModuleInterface) or not isinstance(adapted, torch.nn.Module):
            return adapted
        kind = type(adapted)
        if kind.__name__ == "OptimizedModule" and hasattr(adapted, "training_step"):
            raise TypeError(
                "this module is one of torch.compile: give the module itself, and the plugin compile, "
                "plugins={'compile': {}}"
            )
        if early.is_mine(adapted):
            self._bridge = early_bridge.Bridge(adapted)
        elif hasattr(kind, "training_step") and hasattr(kind, "configure_optimizers"):
            self._bridge = Bridge(adapted, trainer)
        else:
            return adapted
        return self._bridge

    @hookimpl
    def on_setup(self, trainer: hookline.Trainer) -> None:
        bridge = self._bridge
        if bridge is None:
            return
        trainer.plugins.register(Life(self), "lightning.life")
        if isinstance(bridge, early_bridge.Bridge):
            early_bridge.refuse_unheard(bridge.module)
            trainer.plugins.register(early_bridge.Following(bridge), "lightning.following")
            return
        module, view = bridge.module, bridge.view
        view.datamodule = instantiate(self.datamodule, "lightning.datamodule")  # a configuration names their classes
        callbacks = instantiate(list(self.callbacks), "lightning.callbacks")
        configure = overridden(module, "configure_callbacks")
        more = configure() if configure else []
        view.callbacks = [*callbacks, *(more if isinstance(more, (list, tuple)) else [more])]
        view.callbacks.sort(key=writes_checkpoints)  # behind all others
        view.gradient_clip_val, view.gradient_clip_algorithm = self._clipping
        view.given, view.ckpt_path = self._given, self._ckpt_path
        view.loggers = view.loggers if self._loggers is None else self._loggers
        for logger in view.loggers:
            if isinstance(logger, RunLogger):
                logger.connect(view)
        refuse_unheard(bridge, view.callbacks)
        bridge.listeners = listeners(bridge, view.callbacks)
        bridge.files = Files(bridge)
        trainer.plugins.register(bridge.files, "lightning.files")
        bridge.at_least = AtLeast(view.given.min_epochs, view.given.min_steps)
        trainer.plugins.register(bridge.at_least, "lightning.at_least")
        if any(is_of(one, "BasePredictionWriter") for one in view.callbacks):
            trainer.plugins.register(Predicted(bridge), "lightning.predicted")
        trainer.plugins.register(Following(bridge), "lightning.following")
        if any(event in bridge.listeners for event in LONG_STEPS) or overridden(module, "configure_gradient_clipping"):
            trainer.plugins.register(Steps(bridge), "lightning.steps")
        if bridge.manual:
            trainer.plugins.register(Manual(bridge), "lightning.manual")
        for name, hook in OVERRIDES.items():
            if overridden(module, name):
                trainer.plugins.register(hook(bridge), f"lightning.{name}")
        if any(written(bridge, name) for name in TRANSFERS):
            trainer.plugins.register(OwnTransfer(bridge), "lightning.transfer")
        if any(is_metric(one) for one in module.modules()):
            trainer.plugins.register(Metrics(bridge), "lightning.metrics")
        if view.datamodule is not None:
            view.datamodule.trainer = view

    @hookimpl(wrapper=True)
    def setup_optimizers(self, trainer: hookline.Trainer) -> Generator[None, Any, Any]:
        made, bridge = (yield), self._bridge
        if isinstance(bridge, Bridge):
            special = not all(config.is_plain for config in bridge.configs)
            if special or bridge.manual or overridden(bridge.module, "lr_scheduler_step"):
                trainer.plugins.register(Schedules(bridge), "lightning.schedules")
        return made

    @hookimpl(wrapper=True)
    def export_model(self) -> Generator[None, Any, Any]:
        """Name weights as the user's module does."""
        weights = yield
        return weights if self._bridge is None else {name.removeprefix("module."): one for name, one in weights.items()}

    def get_state(self) -> dict[str, Any]:
        """Return what module, callbacks and data module keep of themselves."""
        bridge = self._bridge
        if bridge is None:
            return {}
        if isinstance(bridge, early_bridge.Bridge):
            return bridge.get_own_state()
        view, module = bridge.view, bridge.module
        place = {"epoch": view.current_epoch, "global_step": view.global_step}
        state: dict[str, Any] = {}
        for key, thing in self._stateful():
            kept: dict[str, Any] = {}
            if (ask := overridden(thing, "state_dict")) and thing is not module:
                kept["state"] = ask()
            if save := overridden(thing, "on_save_checkpoint"):
                checkpoint = dict(place)
                call(save, *([checkpoint] if thing in (module, view.datamodule) else [view, module, checkpoint]))
                kept["checkpoint"] = {name: one for name, one in checkpoint.items() if name not in place}
            if kept:
                state[key] = kept
        return {"place": place, **state} if state else {}

    def update_state(self, state: dict[str, Any]) -> None:
        """Give it back, to each a copy of its own."""
        bridge = self._bridge
        if isinstance(bridge, early_bridge.Bridge):
            bridge.update_own_state(state)
            return
        view, module = bridge.view, bridge.module
        for key, thing in self._stateful():
            kept = hookline.copy_state(state.get(key, {}))
            if "state" in kept:
                thing.load_state_dict(kept["state"])
            if "checkpoint" in kept and (load := overridden(thing, "on_load_checkpoint")):
                checkpoint = {**state["place"], **kept["checkpoint"]}
                call(load, *([checkpoint] if thing in (module, view.datamodule) else [view, module, checkpoint]))

    def _stateful(self) -> Iterator[tuple[str, Any]]:
        view = self._bridge.view
        yield "module", self._bridge.module
        if view.datamodule is not None:
            yield "datamodule", view.datamodule
        seen: dict[str, int] = {}
        for callback in view.callbacks:
            key = str(member(callback, "state_key", type(callback).__qualname__))
            seen[key] = seen.get(key, 0) + 1
            yield f"callback {key}" if seen[key] == 1 else f"callback {key} {seen[key]}", callback


class Life(CallbackInterface):
    """Prepares data, sets up and tears down around a run."""

    def __init__(self, plugin: Lightning) -> None:
        self.plugin = plugin

    @hookimpl(wrapper=True)
    def run(self, trainer: hookline.Trainer, stage: Stage) -> Generator[None, bool, bool]:
        bridge = self.plugin._bridge
        today = isinstance(bridge, Bridge)
        if today:
            bridge.word = WORDS[stage]
            require_methods(bridge, stage)
        else:
            bridge.connect()
        with kept_rng():
            set_seed(trainer.options.seed)  # data that are made at random are the same in each process and session
            if today:
                self._begin_files(bridge)
                self._prepare(trainer, bridge)
                self._each(bridge, "setup", bridge.word)
                if configure := overridden(bridge.module, "configure_model"):
                    configure()
                for one in bridge.module.modules():
                    if hasattr(one, "_device"):  # what the real package answers as `self.device`
                        one._device = trainer.device
            loader = bridge.ask_for_loaders(stage)
            if today:
                require_loaders(bridge, stage)
            if stage is Stage.TRAIN:
                bridge.ask_for_loaders(Stage.VAL)
                parts = trainer.shares * trainer.hook.get_window_size(trainer=trainer)
                trainer.options.train_batch_size = batch_size(loader) * parts
                loader = joined(loader)
                if self.plugin.val_check_interval is not None:
                    self._set_interval(trainer, loader, self.plugin.val_check_interval)
        try:
            return (yield)
        finally:
            if today:
                self._each(bridge, "teardown", bridge.word)
            else:
                bridge.disconnect()

    @staticmethod
    def _begin_files(bridge: Bridge) -> None:
        """Lead files of callbacks into the folder of the run, and log what was logged before it."""
        view = bridge.view
        for callback in view.callbacks if view.loggers and bridge.word == "fit" else ():
            if is_of(callback, "ModelCheckpoint") and callback.dirpath is None:
                callback.dirpath = view.strategy.broadcast(str((bridge.trainer.run_dir / "checkpoints").resolve()))
        for logger in view.loggers:
            if isinstance(logger, RunLogger):
                logger.tell_waiting()

    def _prepare(self, trainer: hookline.Trainer, bridge: Bridge) -> None:
        """Have one process of each machine (or of all) prepare the data, the others wait; an error is one of all."""
        asked = [
            (prepare, trainer.local_rank if member(one, "prepare_data_per_node", True) else trainer.rank)
            for one in (bridge.view.datamodule, bridge.module)
            if one is not None and (prepare := overridden(one, "prepare_data"))
        ]
        if not asked:
            return
        failure: Exception | None = None
        if any(rank == 0 for _, rank in asked):
            try:
                for prepare, rank in asked:
                    if rank == 0:
                        prepare()
            except Exception as error:
                failure = error
        said = trainer.hook.all_gather(trainer=trainer, value=None if failure is None else repr(failure))
        if failure is not None:
            raise failure
        for rank, text in enumerate(said):
            if text is not None:
                raise RuntimeError(f"prepare_data failed on rank {rank}: {text}")

    @staticmethod
    def _each(bridge: Bridge, name: str, word: str) -> None:
        view, module = bridge.view, bridge.module
        if view.datamodule is not None and (method := overridden(view.datamodule, name)):
            call(method, word)
        for callback in view.callbacks:
            if method := overridden(callback, name):
                call(method, view, module, word)
        if method := overridden(module, name):
            call(method, word)

    @staticmethod
    def _set_interval(trainer: hookline.Trainer, loader: Any, fraction: float) -> None:
        try:
            batches = len(loader) // trainer.shares
        except TypeError:
            raise ValueError(
                f"lightning.val_check_interval={fraction} is a fraction, but the training loader does not know how "
                "many batches it has; say a number of batches"
            ) from None
        trainer.options.evaluate_every = f"{max(int(batches * fraction), 1)} batches"
