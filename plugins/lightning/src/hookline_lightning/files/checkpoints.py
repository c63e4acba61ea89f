"""`ModelCheckpoint` and its kind under Lightning's names: callbacks that have the trainer write files."""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from hookline_lightning.module import Callback

log = logging.getLogger("hookline.lightning")

EXTENSION = ".ckpt"
STATE = ("monitor", "best_model_score", "best_model_path", "current_score", "dirpath", "best_k_models",
         "kth_best_model_path", "last_model_path")  # fmt: skip


class Checkpoint(Callback):
    """What writes checkpoints; it is called after all other callbacks."""


class ModelCheckpoint(Checkpoint):
    """Has the trainer write checkpoints, and keeps the best.

    Args:
        dirpath: where to; the folder of the logger's run, or `default_root_dir`, and there `checkpoints`.
        filename: with names of values in braces, "{epoch}-{val_loss:.2f}".
        monitor: the value by which they are the best; without one the newest is.
        verbose: log what is written.
        save_last: write a `last.ckpt`, too; "link" makes it a link to the newest.
        save_top_k: how many of the best stay; -1 for all, 0 for none.
        save_on_exception: write one where training fails.
        save_weights_only: leave away what training needs to go on.
        mode: "min" or "max".
        auto_insert_metric_name: write names of values before them.
        every_n_train_steps: write after each so many optimizer steps.
        train_time_interval: write after each such time, at the next batch.
        every_n_epochs: write after each so many epochs.
        save_on_train_epoch_end: at the end of an epoch, and not of a validation; by default where each epoch has one
            validation at most.
        enable_version_counter: append -v1, -v2 … where a file is there already.
    """

    CHECKPOINT_NAME_LAST = "last"

    def __init__(
        self, dirpath: Any = None, filename: str | None = None, monitor: str | None = None, verbose: bool = False,
        save_last: bool | str | None = None, save_top_k: int = 1, save_on_exception: bool = False,
        save_weights_only: bool = False, mode: str = "min", auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None, train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None, save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
    ) -> None:  # fmt: skip
        _check(mode, save_top_k, monitor, every_n_train_steps, train_time_interval, every_n_epochs)
        self.dirpath = None if dirpath is None else os.path.realpath(os.path.expanduser(dirpath))
        self.filename, self.monitor, self.verbose, self.mode = filename, monitor, verbose, mode
        self.save_last, self.save_top_k, self.save_on_exception = save_last, save_top_k, save_on_exception
        self.save_weights_only, self.auto_insert_metric_name = save_weights_only, auto_insert_metric_name
        self.save_on_train_epoch_end, self.enable_version_counter = save_on_train_epoch_end, enable_version_counter
        self.train_time_interval = train_time_interval
        self.every_n_train_steps = every_n_train_steps or 0
        asked = (every_n_train_steps, train_time_interval, every_n_epochs)
        self.every_n_epochs = (every_n_epochs or 0) if any(one is not None for one in asked) else 1
        self.best_k_models: dict[str, torch.Tensor] = {}
        self.best_model_path = self.kth_best_model_path = self.last_model_path = ""
        self.best_model_score: torch.Tensor | None = None
        self.current_score: torch.Tensor | None = None
        self._newest = ""
        self.step = 0
        """Optimizer steps of the newest file."""
        self._looked = time.monotonic()
        self._deferred = False  # a save that waits for the value of a validation

    @property
    def state_key(self) -> str:
        """Under which its state is kept."""
        kept = {"monitor": self.monitor, "mode": self.mode, "every_n_train_steps": self.every_n_train_steps,
                "every_n_epochs": self.every_n_epochs, "train_time_interval": self.train_time_interval}  # fmt: skip
        return f"ModelCheckpoint{kept}"

    def state_dict(self) -> dict[str, Any]:
        """Return what it has written."""
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back; of another folder the best path alone."""
        if state.get("dirpath") == self.dirpath:
            vars(self).update({name: state[name] for name in STATE if name in state})
        else:
            log.warning("ModelCheckpoint: dirpath was %s and is %s: only best_model_path is taken over",
                        state.get("dirpath"), self.dirpath)  # fmt: skip
            self.best_model_path = state["best_model_path"]

    # When ---------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Choose the folder."""
        if self.dirpath is None and stage == "fit":
            folder = trainer.log_dir if trainer.loggers else trainer.default_root_dir
            self.dirpath = trainer.strategy.broadcast(os.path.join(os.path.abspath(folder), "checkpoints"))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to measure the time."""
        self._looked = time.monotonic()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write, if steps or the time say so."""
        if not self._is_due(trainer) or self._skips(trainer):
            return
        if self.monitor is not None and (self.monitor not in trainer.callback_metrics or self._validates_now(trainer)):
            self._deferred = True  # the value is that of an earlier validation, or there is none yet
            return
        self._save(trainer)

    def _is_due(self, trainer: Any) -> bool:
        if self.train_time_interval is not None:
            now, limit = time.monotonic(), self.train_time_interval.total_seconds()
            due = trainer.strategy.broadcast(now - self._looked >= limit)
            self._looked = now if due else self._looked
            return bool(due)
        return self.every_n_train_steps > 0 and trainer.global_step % self.every_n_train_steps == 0

    def _validates_now(self, trainer: Any) -> bool:
        if self._at_epoch_end(trainer) or not trainer.is_last_batch or not trainer.enable_validation:
            return False
        return bool((trainer.current_epoch + 1) % trainer.check_val_every_n_epoch == 0)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write, if epochs say so."""
        if self._at_epoch_end(trainer) and not self._skips(trainer):
            self._save_of_epoch(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Write, if epochs say so or a save waits for a value."""
        if self._at_epoch_end(trainer) or self._skips(trainer):
            return
        if self._deferred:
            self._deferred = False
            self._save(trainer)
        else:
            self._save_of_epoch(trainer)

    def _save_of_epoch(self, trainer: Any) -> None:
        if self.every_n_epochs > 0 and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._save_best(trainer)
        if self.step == trainer.global_step or (self.save_last == "link" and self._newest):
            self._save_last(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write, if that is asked for."""
        if self.save_on_exception and not self._skips(trainer):
            self._write(trainer, self.format_checkpoint_name(self._values(trainer)))
            self._save_last(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the last one, if there is none yet."""
        if self.save_last and not self._newest and not trainer.fast_dev_run:
            self._save_last(trainer)

    def _skips(self, trainer: Any) -> bool:
        training = trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fast_dev_run
        return not training or self.step == trainer.global_step

    def _at_epoch_end(self, trainer: Any) -> bool:
        if self.save_on_train_epoch_end is not None:
            return self.save_on_train_epoch_end
        if trainer.check_val_every_n_epoch != 1:
            return False
        return not trainer.enable_validation or trainer.val_check_interval == 1.0

    # What ---------------------------------------------------------------------------------

    def _save(self, trainer: Any) -> None:
        self._save_best(trainer)
        self._save_last(trainer)

    def _values(self, trainer: Any) -> dict[str, torch.Tensor]:
        place = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        values = dict(trainer.callback_metrics)
        return {
            **values,
            **{name: values[name].int() if name in values else torch.tensor(place[name]) for name in place},
        }

    def _save_best(self, trainer: Any) -> None:
        values = self._values(trainer)
        if self.save_top_k == 0:
            return
        if self.monitor is None:
            path = self._free(trainer, self.format_checkpoint_name(values), self.best_model_path)
            before, self.best_model_path = self.best_model_path, path
            self._write(trainer, path)
            if self.save_top_k == 1:
                self._remove(trainer, before, path)
        elif self.monitor not in values:
            raise ValueError(
                f"ModelCheckpoint(monitor={self.monitor!r}): nobody has logged it; there is {', '.join(values)}. Log "
                "it by self.log"
            )
        elif self._is_better(trainer, values[self.monitor]):
            self._keep(trainer, values)

    def _is_better(self, trainer: Any, value: torch.Tensor) -> bool:
        if self.save_top_k == -1 or len(self.best_k_models) < self.save_top_k:
            return True
        worst = self.best_k_models[self.kth_best_model_path]
        better = value < worst if self.mode == "min" else value > worst
        return bool(trainer.strategy.reduce_boolean_decision(bool(better)))

    def _keep(self, trainer: Any, values: Mapping[str, torch.Tensor]) -> None:
        value, sign = values[str(self.monitor)], 1 if self.mode == "min" else -1
        if torch.isnan(value):
            value = torch.tensor(sign * math.inf)
        gone = ""
        if self.save_top_k > 0 and len(self.best_k_models) == self.save_top_k:
            gone = self.kth_best_model_path
            self.best_k_models.pop(gone)
        path = self._free(trainer, self.format_checkpoint_name(dict(values)), gone)
        self.current_score = self.best_k_models[path] = value
        ordered = sorted(self.best_k_models, key=lambda one: sign * float(self.best_k_models[one]))
        self.best_model_path, self.best_model_score = ordered[0], self.best_k_models[ordered[0]]
        if self.save_top_k == -1 or len(ordered) == self.save_top_k:
            last = float(self.best_k_models[ordered[-1]])  # of several that are as bad the oldest goes first
            self.kth_best_model_path = next(one for one, kept in self.best_k_models.items() if float(kept) == last)
        self._write(trainer, path)
        self._remove(trainer, gone, path)

    def _save_last(self, trainer: Any) -> None:
        if not self.save_last:
            return
        path = self._free(
            trainer, self.format_checkpoint_name(self._values(trainer), self.CHECKPOINT_NAME_LAST), self.last_model_path
        )
        before, self.last_model_path = self.last_model_path, path
        if self.save_last == "link" and self._newest and self.save_top_k != 0:
            if trainer.is_global_zero:
                Path(path).unlink(missing_ok=True)
                Path(path).symlink_to(os.path.relpath(self._newest, os.path.dirname(path)))
            trainer.strategy.barrier("link")
        else:
            self._write(trainer, path)
        self._remove(trainer, before, path)

    def _write(self, trainer: Any, path: str) -> None:
        trainer.save_checkpoint(path, self.save_weights_only)
        self.step, self._newest = trainer.global_step, path
        if self.verbose and trainer.is_global_zero:
            log.info("ModelCheckpoint: wrote %s", path)

    def _free(self, trainer: Any, path: str, but: str) -> str:
        number, free = 0, path
        while self.enable_version_counter and free != but and self.file_exists(free, trainer):
            number += 1
            free = f"{path.removesuffix(EXTENSION)}-v{number}{EXTENSION}"
        return free

    def _remove(self, trainer: Any, path: str, but: str) -> None:
        """Remove a file that this one has written, unless the run began with it."""
        began = trainer.ckpt_path
        if not path or path == but or (began is not None and Path(began).absolute() == Path(path).absolute()):
            return
        if Path(str(self.dirpath)).absolute() in Path(path).absolute().parents:
            trainer.strategy.remove_checkpoint(path)

    def file_exists(self, filepath: Any, trainer: Any) -> bool:
        """Return whether a file is there, as rank 0 sees it."""
        return bool(trainer.strategy.broadcast(os.path.lexists(filepath)))

    def format_checkpoint_name(
        self, metrics: dict[str, torch.Tensor], filename: str | None = None, ver: int | None = None
    ) -> str:
        """Return the path for values: `{name}` in the pattern stands for one of them, 0 where it is not there."""
        pattern = filename or self.filename or "{epoch}-{step}"
        known = dict(metrics)

        def shown(match: re.Match[str]) -> str:
            name, form = match[1], match[2] or ""
            number = known.get(name, torch.tensor(0))
            text = f"{number.item() if isinstance(number, torch.Tensor) else number:{form}}"
            return f"{name}={text}" if self.auto_insert_metric_name else text

        name = re.sub(r"\{([^{}:]*)(?::([^{}]*))?\}", shown, pattern)
        name = f"{name}-v{ver}" if ver is not None else name
        return os.path.join(self.dirpath, f"{name}{EXTENSION}") if self.dirpath else f"{name}{EXTENSION}"


class OnExceptionCheckpoint(Checkpoint):
    """Has the trainer write a checkpoint where a run fails; one that ends well removes it.

    Args:
        dirpath: where to.
        filename: without `.ckpt`.
    """

    def __init__(self, dirpath: Any, filename: str = "on_exception") -> None:
        self.dirpath, self.filename = dirpath, filename

    @property
    def ckpt_path(self) -> str:
        """Of the file."""
        return os.path.join(self.dirpath, f"{self.filename}{EXTENSION}")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write."""
        trainer.save_checkpoint(self.ckpt_path)


def _check(mode: str, top: int, monitor: str | None, steps: Any, time_interval: Any, epochs: Any) -> None:
    if mode not in ("min", "max"):
        raise ValueError(f"ModelCheckpoint(mode={mode!r}) must be min or max")
    if top < -1 or (monitor is None and top not in (-1, 0, 1)):
        raise ValueError(
            f"ModelCheckpoint(save_top_k={top}, monitor={monitor!r}): say by which value they are the best"
        )
    numbers = {"every_n_train_steps": steps, "every_n_epochs": epochs}
    for name, number in numbers.items():
        if number is not None and number < 0:
            raise ValueError(f"ModelCheckpoint({name}={number}) must be at least 0")
    if bool(steps) + bool(epochs) + (time_interval is not None) > 1:
        raise ValueError("ModelCheckpoint: of every_n_train_steps, every_n_epochs and train_time_interval say one")
