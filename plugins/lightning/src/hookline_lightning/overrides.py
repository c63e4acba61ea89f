"""What a module may do in the run's place: transfers, backward, steps of optimizers and of schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import hookline
from hookline import CallbackInterface, Stage, hookimpl, hookspecs
from hookline_lightning.bridge import Bridge, call, overridden
from hookline_lightning.configure import SchedulerConfig

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
