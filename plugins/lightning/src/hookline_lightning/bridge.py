"""A module of today's Lightning as a module of the core."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

import hookline
from hookline import ModuleInterface, Stage
from hookline_lightning.calls import call as call
from hookline_lightning.calls import overridden as overridden
from hookline_lightning.configure import SchedulerConfig, read_optimizers
from hookline_lightning.loaders import in_turn, joined
from hookline_lightning.members import member
from hookline_lightning.module import DOORS, Doors, LightningModule
from hookline_lightning.view import View

log = logging.getLogger("hookline.lightning")

WORDS = {Stage.TRAIN: "fit", Stage.VAL: "validate", Stage.TEST: "test", Stage.PREDICT: "predict"}
LONG = {Stage.TRAIN: "train", Stage.VAL: "validation", Stage.TEST: "test", Stage.PREDICT: "predict"}
INSTEAD = "loss of the module"  # under which a value waits that is told in the place of the run's own mean loss
OWN_WORDS = ("over", "reduce", "sync", "prog", "weighted_by")  # keywords of Trainer.log


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
        self.index = 0  # of the batch under way: in training within its window
        self.batch_idx = self.loader_idx = 0
        self.skipped = False
        self.between = False  # whether a hook of a beginning or an end is called, where self.log is of the epoch
        self.known = ""  # the event under way that comes when the metrics of an evaluation are known
        self.lossless = False  # whether a manual optimisation tells no loss
        self.forked: set[str] = set()  # names of an epoch, of what is logged of steps and of the epoch
        self.hidden: set[str] = set()
        self.epoch_metrics: dict[str, Any] = {}  # objects of torchmetrics that were logged
        self.window: list[tuple[Any, Any, int, float]] = []  # of the step: outputs, batches, indices, samples
        self.samples: float | None = None  # of the batch that is told to be over, by which means are weighted
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
        """Whether the module steps its optimizers itself."""
        return not member(self.module, "automatic_optimization", True)

    def __getstate__(self) -> dict[str, Any]:
        kept = super().__getstate__()
        return {
            **kept,
            "loaders": {},
            "_joined": {},
            "listeners": {},
            "files": None,
            "at_least": None,
            "window": [],
            "_wrapped": [],
            "configs": [],
        }

    # Steps ----------------------------------------------------------------------------

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        """Return the loss of a batch."""
        index = self.trainer.position + self.index
        for listener in self.listeners.get("on_train_batch_start", ()):
            if listener(batch, index) == -1:
                raise ValueError(
                    "on_train_batch_start returned -1, which ends an epoch early: this is not here; limit the epoch "
                    "(limit_train_batches), or ask for the end by self.trainer.should_stop = True"
                )
        returned = call(self.module.training_step, batch, index)
        if "on_train_batch_end" in self.listeners:
            self.window.append((without_graph(returned), batch, index, self.trainer.logs.weight))
        loss = returned.get("loss") if isinstance(returned, Mapping) else returned
        if self.manual:
            return () if loss is None else loss
        if loss is None:
            if isinstance(returned, Mapping):
                raise ValueError(f"training_step returned a mapping without 'loss'; it has {', '.join(returned)}")
            if self.trainer.shares > 1:
                raise ValueError(
                    "training_step returned None, which skips a batch; with several processes one would skip and "
                    "others not: return a loss of zero that depends on the parameters"
                )
            self.skipped = self.index == 0 or self.skipped
            return zero_loss(self.module.parameters())
        self.skipped = False
        return loss

    def _evaluation_step(self, name: str, batch: Any) -> Any:
        index, loader = self.batch_idx, self.loader_idx
        self.batch_idx += 1
        stage = LONG[self.trainer.stage]
        self.tell(f"on_{stage}_batch_start", batch, index, loader)
        step = overridden(self.module, name)
        return self.module(batch) if step is None else call(step, batch, index, loader)

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
            optimizers = [torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)]
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
        """Tell an event of a beginning or an end: what is logged in it is of the epoch."""
        self.between = True
        try:
            self.tell(event, *arguments)
        finally:
            self.between = False

    def tell_known(self, event: str) -> None:
        """Tell an event that comes when the metrics of an evaluation are known: nothing can be logged in it."""
        self.known = event
        try:
            self.tell(event)
        finally:
            self.known = ""

    def take(
        self, name: str, value: Any, *, prog_bar: bool, logger: bool | None, on_step: bool | None,
        on_epoch: bool | None, reduce_fx: Any, sync: bool, with_key: bool, first_rank: bool, batch_size: int | None,
    ) -> None:  # fmt: skip
        """Log a value as `self.log` means it."""
        core = self.trainer
        if self.known:
            raise ValueError(
                f"self.log({name!r}) in {self.known}: the metrics of this evaluation are known by then, so the value "
                f"would belong to none; log it in {self.known.removesuffix('end')}epoch_end"
            )
        if first_rank and core.rank:
            return
        reduce = getattr(reduce_fx, "__name__", reduce_fx)
        if reduce not in ("mean", "sum", "min", "max"):
            raise ValueError(f"self.log({name!r}, reduce_fx={reduce_fx!r}): must be mean, sum, min or max")
        if name in OWN_WORDS:
            raise ValueError(f"self.log({name!r}): this name is a word of the run's own; take another")
        training = core.stage is Stage.TRAIN
        on_step = (training and not self.between) if on_step is None else on_step
        on_epoch = not (training and not self.between) if on_epoch is None else on_epoch
        names = (f"{name}_step", f"{name}_epoch") if on_step and on_epoch else (name, name)
        if names[0] != names[1]:
            self.forked.add(names[1])
        if logger is False and not prog_bar:
            self.hidden.update(names)
        weight = self.samples if batch_size is None else batch_size
        options: dict[str, Any] = {"prog": prog_bar, "sync": sync, "weighted_by": weight}
        if not training:
            if on_step or on_epoch:
                with core.logs.suffixed("") if not with_key else nullcontext():
                    self._take_over_epoch(names[bool(on_epoch)], value, reduce, options)
            return
        if on_step:
            # the value of this batch, which Lightning logs, is nowhere else once `forward` has returned
            shown = getattr(value, "_forward_cache", None) if is_metric(value) else value
            if shown is not None:
                core.log(**options, **{names[0]: shown})
        if on_epoch:
            of_run = names[1] == f"{core.options.train_loss_metric_name}_epoch"  # which the run logs itself
            self._take_over_epoch(INSTEAD if of_run else names[1], value, reduce, options)

    def _take_over_epoch(self, name: str, value: Any, reduce: str, options: dict[str, Any]) -> None:
        if is_metric(value):
            self.epoch_metrics[name + self.trainer.logs.suffix] = (name, value, options)
        else:
            over = "epoch" if self.trainer.stage is Stage.TRAIN else "interval"
            self.trainer.log(over=over, reduce=reduce, **options, **{name: value})

    def log_epoch_metrics(self) -> None:
        """Log the objects of torchmetrics that were logged, and reset them."""
        metrics, self.epoch_metrics = self.epoch_metrics, {}
        over = "epoch" if self.trainer.stage is Stage.TRAIN else "interval"
        for full_name, (name, metric, options) in metrics.items():
            with nullcontext() if full_name != name else self.trainer.logs.suffixed(""):
                self.trainer.log(over=over, **options, **{name: metric.compute()})
        for metric in {id(metric): metric for _, metric, _ in metrics.values()}.values():
            metric.reset()


def is_metric(value: Any) -> bool:
    """Tell whether a value is an object of torchmetrics."""
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(value, torchmetrics.Metric)


class LightningOptimizer:
    """An optimizer whose `step` goes through the gates of the run."""

    def __init__(self, optimizer: torch.optim.Optimizer, bridge: Bridge) -> None:
        self.optimizer = optimizer
        self._bridge = bridge
        self.stepped = False
        """Whether it has stepped since the batch began."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Of the optimizer, for `isinstance`."""
        return type(self.optimizer)

    def step(self, closure: Any = None, **options: Any) -> None:
        """Step, with the gradients averaged over ranks: gates, clipping and the scaler come with it.

        The gradients stay as they are; clear them by `zero_grad`.
        """
        if options:
            raise TypeError(f"step() takes a closure alone, not {', '.join(options)}")
        core = self._bridge.trainer
        if closure is not None:
            closure = self._averaging(closure)
        self._average()
        gradients = {
            one: one.grad
            for other in core.optimizers
            for group in other.param_groups
            for one in group["params"]
            if closure is None or other is not self.optimizer
        }
        core.step([self.optimizer], closure)  # it clears the gradients of all
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        self.stepped = True

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Generator[None, None, None]:
        """Have only the parameters of this optimizer require gradients within."""
        self._bridge.toggle(self.optimizer)
        try:
            yield
        finally:
            self._bridge.untoggle()

    def _averaging(self, closure: Any) -> Any:
        def run() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._average()
            return loss

        return run

    def _average(self) -> None:
        """Give each gradient its mean over ranks."""
        core = self._bridge.trainer
        if core.shares == 1:
            return
        groups = self.optimizer.param_groups
        found = [one.grad for group in groups for one in group["params"] if one.grad is not None]
        if not found:
            return
        whole = torch.cat([one.flatten() for one in found])
        whole = core.hook.all_reduce(trainer=core, value=whole, op="sum") / core.shares
        for gradient, part in zip(found, whole.split([one.numel() for one in found]), strict=True):
            gradient.copy_(part.view_as(gradient))
