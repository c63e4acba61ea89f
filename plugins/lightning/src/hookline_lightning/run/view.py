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
from hookline_lightning.logs.run_logger import RunLogger
from hookline_lightning.run.answers import Answers, Loop
from hookline_lightning.run.lengths import Lengths

STAGES = {Stage.TRAIN: "train", Stage.VAL: "validate", Stage.TEST: "test", Stage.PREDICT: "predict"}
STATUS = {"running": "running", "finished": "finished", "stopped": "finished"}  # others are interrupted


class View(Lengths, Answers):
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
        self.values: dict[str, torch.Tensor] = {}
        self.logged: dict[str, torch.Tensor] = {}
        self.shown: dict[str, torch.Tensor] = {}
        self.intervals: tuple[Any, int | None] | None = None  # val_check_interval and check_val_every_n_epoch
        self.stop_asked = False  # by should_stop
        self.trained: tuple[int, int] | None = None  # epoch and step of the run before, where this one only evaluates

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
        """Index of the epoch under way; behind one that was cut short the next one's, as in Lightning."""
        epoch: int = self.core.epoch + self.bridge.cut if self.trained is None else self.trained[0]
        return epoch

    @property
    def global_step(self) -> int:
        """Optimizer steps completed; in manual optimisation those of each optimizer."""
        if self.trained is not None:
            return self.trained[1]
        steps: int = self.bridge.steps if self.bridge.manual else self.core.global_step + self.bridge.now.ahead
        return steps

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
        """Whether the batch under way is the last of its epoch; `ValueError` where nobody can know."""
        if self.core.totals.batches_per_epoch is None:
            raise ValueError(
                "trainer.is_last_batch: the training loader does not tell how many batches it has; give it a __len__, "
                "or say Trainer(limit_train_batches=…)"
            )
        return bool(self.bridge.now.place + 1 == self.core.totals.batches_per_epoch)

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
        return self.core.stage is Stage.TRAIN and not self.core.sanity_checking

    @property
    def validating(self) -> bool:
        """Whether a validation is under way, and not one that is only tried."""
        return self.core.stage is Stage.VAL and not self.core.sanity_checking

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
        """With `fn`: "fit", "validate", "test" or "predict", what the run was begun for; and how it is."""
        word = STATUS.get(self.core.status, "interrupted")
        stage = "sanity_check" if self.sanity_checking else STAGES[self.core.stage]
        return SimpleNamespace(
            fn=self.bridge.word, status=word, stage=stage, finished=word == "finished", stopped=word != "running"
        )

    @property
    def should_stop(self) -> bool:
        """Whether somebody has asked for the end; set it to ask for it."""
        return self.core.stop_reason is not None

    @should_stop.setter
    def should_stop(self, stop: bool) -> None:
        if stop and self.core.stop_reason is None:
            self.stop_asked = True
            self.bridge.at_least.ask(self.core)

    # Values ---------------------------------------------------------------------------

    @property
    def callback_metrics(self) -> dict[str, torch.Tensor]:
        """The newest of all values that `self.log` was given: of steps at once, of an epoch when it ends."""
        return self.values

    @property
    def logged_metrics(self) -> dict[str, torch.Tensor]:
        """The newest values that trackers see."""
        return self.logged

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """The newest values that progress displays show."""
        return {name: value.item() for name, value in self.shown.items()}

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
    def val_check_interval(self) -> Any:
        """Batches between validations, or as a float a part of an epoch; 1.0 where they come at the end of epochs."""
        return self._intervals[0]

    @property
    def check_val_every_n_epoch(self) -> int | None:
        """Epochs between validations; None where batches are counted across epochs."""
        return self._intervals[1]

    @property
    def _intervals(self) -> tuple[Any, int | None]:
        """What Lightning's words for `evaluate_every` are, unless they were given."""
        if self.intervals is not None or self.core.options.evaluate_every is None:
            return self.intervals or (1.0, 1)
        number, unit = hookline.every(self.core.options.evaluate_every)
        if unit == "epochs":
            return (1.0, int(number)) if number >= 1 else (float(number), 1)
        return number, None


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
