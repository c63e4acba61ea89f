"""What a run is built of: its module, its model, its optimizers, and how long it will be."""

from __future__ import annotations

import inspect
import logging
import math
from typing import TYPE_CHECKING, Any

import torch

from hookline import data
from hookline.counters import Totals, lesser
from hookline.interfaces import Loader, ModuleInterface, Stage
from hookline.options import Options
from hookline.schedules import Scheduled, schedule_all

if TYPE_CHECKING:
    from hookline.run import Run

log = logging.getLogger("hookline.trainer")

KEYWORDS = {  # what a module is asked by keyword
    **{f"{stage.value}_step": ("global_step", "batch", "device") for stage in Stage},
    "get_train_dataloader": ("sampler", "batch_size"),
    **{f"get_{word}_dataloaders": ("sampler", "batch_size") for word in ("val", "test", "predict")},
}


def adapt_module(run: Run, given: Any) -> ModuleInterface:
    """Return the module of what the user gave.

    Raises:
        TypeError: it is none, and no plugin makes one of it; or its methods cannot be called by keyword.
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


def build_model(run: Run) -> torch.nn.Module:
    """Return the model that the loop calls: the module, converted, split, compiled and sharded as plugins say."""
    hook, model = run.hook, run.model
    for change in (hook.convert_model, hook.split_model, hook.compile_model, hook.shard_model):
        model = change(trainer=run, model=model)
    return model


def build_optimizers(run: Run) -> tuple[list[torch.optim.Optimizer], list[Scheduled]]:
    """Return the optimizers and the schedulers of a run.

    Raises:
        ValueError: there is no optimizer.
    """
    optimizers, schedulers = run.hook.setup_optimizers(trainer=run)
    if not optimizers:
        raise ValueError(f"{type(run.module).__name__}.get_optimizers_schedulers returned no optimizer")
    return optimizers, schedule_all(schedulers, run.options.val_loss_metric_name)


def train_loader(run: Run) -> Loader:
    """Return the training loader, ready to iterate.

    Raises:
        ValueError: the module gives none, or several.
    """
    loaders = run.get_loaders(Stage.TRAIN)
    if list(loaders) != ["default"]:
        raise ValueError(
            f"{type(run.module).__name__}.get_train_dataloader() must return one loader; it returned "
            f"{'None' if not loaders else f'loaders by key {list(loaders)}'}"
        )
    return loaders["default"]


def count_totals(options: Options, loader: Loader, window_size: int) -> Totals:
    """Return how long a run will be."""
    batches = lesser(data.length(loader), batches_per_epoch(options, window_size))
    steps_per_epoch = None if batches is None else math.ceil(batches / window_size)
    epochs = epochs_asked(options)
    if epochs is None and options.max_steps is not None and steps_per_epoch:
        epochs = math.ceil(options.max_steps / steps_per_epoch)  # no end: later epochs may have another length
    steps = None if steps_per_epoch is None or epochs is None else steps_per_epoch * epochs
    return Totals(batches, steps_per_epoch, lesser(steps, options.max_steps), epochs)


def epochs_asked(options: Options) -> int | None:
    """Return how many epochs are to be trained; None where steps or time say when to end."""
    if options.epochs is None and options.max_steps is None and options.max_time is None:
        return 1
    return options.epochs


def batches_per_epoch(options: Options, window_size: int) -> int | None:
    """Return the most batches that an epoch may take."""
    steps = options.max_train_steps_per_epoch
    return None if steps is None else steps * window_size


def warn_of_modes(run: Run) -> None:
    """Say that modules are trained in eval mode: modes are the user's, and this one may have been forgotten."""
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
