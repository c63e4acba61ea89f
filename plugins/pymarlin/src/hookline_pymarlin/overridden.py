"""What a subclass of the trainer overrides: called by the run, or refused by name before it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

import hookline
from hookline import CallbackInterface, Stage, hookimpl, hookspecs, kept_rng
from hookline_pymarlin.plugins import gathered

CALLED = ("train", "validate", "train_epoch")
CHECKPOINTS = "give a checkpointer of your own, Trainer(…, checkpointer=…), a subclass of AbstractCheckpointer"
BACKEND = "write a plugin of hookline, registered by trainer.core.plugins.register(…)"
INSTEAD = {  # PyMarlin's methods that nothing here calls
    "save_checkpoint": CHECKPOINTS,
    "save_model_checkpoint": CHECKPOINTS,
    "load_checkpoints": CHECKPOINTS,
    "get_state": "give what a resumed run needs by the module's get_state",
    "update_state": "take what a resumed run needs by the module's update_state",
    "device": "give TrainerArguments(use_gpu=False) for the CPU",
    "train_sampler": BACKEND + ", that performs or wraps get_sampler",
    "val_sampler": BACKEND + ", that performs or wraps get_sampler",
    "stats": "give writers of your own, TrainerArguments(writers=[…])",
    **dict.fromkeys(
        ("train_step_batch_size", "val_step_batch_size", "gradient_accumulation", "pergpu_global_batch_size"),
        "give train_batch_size, gpu_batch_size_limit and val_batch_size",
    ),
    **dict.fromkeys(
        ("estimated_global_steps_per_epoch", "global_steps_finished", "total_steps_finished"),
        "read them; the run counts",
    ),
    **dict.fromkeys(("is_main_process", "is_distributed"), "read them; the launcher says"),
    "_init_checkpointer": CHECKPOINTS,
    "_init_stats": "give writers of your own, TrainerArguments(writers=[…])",
    **dict.fromkeys(("_init_backend", "_fetch_ranks", "_log_hparams", "_get_trainer_backend_args"), BACKEND),
}


def refuse_overrides(own: type, base: type) -> None:
    """Refuse a subclass of the trainer that overrides what nothing here calls.

    Raises:
        TypeError: it does; the message says what to write instead.
    """
    for between in own.__mro__[: own.__mro__.index(base)]:
        for name in vars(between):
            if name in INSTEAD:
                raise TypeError(
                    f"{own.__name__}.{name}: nothing here calls it; {INSTEAD[name]}. The methods {', '.join(CALLED)} "
                    "of a subclass are called"
                )


class OwnEpoch(CallbackInterface):
    """Has the `train_epoch` of a subclass do the epochs of a run."""

    def __init__(self, facade: Any) -> None:
        self.facade = facade
        self._columns: list[Any] | None = None  # the outputs of the epoch so far
        self._returned: Sequence[Any] | None = None

    @hookimpl
    def train_epoch(self, trainer: hookline.Trainer, batches: Iterator[Any]) -> bool:
        complete: list[bool] = []

        def base() -> list[Any]:
            self._columns = []
            complete.append(hookspecs.train_epoch(trainer=trainer, batches=batches))
            columns, self._columns = self._columns, None
            return gathered(trainer, [joined(column) for column in columns]) if complete[0] else []

        with self.facade.within("train_epoch", base):
            self._returned = self.facade.train_epoch()
        if not complete:
            raise TypeError(
                f"{type(self.facade).__name__}.train_epoch() did not call super().train_epoch(), so nothing was "
                "trained that the run knows of: call it, or have the module perform `train_epoch` or `update`, marked "
                "@hookimpl"
            )
        return complete[0]

    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        """Keep the outputs of a step for who calls `train_epoch`."""
        if self._columns is not None:
            self._columns = self._columns or [[] for _ in outputs]
            for column, value in zip(self._columns, outputs, strict=True):
                column.append(value)

    @hookimpl(tryfirst=True)
    def on_end_train_epoch(self, train_step_collated_outputs: list[Any]) -> None:  # type: ignore[override]
        if self._returned is not None:
            train_step_collated_outputs[:] = self._returned
            self._returned = None


class OwnValidation(CallbackInterface):
    """Has the `validate` of a subclass do the validations of a run."""

    def __init__(self, facade: Any) -> None:
        self.facade = facade

    @hookimpl
    def evaluate(
        self, trainer: hookline.Trainer, stage: Stage, loaders: Mapping[str, Any], limit: int | None
    ) -> dict[str, float]:
        arguments: dict[str, Any] = {"trainer": trainer, "stage": stage, "loaders": loaders, "limit": limit}
        if stage is not Stage.VAL or self.facade.asked:
            return hookspecs.evaluate(**arguments)
        metrics: dict[str, float] = {}
        with self.facade.within("validate", lambda: metrics.update(hookspecs.evaluate(**arguments))):
            self.facade.validate()
        return metrics


def validate_within(trainer: hookline.Trainer) -> None:
    """Validate in the middle of a run, as a callback asks for; training goes on as if it had not."""
    with kept_rng():
        loaders, limit = trainer.loaders.get(Stage.VAL), trainer.options.max_val_steps_per_epoch
        metrics = trainer.hook.evaluate(trainer=trainer, stage=Stage.VAL, loaders=loaders, limit=limit)
    trainer.log(reduce="last", **metrics)


def joined(values: Sequence[Any]) -> Any:
    """Return what an output was in all steps of an epoch, in one."""
    if not all(isinstance(value, torch.Tensor) for value in values):
        return [one for value in values for one in value]
    rows = [value if value.ndim else value.reshape(1) for value in values]
    alike = len({row.shape[1:] for row in rows}) == 1
    return torch.cat(rows) if alike else rows


def takes_outputs(module: Any) -> bool:
    """Tell whether a module's `on_end_train_epoch` takes outputs."""
    function = getattr(type(module), "on_end_train_epoch", CallbackInterface.on_end_train_epoch)
    own = function is not CallbackInterface.on_end_train_epoch
    return own and len(inspect.signature(function).parameters) > 2
