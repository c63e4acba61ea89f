"""A trainer of LERNOMATIC as a module of the core."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch

import hookline
from hookline import CallbackInterface, ModuleInterface, Stage, hookimpl
from hookline_lernomatic.following import Following
from hookline_lernomatic.model.common import LernomaticModel, networks, networks_of, put_networks
from hookline_lernomatic.own import Drawn, OneOptimizer, OwnEpoch, OwnValidation
from hookline_lernomatic.train.trainer import Trainer


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
        self.facade, self.models = facade, models
        self.nets: Any = torch.nn.ModuleDict({name: _module(name, model) for name, model in models.items()})
        if not facade.optimizers():
            raise ValueError(
                f"{type(facade).__name__} has no optimizer: have _init_optimizer set some torch.optim.Optimizer as "
                "attributes"
            )
        self._check_parameters()
        self._networks, self._optimizers = networks_of(models), facade.optimizers()

    def _check_parameters(self) -> None:
        """Require that what the optimizers step is in the module, which is what is moved, saved and exported."""
        here = {id(parameter) for parameter in self.parameters()}
        for name, optimizer in self.facade.optimizers().items():
            count = sum(id(one) not in here for group in optimizer.param_groups for one in group["params"])
            if count:
                raise ValueError(
                    f"{count} parameters of {type(self.facade).__name__}.{name} are in no torch.nn.Module that is an "
                    f"attribute of {' or '.join(self.models)}, or in a list or dictionary there: keep them in one"
                )

    def give_back(self) -> None:
        """Give the models their networks, in whose place plugins may have put others."""
        for name, model in self.models.items():
            parts, kept = networks(model), self.nets[name]
            put_networks(model, dict.fromkeys(parts, kept) if len(parts) == 1 else dict(kept.items()))
        self._networks, self._optimizers = networks_of(self.models), self.facade.optimizers()

    def serves(self, facade: Any) -> bool:
        """Tell whether models, networks and optimizers of a trainer are still those that this was made of."""
        return networks_of(facade.models()) == self._networks and facade.optimizers() == self._optimizers

    def require_same(self) -> None:
        """Require that no epoch has put others in their place, which would not be trained.

        Raises:
            RuntimeError: one has.
        """
        if not self.serves(self.facade):
            raise RuntimeError(
                f"{type(self.facade).__name__} has got other models or optimizers within a training, which goes on "
                "with those it began with: change what they are (set_learning_rate, param_groups, load_state_dict), or "
                "do it between two trainings: set_num_epochs(more) and train() once more"
            )

    def train_step(self, global_step: int, batch: Any, device: Any) -> torch.Tensor:
        """Return the loss of a batch."""
        facade = self.facade
        if self.trainer.idle:
            return facade.batch_loss(batch)[0]  # type: ignore[no-any-return]
        if facade.lr_scheduler is not None:
            facade.apply_lr_schedule()
        if facade.mtm_scheduler is not None:
            facade.apply_mtm_schedule()
        loss: torch.Tensor = facade.batch_loss(batch)[0]
        if facade.loss_iter >= len(facade.loss_history):
            facade.make_room("loss_history", 1)
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
        loader = self.facade.train_loader
        return loader.loader if isinstance(loader, Drawn) else loader

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


def _module(name: str, model: LernomaticModel) -> torch.nn.Module:
    """Return the networks of a model as one module: the network itself where there is one."""
    parts = networks(model)
    if not parts:
        raise ValueError(f"{type(model).__name__}, the `{name}` of a trainer, has no network: set `net` in __init__")
    return next(iter(parts.values())) if len(parts) == 1 else torch.nn.ModuleDict(parts)


@dataclass(eq=False)
class Lernomatic(CallbackInterface):
    """Train what a trainer of LERNOMATIC trains: its models, its data, its optimizers and its schedules."""

    def __post_init__(self) -> None:
        self._facade: Any = None
        self._trainer: Any = None

    @hookimpl(wrapper=True)
    def adapt_module(self, trainer: hookline.Trainer, module: Any) -> Generator[None, Any, Any]:
        adapted = yield
        if not isinstance(adapted, Trainer):
            return adapted
        self._facade = adapted
        return Bridge(adapted)

    @hookimpl
    def on_setup(self, trainer: hookline.Trainer) -> None:
        self._trainer, facade = trainer, self._facade
        if facade is None:
            return
        if facade.train_loader is not None:
            parts = trainer.shares * trainer.hook.get_window_size(trainer=trainer)
            trainer.options.train_batch_size = (getattr(facade.train_loader, "batch_size", None) or 1) * parts
        if facade._owns("train_epoch"):
            trainer.plugins.register(OwnEpoch(facade), "lernomatic.train_epoch")
        if facade._owns("val_epoch"):
            trainer.plugins.register(OwnValidation(facade), "lernomatic.val_epoch")
        if len(facade.optimizers()) > 1 and "optimizer" in facade.optimizers():
            trainer.plugins.register(OneOptimizer(facade), "lernomatic.step_optimizer")
        trainer.plugins.register(Following(facade), "lernomatic.following")

    def get_state(self) -> dict[str, Any]:
        """Return the history, what the schedules have seen, and where the training had begun."""
        facade = self._facade
        if facade is None:
            return {}
        schedules = [state_of(schedule) for schedule in (facade.lr_scheduler, facade.mtm_scheduler)]
        return {"history": facade.get_history(), "schedules": schedules, "ahead": facade._ahead}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        facade = self._facade
        if self._trainer.stage is Stage.TRAIN and state["ahead"] != facade._ahead:
            raise ValueError(
                f"the run that goes on had start_epoch={state['ahead']}, and now it is {facade._ahead}: set "
                "start_epoch as it was before train()"
            )
        facade.set_history(state["history"])
        for schedule, kept in zip((facade.lr_scheduler, facade.mtm_scheduler), state["schedules"], strict=True):
            if kept is not None and hasattr(schedule, "update_state"):
                schedule.update_state(kept)


def state_of(schedule: Any) -> dict[str, Any] | None:
    """Return what a schedule keeps; None where it keeps nothing."""
    return schedule.get_state() if hasattr(schedule, "get_state") else None
