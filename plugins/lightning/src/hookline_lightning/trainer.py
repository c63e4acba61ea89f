"""The trainer of today's Lightning: a translation of its arguments to options and plugins."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import hookline
from hookline import nearest
from hookline_lightning import early
from hookline_lightning.files.checkpoints import ModelCheckpoint
from hookline_lightning.files.plain import hparams_of
from hookline_lightning.files.saving import FromFile, found, shared
from hookline_lightning.logs.run_logger import NoLogger, RunLogger
from hookline_lightning.plugin import Lightning
from hookline_lightning.run import portions
from hookline_lightning.run.answers import BeforeRun
from hookline_lightning.run.bridge import overridden
from hookline_lightning.run.view import View
from hookline_lightning.translating import arguments
from hookline_lightning.translating.given_data import Predictions, data_of
from hookline_lightning.translating.given_loggers import OwnLoggers
from hookline_lightning.translating.given_loggers import listed as listed_loggers
from hookline_lightning.translating.results import results_of, table_of
from hookline_lightning.translating.translation import is_of, translated, writes_checkpoints

log = logging.getLogger("hookline.lightning")

ANSWERED = (  # what a trainer answers of the run of its newest fit, even where a test has come after it
    "current_epoch", "global_step", "optimizers", "lr_scheduler_configs", "train_dataloader", "val_dataloaders",
    "num_training_batches", "num_val_batches", "estimated_stepping_batches", "interrupted",
)  # fmt: skip


class Trainer:
    """Trains a module of today's Lightning; each argument has Lightning's name and default.

    Args:
        accelerator: "auto", "cpu", "gpu", "cuda" or "mps".
        strategy: "auto", "ddp", "ddp_find_unused_parameters_true" or "fsdp"; others are plugins.
        devices: ranks on this machine; more than one are started by a launcher.
        num_nodes: machines, which the launcher starts.
        precision: "32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true" or "16-true".
        logger: False for none, True for the plugin csv, a logger, a name, several, or a mapping of names to options.
        callbacks: one, or a list of them.
        fast_dev_run: try everything with this many batches (True for one); nothing is logged or saved.
        max_epochs: epochs; 1000 unless something else says when to end. -1 for no such limit.
        min_epochs: `should_stop` ends training after these at the earliest.
        max_steps: optimizer steps; -1 for no such limit.
        min_steps: `should_stop` ends training after these at the earliest.
        max_time: of training: "10 min", Lightning's "00:12:00:00" (days first), a dict or a timedelta.
        limit_train_batches: a number of batches, or (a float) a fraction of the loader; so the others.
        limit_val_batches: 0 for no validation.
        limit_test_batches: as above.
        limit_predict_batches: as above.
        overfit_batches: train on the same first batches, and validate on as many of the validation's.
        val_check_interval: batches between validations, or (a float) a fraction of an epoch, or a time.
        check_val_every_n_epoch: validate only in each so many epochs; None counts batches across epochs.
        num_sanity_val_steps: validation batches to try before training; -1 for all.
        log_every_n_steps: optimizer steps from one flush of values to the next; 0 for none.
        enable_checkpointing: whether to save the run after each epoch, and its newest weights as a file.
        enable_progress_bar: whether to show one.
        enable_model_summary: whether to show the layers.
        accumulate_grad_batches: micro-batches of one optimizer step.
        gradient_clip_val: the largest norm of all gradients, or of each value; 0 for none.
        gradient_clip_algorithm: "norm" or "value".
        deterministic: True raises where an operation is not deterministic, "warn" reports it.
        benchmark: whether cuDNN tries which algorithm is the fastest.
        inference_mode: evaluations are under `torch.no_grad` either way.
        use_distributed_sampler: False is refused with several ranks.
        profiler: "simple", "advanced" or "pytorch" for the plugin profile.
        detect_anomaly: whether autograd raises where a gradient is NaN.
        barebones: turn off what is not training.
        plugins: more plugins of hookline by name.
        sync_batchnorm: whether batch norm sees the batches of all ranks.
        reload_dataloaders_every_n_epochs: refused, but for 0.
        default_root_dir: where folders of runs are made.
        enable_autolog_hparams: whether hparams are in the configuration that trackers get.
        model_registry: refused, but for None.
        seed: of the order of samples and of all random states; by default that of `seed_everything`, else 0.

    Raises:
        TypeError: an argument that is none.
        ValueError: a value that cannot be, or is not honoured, and what to write instead.
    """

    def __init__(
        self, *, accelerator: Any = "auto", strategy: Any = "auto", devices: Any = "auto", num_nodes: int = 1,
        precision: Any = None, logger: Any = None, callbacks: Any = None, fast_dev_run: int | bool = False,
        max_epochs: int | None = None, min_epochs: int | None = None, max_steps: int = -1,
        min_steps: int | None = None, max_time: Any = None, limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None, limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None, overfit_batches: int | float = 0.0,
        val_check_interval: Any = None, check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int | None = None, log_every_n_steps: int | None = None,
        enable_checkpointing: bool | None = None, enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = None, accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None,
        deterministic: bool | str | None = None, benchmark: bool | None = None, inference_mode: bool = True,
        use_distributed_sampler: bool = True, profiler: Any = None, detect_anomaly: bool = False,
        barebones: bool = False, plugins: Any = None, sync_batchnorm: bool = False,
        reload_dataloaders_every_n_epochs: int = 0, default_root_dir: str | os.PathLike[str] | None = None,
        enable_autolog_hparams: bool = True, model_registry: str | None = None, seed: int | None = None,
        **others: Any,
    ) -> None:  # fmt: skip
        given = SimpleNamespace(**{name: value for name, value in locals().items() if name not in ("self", "others")})
        for name in others:
            known = sorted(vars(given))
            raise TypeError(f"Trainer has no argument {name!r}{nearest(name, known)}; it has {', '.join(known)}")
        arguments.refuse(given)
        listed = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks] if callbacks else []
        given.timed = any(is_of(one, "Timer") for one in listed)
        running, translations = translated(listed, given)
        writers = [one for one in running if writes_checkpoints(one)]
        if enable_checkpointing is False and writers:
            raise ValueError(
                f"enable_checkpointing=False, and callbacks has {type(writers[0]).__name__}: leave one out"
            )
        arguments.defaults(given)
        self._given_callbacks = list(running)
        if (
            enable_checkpointing is not False
            and not barebones
            and not any(is_of(one, "ModelCheckpoint") for one in running)
        ):
            running.append(ModelCheckpoint(save_weights_only=True))
        self._given = given
        self._callbacks = running
        self._loggers = [NoLogger()] if given.fast_dev_run and given.logger else listed_loggers(given.logger)
        value, algorithm = gradient_clip_val or None, gradient_clip_algorithm
        self.clipping = (value, algorithm)
        self.intervals = arguments.validation(given)
        self.options: dict[str, Any] = arguments.options_of(given) | self._place()
        own = arguments.plugins_of(given)
        self._limits: dict[str, Any] = own.get("limits", {})
        self.plugins: dict[str, Any] = {
            **own,
            **self._around({*own, *translations}),
            **translations,
            **{one.plugin: one.options() for one in self._loggers if getattr(one, "plugin", "")},
            **(given.plugins or {}),
        }
        self.core: Any = None
        """The `hookline.Trainer` of the newest run."""
        self._fitted: Any = None

    def _place(self) -> dict[str, Any]:
        """Return where the first logger wants the folders of runs, and what it calls them."""
        places = [place for one in self._loggers if isinstance(one, RunLogger) and (place := one.place())]
        if not places:
            return {}
        folder, name = places[0]
        return {"run_name": name, **({"runs_folder": folder} if folder else {})}

    def _around(self, named: Collection[str]) -> dict[str, Any]:
        """Return the plugins of this distribution that something is asked of, beside those that are named."""
        asked = {
            "Unshuffled": self._given.overfit_batches,
            "Anomaly": self._given.detect_anomaly,
            "Averaged": "ema" in named or "swa" in named,
            "ShortWindows": "accumulate" in named,
        }
        home = "hookline_lightning.translating.running"
        return {f"lightning.{kind.lower()}": {"_plugin_": f"{home}.{kind}"} for kind, wanted in asked.items() if wanted}

    # Doors ----------------------------------------------------------------------------

    def fit(
        self, model: Any, train_dataloaders: Any = None, val_dataloaders: Any = None, datamodule: Any = None,
        ckpt_path: Any = None, weights_only: bool | None = None,
    ) -> None:  # fmt: skip
        """Train.

        Args:
            model: a module.
            train_dataloaders: a loader, or a data module.
            val_dataloaders: a loader or several.
            datamodule: a data module, in place of loaders.
            ckpt_path: "last", "best", a file of `save_checkpoint`, or the folder of a run or of one of its checkpoints,
                to go on with.
            weights_only: False runs what code the file holds; only for a file whose maker you trust.

        Raises:
            ValueError: data that are given twice, or a checkpoint that is none.
        """
        data = data_of(datamodule, train=train_dataloaders, val=val_dataloaders)
        if self._given.limit_train_batches == 0 and not self._given.overfit_batches:
            log.warning("limit_train_batches=0: there is nothing to train on")
            return
        if ckpt_path is None and self._fitted is not None and self._is_done():
            return
        self._fitted = self._begin(model, data, ckpt_path, weights_only)
        if self._fitted.options.epochs == 0 or self._fitted.options.max_steps == 0:
            log.warning("max_epochs or max_steps is 0: there is nothing to train")
            return
        self._fitted.train()

    def _is_done(self) -> bool:
        """Return whether an earlier fit has done all that there is, as Lightning counts epochs and steps over all.

        Raises:
            ValueError: it was stopped before, and Lightning would go on.
        """
        if self._fitted.status == "stopped":
            raise ValueError(
                f"fit was called before, and was stopped at step {self._fitted.global_step}: to go on say "
                "ckpt_path='last', to begin anew make another Trainer"
            )
        if self._fitted.status == "finished":
            log.warning(
                "fit was called before, and has trained to max_epochs=%s, max_steps=%s: nothing is left. Make another "
                "Trainer for another training", self.max_epochs, self.max_steps,
            )  # fmt: skip
        return self._fitted.status == "finished"  # type: ignore[no-any-return]

    def validate(
        self, model: Any = None, dataloaders: Any = None, ckpt_path: Any = None, verbose: bool = True,
        datamodule: Any = None, weights_only: bool | None = None,
    ) -> list[dict[str, float]]:  # fmt: skip
        """Validate; return the metrics, of each loader where there are several.

        Args:
            model: a module; by default that of `fit`, with its best weights where it has written a file of them.
            dataloaders: a loader, several, or a data module.
            ckpt_path: "best", "last", or a file whose weights to take.
            verbose: print the metrics.
            datamodule: a data module, in place of loaders.
            weights_only: False runs what code the file holds; only for a file whose maker you trust.
        """
        return self._evaluate("val", model, data_of(datamodule, val=dataloaders), ckpt_path, weights_only, verbose)

    def test(
        self, model: Any = None, dataloaders: Any = None, ckpt_path: Any = None, verbose: bool = True,
        datamodule: Any = None, weights_only: bool | None = None,
    ) -> list[dict[str, float]]:  # fmt: skip
        """Test; return the metrics, of each loader where there are several; see `validate`."""
        return self._evaluate("test", model, data_of(datamodule, test=dataloaders), ckpt_path, weights_only, verbose)

    def _evaluate(
        self, stage: str, model: Any, data: Any, ckpt_path: Any, weights_only: bool | None, verbose: bool
    ) -> list[dict[str, float]]:
        if getattr(self._given, f"limit_{stage}_batches") == 0:
            return []
        core = self._again(model, data, ckpt_path, weights_only)
        metrics = core.validate() if stage == "val" else core.test()
        word = "validate" if stage == "val" else "test"
        results = results_of(metrics)
        if verbose and core.rank == 0:
            print(table_of(word, results))
        return results

    def predict(
        self, model: Any = None, dataloaders: Any = None, datamodule: Any = None,
        return_predictions: bool | None = None, ckpt_path: Any = None, weights_only: bool | None = None,
    ) -> list[Any] | None:  # fmt: skip
        """Predict; return what `predict_step` returned of each batch, by loader where there are several.

        Args:
            model: as for `validate`; so the others.
            dataloaders: as above.
            datamodule: as above.
            return_predictions: False keeps and returns nothing, for a callback that writes them.
            ckpt_path: as above.
            weights_only: as above.
        """
        if self._given.limit_predict_batches == 0:
            return None
        core = self._again(model, data_of(datamodule, predict=dataloaders), ckpt_path, weights_only)
        kept = Predictions()
        if return_predictions is not False:
            core.plugins.register(kept, "predictions")
        try:
            core.predict()
        finally:
            if return_predictions is not False:
                core.plugins.unregister(kept)
        if return_predictions is False:
            return None
        return list(kept.outputs.values()) if len(kept.outputs) > 1 else next(iter(kept.outputs.values()), [])

    def plan(self, model: Any = None) -> list[dict[str, Any]]:
        """Return who does what in the run behind it, as `hookline plan` shows it."""
        core = self.core if model is None else self._made(model, None, None, None)
        if core is None:
            raise ValueError("plan() of a trainer that has not run needs the module: plan(model)")
        return core.plugins.plan()

    def save_checkpoint(self, filepath: Any, weights_only: bool | None = None, storage_options: Any = None) -> None:
        """Write a file in the form of Lightning's; every rank calls it.

        Raises:
            ValueError: there is no run yet, or options of a storage.
        """
        if self.core is None:
            raise ValueError("save_checkpoint: there is no run yet; call fit, or validate with a model, before")
        self._view.save_checkpoint(filepath, weights_only, storage_options)

    def print(self, *arguments: Any, **options: Any) -> None:
        """Print on rank 0."""
        if self.is_global_zero:
            print(*arguments, **options)

    # What it knows ----------------------------------------------------------------------

    @property
    def _view(self) -> Any:
        return getattr(self.core.module, "view", None) if self.core is not None else None

    def __getattr__(self, name: str) -> Any:
        """Return what the run knows, and before it what the arguments say."""
        if name.startswith("_") or "core" not in vars(self):
            raise AttributeError(name)
        run = self._fitted if name in ANSWERED and self._fitted is not None else self.core
        return getattr(self._before if run is None else getattr(run.module, "view", run), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "should_stop":  # a fit begins without it
            if self.core is not None:
                self._view.should_stop = value
        elif hasattr(View, name) and name != "core" and not hasattr(type(self), name):
            raise AttributeError(f"trainer.{name} cannot be set: it is an argument of the Trainer, or known by its run")
        else:
            super().__setattr__(name, value)

    @property
    def _before(self) -> Any:
        return BeforeRun(self._given, self._callbacks, self._loggers)

    @property
    def callbacks(self) -> list[Any]:
        """Those that run here; the others are plugins."""
        return self._callbacks

    @callbacks.setter
    def callbacks(self, callbacks: list[Any]) -> None:
        self._callbacks = self._given_callbacks = list(callbacks)

    @property
    def callback_metrics(self) -> dict[str, torch.Tensor]:
        """The newest of all logged values."""
        return self._view.callback_metrics if self._view else {}

    @property
    def logged_metrics(self) -> dict[str, torch.Tensor]:
        """The newest values that trackers saw."""
        return self._view.logged_metrics if self._view else {}

    # The run behind it ----------------------------------------------------------------

    def _again(self, model: Any, data: Any, ckpt_path: Any, weights_only: bool | None) -> Any:
        """Return the run of this module if there is one and nothing new is asked of it, else another."""
        core = self.core
        if model is None and core is None:
            raise ValueError("there is no module yet: give one")
        if model is None and ckpt_path is None:
            ckpt_path = self._best_of_fit()
        same = core is not None and (model is None or core.module.module is model)
        if same and data is None and ckpt_path is None:
            return core
        if data is None and core is not None:
            data = core.plugins.get_plugin("lightning").datamodule if same else None
        made = self._begin(core.module.module if model is None else model, data, ckpt_path, weights_only)
        if core is not None and hasattr(core.module, "view") and hasattr(made.module, "view"):
            made.module.view.trained = (core.module.view.current_epoch, core.module.view.global_step)
        return made

    def _best_of_fit(self) -> str | None:
        """Return the file that Lightning takes where no module and no file are given: the best of the fit."""
        writer = self.checkpoint_callback if self._fitted is not None else None
        best = getattr(writer, "best_model_path", "")
        if not best:
            return None
        steps = self._fitted.global_step if self.core is self._fitted else -1
        newest = getattr(writer, "step", None) == steps and getattr(writer, "monitor", "") is None
        if not newest:
            log.warning(
                "no model and no ckpt_path: taking the best weights, %s; ckpt_path='last' takes the newest", best
            )
        return None if newest else best

    def _begin(self, model: Any, data: Any, ckpt_path: Any, weights_only: bool | None = None) -> Any:
        self.core = self._made(model, data, ckpt_path, weights_only)
        if self._view is not None:
            self._callbacks = self._view.callbacks  # those of the module's own among them
        return self.core

    def _made(self, model: Any, data: Any, ckpt_path: Any, weights_only: bool | None) -> hookline.Trainer:
        if early.is_mine(model):
            raise TypeError(
                f"{type(model).__name__} is of Lightning's first year, for which there is no trainer of its own here: "
                'hookline.Trainer(module, plugins={"lightning": {}}, epochs=…)'
            )
        if isinstance(model, torch.nn.Module) and shared(model):
            raise ValueError(
                f"the ranks of an earlier run share the weights of this {type(model).__name__}: give a new one, and "
                "ckpt_path, or evaluate with the data that fit was given and without ckpt_path"
            )
        mine = hasattr(type(model), "training_step")  # another module has no file of weights in Lightning's form
        plugin = Lightning(data, self._callbacks if mine else self._given_callbacks, *self.intervals)
        plugin._clipping, plugin._given, plugin._loggers = self.clipping, self._given, self._loggers
        plugins = {"lightning": plugin, **self.plugins}
        if plugins.get("limits") is self._limits:  # and none of hookline's own
            same, plugin._portions = portions.split(self._limits)
            plugins = {**plugins, "limits": same} if same else {k: v for k, v in plugins.items() if k != "limits"}
        value, algorithm = self.clipping
        own = isinstance(model, torch.nn.Module) and overridden(model, "configure_gradient_clipping")
        if value is not None and not own:
            plugins["clip"] = {"max_norm": None, "max_value": value} if algorithm == "value" else {"max_norm": value}
        options = dict(self.options)
        if ckpt_path is not None:
            begin = found(ckpt_path, self.checkpoint_callback)
            if isinstance(begin, Path):
                plugins["lightning.file"] = FromFile(begin, weights_only)
                plugin._ckpt_path = str(begin)
            else:
                plugins.setdefault("checkpoint", {"every": None})
                options["resume"] = begin
        plugin.hparams = self._hparams(model, data)
        if own_loggers := [one for one in self._loggers if not isinstance(one, RunLogger)]:
            plugins["lightning.loggers"] = OwnLoggers(own_loggers, plugin.hparams)
        return hookline.Trainer(model, plugins, **options)

    def _hparams(self, model: Any, data: Any) -> dict[str, Any]:
        """Return what the module, the data and loggers know of parameters."""
        known = {**hparams_of(data), **hparams_of(model)} if self._given.enable_autolog_hparams else {}
        for one in self._loggers:
            known.update(one.hparams if isinstance(one, RunLogger) else {})
        return known
