"""What PyMarlin's trainer is told, and the options and plugins of hookline that it means."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hookline import nearest
from hookline_pymarlin.plugins import BatchSizeLimit, Written

log = logging.getLogger("hookline.pymarlin")

BACKENDS: dict[str, dict[str, dict[str, Any]]] = {
    "sp": {},
    "sp-amp": {"amp": {"precision": "fp16", "init_scale": 4096.0}},
    "ddp": {"ddp": {"find_unused_parameters": True}},
    "ddp-amp": {"ddp": {"find_unused_parameters": True}, "amp": {"precision": "fp16", "init_scale": 4096.0}},
}
GONE = {  # and why
    "sp-dp": "differential privacy needs opacus, which nobody has made a plugin of",
    "ddp-dp": "differential privacy needs opacus, which nobody has made a plugin of",
    "sp-amp-apex": "apex is given up; take sp-amp",
    "ddp-amp-apex": "apex is given up; take ddp-amp",
}


@dataclass
class StatInitArguments:
    """When stats are logged."""

    log_steps: int = 50
    """Steps from one flush of values to the next."""
    update_system_stats: bool = False
    """Log what the machine and its devices do, by the plugin monitor."""


@dataclass
class WriterInitArguments:
    """Where writers write."""

    tb_log_dir: str = "logs"
    """Of TensorBoard, in the folder of the run."""


@dataclass
class DefaultCheckpointerArguments:
    """When checkpoints are saved, and from which a run goes on."""

    checkpoint: bool = True
    delete_existing_checkpoints: bool = False
    period: int = 1
    """Epochs from one checkpoint to the next."""
    save_dir: str = "checkpoints"
    """Where the folders of runs are."""
    model_state_save_dir: str | None = None
    """Unless None, the newest model alone is saved after each evaluation as well, in `models` of the run's folder."""
    load_dir: str | None = None
    """The folder of a run to go on with, or the folder that runs are in, for the newest of `file_prefix`."""
    load_filename: str | None = None
    """One checkpoint in `checkpoints` of that run's folder, instead of the newest."""
    file_prefix: str = "model"
    """What the run is called."""
    file_ext: str = "pt"

    def __post_init__(self) -> None:
        if self.delete_existing_checkpoints:
            raise ValueError(
                "delete_existing_checkpoints=True is not done here: a run has a folder of its own and keeps the last "
                "three checkpoints of it; remove folders of runs by hand"
            )
        if self.period < 1:
            raise ValueError(f"period={self.period} must be at least 1 epoch")
        if self.file_ext != "pt":
            raise ValueError(f"file_ext={self.file_ext!r} has no meaning here: a checkpoint is a folder")
        if self.load_dir is None and self.load_filename is not None:
            raise ValueError(f"load_filename={self.load_filename!r} is looked for in load_dir, which is not given")

    def resume(self) -> str | bool:
        """Return where to go on.

        Raises:
            ValueError: it is not there; a run never begins anew where another was asked for.
        """
        if self.load_dir is None:
            return False
        folder = Path(self.load_dir)
        if not (folder / "checkpoints").is_dir():
            runs = [run for run in folder.glob(f"{self.file_prefix}-*") if (run / "checkpoints").is_dir()]
            if not runs:
                raise ValueError(
                    f"load_dir={self.load_dir!r} is neither the folder of a run nor one that has runs called "
                    f"{self.file_prefix}-1, {self.file_prefix}-2 …"
                )
            folder = max(runs, key=lambda run: int(run.name.rpartition("-")[2]))
        if self.load_filename is None:
            return str(folder)
        one = folder / "checkpoints" / self.load_filename
        if not one.is_dir():
            there = ", ".join(sorted(path.name for path in one.parent.iterdir() if path.is_dir()))
            raise ValueError(f"load_filename={self.load_filename!r} is not in {one.parent}; it has {there}")
        return str(one)


@dataclass
class TrainerArguments:
    """What PyMarlin's trainer is told."""

    epochs: int = 1
    use_gpu: bool = True
    train_batch_size: int = 1
    """Samples of one optimizer step, over all ranks and micro-batches; never changed."""
    gpu_batch_size_limit: int = 512
    """Samples of one micro-batch at most."""
    val_batch_size: int = 1
    """On one rank."""
    max_train_steps_per_epoch: int | None = None
    max_val_steps_per_epoch: int | None = None
    clip_grads: bool = True
    max_grad_norm: float = 1.0
    reset_optimizers_schedulers: bool = False
    checkpointer_args: DefaultCheckpointerArguments = field(default_factory=DefaultCheckpointerArguments)
    distributed_training_args: Any = None
    writers: Sequence[Any] = ("stdout", "tensorboard")
    """"stdout", "tensorboard", "aml", and objects of `Writer`."""
    stats_args: StatInitArguments = field(default_factory=StatInitArguments)
    writer_args: WriterInitArguments = field(default_factory=WriterInitArguments)
    disable_tqdm: bool = False
    log_level: str = "INFO"
    backend: str = "sp"
    amp_backend_native: bool = False
    amp_backend_apex: bool = False
    amp_level_apex: str = "O1"
    differential_privacy_args: Any = None
    seed: int = 0
    """Of all random states; PyMarlin leaves it to the user's script."""

    def __post_init__(self) -> None:
        for name, kind in (
            ("checkpointer_args", DefaultCheckpointerArguments),
            ("stats_args", StatInitArguments),
            ("writer_args", WriterInitArguments),
        ):
            if isinstance(given := getattr(self, name), dict):  # as a YAML has it
                setattr(self, name, made(kind, given, name))
        if self.backend in GONE:
            raise ValueError(f"backend={self.backend!r} is not here: {GONE[self.backend]}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend={self.backend!r} must be one of {', '.join(BACKENDS)}")
        if self.amp_backend_apex:
            raise ValueError("amp_backend_apex=True is not here: apex is given up; take backend='sp-amp' or 'ddp-amp'")
        if self.amp_backend_native and not self.backend.endswith("-amp"):
            self.backend += "-amp"
        if self.differential_privacy_args is not None:
            raise ValueError(f"differential_privacy_args is not here: {GONE['sp-dp']}")
        if self.distributed_training_args is not None:
            raise ValueError(
                "distributed_training_args is not here: ranks are what the launcher says (hookline fit --nproc, "
                "torchrun, SLURM, MPI); leave it None"
            )
        if self.gpu_batch_size_limit < 1:
            raise ValueError(f"gpu_batch_size_limit={self.gpu_batch_size_limit} must be at least 1")

    def options(self) -> dict[str, Any]:
        """Return the options of `hookline.Trainer`."""
        checkpoints = self.checkpointer_args
        return {
            "epochs": self.epochs,
            "train_batch_size": self.train_batch_size,
            "val_batch_size": self.val_batch_size,
            "max_train_steps_per_epoch": self.max_train_steps_per_epoch,
            "max_val_steps_per_epoch": self.max_val_steps_per_epoch,
            "reset_optimizers_schedulers": self.reset_optimizers_schedulers,
            "train_loss_metric_name": "loss",
            "log_every": f"{self.stats_args.log_steps} steps",
            "device": "auto" if self.use_gpu else "cpu",
            "seed": self.seed,
            "runs_folder": checkpoints.save_dir,
            "run_name": checkpoints.file_prefix,
            "resume": checkpoints.resume(),
        }

    def plugins(self) -> dict[str, Any]:
        """Return the plugins by name, with their options."""
        checkpoints = self.checkpointer_args
        plugins: dict[str, Any] = {
            "jsonl": {},
            **{name: dict(options) for name, options in BACKENDS[self.backend].items()},
            "gpu_batch_size_limit": BatchSizeLimit(self.gpu_batch_size_limit),
        }
        if self.clip_grads:
            plugins["clip"] = {"max_norm": self.max_grad_norm}
        if checkpoints.checkpoint:
            plugins["checkpoint"] = {"every": f"{checkpoints.period} epochs"}
        elif checkpoints.load_dir is not None:
            plugins["checkpoint"] = {"every": None}
        if checkpoints.model_state_save_dir is not None:
            plugins["model_saving"] = {"policy": "always"}
        if self.stats_args.update_system_stats:
            plugins["monitor"] = {"cpu_utilization": True, "gpu_utilization": True}
        return {**plugins, **self._writers()}

    def _writers(self) -> dict[str, Any]:
        plugins: dict[str, Any] = {}
        for number, writer in enumerate(self.writers):
            if writer == "stdout":
                if not self.disable_tqdm:
                    plugins["progress"] = {}
            elif writer == "tensorboard":
                plugins["tensorboard"] = {"folder": self.writer_args.tb_log_dir}
            elif writer == "aml":
                log.warning("the writer 'aml' is not here; in Azure ML the plugin mlflow does its work")
            elif isinstance(writer, str):
                raise ValueError(f"writers: {writer!r} must be stdout, tensorboard, aml or a Writer of your own")
            else:
                plugins[f"writer_{number}"] = Written(writer)
        return plugins


def made(kind: Any, given: dict[str, Any], where: str) -> Any:
    """Return arguments from a mapping, as a YAML has them.

    Raises:
        ValueError: a name that is none, with the nearest that is.
    """
    known = [one.name for one in fields(kind)]
    for name in given:
        if name not in known:
            raise ValueError(f"{where} has no {name!r}{nearest(name, known)}; it has {', '.join(known)}")
    return kind(**given)
