"""What a module of today's Lightning must have for what it is begun for."""

from __future__ import annotations

import inspect

from hookline import Stage
from hookline_lightning.run.bridge import LONG, Bridge, overridden

STEPS = {Stage.TRAIN: "training_step", Stage.VAL: "validation_step", Stage.TEST: "test_step"}
LOADERS = {stage: f"{'val' if stage is Stage.VAL else LONG[stage]}_dataloader" for stage in Stage}


def require_methods(bridge: Bridge, stage: Stage) -> None:
    """Refuse a module that lacks a method, or whose step wants an iterator.

    Raises:
        ValueError: what it lacks, or wants, by name.
    """
    module, name = bridge.module, type(bridge.module).__name__
    needed = [STEPS[stage]] if stage in STEPS else []
    for method in [*needed, "configure_optimizers"] if stage is Stage.TRAIN else needed:
        if overridden(module, method) is None:
            raise ValueError(f"{name} has no {method}(), without which there is nothing to {bridge.word}")
    for method in (*STEPS.values(), "predict_step"):
        step = overridden(module, method)
        if step and "dataloader_iter" in inspect.signature(step).parameters:
            raise ValueError(
                f"{name}.{method}(dataloader_iter) is given batches here and no iterator: take batch and batch_idx"
            )


def require_loaders(bridge: Bridge, stage: Stage) -> None:
    """Refuse a module without data; warn of a validation that nothing comes of.

    Raises:
        ValueError: the method that there is not.
    """
    name, sources = type(bridge.module).__name__, [bridge.view.datamodule, bridge.module]
    if bridge.ask_for_loaders(stage) is None:
        raise ValueError(f"{name} has no {LOADERS[stage]}(), and no data module or loader is given")
    if stage is not Stage.TRAIN or bridge.trainer.options.evaluate_every is None:
        return
    with_step = bool(overridden(bridge.module, "validation_step"))
    with_data = any(one is not None and overridden(one, LOADERS[Stage.VAL]) for one in sources)
    if with_data and not with_step:
        bridge.trainer.say_once(f"there are validation data, and {name} has no validation_step(): nothing is validated")
    if with_step and bridge.ask_for_loaders(Stage.VAL) is None:
        bridge.trainer.say_once(f"{name} has validation_step() and no validation data: nothing is validated")
