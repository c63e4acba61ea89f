"""ACCMT's trainer: a translation of its arguments to options and plugins."""

from __future__ import annotations

import inspect
import logging
import os
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import hookline
from hookline_accmt.cadences import batches, handlers_of
from hookline_accmt.data import collate_of
from hookline_accmt.describing import described_by, paths
from hookline_accmt.hyperparameters import HyperParameters, count
from hookline_accmt.later import ARGUMENTS
from hookline_accmt.metrics import Metric, metrics_of
from hookline_accmt.module import AcceleratorModule
from hookline_accmt.names import Monitor, current_seed
from hookline_accmt.plugin import Accmt
from hookline_accmt.resuming import check_resume, choose_resume
from hookline_accmt.tracker import plugins_of
from hookline_accmt.words import check_options, own_words

log = logging.getLogger("hookline.accmt")


class Trainer:
    """Trains an `AcceleratorModule`. Steps are batches of one process, as in ACCMT.

    Args:
        hps_config: path of a YAML or JSON, a mapping, or `HyperParameters`.
        model_path: folder for the model, each policy of `model_saving` a folder in it.
        track_name: what trackers call it; the name of the model's folder unless given.
        checkpoint: where runs are kept, `<checkpoint>-<number>` each with its checkpoints; unless given, beside the
            model's folder, and called after it with "checkpoint-" before.
        resume: go on with the newest of these that has a checkpoint; None does where there is one; or the path of a
            run or of one of its checkpoints.
        model_saving: "best_valid_loss", "best_train_loss", "best_<metric>" with a name of `additional_metrics`,
            "always", a list of them, or None. Without validation data the first is the second. "best_" may be left out
            before the name of one of `metrics`.
        evaluate_every_n_steps: steps from one evaluation to the next; None for each epoch's end.
        checkpoint_every: "epoch", "2 epochs", "50 steps", "eval", "3 evaluations" …, or None.
        logging_dir: of TensorBoard, in the run's folder or an absolute path; or the URL of a tracker's server.
        log_with: TensorBoard, WandB, CometML, Aim, MLFlow, ClearML, DVCLive, by class or name, or a list of them.
        log_every: updates of the weights from one value in the log to the next.
        grad_accumulation_steps: batches of one update of the weights.
        clip_grad: norm of all gradients above which they are scaled down to it.
        set_to_none: clear gradients by removing them.
        shuffle_train: shuffle what is trained on.
        shuffle_validation: shuffle what is validated on.
        sampler: what draws the samples of training, or a list of them, one after the other.
        model_saving_below: save only models whose value is below this one.
        model_saving_above: save only models whose value is above this one.
        model_saving_aboce: the same; the documentation of ACCMT writes it so.
        collate_fn: makes a batch of samples, or a list of functions, one after the other; the module's own goes before.
        max_shard_size: size of a file of safetensors from which it is split.
        safe_serialization: save safetensors.
        compile: compile the model, and the teacher.
        train_loss_metric_name: name of the loss of training in logs.
        val_loss_metric_name: name of the loss of validation in logs.
        dataloader_pin_memory: load into memory from which copies to CUDA are quick.
        dataloader_num_workers: processes that load.
        report_loss_after_eval: log the loss of a validation at its end; False also within it.
        handlers: which errors lead to a checkpoint, one `Handler` or a list of them.
        eval_when_finish: evaluate at the end, where `evaluate_every_n_steps` is given.
        eval_when_start: evaluate before training.
        verbose: show progress.
        monitor: what is logged, a `Monitor` or a mapping of its fields.
        metrics: a `Metric`, or a list of them, for what `validation_step` returns under their names.
        kwargs: of the tracker, such as `run_name` and `tags`.

    Raises:
        ValueError, TypeError: what cannot be.
    """

    def __init__(
        self,
        hps_config: Any,
        model_path: str | Path,
        track_name: str | None = None,
        checkpoint: str | Path | None = None,
        resume: bool | str | Path | None = False,
        model_saving: Any = "best_valid_loss",
        evaluate_every_n_steps: int | None = None,
        checkpoint_every: str | None = "epoch",
        logging_dir: str = "logs",
        log_with: Any = None,
        log_every: int = 1,
        grad_accumulation_steps: int | None = None,
        clip_grad: float | None = None,
        set_to_none: bool = True,
        shuffle_train: bool = True,
        shuffle_validation: bool = False,
        sampler: Any = None,
        model_saving_below: float | None = None,
        model_saving_above: float | None = None,
        collate_fn: Any = None,
        max_shard_size: str = "10GB",
        safe_serialization: bool = False,
        compile: bool = False,
        train_loss_metric_name: str = "train_loss",
        val_loss_metric_name: str = "val_loss",
        dataloader_pin_memory: bool = True,
        dataloader_num_workers: int = 0,
        report_loss_after_eval: bool = True,
        handlers: Any = None,
        eval_when_finish: bool = True,
        eval_when_start: bool = False,
        verbose: bool = True,
        monitor: Monitor | Mapping[str, Any] | None = None,
        model_saving_aboce: float | None = None,
        metrics: Metric | Sequence[Metric] | None = None,
        **kwargs: Any,
    ) -> None:
        self.hps = HyperParameters.read(hps_config)
        self.model_path = Path(model_path)
        if not self.model_path.name:
            raise ValueError(f"model_path={str(model_path)!r} has no name")
        named = self.model_path.with_name(f"checkpoint-{self.model_path.name}")
        self.checkpoint = named if checkpoint is None else Path(checkpoint)
        self.resume = check_resume(resume, self.checkpoint)
        self.core: hookline.Trainer | None = None
        """The trainer behind the last `fit`."""
        if model_saving_above is not None and model_saving_aboce is not None:
            raise ValueError("model_saving_above and model_saving_aboce are two names of one argument; give one")
        above = model_saving_above if model_saving_aboce is None else model_saving_aboce
        for name, given in (("evaluate_every_n_steps", evaluate_every_n_steps), ("log_every", log_every)):
            if given is not None:
                count(name, given)
        self.metrics = metrics_of(metrics)
        self._model_saving = {
            "policy": self._policy(model_saving),
            "below": model_saving_below,
            "above": above,
            "safe_serialization": safe_serialization,
            "max_shard_size": max_shard_size,
        }
        self._objects = {"sampler": sampler, "collate_fn": collate_fn}
        collate_of(collate_fn)
        self._accmt: dict[str, Any] = {
            "hps": self.hps.as_config(),
            "model_path": str(self.model_path),
            "shuffle_train": shuffle_train,
            "shuffle_validation": shuffle_validation,
            "dataloader_pin_memory": dataloader_pin_memory,
            "dataloader_num_workers": dataloader_num_workers,
            "set_to_none": set_to_none,
        }
        self._options: dict[str, Any] = {
            "epochs": self.hps.epochs,
            "train_batch_size": self.hps.batch_size * (grad_accumulation_steps or 1),
            "val_batch_size": self.hps.val_batch_size,
            "evaluate_every": "epoch" if evaluate_every_n_steps is None else f"{evaluate_every_n_steps} batches",
            "eval_when_start": eval_when_start,
            "eval_when_finish": eval_when_finish and evaluate_every_n_steps is not None,
            "report_loss_after_eval": report_loss_after_eval,
            "log_every": f"{log_every} steps",
            "train_loss_metric_name": train_loss_metric_name,
            "val_loss_metric_name": val_loss_metric_name,
            "runs_folder": str(self.checkpoint.parent),
            "run_name": self.checkpoint.name,
        }
        self._plugins: dict[str, Any] = {"jsonl": {}}
        if verbose:
            self._plugins["progress"] = {}
        if grad_accumulation_steps not in (None, 1):
            self._plugins["accumulate"] = {"steps": count("grad_accumulation_steps", grad_accumulation_steps)}
        if clip_grad is not None:
            if isinstance(clip_grad, bool) or not isinstance(clip_grad, (int, float)):
                raise TypeError(f"clip_grad={clip_grad!r} must be a number, or None")
            self._plugins["clip"] = {"max_norm": float(clip_grad)}
        self._plugins["checkpoint"] = {"every": batches(checkpoint_every)}
        errors = list(dict.fromkeys(handler.kind for handler in handlers_of(handlers)))
        if errors:
            if checkpoint_every is None:
                raise ValueError("handlers make a checkpoint, and checkpoint_every=None disables them; name a cadence")
            self._plugins["guard"] = {"errors": errors, "every": "step"}
        if compile:
            self._plugins["compile"] = {}
        if monitor is not None:
            self._plugins["monitor"] = Monitor.of(monitor).options()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self._plugins["ddp"] = {}
        for name in kwargs:
            if name in ARGUMENTS:
                raise TypeError(f"Trainer has no {name!r}, which is of another version of ACCMT: use {ARGUMENTS[name]}")
        known = [name for name in inspect.signature(Trainer).parameters if name != "kwargs"]
        aimed = [name for name, given in (("track_name", track_name), ("logging_dir", logging_dir != "logs")) if given]
        if log_with is None and aimed:
            log.warning("%s without log_with: there is no tracker that it could be said to", " and ".join(aimed))
        self._plugins |= plugins_of(log_with, track_name or self.model_path.name, str(logging_dir), kwargs, known)
        check_options({"accmt": self._accmt, **self._all_plugins(True, False)})

    def fit(
        self,
        module: AcceleratorModule | str | tuple[str, Any],
        train_dataset: Any = None,
        val_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        """Train.

        Args:
            module: what to train; or a path of transformers, or that and a class, as for `AcceleratorModule.from_hf`.
            train_dataset: what to train on; None where the module has `get_train_dataloader`.
            val_dataset: what to validate on; None where it has `get_validation_dataloader`, or for no validation.
            kwargs: of `from_pretrained`, where a path is given.

        Raises:
            FileNotFoundError: `resume=True`, and there is no run to go on with.
            Whatever is raised in it; nothing is swallowed.
        """
        if isinstance(module, (str, tuple)):
            module = AcceleratorModule.from_hf(*([module] if isinstance(module, str) else module), **kwargs)
        elif kwargs:
            raise TypeError(
                f"fit() got {', '.join(kwargs)}, which are arguments of from_pretrained; the module stands already"
            )
        elif not isinstance(module, AcceleratorModule):
            kind = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
            raise TypeError(f"fit() got {kind}; give it an object of a subclass of AcceleratorModule")
        data = {"train_dataset": train_dataset, "val_dataset": val_dataset}
        with own_words():
            self.core = self._build(module, data, self._resume())
            self.core.train()

    @property
    def status_dict(self) -> dict[str, Any]:
        """How far the last `fit` is or was.

        Raises:
            RuntimeError: there has been none.
        """
        if self.core is None:
            raise RuntimeError("there has been no fit yet, so there is no status")
        bridge: Any = self.core.module
        status: dict[str, Any] = bridge.user.status_dict
        return status

    def plan(self) -> list[dict[str, Any]]:
        """Return who does what in the run behind it, as `hookline plan` shows it."""
        core = self.core or self._build(_Blank(), {"train_dataset": [0], "val_dataset": [0]})
        return core.plugins.plan()

    def to_yaml(self, module: Any, train_dataset: Any = None, val_dataset: Any = None) -> str:
        """Return the configuration by which `hookline fit` does what `fit` does, to the bit.

        Args:
            module: the class of the module or a function that makes it, or a mapping of `_target_` and arguments.
            train_dataset: what makes the dataset, in the same way.
            val_dataset: likewise.

        Raises:
            TypeError: an object, of which nobody can know how it was made.
        """
        if self.metrics:
            raise TypeError(
                "to_yaml: metrics are objects; have get_metrics() of the module answer metrics of torchmetrics"
            )
        made = {"train_dataset": train_dataset, "val_dataset": val_dataset}
        described = {name: described_by(name, given) for name, given in made.items() if given is not None}
        functions = {name: paths(name, given) for name, given in self._objects.items() if given is not None}
        node = described_by("module", module)
        kind = pkgutil.resolve_name(node["_target_"])
        validates = "val_dataset" in described or hasattr(kind, "get_validation_dataloader")
        plugins = self._all_plugins(validates, hasattr(kind, "get_metrics"))
        resume = self.resume if isinstance(self.resume, str) else self.resume is not False
        tree = {
            "module": node,
            "trainer": {**self._options, "seed": current_seed(), "resume": resume},
            "plugins": {"accmt": {**self._accmt, **described, **functions}, **plugins},
        }
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)

    def _policy(self, given: Any) -> Any:
        """Return what the plugin model_saving calls it."""
        if isinstance(given, (list, tuple)):
            return [self._policy(name) for name in given]
        return f"best_{given}" if given in [metric.main_metric for metric in self.metrics] else given

    def _resume(self) -> bool | str:
        return choose_resume(self.resume, self.checkpoint)

    def _build(
        self, module: AcceleratorModule, datasets: dict[str, Any], resume: bool | str = False
    ) -> hookline.Trainer:
        accmt = Accmt(**self._accmt)
        accmt.metrics = self.metrics
        accmt.use(**{name: given for name, given in {**self._objects, **datasets}.items() if given is not None})
        validates = datasets["val_dataset"] is not None or hasattr(module, "get_validation_dataloader")
        plugins = self._all_plugins(validates, hasattr(module, "get_metrics"))
        options = {**self._options, "seed": current_seed(), "resume": resume}
        return hookline.Trainer(module, {"accmt": accmt, **plugins}, **options)

    def _all_plugins(self, validates: bool, has_metrics: bool) -> dict[str, Any]:
        saving = dict(self._model_saving)
        if saving["policy"] == "best_valid_loss" and not validates:
            log.info("there are no validation data, so the model is saved by its best loss of training")
            saving["policy"] = "best_train_loss"
        plugins = {**self._plugins, "model_saving": saving}
        if has_metrics:
            plugins["metrics"] = {}
        return plugins


class _Blank(AcceleratorModule):
    """A module to make a plan with."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(1, 1)

    def step(self, batch: Any) -> Any:
        """Never called."""
