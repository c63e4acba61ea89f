"""What a module may do in the run's place: transfers, backward, steps of optimizers and of schedulers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

import hookline
from hookline import CallbackInterface, Stage, hookimpl, hookspecs
from hookline_lightning.run.bridge import Bridge, call, overridden
from hookline_lightning.run.configure import SchedulerConfig
from hookline_lightning.run.optimizer import LightningOptimizer

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
        if self.bridge.now.within_closure:  # which is given the batch as it is
            return batch
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


class Stepping(LightningOptimizer):
    """The optimizer that `optimizer_step` is given: a step goes through all gates, behind its closure."""

    def step(self, closure: Any = None, **options: Any) -> Any:
        """Step; return what the closure answers."""
        if options:
            raise TypeError(f"step() takes a closure alone, not {', '.join(options)}")
        core = self._bridge.trainer
        if closure is not None and needs_closure(self.optimizer):
            core.step([self.optimizer], closure)
            return None
        answer = None if closure is None else closure()
        core.step([self.optimizer])
        return answer


class Closes(CallbackInterface):
    """Gives the optimizer, or the module's `optimizer_step`, a closure that does forward and backward of a batch.

    It may be called several times; each is a forward and a backward of its own. Schedulers move once, behind all.
    """

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self.own = overridden(bridge.module, "optimizer_step")

    @hookimpl
    def on_begin_train(self, trainer: hookline.Trainer) -> None:
        rows = {row["hook"]: row for row in trainer.plugins.plan()}
        for hook in ("prepare_batch", "run_window"):
            doing = [*rows[hook]["wrapped_by"], *rows[hook]["done_by"]]
            others = [name for name in doing if name not in ("core", "lightning.transfer")]
            if others:
                raise ValueError(
                    f"optimizer_step of a module, or LBFGS, and the plugin {others[0]}, which does {hook}: a closure "
                    "would do without it; leave one of them out, or set self.automatic_optimization = False"
                )

    @hookimpl
    def update(self, trainer: hookline.Trainer, window: Sequence[Any]) -> list[Any]:
        bridge, hook, size = self.bridge, trainer.hook, len(window)
        outputs: list[Any] = []
        for index, batch in enumerate(window[:-1]):
            trainer.window.begin_micro_batch(index)
            outputs.append(hook.forward_backward(trainer=trainer, batch=batch, index=index, size=size))
        trainer.window.begin_micro_batch(size - 1)
        batch = hook.prepare_batch(trainer=trainer, batch=window[-1], stage=Stage.TRAIN)
        bridge.begin_batch(batch, size - 1)
        calls: list[Any] = []

        def closure() -> torch.Tensor:
            if calls and size > 1:
                raise ValueError(
                    f"optimizer_step or LBFGS calls its closure again in a window of {size} micro-batches, whose "
                    "gradients would count twice; leave accumulate_grad_batches at 1"
                )
            bridge.now.cleared_for = None if size == 1 else bridge.now.cleared_for  # each call begins with no gradients
            calls.append(hook.forward_backward(trainer=trainer, batch=batch, index=size - 1, size=size))
            if bridge.now.skipped:
                trainer.zero_grad()  # optimizers leave weights alone that have no gradient
            loss: torch.Tensor = calls[-1][0]
            return loss.detach()

        bridge.now.within_closure = closure
        try:
            if self.own is not None:
                self.own(trainer.epoch, bridge.now.place, Stepping(trainer.optimizers[0], bridge), closure)
            elif not trainer.step(None, closure) and not calls:  # a gate has refused the step
                closure()
        finally:
            bridge.now.within_closure = None
        if not calls:
            raise ValueError(
                "optimizer_step has not called its closure, which does forward and backward: write "
                "optimizer.step(closure=optimizer_closure), or call optimizer_closure()"
            )
        hook.step_schedulers(trainer=trainer, when="step", optimizers=trainer.optimizers, metrics=trainer.metrics)
        return [*outputs, calls[-1]]


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether `step` of an optimizer cannot do without a closure, as that of LBFGS."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


class Schedules(CallbackInterface):
    """Moves schedulers that move every so many steps or epochs, or by a value, or as the module says."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self.own = overridden(bridge.module, "lr_scheduler_step")
        self._waiting: list[SchedulerConfig] = []
        self._moved = -1  # the epoch at whose end schedulers have moved
        bridge.look = self._look_again

    @hookimpl
    def step_schedulers(self, trainer: hookline.Trainer, when: str) -> bool:
        if self.bridge.manual or when == "validation" or self.bridge.now.within_closure is not None:
            return True  # those of a step within a closure move behind it
        if when == "epoch":
            self._move_epoch(trainer)
            return True
        due = [one for one in self.bridge.configs if one.interval == "step" and self._due(one, self.bridge.now.place)]
        self._waiting = [
            one for one in due if one.reduce_on_plateau
        ]  # a validation of this step comes before they look
        self.bridge.now.ahead = 1  # the step is done, and not counted yet
        try:
            for config in due:
                if not config.reduce_on_plateau:
                    self._move(config)
            if self.bridge.now.place + 1 == trainer.totals.batches_per_epoch:  # before the validation of the epoch
                self._move_epoch(trainer)
        finally:
            self.bridge.now.ahead = 0
        return True

    @hookimpl
    def on_end_optimizer_step(self, trainer: hookline.Trainer, stepped: bool) -> None:
        """Move schedulers also for a batch that `training_step` has skipped, as in Lightning."""
        if self.bridge.now.skipped and not stepped and not self.bridge.now.beside:
            self.step_schedulers(trainer, "step")

    def _move_epoch(self, trainer: hookline.Trainer) -> None:
        if self._moved == trainer.epoch:
            return
        self._moved = trainer.epoch
        for config in self.bridge.configs:
            if config.interval == "epoch" and not config.reduce_on_plateau and self._due(config, trainer.epoch):
                self._move(config)

    @hookimpl
    def on_end_train_epoch(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        if not self.bridge.manual:
            configs = [one for one in self.bridge.configs if one.interval == "epoch" and one.reduce_on_plateau]
            self._look(trainer, [one for one in configs if self._due(one, trainer.epoch)])

    @hookimpl
    def on_boundary(self, trainer: hookline.Trainer) -> None:
        self._look_again()

    def _look_again(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._look(self.bridge.trainer, waiting)

    @staticmethod
    def _due(config: SchedulerConfig, done: int) -> bool:
        """Tell whether it is due after an epoch, or after a batch of an epoch, of this index."""
        return (done + 1) % config.frequency == 0

    def _look(self, trainer: hookline.Trainer, configs: Sequence[SchedulerConfig]) -> None:
        values = self.bridge.view.values
        for config in configs:
            if config.monitor in values:  # where each rank has its own, their mean, or rates would be different
                ranks = trainer.hook.all_gather(trainer=trainer, value=values[config.monitor].item())
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
