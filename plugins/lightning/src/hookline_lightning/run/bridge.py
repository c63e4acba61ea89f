"""A module of today's Lightning as a module of the core."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

import hookline
from hookline import ModuleInterface, Stage
from hookline_lightning.module import DOORS, Doors, LightningModule
from hookline_lightning.run.calls import call as call
from hookline_lightning.run.calls import overridden as overridden
from hookline_lightning.run.configure import SchedulerConfig, read_optimizers
from hookline_lightning.run.loaders import in_turn, joined
from hookline_lightning.run.members import member
from hookline_lightning.run.optimizer import LightningOptimizer, Still
from hookline_lightning.run.values import Values
from hookline_lightning.run.view import View

log = logging.getLogger("hookline.lightning")

WORDS = {Stage.TRAIN: "fit", Stage.VAL: "validate", Stage.TEST: "test", Stage.PREDICT: "predict"}
LONG = {Stage.TRAIN: "train", Stage.VAL: "validation", Stage.TEST: "test", Stage.PREDICT: "predict"}


def zero_loss(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """Return a loss of zero that depends on each of these parameters."""
    return torch.stack([one.flatten()[:0].sum() for one in parameters if one.requires_grad]).sum()


def without_graph(returned: Any) -> Any:
    """Return what a step did, detached."""
    if isinstance(returned, Mapping):
        return {key: without_graph(value) for key, value in returned.items()}
    return returned.detach() if isinstance(returned, torch.Tensor) else returned


class Held:
    """What a step of an evaluation returned: no output that the run would take for a loss."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Now:
    """The step and the batch under way; a plain object, as attributes of a module cost a call each."""

    index = 0
    """Of the batch within its window."""
    place = -1
    """Of the batch in its epoch."""
    pending: tuple[Any, Any] | None = None
    """What `training_step` has returned, and its batch, until its end is told."""
    skipped = False
    """Whether no batch of the window has given a loss."""
    no_loss = False
    """Whether this batch has given none, in automatic optimisation."""
    beside = False
    """Whether the step is one of the module's own in automatic optimisation."""
    ahead = 0
    """Steps that are done and not counted yet."""
    cleared_for: Any = None
    """The step for which gradients are cleared."""
    within_closure: Any = None
    """The closure of the step that does forward and backward."""


class Bridge(ModuleInterface):
    """A module of today's Lightning.

    Args:
        module: the user's.
        core: the run.
    """

    def __init__(self, module: torch.nn.Module, core: hookline.Trainer) -> None:
        super().__init__()
        self.module: Any = module
        self.view = View(core, self)
        self.word = "fit"
        self.configs: list[SchedulerConfig] = []
        self.loaders: dict[Stage, Any] = {}
        self._joined: dict[bool, Any] = {}  # training loaders, by whether they shuffle
        self.batch_idx = self.loader_idx = 0
        self.loader_number: tuple[int, ...] = ()  # of the loader, as hooks of a batch hear it where there are several
        self.lossless = False  # whether a manual optimisation tells no loss
        self.now = Now()
        self.values = Values(self)
        self.steps = 0  # of each optimizer, in manual optimisation
        self.cut = 0  # epochs that were cut short and have ended in Lightning's words
        self.gradients: dict[torch.nn.Parameter, torch.Tensor] = {}  # of the last step, while somebody may look at them
        self.own_zero_grad = overridden(module, "optimizer_zero_grad")
        self.look: Callable[[], None] = lambda: None  # lets schedulers look at values of the last step
        self.listeners: dict[str, list[Callable[..., Any]]] = {}
        self.files: Any = None  # what writes checkpoints as files
        self.at_least: Any = None  # what ends training by should_stop
        self._wrapped: list[LightningOptimizer] = []
        self._toggled: dict[torch.nn.Parameter, bool] | None = None
        for one in module.modules():
            if one is module or isinstance(one, LightningModule) or hasattr(type(one), "automatic_optimization"):
                self._attach(one)

    def _attach(self, module: Any) -> None:
        """Give a module the doors to the run, in the place of those that the real package has."""
        module._trainer = self.view
        if isinstance(module, LightningModule):
            return
        for name in DOORS:
            if overridden(module, name) is None:
                setattr(module, name, types.MethodType(getattr(Doors, name), module))
        if not hasattr(type(module), "trainer"):
            module.trainer = self.view

    @property
    def manual(self) -> bool:
        """Whether the module steps its optimizers itself.

        Raises:
            RuntimeError: the module's own property fails; torch would take its AttributeError for ours.
        """
        try:
            return not member(self.module, "automatic_optimization", True)
        except AttributeError as error:
            raise RuntimeError(f"{type(self.module).__name__}.automatic_optimization: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        kept = super().__getstate__()
        gone: dict[str, Any] = {
            **{name: {} for name in ("loaders", "_joined", "listeners", "gradients")},
            **dict.fromkeys(("files", "at_least", "look"), None),
            **{name: [] for name in ("_wrapped", "configs")},
        }
        return {**kept, **gone}

    # Steps ----------------------------------------------------------------------------

    def begin_batch(self, batch: Any, index: int) -> None:
        """Begin a training batch, the index-th of its window."""
        self.now.index, self.now.place = index, self.trainer.position + index
        self.now.skipped = self.now.skipped and index > 0
        if self.gradients and index == 0:
            self.show_gradients()
        self.values.begin_batch(batch)
        for listener in self.listeners.get("on_train_batch_start", ()):
            if listener(batch, self.now.place) == -1:
                raise ValueError(
                    "on_train_batch_start returned -1, which ends an epoch early: this is not here; limit the epoch "
                    "(limit_train_batches), or ask for the end by self.trainer.should_stop = True"
                )

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        """Return the loss of a batch."""
        if not self.now.within_closure:  # whose batch has begun
            self.begin_batch(batch, self.now.index)
        returned = call(self.module.training_step, batch, self.now.place)
        if "on_train_batch_end" in self.listeners:
            self.now.pending = (without_graph(returned), batch)
        loss = returned.get("loss") if isinstance(returned, Mapping) else returned
        if self.manual:
            return () if loss is None else loss
        if self.now.index == 0:
            self._clear_gradients(global_step)
        if loss is None:
            if isinstance(returned, Mapping):
                raise ValueError(f"training_step returned a mapping without 'loss'; it has {', '.join(returned)}")
            if self.trainer.shares > 1:
                raise ValueError(
                    "training_step returned None, which skips a batch; with several processes one would skip and "
                    "others not: return a loss of zero that depends on the parameters"
                )
            self.now.skipped, self.now.no_loss = self.now.index == 0 or self.now.skipped, True
            return zero_loss(self.module.parameters())
        self.now.skipped = self.now.no_loss = False
        return loss

    def _clear_gradients(self, global_step: int) -> None:
        """Clear gradients before the first backward of a step, as Lightning does: also what training_step has left."""
        key, core = (global_step, self.trainer.idle), self.trainer
        if self.now.cleared_for == key:  # another plugin runs a batch in parts, or twice
            return
        self.now.cleared_for = key
        if self.gradients:
            self.show_gradients()
            self.gradients = {}
        self.tell("on_before_zero_grad", core.optimizers[0])
        if self.own_zero_grad is None:
            for group in core.optimizers[0].param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        else:
            self.own_zero_grad(core.epoch, self.now.place, core.optimizers[0])

    def clear_before_validation(self) -> None:
        """Clear gradients before a validation in training, those too that wait for a step, as Lightning does."""
        if own := overridden(self.module, "on_validation_model_zero_grad"):
            own()
        else:
            self.gradients = {}
            self.module.zero_grad()

    def show_gradients(self) -> None:
        """Put back the gradients of the last step, which Lightning clears later than the run does."""
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient

    @property
    def hears_behind(self) -> bool:
        """Whether something may be logged of a batch behind its backward."""
        return bool(self.listeners.keys() & {"on_train_batch_end", "on_before_optimizer_step"})

    def end_batch(self) -> None:
        """Tell that a training batch is over."""
        if self.now.pending is None:
            return
        (returned, batch), self.now.pending = self.now.pending, None
        outputs = {} if returned is None else dict(returned) if isinstance(returned, Mapping) else {"loss": returned}
        if outputs and not self.manual:
            outputs["loss"] = outputs["loss"] / self.trainer.window_size
        self.tell("on_train_batch_end", outputs, batch, self.now.place)
        self.values.begin_batch(None)

    def _evaluation_step(self, name: str, batch: Any) -> Any:
        place = (self.batch_idx, *self.loader_number)
        self.batch_idx += 1
        self.values.begin_batch(batch)
        stage = LONG[self.trainer.stage]
        self.tell(f"on_{stage}_batch_start", batch, *place)
        step = overridden(self.module, name)
        return self.module(batch) if step is None else call(step, batch, *place)

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        """Return what `validation_step` does, none of it a loss of the run."""
        return (Held(self._evaluation_step("validation_step", batch)),)

    def test_step(self, global_step: int, batch: Any, device: Any) -> Any:
        """Return what `test_step` does, none of it a loss of the run."""
        return (Held(self._evaluation_step("test_step", batch)),)

    def predict_step(self, global_step: int, batch: Any, device: Any) -> Any:
        """Return what `predict_step` does, or `forward` where there is none."""
        return self._evaluation_step("predict_step", batch)

    # Data -----------------------------------------------------------------------------

    def ask_for_loaders(self, stage: Stage) -> Any:
        """Return what the data module, else the module, has for a stage; asked once."""
        if stage not in self.loaders:
            step = {Stage.VAL: "validation_step", Stage.TEST: "test_step"}.get(stage)
            wanted = step is None or overridden(self.module, step)
            self.loaders[stage] = self._asked(f"{'val' if stage is Stage.VAL else LONG[stage]}_dataloader", wanted)
        return self.loaders[stage]

    def _asked(self, name: str, wanted: Any) -> Any:
        for source in (self.view.datamodule, self.module) if wanted else ():
            ask: Any = None if source is None else overridden(source, name)
            if ask is None:
                continue
            if not callable(ask):
                raise TypeError(f"{type(source).__name__}.{name} must be a method that gives loaders")
            return ask()
        return None

    def get_train_dataloader(self, sampler: type, batch_size: int) -> Any:
        """Return the user's loader, or one for several."""
        loader, shuffle = self.ask_for_loaders(Stage.TRAIN), getattr(sampler, "shuffle", True)
        if shuffle not in self._joined:
            self._joined[shuffle] = joined(loader, self.trainer.shares, shuffle)
        return self._joined[shuffle]

    def _evaluation_loaders(self, stage: Stage) -> Any:
        asked = self.ask_for_loaders(stage)
        if asked is None:
            return None
        loaders = in_turn(asked, stage is Stage.PREDICT)
        if len(loaders) == 1:
            return {"default": loaders[0]}
        return {f"dataloader_idx_{number}": loader for number, loader in enumerate(loaders)}

    def get_val_dataloaders(self, sampler: type, batch_size: int) -> Any:
        """Return the user's loaders."""
        return self._evaluation_loaders(Stage.VAL)

    def get_test_dataloaders(self, sampler: type, batch_size: int) -> Any:
        """Return the user's loaders."""
        return self._evaluation_loaders(Stage.TEST)

    def get_predict_dataloaders(self, sampler: type, batch_size: int) -> Any:
        """Return the user's loaders."""
        return self._evaluation_loaders(Stage.PREDICT)

    # Optimizers -----------------------------------------------------------------------

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int | None, epochs: int) -> Any:
        """Return what `configure_optimizers` answers, with one that does nothing where it answers None."""
        name = type(self.module).__name__
        optimizers, self.configs = read_optimizers(self.module.configure_optimizers())
        if not optimizers:
            log.warning("%s.configure_optimizers() returned none: no weight will move but by its own hand", name)
            optimizers = [Still(list(self.parameters()), {})]
        if len(optimizers) > 1 and not self.manual:
            raise ValueError(
                f"{name}.configure_optimizers() returned {len(optimizers)} optimizers, and nobody knows which of them "
                "steps when: set self.automatic_optimization = False in __init__ and step them in training_step"
            )
        self._wrapped = [LightningOptimizer(one, self) for one in optimizers]
        # what a scheduler looks at need not be of an evaluation: `Schedules` gives it the value, not the run
        told = [
            (one.scheduler, "epoch", None) if one.reduce_on_plateau else (one.scheduler, one.interval)
            for one in self.configs
        ]
        return optimizers, told

    def wrapped(self) -> list[LightningOptimizer]:
        """Return the optimizers as `self.optimizers()` shows them."""
        return self._wrapped

    def backward(self, loss: torch.Tensor, *arguments: Any, **options: Any) -> None:
        """Compute gradients in manual optimisation."""
        core = self.trainer
        if not self.manual:
            raise RuntimeError("manual_backward needs self.automatic_optimization = False in __init__")
        if not arguments and not options:
            core.hook.run_backward(trainer=core, loss=loss)
        elif own := overridden(self.module, "backward"):
            self.tell("on_before_backward", loss)
            own(loss, *arguments, **options)
        elif core.plugins.performers("run_backward"):
            (other,) = core.plugins.performers("run_backward")
            raise ValueError(
                f"manual_backward(loss, {', '.join(options) or '…'}): the plugin {other} does backward in a way of its "
                "own, and takes the loss alone"
            )
        else:
            self.tell("on_before_backward", loss)
            loss.backward(*arguments, **options)  # type: ignore[no-untyped-call]
        core.hook.on_end_backward(trainer=core, global_step=core.global_step, loss_tensor=loss)

    def toggle(self, optimizer: Any) -> None:
        """Have only the parameters of one optimizer require gradients."""
        if self._toggled is not None:
            raise RuntimeError("toggle_optimizer is called twice; call untoggle_optimizer between")
        groups = [group for one in self.trainer.optimizers for group in one.param_groups]
        self._toggled = {one: one.requires_grad for group in groups for one in group["params"]}
        own = {one for group in optimizer.param_groups for one in group["params"]}
        for parameter in self._toggled:
            if parameter not in own:
                parameter.requires_grad_(False)

    def untoggle(self) -> None:
        """Have parameters require gradients as they did."""
        for parameter, required in (self._toggled or {}).items():
            parameter.requires_grad_(required)
        self._toggled = None

    # Telling and logging --------------------------------------------------------------

    def tell(self, event: str, *arguments: Any) -> None:
        """Call an event's listeners: callbacks, then the module."""
        for listener in self.listeners.get(event, ()):
            listener(*arguments)

    def tell_between(self, event: str, *arguments: Any) -> None:
        """Tell an event of a beginning or an end: what is logged in it is of the epoch, and known at once."""
        self.values.between = True
        try:
            self.tell(event, *arguments)
        finally:
            self.values.between = False

    def tell_known(self, event: str) -> None:
        """Tell an event that comes when the metrics of an evaluation are known: nothing can be logged in it."""
        self.values.known = event
        try:
            self.tell(event)
        finally:
            self.values.known = ""
