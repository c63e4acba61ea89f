"""A trainer of LERNOMATIC as a module of the core."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import hookline
from hookline import CallbackInterface, ModuleInterface, Stage, hookimpl, hookspecs
from hookline_lernomatic.train.trainer import Trainer


class _Stop(BaseException):
    """Leaves a `train_epoch` of the user's between two steps; no `except Exception` of his takes it."""


class Bridge(ModuleInterface):
    """The models of a trainer, with its data and its optimizers.

    Args:
        facade: the trainer, whose attributes are read when they are needed.
    """

    def __init__(self, facade: Any) -> None:
        super().__init__()
        models = facade.models()
        if not models:
            raise ValueError(
                f"{type(facade).__name__} has no LernomaticModel: give it one, load_checkpoint(file), or set those of "
                "a subclass before super().__init__()"
            )
        self.facade = facade
        self.nets: Any = torch.nn.ModuleDict({name: model.net for name, model in models.items()})

    def train_step(self, global_step: int, batch: Any, device: Any) -> torch.Tensor:
        """Return the loss of a batch."""
        facade = self.facade
        loss: torch.Tensor = facade.batch_loss(batch)[0]
        if facade.loss_iter < len(facade.loss_history):
            facade.loss_history[facade.loss_iter] = loss.detach()
        facade.loss_iter += 1
        return loss

    def val_step(self, global_step: int, batch: Any, device: Any) -> torch.Tensor:
        """Return the loss of a batch, and log its accuracy where the targets are classes."""
        loss, output, target = self.facade.batch_loss(batch)
        if output.ndim == 2 and target.ndim == 1 and not target.is_floating_point():
            accuracy = (output.argmax(dim=1) == target).float().mean()
            self.log(**{f"{self.trainer.stage.value}_acc": accuracy})
        return loss  # type: ignore[no-any-return]

    test_step = val_step

    def get_train_dataloader(self, sampler: type, batch_size: int) -> Any:
        """Return the trainer's loader."""
        return self.facade.train_loader

    def get_val_dataloaders(self, sampler: type, batch_size: int) -> Any:
        """Return the trainer's loader."""
        return self.facade.val_loader

    def get_test_dataloaders(self, sampler: type, batch_size: int) -> Any:
        """Return the trainer's loader."""
        return self.facade.test_loader

    def get_optimizers_schedulers(
        self, estimated_global_steps_per_epoch: int | None, epochs: int
    ) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """Return the trainer's optimizers; its schedules are no schedulers of torch."""
        return list(self.facade.optimizers().values()), []


class _Drawn:
    """A loader that gives the batches of this epoch that are left, and knows how large they were."""

    def __init__(self, loader: Any, batches: Iterator[Any], trainer: hookline.Trainer, stage: Stage) -> None:
        self._loader, self._batches = loader, batches
        self._count = functools.partial(trainer.hook.count_samples, trainer=trainer, stage=stage)
        self.samples: list[int] = []
        """Of each batch that was drawn."""

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            self.samples.append(self._count(batch=batch))
            yield batch

    def mean(self, losses: torch.Tensor) -> tuple[Any, int]:
        """Return the mean of a history over samples, and how many; over its entries where these are not the batches."""
        counts = self.samples[: len(losses)]  # a stop may come behind a step whose loss is not kept yet
        if not len(counts) == len(losses) >= len(self.samples) - 1:
            return losses.mean(), sum(self.samples)
        samples = torch.tensor(counts, dtype=losses.dtype, device=losses.device)
        return (losses * samples).sum() / samples.sum(), sum(counts)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class OwnEpoch(CallbackInterface):
    """Has a `train_epoch` of the user's train; each step of the first optimizer is one of the run."""

    def __init__(self, facade: Any, plugin: Lernomatic) -> None:
        self.facade, self.plugin = facade, plugin

    @hookimpl
    def train_epoch(self, trainer: hookline.Trainer, batches: Iterator[Any]) -> bool:
        facade, counters = self.facade, trainer.counters
        loader, before = facade.train_loader, facade.loss_iter
        facade.train_loader = drawn = _Drawn(loader, batches, trainer, Stage.TRAIN)

        def step(*_: Any) -> None:
            counters.global_step += 1
            counters.batches += 1
            counters.samples += drawn.samples[-1] * trainer.shares
            trainer.position += 1
            self.plugin.schedule(trainer)
            if not trainer.settle(counted=True):
                raise _Stop

        handle = next(iter(facade.optimizers().values())).register_step_post_hook(step)
        try:
            facade.train_epoch()
        except _Stop:
            return False
        finally:
            handle.remove()
            facade.train_loader = loader
            if facade.loss_iter > before:
                mean, samples = drawn.mean(facade.loss_history[before : facade.loss_iter])
                name = f"{trainer.options.train_loss_metric_name}_epoch"
                trainer.log(over="epoch", weighted_by=samples, **{name: mean})
        return True


class OwnValidation(CallbackInterface):
    """Has a `val_epoch` of the user's validate."""

    def __init__(self, facade: Any) -> None:
        self.facade = facade

    @hookimpl
    def evaluate(
        self, trainer: hookline.Trainer, stage: Stage, loaders: Mapping[str, Any], limit: int | None
    ) -> dict[str, float]:
        if stage is not Stage.VAL:
            return hookspecs.evaluate(trainer, stage, loaders, limit)
        facade = self.facade
        loader, losses, accuracies = facade.val_loader, facade.val_loss_iter, facade.acc_iter
        facade.val_loader = drawn = _Drawn(loader, itertools.islice(loaders["default"], limit), trainer, stage)
        try:
            with trainer.evaluation.under_way(stage):
                facade.val_epoch()
                if facade.val_loss_iter > losses:
                    mean, samples = drawn.mean(facade.val_loss_history[losses : facade.val_loss_iter])
                    trainer.log(weighted_by=samples, **{trainer.options.val_loss_metric_name: mean})
                if facade.acc_iter > accuracies:
                    accuracy = facade.acc_history[facade.acc_iter - 1]
                    trainer.log(weighted_by=sum(drawn.samples), val_acc=accuracy)
                return trainer.logs.collect()
        finally:
            facade.val_loader = loader


@dataclass(eq=False)
class Lernomatic(CallbackInterface):
    """Train what a trainer of LERNOMATIC trains: its models, its data, its optimizers and its schedules."""

    def __post_init__(self) -> None:
        self._facade: Any = None

    @hookimpl(wrapper=True)
    def adapt_module(self, trainer: hookline.Trainer, module: Any) -> Generator[None, Any, Any]:
        adapted = yield
        if not isinstance(adapted, Trainer):
            return adapted
        self._facade = adapted
        return Bridge(adapted)

    @hookimpl
    def on_setup(self, trainer: hookline.Trainer) -> None:
        facade = self._facade
        if facade is None:
            return
        if facade.train_loader is not None:
            parts = trainer.shares * trainer.hook.get_window_size(trainer=trainer)
            trainer.options.train_batch_size = (facade.train_loader.batch_size or 1) * parts
        if type(facade).train_epoch is not Trainer.train_epoch:
            trainer.plugins.register(OwnEpoch(facade, self), "lernomatic.train_epoch")
        if type(facade).val_epoch is not Trainer.val_epoch:
            trainer.plugins.register(OwnValidation(facade), "lernomatic.val_epoch")
        trainer.plugins.register(Following(facade, self), "lernomatic.following")

    def schedule(self, trainer: hookline.Trainer) -> None:
        """Set the learning rate and the momentum of the next step."""
        facade = self._facade
        for schedule, names in ((facade.lr_scheduler, ("lr",)), (facade.mtm_scheduler, ("momentum", "betas"))):
            if schedule is None:
                continue
            at = {"iter": trainer.global_step, "epoch": trainer.epoch, "acc": facade.get_cur_acc() or 0.0}[schedule.by]
            value = schedule.get_lr(at)
            for optimizer in facade.optimizers().values():
                for group in optimizer.param_groups:
                    for name in names:
                        if name in group:  # the first of Adam's betas is its momentum
                            group[name] = (value, *group[name][1:]) if name == "betas" else value

    def get_state(self) -> dict[str, Any]:
        """Return the history, and what the schedules have seen."""
        if self._facade is None:
            return {}
        schedules = [schedule and schedule.get_state() for schedule in self._schedules()]
        return {"history": self._facade.get_history(), "schedules": schedules}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._facade.set_history(state["history"])
        for schedule, kept in zip(self._schedules(), state["schedules"], strict=True):
            if schedule is not None and kept is not None:
                schedule.update_state(kept)

    def _schedules(self) -> tuple[Any, Any]:
        return self._facade.lr_scheduler, self._facade.mtm_scheduler


class Following(CallbackInterface):
    """Keeps a trainer's attributes and files in step with the run."""

    def __init__(self, facade: Any, plugin: Lernomatic) -> None:
        self.facade, self.plugin = facade, plugin

    @hookimpl
    def on_begin_train(self, trainer: hookline.Trainer) -> None:
        facade, module = self.facade, trainer.module
        assert isinstance(module, Bridge)
        for name, net in module.nets.items():  # plugins may have put others in their place
            getattr(facade, name).net = net
        facade.start_epoch = facade.cur_epoch = trainer.epoch
        self.plugin.schedule(trainer)
        Path(facade.checkpoint_dir).mkdir(parents=True, exist_ok=True)

    @hookimpl
    def on_begin_run(self, trainer: hookline.Trainer, stage: Stage) -> None:
        if stage is Stage.TRAIN:
            self._set_train(trainer)

    @hookimpl
    def on_begin_train_epoch(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        self.facade.cur_epoch = trainer.epoch
        self._set_train(trainer)

    def _set_train(self, trainer: hookline.Trainer) -> None:
        """Do what the original does at the beginning of its `train_epoch`; one of the user's does it itself."""
        if trainer.plugins.get_plugin("lernomatic.train_epoch") is None:
            for model in self.facade.models().values():
                model.set_train()

    @hookimpl
    def on_end_train_step(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        self.plugin.schedule(trainer)

    @hookimpl
    def on_end_val_step(self, trainer: hookline.Trainer, outputs: Any) -> None:
        facade = self.facade
        if not trainer.sanity_checking and facade.val_loss_iter < len(facade.val_loss_history):
            facade.val_loss_history[facade.val_loss_iter] = outputs[0]
            facade.val_loss_iter += 1

    @hookimpl
    def on_end_validation(self, trainer: hookline.Trainer, metrics: Mapping[str, float]) -> None:
        self.judge(trainer, metrics)

    def judge(self, trainer: hookline.Trainer, metrics: Mapping[str, float]) -> None:
        """Take the accuracy of a validation into the history; keep the best model, and stop where it is time."""
        facade = self.facade
        if (accuracy := metrics.get("val_acc")) is None:
            return
        if trainer.plugins.get_plugin("lernomatic.val_epoch") is None and facade.acc_iter < len(facade.acc_history):
            facade.acc_history[facade.acc_iter] = accuracy
            facade.acc_iter += 1
        for schedule in (facade.lr_scheduler, facade.mtm_scheduler):
            if hasattr(schedule, "see_acc"):
                schedule.see_acc(accuracy)
        if accuracy > facade.best_acc:
            facade.best_acc = accuracy
            if facade.save_best and trainer.rank == 0:
                facade.save_checkpoint(self._file(f"best_{facade.checkpoint_name}"))
        history = facade.get_acc_history()
        if 0 < facade.stop_when_acc <= accuracy:
            trainer.stop(f"the accuracy is {accuracy:.4g} (stop_when_acc={facade.stop_when_acc})", alone=False)
        elif facade.early_stop is not None and len(history) > (waited := int(facade.early_stop["num_epochs"])):
            if history[-waited:].max() < history[:-waited].max() + facade.early_stop["improv"]:
                trainer.stop(f"{waited} epochs without a better accuracy (early_stop)", alone=False)

    @hookimpl
    def on_boundary(self, trainer: hookline.Trainer) -> None:
        facade = self.facade
        facade.cur_epoch = trainer.epoch
        if trainer.rank:
            return
        if facade.save_every and trainer.due("epoch" if facade.save_every < 0 else f"{facade.save_every} steps"):
            name = f"{facade.checkpoint_name}_epoch_{trainer.epoch}_iter_{trainer.global_step}"
            facade.save_checkpoint(self._file(name))
        if facade.save_hist and trainer.due("epoch"):
            facade.save_history(self._file(f"{facade.checkpoint_name}_history"))

    def _file(self, name: str) -> Path:
        return Path(self.facade.checkpoint_dir) / f"{name}.pkl"
