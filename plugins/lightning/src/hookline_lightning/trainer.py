"""The trainer of today's Lightning: a translation of its arguments to options and plugins."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import hookline
from hookline import CallbackInterface, hookimpl, nearest
from hookline_lightning import early, intervals, portions
from hookline_lightning.bridge import overridden
from hookline_lightning.module import LightningDataModule
from hookline_lightning.plugin import Lightning

PRECISIONS: dict[Any, dict[str, Any]] = {
    "32-true": {}, "32": {}, 32: {},
    "bf16-mixed": {"amp": {"precision": "bf16"}}, "bf16": {"amp": {"precision": "bf16"}},
    "16-mixed": {"amp": {"precision": "fp16"}}, "16": {"amp": {"precision": "fp16"}},
    16: {"amp": {"precision": "fp16"}},
}  # fmt: skip
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"ddp": {}},
    "ddp_find_unused_parameters_true": {"ddp": {"find_unused_parameters": True}},
    "ddp_find_unused_parameters_false": {"ddp": {}},
    "fsdp": {"fsdp": {}},
}
DEVICES = {"auto": "auto", "cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "mps": "mps"}
NOT_HONOURED = {
    "min_epochs": "training ends where its limits say; stop by a callback of your own that counts",
    "min_steps": "training ends where its limits say; stop by a callback of your own that counts",
    "num_nodes": "ranks are what the launcher says (torchrun, SLURM, MPI)",
    "deterministic": "name plugin backend (deterministic: error)",
    "benchmark": "name plugin backend (cudnn_benchmark: true)",
    "inference_mode": "evaluations are under torch.no_grad",
    "use_distributed_sampler": "loaders are shared between ranks, unless their sampler or hookline.sharded says so",
    "profiler": "name plugin profile, or wrap the run in torch.profiler",
    "detect_anomaly": "call torch.autograd.set_detect_anomaly(True) yourself",
    "barebones": "leave plugins out by logger=False, enable_checkpointing=False, enable_progress_bar=False",
    "sync_batchnorm": "call torch.nn.SyncBatchNorm.convert_sync_batchnorm on the module yourself",
    "reload_dataloaders_every_n_epochs": "loaders are asked for once in a run",
    "model_registry": "models are files in the folder of the run",
    "enable_autolog_hparams": "parameters of a run are its configuration",
    "enable_model_summary": "name plugin summary, or print the module yourself",
}
LOGGERS = {  # classes of the real package
    "CSVLogger": "csv", "TensorBoardLogger": "tensorboard", "WandbLogger": "wandb", "MLFlowLogger": "mlflow",
    "CometLogger": "comet", "NeptuneLogger": "no plugin",
}  # fmt: skip


class Trainer:
    """Trains a module of today's Lightning.

    Args:
        max_epochs: epochs; 1000 unless something else says when to end. -1 for no such limit.
        max_steps: optimizer steps; -1 for no such limit.
        max_time: of training, such as "10 min", or as Lightning writes it, "00:12:00:00" (days first).
        accumulate_grad_batches: micro-batches of one optimizer step.
        gradient_clip_val: the largest norm of all gradients, or of each value.
        gradient_clip_algorithm: "norm" or "value".
        precision: "32-true", "bf16-mixed" or "16-mixed".
        val_check_interval: batches of an epoch between validations, or (a float) a fraction of an epoch.
        check_val_every_n_epoch: validate only in each so many epochs; None counts batches across epochs.
        limit_train_batches: a number of batches, or (a float) a fraction of the loader; so the others.
        limit_val_batches: 0 for no validation.
        limit_test_batches: as above.
        limit_predict_batches: as above.
        overfit_batches: train on the same first batches in each epoch, and validate on as many.
        fast_dev_run: try everything with this many batches (True for one).
        callbacks: one, or a list of them.
        logger: False for none, True for the plugin csv, a name, a list of names, or a mapping of names to options.
        default_root_dir: where folders of runs are made.
        log_every_n_steps: optimizer steps from one flush of values to the next.
        num_sanity_val_steps: validation batches to try before training.
        enable_progress_bar: whether to show one.
        enable_checkpointing: whether to save the run after each epoch.
        accelerator: "auto", "cpu", "gpu", "cuda" or "mps".
        devices: ranks on this machine; more than one are started by a launcher.
        strategy: "auto", "ddp", "ddp_find_unused_parameters_true" or "fsdp".
        seed: of the order of samples and of all random states.
        plugins: more plugins of hookline by name.
        others: no argument, or one that is not honoured.

    Raises:
        TypeError: an argument that is none, or is not honoured, and why.
        ValueError: a value that cannot be.
    """

    def __init__(
        self, *, max_epochs: int | None = None, max_steps: int = -1, max_time: str | None = None,
        accumulate_grad_batches: int = 1, gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None, precision: Any = "32-true",
        val_check_interval: Any = 1.0, check_val_every_n_epoch: int | None = 1,
        limit_train_batches: int | float = 1.0, limit_val_batches: int | float = 1.0,
        limit_test_batches: int | float = 1.0, limit_predict_batches: int | float = 1.0,
        overfit_batches: int | float = 0.0, fast_dev_run: int | bool = False, callbacks: Any = None,
        logger: Any = True, default_root_dir: str | os.PathLike[str] | None = None, log_every_n_steps: int = 50,
        num_sanity_val_steps: int = 2, enable_progress_bar: bool = True, enable_checkpointing: bool = True,
        accelerator: str = "auto", devices: Any = "auto", strategy: str = "auto", seed: int = 0,
        plugins: Mapping[str, Any] | None = None, **others: Any,
    ) -> None:  # fmt: skip
        self._refuse(others)
        self.callbacks = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks] if callbacks else []
        self.clipping = (gradient_clip_val, gradient_clip_algorithm)
        if gradient_clip_algorithm not in (None, "norm", "value"):
            raise ValueError(f"gradient_clip_algorithm={gradient_clip_algorithm!r} must be norm or value")
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r} must be one of 32-true, bf16-mixed, 16-mixed")
        if accelerator not in DEVICES:
            raise ValueError(f"accelerator={accelerator!r} must be one of {', '.join(DEVICES)}")
        if not isinstance(val_check_interval, (int, float)):
            val_check_interval = duration(val_check_interval)
        self.intervals: tuple[Any, int | None] = (val_check_interval, check_val_every_n_epoch)
        if fast_dev_run:
            self.intervals = (1.0, 1)
        intervals.check(*self.intervals)
        limits = {
            "fast_dev_run": fast_dev_run or None,
            "overfit_batches": overfit_batches or None,
            **{
                f"{stage}_batches": amount
                for stage, amount in (
                    ("train", limit_train_batches), ("val", limit_val_batches), ("test", limit_test_batches),
                    ("predict", limit_predict_batches),
                )
                if not (isinstance(amount, float) and amount == 1.0) and not (stage == "val" and amount == 0)
            },
        }  # fmt: skip
        limits = {name: amount for name, amount in limits.items() if amount is not None}
        self._limits: dict[str, Any] = limits
        self._accumulates = accumulate_grad_batches != 1
        no_validation = limit_val_batches == 0
        steps, epochs = (None if number in (None, -1) else number for number in (max_steps, max_epochs))
        if epochs is None and steps is None and max_time is None and max_epochs == -1:
            raise ValueError("max_epochs=-1 never ends: say max_steps or max_time")
        if epochs is None and steps is None and max_time is None:
            epochs = 1000
        self.options: dict[str, Any] = {
            "epochs": epochs,
            "max_steps": steps,
            "max_time": None if max_time is None else duration(max_time),
            "evaluate_every": None if no_validation else intervals.cadence(*self.intervals),
            "eval_when_finish": False,
            "sanity_val_steps": 0 if no_validation else num_sanity_val_steps,
            "log_every": f"{log_every_n_steps} steps",
            "train_loss_metric_name": "loss",
            "device": DEVICES[accelerator],
            "seed": seed,
            "runs_folder": os.fspath(default_root_dir) if default_root_dir is not None else "runs",
            "run_name": "lightning",
        }
        self.plugins: dict[str, Any] = {
            "jsonl": {},
            **_of_strategy(strategy, devices),
            **PRECISIONS[precision],
            **({"accumulate": {"steps": accumulate_grad_batches}} if accumulate_grad_batches != 1 else {}),
            **({"limits": limits} if limits else {}),
            **({"checkpoint": {}} if enable_checkpointing else {}),
            **({"progress": {}} if enable_progress_bar else {}),
            **_of_logger(logger),
            **(plugins or {}),
        }
        self.core: Any = None
        """The `hookline.Trainer` of the newest run."""

    @staticmethod
    def _refuse(others: Mapping[str, Any]) -> None:
        known = [name for name in inspect.signature(Trainer.__init__).parameters if name not in ("self", "others")]
        for name in others:
            if name in NOT_HONOURED:
                raise TypeError(f"Trainer({name}=…) is not honoured here: {NOT_HONOURED[name]}")
            hint = nearest(name, [*known, *NOT_HONOURED])
            raise TypeError(f"Trainer has no argument {name!r}{hint}; it has {', '.join(known)}")

    # Doors ----------------------------------------------------------------------------

    def fit(
        self, model: Any, train_dataloaders: Any = None, val_dataloaders: Any = None, datamodule: Any = None,
        ckpt_path: Any = None,
    ) -> None:  # fmt: skip
        """Train.

        Args:
            model: a module.
            train_dataloaders: a loader, or a data module.
            val_dataloaders: a loader or several.
            datamodule: a data module, in place of loaders.
            ckpt_path: "last", or the folder of a run or of one of its checkpoints, to go on with.

        Raises:
            ValueError: data that are given twice, or a checkpoint that is none.
        """
        data = _data(datamodule, train=train_dataloaders, val=val_dataloaders)
        self._begin(model, data, ckpt_path).train()

    def validate(
        self, model: Any = None, dataloaders: Any = None, datamodule: Any = None, ckpt_path: Any = None
    ) -> list[dict[str, float]]:
        """Validate; return the metrics, in a list of one."""
        return [self._again(model, _data(datamodule, val=dataloaders), ckpt_path).validate()]

    def test(
        self, model: Any = None, dataloaders: Any = None, datamodule: Any = None, ckpt_path: Any = None
    ) -> list[dict[str, float]]:
        """Test; return the metrics, in a list of one."""
        return [self._again(model, _data(datamodule, test=dataloaders), ckpt_path).test()]

    def predict(
        self, model: Any = None, dataloaders: Any = None, datamodule: Any = None, ckpt_path: Any = None
    ) -> list[Any]:
        """Predict; return what `predict_step` returned of each batch, by loader where there are several."""
        core, kept = self._again(model, _data(datamodule, predict=dataloaders), ckpt_path), Predictions()
        core.plugins.register(kept, "predictions")
        try:
            core.predict()
        finally:
            core.plugins.unregister(kept)
        return list(kept.outputs.values()) if len(kept.outputs) > 1 else next(iter(kept.outputs.values()), [])

    def plan(self, model: Any = None) -> list[dict[str, Any]]:
        """Return who does what in the run behind it, as `hookline plan` shows it."""
        core = self.core if model is None else self._made(model, None, None)
        if core is None:
            raise ValueError("plan() of a trainer that has not run needs the module: plan(model)")
        return core.plugins.plan()

    @property
    def callback_metrics(self) -> dict[str, torch.Tensor]:
        """The newest of all logged values."""
        return self.core.module.view.callback_metrics if self.core else {}

    @property
    def logged_metrics(self) -> dict[str, torch.Tensor]:
        """The newest values that trackers saw."""
        return self.core.module.view.logged_metrics if self.core else {}

    # The run behind it ----------------------------------------------------------------

    def _again(self, model: Any, data: Any, ckpt_path: Any) -> Any:
        """Return the run of this module if there is one and nothing new is asked of it, else another."""
        core = self.core
        if model is None and core is None:
            raise ValueError("there is no module yet: give one")
        same = core is not None and (model is None or core.module.module is model)
        if same and data is None and ckpt_path is None:
            return core
        made = self._begin(core.module.module if model is None else model, data, ckpt_path)
        if core is not None and hasattr(core.module, "view") and hasattr(made.module, "view"):
            made.module.view.trained = (core.module.view.current_epoch, core.module.view.global_step)
        return made

    def _begin(self, model: Any, data: Any, ckpt_path: Any) -> Any:
        self.core = self._made(model, data, ckpt_path)
        return self.core

    def _made(self, model: Any, data: Any, ckpt_path: Any) -> hookline.Trainer:
        if early.is_mine(model):
            raise TypeError(
                f"{type(model).__name__} is of Lightning's first year, for which there is no trainer of its own here: "
                'hookline.Trainer(module, plugins={"lightning": {}}, epochs=…)'
            )
        plugin = Lightning(data, self.callbacks, *self.intervals)
        plugin._clipping = self.clipping
        plugin._accumulates = self._accumulates
        plugins = {"lightning": plugin, **self.plugins}
        if plugins.get("limits") is self._limits:  # and none of hookline's own
            same, otherwise = portions.split(self._limits)
            plugin._portions = (otherwise, "overfit_batches" in self._limits)
            plugins = {**plugins, "limits": same} if same else {k: v for k, v in plugins.items() if k != "limits"}
        value, algorithm = self.clipping
        own = isinstance(model, torch.nn.Module) and overridden(model, "configure_gradient_clipping")
        if value is not None and not own:
            plugins["clip"] = {"max_norm": None, "max_value": value} if algorithm == "value" else {"max_norm": value}
        options = dict(self.options)
        if ckpt_path is not None:
            plugins.setdefault("checkpoint", {"every": None})
            options["resume"] = self._resume(ckpt_path)
        return hookline.Trainer(model, plugins, **options)

    @staticmethod
    def _resume(ckpt_path: Any) -> str | bool:
        if ckpt_path == "last":
            return True
        path = Path(ckpt_path)
        if not path.is_dir():
            what = "is a file" if path.exists() else "is not there"
            raise ValueError(
                f'ckpt_path={str(ckpt_path)!r} {what}: say "last", or the folder of a run or of a checkpoint of it; '
                'weights of a .ckpt of Lightning are read by hookline_checkpoint.load_foreign(file)["state_dict"]'
            )
        return str(path)


class Predictions(CallbackInterface):
    """Keeps predictions."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[Any]] = {}

    @hookimpl
    def on_end_predict_step(self, outputs: Any, key: str) -> None:
        self.outputs.setdefault(key, []).append(outputs)


class Loaders(LightningDataModule):
    """Loaders that were given as they are."""

    def __init__(self, loaders: Mapping[str, Any]) -> None:
        for stage, loader in loaders.items():
            setattr(self, f"{stage}_dataloader", lambda loader=loader: loader)


def _data(datamodule: Any, **loaders: Any) -> Any:
    given = {stage: loader for stage, loader in loaders.items() if loader is not None}
    if len(given) == 1 and hasattr(next(iter(given.values())), "prepare_data"):  # Lightning takes it there, too
        datamodule, given = next(iter(given.values())), {}
    if datamodule is not None and given:
        raise ValueError("loaders and a datamodule are given; give one of them")
    return datamodule if datamodule is not None else Loaders(given) if given else None


def duration(text: str) -> str:
    """Return a time of training as hookline writes it; Lightning's is days, hours, minutes and seconds."""
    parts = str(text).split(":")
    if len(parts) != 4 or not all(part.isdigit() for part in parts):
        hookline.seconds(text, "max_time")
        return text
    days, hours, minutes, rest = map(int, parts)
    return f"{((days * 24 + hours) * 60 + minutes) * 60 + rest} s"


def _of_strategy(strategy: str, devices: Any) -> dict[str, Any]:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = len(devices) if isinstance(devices, Sequence) and not isinstance(devices, str) else devices
    if wanted not in ("auto", -1, "-1") and int(wanted) > 1 and ranks == 1:
        raise ValueError(
            f"devices={devices!r}: this is one process; a launcher starts more of them, `torchrun --nproc-per-node "
            f"{wanted} script.py`, and each is one device"
        )
    if strategy == "auto":
        return dict(STRATEGIES["ddp"]) if ranks > 1 else {}
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} must be auto or one of {', '.join(STRATEGIES)}; others are plugins")
    return {name: dict(options) for name, options in STRATEGIES[strategy].items()}


def _of_logger(logger: Any) -> dict[str, Any]:
    if logger is None or logger is False:
        return {}
    if logger is True:
        return {"csv": {}}
    if isinstance(logger, Mapping):
        return dict(logger)
    named: dict[str, Any] = {}
    for one in logger if isinstance(logger, (list, tuple)) else [logger]:
        if not isinstance(one, str):
            kind = type(one).__name__
            here = f"; here it is {LOGGERS[kind]!r}" if kind in LOGGERS else ""
            raise ValueError(f"logger={kind}(…): loggers are plugins and are named, such as logger='csv'{here}")
        named[one] = {}
    return named
