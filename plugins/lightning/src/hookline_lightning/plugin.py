"""The plugin: which modules are adapted, and what their run hears."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import hookline
from hookline import CallbackInterface, Stage, hookimpl, hookspecs, instantiate, kept_rng, set_seed
from hookline_lightning import early
from hookline_lightning.bridge import INSTEAD, LONG, WORDS, Bridge, call, is_metric, overridden
from hookline_lightning.configure import SchedulerConfig
from hookline_lightning.events import LONG_STEPS, listeners, refuse_unheard


@dataclass(eq=False)
class Lightning(CallbackInterface):
    """Train modules that are written for Lightning, today's or that of its first year."""

    datamodule: Any = None
    """A LightningDataModule; without one the module has the loaders itself."""
    callbacks: list[Any] = field(default_factory=list)
    """Callbacks of Lightning."""
    val_check_interval: float | None = None
    """Validate after this fraction of an epoch's batches, in place of `evaluate_every`."""

    def __post_init__(self) -> None:
        if self.val_check_interval is not None and not 0 < self.val_check_interval <= 1:
            raise ValueError(
                f"lightning.val_check_interval={self.val_check_interval} must be above 0 and at most 1; for a number "
                'of batches write trainer.evaluate_every: "100 batches"'
            )
        self._bridge: Any = None
        self._clipping: tuple[float | None, str | None] = (None, None)

    @hookimpl(wrapper=True)
    def adapt_module(self, trainer: hookline.Trainer, module: Any) -> Generator[None, Any, Any]:
        adapted = yield
        if isinstance(adapted, hookline.ModuleInterface) or not isinstance(adapted, torch.nn.Module):
            return adapted
        kind = type(adapted)
        if early.is_mine(adapted):
            self._bridge = early.Bridge(adapted)
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
        if isinstance(bridge, early.Bridge):
            early.refuse_unheard(bridge.module)
            trainer.plugins.register(early.Following(bridge), "lightning.following")
            return
        module, view = bridge.module, bridge.view
        view.datamodule = instantiate(self.datamodule, "lightning.datamodule")  # a configuration names their classes
        callbacks = instantiate(list(self.callbacks), "lightning.callbacks")
        configure = overridden(module, "configure_callbacks")
        more = configure() if configure else []
        view.callbacks = [*callbacks, *(more if isinstance(more, (list, tuple)) else [more])]
        view.gradient_clip_val, view.gradient_clip_algorithm = self._clipping
        refuse_unheard(bridge, view.callbacks)
        bridge.listeners = listeners(bridge, view.callbacks)
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
        if isinstance(bridge, early.Bridge):
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
        if isinstance(bridge, early.Bridge):
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
            key = str(getattr(callback, "state_key", type(callback).__qualname__))
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
        with kept_rng():
            set_seed(trainer.options.seed)  # data that are made at random are the same in each process and session
            if today:
                self._prepare(trainer, bridge)
                self._each(bridge, "setup", bridge.word)
                if configure := overridden(bridge.module, "configure_model"):
                    configure()
                for one in bridge.module.modules():
                    if hasattr(one, "_device"):  # what the real package answers as `self.device`
                        one._device = trainer.device
            loader = bridge.ask_for_loaders(stage)
            if stage is Stage.TRAIN:
                bridge.ask_for_loaders(Stage.VAL)
                parts = trainer.shares * trainer.hook.get_window_size(trainer=trainer)
                trainer.options.train_batch_size = (getattr(loader, "batch_size", None) or 1) * parts
                if self.plugin.val_check_interval is not None:
                    self._set_interval(trainer, loader, self.plugin.val_check_interval)
        try:
            return (yield)
        finally:
            if today:
                self._each(bridge, "teardown", bridge.word)

    def _prepare(self, trainer: hookline.Trainer, bridge: Bridge) -> None:
        """Have one process of each machine prepare the data, and the others wait; an error is one of all."""
        asked = [overridden(one, "prepare_data") for one in (bridge.view.datamodule, bridge.module) if one is not None]
        if not any(asked):
            return
        failure: Exception | None = None
        if trainer.local_rank == 0:
            try:
                for prepare in filter(None, asked):
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


class Following(CallbackInterface):
    """Tells a module of today's Lightning and its callbacks of their run."""

    state_of_rank = True

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self._keys: list[str] = []

    # Training -------------------------------------------------------------------------

    @hookimpl
    def on_begin_train(self, trainer: hookline.Trainer) -> None:
        self.bridge.tell_between("on_fit_start")
        self.bridge.tell_between("on_train_start")

    @hookimpl
    def on_begin_train_epoch(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        self.bridge.tell_between("on_train_epoch_start")

    @hookimpl(wrapper=True)
    def forward_backward(self, index: int) -> Generator[None, Any, Any]:
        self.bridge.index = index
        return (yield)

    @hookimpl(wrapper=True)
    def should_step(self) -> Generator[None, bool, bool]:
        return (yield) and not self.bridge.skipped

    @hookimpl(wrapper=True, tryfirst=True)
    def step_schedulers(self, when: str) -> Generator[None, bool, bool]:
        if when == "epoch":  # the last moment at which values of this epoch can be logged
            self.bridge.tell_between("on_train_epoch_end")
            self.bridge.log_epoch_metrics()
        return (yield)

    @hookimpl
    def on_end_train_epoch(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        self.bridge.tell_between("on_train_epoch_end late")

    @hookimpl
    def on_end_train(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        self.bridge.tell_between("on_train_end")
        self.bridge.tell_between("on_fit_end")

    # Evaluation -----------------------------------------------------------------------

    @hookimpl
    def on_begin_evaluation(self, trainer: hookline.Trainer, totals: Mapping[str, int | None]) -> None:
        self._keys = list(totals)
        if trainer.sanity_checking:
            self.bridge.tell("on_sanity_check_start")

    @hookimpl(wrapper=True)
    def evaluate(self, trainer: hookline.Trainer, stage: Stage) -> Generator[None, dict[str, float], dict[str, float]]:
        bridge = self.bridge
        metrics = yield
        word = LONG[stage]
        if not trainer.sanity_checking:
            self._take(bridge.view.values, metrics)
        if f"on_{word}_end" in bridge.listeners:
            with trainer.evaluation.under_way(stage):
                bridge.tell_known(f"on_{word}_end")
        if trainer.sanity_checking:
            bridge.tell("on_sanity_check_end")
        return metrics

    @hookimpl
    def on_begin_val_epoch(self, key: str) -> None:
        self._begin("validation", key)

    @hookimpl
    def on_begin_test_epoch(self, key: str) -> None:
        self._begin("test", key)

    @hookimpl
    def on_begin_predict_epoch(self, key: str) -> None:
        self._begin("predict", key)

    def _begin(self, word: str, key: str) -> None:
        bridge = self.bridge
        bridge.batch_idx, bridge.loader_idx = 0, self._keys.index(key)
        if bridge.loader_idx == 0:
            self._of_all(f"on_{word}_start")
            self._of_all(f"on_{word}_epoch_start")

    def _of_all(self, event: str) -> None:
        """Tell an event that is of all loaders: what is logged in it has no loader's key."""
        with self.bridge.trainer.logs.suffixed(""):
            self.bridge.tell(event)

    @hookimpl
    def on_end_val_step(self, outputs: Any, batch: Any, index: int) -> None:
        self._end_batch("validation", outputs[0].value, batch, index)

    @hookimpl
    def on_end_test_step(self, outputs: Any, batch: Any, index: int) -> None:
        self._end_batch("test", outputs[0].value, batch, index)

    @hookimpl
    def on_end_predict_step(self, outputs: Any, batch: Any, index: int) -> None:
        self._end_batch("predict", outputs, batch, index)

    def _end_batch(self, word: str, outputs: Any, batch: Any, index: int) -> None:
        self.bridge.tell(f"on_{word}_batch_end", outputs, batch, index, self.bridge.loader_idx)

    @hookimpl
    def on_end_val_epoch(self, key: str) -> None:  # type: ignore[override]
        self._end("validation", key)

    @hookimpl
    def on_end_test_epoch(self, key: str) -> None:
        self._end("test", key)

    @hookimpl
    def on_end_predict_epoch(self, key: str) -> None:
        self._end("predict", key)

    def _end(self, word: str, key: str) -> None:
        self.bridge.log_epoch_metrics()
        if key == self._keys[-1]:
            self._of_all(f"on_{word}_epoch_end")
            with self.bridge.trainer.logs.suffixed(""):
                self.bridge.log_epoch_metrics()

    # Values ---------------------------------------------------------------------------

    @hookimpl
    def on_log(self, metrics: Mapping[str, float]) -> None:
        view = self.bridge.view
        self._take(view.values, metrics)
        view.logged.update(metrics)

    @hookimpl(wrapper=True)
    def filter_log(self, trainer: hookline.Trainer) -> Generator[None, dict[str, float], dict[str, float]]:
        metrics, hidden = (yield), self.bridge.hidden
        own = f"{trainer.options.train_loss_metric_name}_epoch"
        if self.bridge.lossless:  # several ranks have a mean of it all the same
            metrics.pop(own, None)
        if INSTEAD in metrics:
            metrics[own] = metrics.pop(INSTEAD)
        if not hidden:
            return metrics
        kept = {name: one for name, one in metrics.items() if name.split("/dataloader_idx_")[0] not in hidden}
        self._take(self.bridge.view.values, {name: one for name, one in metrics.items() if name not in kept})
        return kept

    def _take(self, values: dict[str, float], metrics: Mapping[str, float]) -> None:
        values.update(metrics)
        for name in self.bridge.forked & metrics.keys():  # what is logged both ways is known by its plain name, too
            values[name.removesuffix("_epoch")] = metrics[name]

    def get_state(self) -> dict[str, Any]:
        """Return the newest values, which schedulers and callbacks look at."""
        view = self.bridge.view
        return {"values": dict(view.values), "logged": dict(view.logged)}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.bridge.view.values, self.bridge.view.logged = dict(state["values"]), dict(state["logged"])

    @hookimpl
    def on_exception(self, exception: BaseException) -> None:
        for callback in self.bridge.view.callbacks:
            if method := overridden(callback, "on_exception"):
                call(method, self.bridge.view, self.bridge.module, exception)


class Steps(CallbackInterface):
    """Tells of what happens within a step; only where somebody listens."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self.clips = overridden(bridge.module, "configure_gradient_clipping")
        for event, hook in LONG_STEPS.items():  # an attribute hides the method: nobody is called for nothing
            if event not in bridge.listeners and not (event == "on_before_optimizer_step" and self.clips):
                setattr(self, hook, None)

    @hookimpl(wrapper=True)
    def run_backward(self, loss: torch.Tensor) -> Generator[None, bool, bool]:
        self.bridge.tell("on_before_backward", loss)
        return (yield)

    @hookimpl
    def on_end_backward(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        self.bridge.tell("on_after_backward")

    @hookimpl
    def on_begin_optimizer_step(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        view = self.bridge.view
        for optimizer in optimizers:
            self.bridge.tell("on_before_optimizer_step", optimizer)
            if self.clips and not self.bridge.manual:
                call(self.clips, optimizer, view.gradient_clip_val, view.gradient_clip_algorithm)

    @hookimpl
    def on_end_optimizer_step(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            self.bridge.tell("on_before_zero_grad", optimizer)

    @hookimpl
    def on_end_train_step(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        window, self.bridge.window = self.bridge.window, []
        for outputs, batch, index, samples in window:
            self.bridge.samples = samples
            self.bridge.tell("on_train_batch_end", outputs, batch, index)
        self.bridge.samples = None


# What a module may do in the run's place ------------------------------------------------


TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def written(bridge: Bridge, name: str) -> Any:
    """Return a method of the data module, else of the module, that the user has written; or None."""
    data = bridge.view.datamodule
    return (overridden(data, name) if data is not None else None) or overridden(bridge.module, name)


class OwnTransfer(CallbackInterface):
    """Has the data module or the module bring batches to the device, or change them on the way."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self.before, self.transfer, self.after = (written(bridge, name) for name in TRANSFERS)

    @hookimpl
    def prepare_batch(self, trainer: hookline.Trainer, batch: Any, stage: Stage) -> Any:
        loader = 0 if stage is Stage.TRAIN else self.bridge.loader_idx
        if self.before:
            batch = call(self.before, batch, loader)
        if self.transfer:
            batch = call(self.transfer, batch, trainer.device, loader)
        else:
            batch = hookspecs.prepare_batch(trainer, batch, stage)
        return call(self.after, batch, loader) if self.after else batch


class OwnBackward(CallbackInterface):
    """Has the module compute the gradients."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge

    @hookimpl
    def run_backward(self, loss: torch.Tensor) -> bool:
        self.bridge.module.backward(loss)
        return True


class OwnStep(CallbackInterface):
    """Has the module step its optimizer; the gradients are there already, so its closure only answers the loss."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge

    @hookimpl
    def step_optimizer(self, trainer: hookline.Trainer, optimizer: torch.optim.Optimizer, closure: Any) -> bool:
        index = trainer.position + self.bridge.index
        self.bridge.module.optimizer_step(trainer.epoch, index, optimizer, closure or (lambda: None))
        return True


OVERRIDES = {"optimizer_step": OwnStep, "backward": OwnBackward}


class Schedules(CallbackInterface):
    """Moves schedulers that move every so many steps or epochs, or by a value, or as the module says."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self.own = overridden(bridge.module, "lr_scheduler_step")
        self._waiting: list[SchedulerConfig] = []

    @hookimpl
    def step_schedulers(self, trainer: hookline.Trainer, when: str) -> bool:
        if self.bridge.manual or when == "validation":
            return True
        due = self._due(trainer, when)
        for config in due:
            if not config.reduce_on_plateau:
                self._move(config)
        if when == "step":  # a validation of this step comes before they look at it
            self._waiting = [config for config in due if config.reduce_on_plateau]
        return True

    @hookimpl
    def on_end_train_epoch(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        if not self.bridge.manual:
            self._look(trainer, [config for config in self._due(trainer, "epoch") if config.reduce_on_plateau])

    @hookimpl
    def on_boundary(self, trainer: hookline.Trainer) -> None:
        waiting, self._waiting = self._waiting, []
        self._look(trainer, waiting)

    def _due(self, trainer: hookline.Trainer, interval: str) -> list[SchedulerConfig]:
        done = trainer.epoch if interval == "epoch" else trainer.position // trainer.window_size
        return [one for one in self.bridge.configs if one.interval == interval and (done + 1) % one.frequency == 0]

    def _look(self, trainer: hookline.Trainer, configs: Sequence[SchedulerConfig]) -> None:
        values = self.bridge.view.values
        for config in configs:
            if config.monitor in values:  # where each rank has its own, their mean, or rates would be different
                ranks = trainer.hook.all_gather(trainer=trainer, value=values[config.monitor])
                self._move(config, torch.tensor(sum(ranks) / len(ranks)))
            elif config.strict:
                raise ValueError(
                    f"{type(config.scheduler).__name__} looks at {config.monitor!r}, which nobody has logged; there is "
                    f"{', '.join(values) or 'nothing'}. Log it by self.log, or say strict=False"
                )

    def _move(self, config: SchedulerConfig, *value: Any) -> None:
        if self.own:
            call(self.own, config.scheduler, value[0] if value else None)
        else:
            config.scheduler.step(*value)


class Manual(CallbackInterface):
    """Lets the module step its optimizers itself; one batch is one step of the run."""

    state_of_rank = True

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self._gradients: dict[str, torch.Tensor] = {}  # that came back and wait for the next batch

    @hookimpl
    def on_begin_train(self, trainer: hookline.Trainer) -> None:
        if any(hasattr(weight, "device_mesh") for weight in self.bridge.parameters()):
            raise ValueError(
                "automatic_optimization = False and a model that ranks share (fsdp): backward would run within the "
                "forward that gathers it; take ddp"
            )

    @hookimpl
    def update(self, trainer: hookline.Trainer, window: Sequence[Any]) -> list[tuple[Any, ...]]:
        if len(window) > 1:
            raise ValueError(
                f"a window of {len(window)} micro-batches and automatic_optimization = False: accumulate gradients "
                "yourself, by stepping and clearing only every so many batches"
            )
        if trainer.padding:
            raise ValueError(
                "this rank has no batch left while others have, and with automatic_optimization = False it cannot "
                "keep them company; let distributed.uneven be drop"
            )
        bridge, hook = self.bridge, trainer.hook
        bridge.index = 0
        for name, gradient in self._gradients.items():
            parameter = bridge.get_parameter(name)
            parameter.grad = gradient.to(parameter.device, copy=True)
        self._gradients = {}
        for optimizer in bridge.wrapped():
            optimizer.stepped = False
        batch = hook.prepare_batch(trainer=trainer, batch=window[0], stage=Stage.TRAIN)
        model = trainer.model
        trainer.built.use_model(trainer.module)  # what averages gradients in backward must not see this
        try:
            outputs = hook.call_model(trainer=trainer, batch=batch, stage=Stage.TRAIN)
        finally:
            trainer.built.use_model(model)
        bridge.lossless = not isinstance(outputs, torch.Tensor)
        return [() if bridge.lossless else (outputs.detach(),)]

    def get_state(self) -> dict[str, Any]:
        """Return gradients that wait for a step to come."""
        waiting = {
            id(parameter)
            for optimizer in self.bridge.wrapped()
            if not optimizer.stepped
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        named = self.bridge.named_parameters()
        gradients = {name: one.grad for name, one in named if id(one) in waiting and one.grad is not None}
        return {"gradients": gradients} if gradients else {}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take them back; the run clears all gradients after this."""
        self._gradients = state["gradients"]


class Metrics(CallbackInterface):
    """Keeps what objects of torchmetrics have seen so far, for a run that is cut in mid-epoch."""

    state_of_rank = True

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge

    def _named(self) -> Iterator[tuple[str, Any]]:
        return ((name, one) for name, one in self.bridge.named_modules() if is_metric(one))

    def get_state(self) -> dict[str, Any]:
        """Return it by the names of the objects."""
        return {
            name: {"values": dict(one.metric_state), "count": one.update_count}
            for name, one in self._named()
            if one.update_count
        }

    def update_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        for name, one in self._named():
            if name in state:
                for key, value in hookline.copy_state(state[name]["values"]).items():
                    setattr(one, key, value)
                # `compute` warns without updates and answers what it has kept, and only `reset` sets both in public
                one._update_count, one._computed = state[name]["count"], None
