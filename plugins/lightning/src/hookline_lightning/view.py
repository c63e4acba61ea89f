"""The run as Lightning's modules and callbacks know it."""

from __future__ import annotations

import builtins
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import hookline
from hookline import Stage, nearest
from hookline_lightning.answers import Answers, Loop
from hookline_lightning.loggers import RunLogger

DIGITS = {Stage.VAL: "val", Stage.TEST: "test", Stage.PREDICT: "predict"}


class View(Answers):
    """What `self.trainer` is: the part of Lightning's trainer that has a meaning here.

    A copy or a pickle of it is with no run.
    """

    def __init__(self, core: hookline.Trainer | None = None, bridge: Any = None) -> None:
        self._core = weakref.ref(core) if core is not None else None
        self._bridge = weakref.ref(bridge) if bridge is not None else None
        self.callbacks: list[Any] = []
        self.loggers: list[Any] = [RunLogger()]
        self.predictions: list[Any] = []
        self.indices: list[list[Any]] = []  # of the samples of each batch that is predicted, by loader
        self.datamodule: Any = None
        self.gradient_clip_val: float | None = None
        self.gradient_clip_algorithm: str | None = None
        self.values: dict[str, float] = {}
        self.logged: dict[str, float] = {}

    def __reduce__(self) -> Any:
        return View, ()

    def __getattr__(self, name: str) -> Any:
        known = [one for one in dir(type(self)) if not one.startswith("_")]
        raise AttributeError(
            f"the trainer that hookline gives to Lightning's modules has no {name!r}"
            f"{nearest(name, known)}; hookline.Trainer itself is `trainer.core`"
        )

    @property
    def is_connected(self) -> bool:
        """Whether there is a run."""
        return self._core is not None and self._core() is not None

    @property
    def core(self) -> hookline.Trainer:
        """The `hookline.Trainer` itself; `RuntimeError` where it is no more."""
        core = self._core() if self._core is not None else None
        if core is None:
            raise RuntimeError("this trainer is one of a copy of a module, or its run is no more")
        return core

    @property
    def bridge(self) -> Any:
        """The `ModuleInterface` around the module."""
        assert self._bridge is not None
        return self._bridge()

    # Where it is ----------------------------------------------------------------------

    @property
    def current_epoch(self) -> int:
        """Index of the epoch under way."""
        return self.core.epoch

    @property
    def global_step(self) -> int:
        """Optimizer steps completed; in manual optimisation batches."""
        return self.core.global_step

    @property
    def max_epochs(self) -> int:
        """Epochs of the run; -1 where steps or a time alone end it."""
        options, totals = self.core.options, self.core.totals
        if options.epochs is None and options.max_steps is None and options.max_time is None:
            return totals.epochs or 1
        return -1 if options.epochs is None else options.epochs

    @property
    def max_steps(self) -> int:
        """Optimizer steps after which training ends; -1 for no such limit."""
        steps = self.core.options.max_steps
        return -1 if steps is None else steps

    @property
    def estimated_stepping_batches(self) -> float:
        """Optimizer steps of the whole run; infinity where nobody can know."""
        steps = self.core.totals.steps
        return float("inf") if steps is None else steps

    @property
    def num_training_batches(self) -> float:
        """Micro-batches of an epoch on this rank; infinity where nobody can know."""
        batches = self.core.totals.batches_per_epoch
        return float("inf") if batches is None else batches

    @property
    def is_last_batch(self) -> bool:
        """Whether the batch under way is the last of its epoch."""
        return bool(self.core.position + self.bridge.index + 1 == self.num_training_batches)

    @property
    def train_dataloader(self) -> Any:
        """The training loader as the user gave it."""
        return self.bridge.loaders.get(Stage.TRAIN)

    @property
    def val_dataloaders(self) -> Any:
        """The validation loaders as the user gave them."""
        return self.bridge.loaders.get(Stage.VAL)

    @property
    def accumulate_grad_batches(self) -> int:
        """Micro-batches of one optimizer step."""
        return self.core.window_size

    @property
    def log_every_n_steps(self) -> int:
        """Steps from one flush of logged values to the next, where these are counted in steps."""
        return int(hookline.every(self.core.options.log_every).number)

    @property
    def sanity_checking(self) -> bool:
        """Whether the validation is only tried."""
        return self.core.sanity_checking

    @property
    def training(self) -> bool:
        """Whether a training step or epoch is under way."""
        return self.core.stage is Stage.TRAIN

    @property
    def validating(self) -> bool:
        """Whether a validation is under way."""
        return self.core.stage is Stage.VAL

    @property
    def testing(self) -> bool:
        """Whether a test is under way."""
        return self.core.stage is Stage.TEST

    @property
    def predicting(self) -> bool:
        """Whether a prediction is under way."""
        return self.core.stage is Stage.PREDICT

    @property
    def state(self) -> Any:
        """With `fn`: "fit", "validate", "test" or "predict", what the run was begun for."""
        return SimpleNamespace(fn=self.bridge.word)

    @property
    def should_stop(self) -> bool:
        """Whether somebody has asked for the end; set it to ask for it."""
        return self.core.stop_reason is not None

    @should_stop.setter
    def should_stop(self, stop: bool) -> None:
        if stop and self.core.stop_reason is None:
            self.bridge.at_least.ask(self.core)

    # Values ---------------------------------------------------------------------------

    @property
    def callback_metrics(self) -> dict[str, torch.Tensor]:
        """The newest of all values that were logged, those included that no tracker sees."""
        return {name: torch.tensor(value) for name, value in self.values.items()}

    @property
    def logged_metrics(self) -> dict[str, torch.Tensor]:
        """The newest values that trackers saw."""
        return {name: torch.tensor(value) for name, value in self.logged.items()}

    # Ranks ----------------------------------------------------------------------------

    @property
    def global_rank(self) -> int:
        """Of this process."""
        return self.core.rank  # type: ignore[no-any-return]

    @property
    def local_rank(self) -> int:
        """Of this process on its machine."""
        return self.core.local_rank  # type: ignore[no-any-return]

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self.core.world_size  # type: ignore[no-any-return]

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return self.core.rank == 0  # type: ignore[no-any-return]

    @property
    def strategy(self) -> Any:
        """What ranks do together: `reduce_boolean_decision`, `barrier`, `broadcast`."""
        return Ranks(self)

    def gather(self, data: Any) -> Any:
        """Return the tensors of all ranks, stacked along a new first dimension."""
        if isinstance(data, dict):
            return {key: self.gather(value) for key, value in data.items()}
        if isinstance(data, (list, tuple)):
            return type(data)([self.gather(value) for value in data])
        core = self.core
        tensor = torch.as_tensor(data)
        ranks = core.hook.all_gather(trainer=core, value=tensor.detach().cpu())
        return torch.stack(ranks).to(tensor.device)

    # Parts ----------------------------------------------------------------------------

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """All optimizers."""
        return self.core.optimizers

    @property
    def lr_scheduler_configs(self) -> list[Any]:
        """All schedulers with `interval`, `frequency` and `monitor`."""
        return self.bridge.configs  # type: ignore[no-any-return]

    @property
    def lightning_module(self) -> Any:
        """The user's module."""
        return self.bridge.module

    model = lightning_module

    @property
    def default_root_dir(self) -> str:
        """Where folders of runs are made."""
        return self.core.options.runs_folder

    def print(self, *arguments: Any, **options: Any) -> None:
        """Print on rank 0."""
        if self.is_global_zero:
            builtins.print(*arguments, **options)

    def save_checkpoint(self, filepath: Any, weights_only: bool | None = None, storage_options: Any = None) -> None:
        """Write a file in the form of Lightning's; every rank calls it."""
        if storage_options is not None:
            raise ValueError("save_checkpoint(storage_options=…): files are written to folders of this machine")
        self.bridge.files.write(filepath, weights_only)

    @property
    def device_ids(self) -> list[int]:
        """The index of the device of this rank."""
        return [self.core.device.index or 0]

    @property
    def interrupted(self) -> bool:
        """Whether a signal or the keyboard has ended the run."""
        return self.core.status in ("preempted", "failed")

    @property
    def received_sigterm(self) -> bool:
        """Whether a signal asks for the end."""
        return "SIGTERM" in (self.core.stop_reason or "")

    @property
    def evaluating(self) -> bool:
        """Whether a validation or a test is under way."""
        return self.validating or self.testing

    @property
    def enable_validation(self) -> bool:
        """Whether training validates."""
        return self.core.options.evaluate_every is not None and self.bridge.loaders.get(Stage.VAL) is not None

    @property
    def test_dataloaders(self) -> Any:
        """The test loaders as the user gave them."""
        return self.bridge.loaders.get(Stage.TEST)

    @property
    def predict_dataloaders(self) -> Any:
        """The loaders of a prediction as the user gave them."""
        return self.bridge.loaders.get(Stage.PREDICT)

    @property
    def num_val_batches(self) -> list[float]:
        """Batches of each validation loader on this rank."""
        return self._lengths(Stage.VAL)

    @property
    def num_sanity_val_batches(self) -> list[float]:
        """Batches of each validation loader in the sanity check."""
        return [min(one, self.core.options.sanity_val_steps) for one in self._lengths(Stage.VAL)]

    @property
    def num_test_batches(self) -> list[float]:
        """Batches of each test loader on this rank."""
        return self._lengths(Stage.TEST)

    @property
    def num_predict_batches(self) -> list[float]:
        """Batches of each loader of a prediction on this rank."""
        return self._lengths(Stage.PREDICT)

    def _lengths(self, stage: Stage) -> list[float]:
        asked = self.bridge.loaders.get(stage)
        named = list(asked.values()) if isinstance(asked, dict) else asked
        limit = self.given.overfit_batches if stage is Stage.VAL and self.given.overfit_batches else None
        limit = getattr(self.given, f"limit_{DIGITS[stage]}_batches") if limit is None else limit
        limit = int(self.given.fast_dev_run) if self.given.fast_dev_run else limit
        found = []
        for loader in [] if named is None else named if isinstance(named, (list, tuple)) else [named]:
            batches = -(-len(loader) // self.core.shares) if hasattr(loader, "__len__") else float("inf")
            found.append(int(batches * limit) if isinstance(limit, float) and batches < float("inf") else batches)
            found[-1] = min(found[-1], limit) if isinstance(limit, int) else found[-1]
        return found

    @property
    def fit_loop(self) -> Loop:
        """What programs read of it."""
        progress, tried = Loop(is_last_batch=self.is_last_batch), Loop(_has_run=self.core.counters.evaluations > 0)
        within = Loop(batch_progress=progress, val_loop=tried, global_step=self.global_step)
        return Loop(max_epochs=self.max_epochs, min_epochs=self.min_epochs, max_steps=self.max_steps,
                    min_steps=self.min_steps, epoch_loop=within)  # fmt: skip

    @property
    def predict_loop(self) -> Loop:
        """What is predicted, and of which samples, in the order of the data."""
        current = self.indices[-1][-1] if self.indices and self.indices[-1] else None
        several = len(self.predictions) > 1
        return Loop(
            current_batch_indices=current,
            epoch_batch_indices=self.indices,
            predictions=self.predictions if several else next(iter(self.predictions), []),
        )

    @property
    def log_dir(self) -> str:
        """The folder of this run."""
        return str(self.core.run_dir)

    @property
    def val_check_interval(self) -> float:
        """1.0, as callbacks are told of each validation."""
        return 1.0

    @property
    def check_val_every_n_epoch(self) -> int:
        """1, as callbacks are told of each validation."""
        return 1


class Ranks:
    """What callbacks do over all ranks."""

    def __init__(self, view: View) -> None:
        self.view = view

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return whether all ranks say so, or any of them."""
        core = self.view.core
        said = core.hook.all_gather(trainer=core, value=bool(decision))
        return min(said) if all else max(said)  # type: ignore[no-any-return]

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks."""
        core = self.view.core
        core.hook.all_gather(trainer=core, value=None)

    @property
    def root_device(self) -> torch.device:
        """The device of this rank."""
        return self.view.core.device

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a file or a folder of a checkpoint, on rank 0."""
        if self.view.is_global_zero and Path(filepath).is_dir():
            shutil.rmtree(filepath)
        elif self.view.is_global_zero:
            Path(filepath).unlink(missing_ok=True)

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """Return the object of one rank."""
        core = self.view.core
        return core.hook.all_gather(trainer=core, value=value)[src]
