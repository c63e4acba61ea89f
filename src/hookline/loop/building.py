"""What a run builds: its module, its model, its optimizers, and its expected length."""

from __future__ import annotations

import inspect
import logging
import math
from typing import TYPE_CHECKING, Any

import torch

from hookline import data
from hookline.counters import Totals, lesser
from hookline.data import Loaders
from hookline.interfaces import Loader, ModuleInterface, Stage
from hookline.loop.window import Window
from hookline.options import Options
from hookline.schedulers import Scheduled, schedule_all

if TYPE_CHECKING:
    from hookline.run import Run

log = logging.getLogger("hookline.trainer")

KEYWORDS = {  # methods of a module that are called by keyword
    **{f"{stage.value}_step": ("global_step", "batch", "device") for stage in Stage},
    "get_train_dataloader": ("sampler", "batch_size"),
    **{f"get_{word}_dataloaders": ("sampler", "batch_size") for word in ("val", "test", "predict")},
}


def adapt_module(run: Run, given: Any) -> ModuleInterface:
    """Return the `ModuleInterface` for what the user gave.

    Raises:
        TypeError: it is not one and no plugin adapts it; or its methods cannot be called by keyword.
    """
    adapted = run.hook.adapt_module(trainer=run, module=given)
    if not isinstance(adapted, ModuleInterface):
        said = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
        if adapted is not given:
            said += f" that made a {type(adapted).__name__}"
        raise TypeError(
            f"Trainer got {said}, which is no object of a ModuleInterface, and no plugin adapts it: "
            "subclass hookline.ModuleInterface, or name the adapter of its framework in plugins"
        )
    for method, names in KEYWORDS.items():
        try:
            inspect.signature(getattr(adapted, method)).bind(**dict.fromkeys(names))
        except TypeError as error:
            raise TypeError(
                f"{type(adapted).__name__}.{method}() is called by keyword and must take "
                f"{', '.join(names)} by these names, in any order: {error}"
            ) from None
    return adapted


class Built:
    """The model, the optimizers and the schedulers that a run made from its module, and its expected length."""

    model: torch.nn.Module
    """The model that the loop calls: the module after plugins converted, split, compiled and sharded it."""

    def __init__(self, run: Run, loaders: Loaders, window: Window) -> None:
        self.run, self.loaders, self.window = run, loaders, window
        self.optimizers: list[torch.optim.Optimizer] = []
        self.schedulers: list[Scheduled] = []
        self.followed: dict[str, str] = {}
        """Metrics that schedulers follow, each with the name of its scheduler."""
        self.totals = Totals(None, None, None, run.options.epochs)
        self._stands = False

    def make_model(self) -> None:
        """Make the model from the module, once."""
        if self._stands:
            return
        run, hook = self.run, self.run.hook
        self.window.resize(hook.get_window_size(trainer=run))
        self.loaders.begin_windows(self.window.size)
        model = self.model
        for change in (hook.convert_model, hook.split_model, hook.compile_model, hook.shard_model):
            model = change(trainer=run, model=model)
        self.model, self._stands = model, True

    def use_model(self, model: torch.nn.Module) -> None:
        """Let the loop call another wrapping of the module from now on; for strategies."""
        self.model = model

    def make_optimizers(self) -> None:
        """Make the optimizers and schedulers of the model.

        Raises:
            ValueError: there is no optimizer.
        """
        optimizers, schedulers = self.run.hook.setup_optimizers(trainer=self.run)
        if not optimizers:
            raise ValueError(f"{type(self.run.module).__name__}.get_optimizers_schedulers returned no optimizer")
        self.optimizers = optimizers
        self.schedulers = schedule_all(schedulers, self.run.options.val_loss_metric_name)
        self.followed = {metric: type(one).__name__ for one, _, metric in self.schedulers if metric is not None}

    def train_loader(self) -> Loader:
        """Return the training loader, ready to iterate.

        Raises:
            ValueError: the module returned none.
        """
        loaders = self.loaders.get(Stage.TRAIN)
        if not loaders:
            name = type(self.run.module).__name__
            raise ValueError(f"{name}.get_train_dataloader() must return one loader; it returned None")
        self.run.cursor.set_length(lesser(data.length(loaders["default"]), self.batches_per_epoch()))
        return loaders["default"]

    def batches_per_epoch(self) -> int | None:
        """Return the limit of batches per epoch; None for no limit."""
        steps = self.run.options.max_train_steps_per_epoch
        return None if steps is None else steps * self.window.size

    def count_totals(self, loader: Loader) -> None:
        """Compute the expected length of the run."""
        options = self.run.options
        batches = lesser(data.length(loader), self.batches_per_epoch())
        steps_per_epoch = None if batches is None else math.ceil(batches / self.window.size)
        epochs = epochs_asked(options)
        if epochs is None and options.max_steps is not None and steps_per_epoch:
            epochs = math.ceil(options.max_steps / steps_per_epoch)  # not a limit: later epochs may have another length
        steps = None if steps_per_epoch is None or epochs is None else steps_per_epoch * epochs
        self.totals = Totals(batches, steps_per_epoch, lesser(steps, options.max_steps), epochs)


def epochs_asked(options: Options) -> int | None:
    """Return how many epochs to train; None if only steps or time limit training."""
    if options.epochs is None and options.max_steps is None and options.max_time is None:
        return 1
    return options.epochs


def warn_of_module(run: Run) -> None:
    """Warn of a validation step without data, and of modules with trainable weights in eval mode.

    Modes are the user's, but this may be a mistake.
    """
    kind, given = type(run.module), ModuleInterface
    unvalidated = kind.val_step is not given.val_step and kind.get_val_dataloaders is given.get_val_dataloaders
    if unvalidated and run.options.evaluate_every is not None and run.rank == 0:
        log.warning(
            "%s has val_step and no get_val_dataloaders (by this very name), so nothing is validated; "
            "evaluate_every=None says that this is meant", kind.__name__,
        )  # fmt: skip
    idle = [
        name or "the module itself"
        for name, module in run.module.named_modules()
        if not module.training and any(weight.requires_grad for weight in module.parameters())
    ]
    if idle and run.rank == 0:
        log.warning(
            "%d module(s) with weights to train are in eval mode, and stay in it in training (no dropout, batch "
            "norm as it is): %s. Where that is not meant, call .train() on them before training",
            len(idle), ", ".join(idle[:3]) + (" …" if len(idle) > 3 else ""),
        )  # fmt: skip
