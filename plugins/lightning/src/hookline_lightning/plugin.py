"""The plugin: which modules are adapted, and what surrounds their run."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import hookline
from hookline import CallbackInterface, Stage, hookimpl, instantiate, kept_rng, set_seed
from hookline_lightning import early
from hookline_lightning.files.saving import Files
from hookline_lightning.first_year import bridge as early_bridge
from hookline_lightning.logs.run_logger import RunLogger
from hookline_lightning.run import intervals
from hookline_lightning.run.answers import USUAL
from hookline_lightning.run.bridge import WORDS, Bridge, call, overridden
from hookline_lightning.run.events import LONG_STEPS, OWN, RUNNING, listeners, refuse_unheard
from hookline_lightning.run.following import Following, Steps
from hookline_lightning.run.intervals import Intervals
from hookline_lightning.run.loaders import batch_size, joined
from hookline_lightning.run.manual import Manual
from hookline_lightning.run.members import member
from hookline_lightning.run.metrics import Metrics
from hookline_lightning.run.needs import require_loaders, require_methods
from hookline_lightning.run.overrides import (
    TRANSFERS,
    Closes,
    OwnBackward,
    OwnTransfer,
    Schedules,
    needs_closure,
    written,
)
from hookline_lightning.run.portions import Portions
from hookline_lightning.run.predicting import Predicted
from hookline_lightning.run.values import is_metric
from hookline_lightning.translating.running import AtLeast
from hookline_lightning.translating.translation import is_of, replaces, writes_checkpoints


@dataclass(eq=False)
class Lightning(CallbackInterface):
    """Train modules that are written for Lightning, today's or that of its first year."""

    datamodule: Any = None
    """A LightningDataModule; without one the module has the loaders itself."""
    callbacks: list[Any] = field(default_factory=list)
    """Callbacks of Lightning."""
    val_check_interval: Any = None
    """Validate after each such part of an epoch (a float) or so many batches of it; null leaves it to the run."""
    check_val_every_n_epoch: int | None = 1
    """With `val_check_interval`: only in each so many epochs; null counts its batches across epochs."""
    hparams: dict[str, Any] = field(default_factory=dict)
    """Parameters that trackers show as part of the configuration; `hookline_lightning.Trainer` fills them in."""

    def __post_init__(self) -> None:
        if self.val_check_interval is not None:
            intervals.check(self.val_check_interval, self.check_val_every_n_epoch)
        self._bridge: Any = None
        self._module: Any = None  # the user's
        self._clipping: tuple[float | None, str | None] = (None, None)
        self._given: Any = USUAL
        self._loggers: list[Any] | None = None
        self._ckpt_path: str | None = None
        self._intervals: Any = None
        self._portions: dict[str, float] = {}  # of loaders

    @hookimpl(wrapper=True)
    def adapt_module(self, trainer: hookline.Trainer, module: Any) -> Generator[None, Any, Any]:
        adapted = self._module = yield
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
        if not isinstance(bridge, Bridge):
            self._refuse_unheard()
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
        more = list(more) if isinstance(more, (list, tuple)) else [more]
        view.callbacks = [*(one for one in callbacks if not any(replaces(other, one) for other in more)), *more]
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
        if self._portions:
            trainer.plugins.register(Portions(**self._portions), "lightning.portions")
        if self.val_check_interval is not None:
            view.intervals = (self.val_check_interval, self.check_val_every_n_epoch)
            if trainer.options.evaluate_every is not None:
                self._intervals = Intervals(bridge, *view.intervals)
                trainer.plugins.register(self._intervals, "lightning.intervals")
        clips = overridden(module, "configure_gradient_clipping")
        if any(event in bridge.listeners for event in LONG_STEPS) or clips or bridge.own_zero_grad:
            trainer.plugins.register(Steps(bridge), "lightning.steps")
        if bridge.manual:
            trainer.plugins.register(Manual(bridge), "lightning.manual")
        if overridden(module, "backward"):
            trainer.plugins.register(OwnBackward(bridge), "lightning.backward")
        if any(written(bridge, name) for name in TRANSFERS):
            trainer.plugins.register(OwnTransfer(bridge), "lightning.transfer")
        if any(is_metric(one) for one in module.modules()):
            trainer.plugins.register(Metrics(bridge), "lightning.metrics")
        if view.datamodule is not None:
            view.datamodule.trainer = view

    def _refuse_unheard(self) -> None:
        """Refuse what is only for modules of today's Lightning.

        Raises:
            ValueError: callbacks, data or an interval that nobody would hear of.
        """
        kinds = [type(callback).__name__ for callback in instantiate(list(self.callbacks), "lightning.callbacks")]
        known = OWN | RUNNING
        here = "; ".join(f"{kind} is {known[kind]} here" for kind in kinds if kind in known)
        interval = None if (self.val_check_interval, self.check_val_every_n_epoch) in ((None, 1), (1.0, 1)) else True
        for name, given, instead in (
            ("callbacks", kinds, here or "write what they do as a plugin, or in hooks of the module"),
            ("datamodule", self.datamodule, "loaders are methods of the module"),
            ("val_check_interval", interval, "say trainer.evaluate_every"),
        ):
            if given:
                what = f" ({', '.join(kinds)})" if name == "callbacks" else ""
                raise ValueError(
                    f"lightning.{name}{what}: {type(self._module).__name__} is no module of today's Lightning, so "
                    f"nothing hears of it: {instead}"
                )

    @hookimpl(wrapper=True)
    def setup_optimizers(self, trainer: hookline.Trainer) -> Generator[None, Any, Any]:
        made, bridge = (yield), self._bridge
        if isinstance(bridge, Bridge):
            if bridge.configs:
                trainer.plugins.register(Schedules(bridge), "lightning.schedules")
            own = overridden(bridge.module, "optimizer_step")
            if not bridge.manual and (own or any(map(needs_closure, made[0]))):
                trainer.plugins.register(Closes(bridge), "lightning.closes")
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
            bridge.values.forget()
            if stage is Stage.TRAIN and trainer.resuming is not None:
                trainer.options.sanity_val_steps = 0  # it would change what was loaded
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
                if self.plugin._intervals is not None:
                    self.plugin._intervals.set_cadence(trainer.options, loader)
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
