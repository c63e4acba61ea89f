"""What users of today's Lightning derive from, without its package: a module, a data module, a callback."""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from hookline_lightning.view import View


class Doors:
    """What a module calls of the run that it is in; bound to modules of the real package, too."""

    _trainer: View | None

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log a value: a number, a tensor of one element, or a metric object of torchmetrics.

        Tensors stay on their device until the interval or the epoch ends.

        Args:
            name: of the value.
            value: what is logged.
            prog_bar: show it on progress displays.
            logger: False keeps it from trackers, unless `prog_bar` shows it.
            on_step: the mean of each interval of `log_every`; by default in `training_step`.
            on_epoch: over the epoch; by default everywhere else.
            reduce_fx: "mean", "sum", "min" or "max" of an epoch.
            enable_graph: has no meaning here, values are detached.
            sync_dist: over all ranks (an evaluation always is).
            sync_dist_group: has no meaning here.
            add_dataloader_idx: append the key of the loader where there are several.
            batch_size: how much the value weighs in a mean; unless given, the first dimension of the batch's first
                tensor, as in Lightning.
            metric_attribute: the name of an object of torchmetrics that is no attribute of the module.
            rank_zero_only: only rank 0 logs it.

        Raises:
            ValueError: a reduction or a name that cannot be.
        """
        connected(self).bridge.values.take(
            name, value, prog_bar=prog_bar, logger=logger, on_step=on_step, on_epoch=on_epoch, reduce_fx=reduce_fx,
            sync=sync_dist, with_key=add_dataloader_idx, first_rank=rank_zero_only, batch_size=batch_size,
            metric_attribute=metric_attribute,
        )  # fmt: skip

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **options: Any) -> None:
        """Log several values; see `log`."""
        for name, value in dictionary.items():
            self.log(name, value, *args, **options)

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """Return the optimizer, or a list of several; their `step` goes through the gates of the run."""
        view = connected(self)
        found = view.bridge.wrapped() if use_pl_optimizer else view.optimizers
        return found[0] if len(found) == 1 else found

    def lr_schedulers(self) -> Any:
        """Return the scheduler, a list of several, or None."""
        found = [config.scheduler for config in connected(self).lr_scheduler_configs]
        return found[0] if len(found) == 1 else found or None

    def manual_backward(self, loss: torch.Tensor, *args: Any, **options: Any) -> None:
        """Compute gradients in manual optimisation; what is said besides goes to `Tensor.backward`."""
        connected(self).bridge.backward(loss, *args, **options)

    def clip_gradients(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients of an optimizer, by "norm" or by "value"."""
        view = self._trainer
        if view is not None and gradient_clip_val is None:
            gradient_clip_val = view.gradient_clip_val
        if view is not None and gradient_clip_algorithm is None:
            gradient_clip_algorithm = view.gradient_clip_algorithm
        if gradient_clip_val is None:
            return
        if gradient_clip_algorithm not in (None, "norm", "value"):
            raise ValueError(f"gradient_clip_algorithm={gradient_clip_algorithm!r} must be norm or value")
        clip = clip_grad_value_ if gradient_clip_algorithm == "value" else clip_grad_norm_
        clip([parameter for group in optimizer.param_groups for parameter in group["params"]], gradient_clip_val)

    def toggle_optimizer(self, optimizer: Any) -> None:
        """Have only the parameters of this optimizer require gradients, until `untoggle_optimizer`."""
        connected(self).bridge.toggle(optimizer)

    def untoggle_optimizer(self, optimizer: Any) -> None:
        """Have parameters require gradients as before `toggle_optimizer`."""
        connected(self).bridge.untoggle()

    @contextmanager
    def toggled_optimizer(self, optimizer: Any) -> Generator[None, None, None]:
        """Toggle an optimizer within."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Return the tensors of all ranks, stacked; without gradients.

        Raises:
            ValueError: gradients are asked for.
        """
        if sync_grads:
            raise ValueError("all_gather(sync_grads=True): gradients do not go through the gather of a run")
        return connected(self).gather(data)

    def print(self, *args: Any, **options: Any) -> None:
        """Print on rank 0."""
        if connected(self).is_global_zero:
            builtins.print(*args, **options)


DOORS = [name for name in vars(Doors) if not name.startswith("_")]


def connected(module: Any) -> View:
    """Return the view that a module has of its run.

    Raises:
        RuntimeError: it is with none.
    """
    view = module._trainer
    if view is None or not view.is_connected:
        raise RuntimeError(
            f"{type(module).__name__} is with no trainer yet: `self.log`, `self.optimizers` and the like work once it "
            "has been given to hookline.Trainer or hookline_lightning.Trainer"
        )
    return view  # type: ignore[no-any-return]


class AttributeDict(dict[str, Any]):
    """Parameters, as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"hparams have no {name!r}; they have {', '.join(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


class HasHparams:
    """Keeps what its `__init__` was called with."""

    @property
    def hparams(self) -> AttributeDict:
        """What `save_hyperparameters` kept."""
        return vars(self).setdefault("_hparams", AttributeDict())  # type: ignore[no-any-return]

    def save_hyperparameters(self, *names: Any, ignore: str | Iterable[str] = (), logger: bool = True) -> None:
        """Keep the arguments of `__init__`, or of them those named, or the mapping or namespace that is given.

        Raises:
            ValueError: a name that is no argument of `__init__`.
        """
        given: dict[str, Any] = {}
        for one in [name for name in names if not isinstance(name, str)]:
            given.update(one if isinstance(one, Mapping) else vars(one))
        wanted = [name for name in names if isinstance(name, str)]
        if wanted or not names:
            frame = inspect.currentframe()
            arguments = _arguments(frame.f_back if frame else None)
            for name in wanted:
                if name not in arguments:
                    raise ValueError(f"save_hyperparameters({name!r}): __init__ has only {', '.join(arguments)}")
            given.update({name: arguments[name] for name in wanted or arguments})
        left_out = {ignore} if isinstance(ignore, str) else set(ignore)
        self.hparams.update({name: value for name, value in given.items() if name not in left_out})


def _arguments(frame: FrameType | None) -> dict[str, Any]:
    """Return the arguments of the `__init__` that a frame is of, without `self`; those in ** among them."""
    assert frame is not None
    names, _, keywords, values = inspect.getargvalues(frame)
    arguments = {name: values[name] for name in names[1:]}
    return {**arguments, **(values[keywords] if keywords else {})}


class LightningModule(Doors, HasHparams, torch.nn.Module):
    """A module in Lightning's words: `training_step`, `configure_optimizers`, and what else it needs."""

    _trainer: View | None = None
    automatic_optimization = True

    @property
    def trainer(self) -> View:
        """The run, as far as Lightning's modules know it."""
        return connected(self)

    @property
    def current_epoch(self) -> int:
        """Index of the epoch; 0 before there is a run."""
        return self._trainer.current_epoch if self._trainer and self._trainer.is_connected else 0

    @property
    def global_step(self) -> int:
        """Optimizer steps completed; 0 before there is a run."""
        return self._trainer.global_step if self._trainer and self._trainer.is_connected else 0

    @property
    def global_rank(self) -> int:
        """Of this process; 0 before there is a run."""
        return self._trainer.global_rank if self._trainer and self._trainer.is_connected else 0

    @property
    def local_rank(self) -> int:
        """Of this process on its machine; 0 before there is a run."""
        return self._trainer.local_rank if self._trainer and self._trainer.is_connected else 0

    @property
    def logger(self) -> Any:
        """What logs values by `log_metrics`; None before there is a run."""
        return self._trainer.logger if self._trainer and self._trainer.is_connected else None

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    def freeze(self) -> None:
        """Have no parameter require gradients, and be in eval mode."""
        self.requires_grad_(False)
        self.eval()

    def unfreeze(self) -> None:
        """Have all parameters require gradients, and be in train mode."""
        self.requires_grad_(True)
        self.train()


class LightningDataModule(HasHparams):
    """Data in Lightning's words: `prepare_data`, `setup(stage)` and the loaders."""

    trainer: View | None = None


class Callback:
    """What hears of a run in Lightning's words: `on_train_start(trainer, pl_module)` and so on."""
