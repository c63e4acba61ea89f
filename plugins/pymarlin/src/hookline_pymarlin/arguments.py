"""What PyMarlin's trainer is told, and the options and plugins of hookline that it means."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from hookline import nearest
from hookline_pymarlin.backends import BACKENDS, GONE, check_backend, launched
from hookline_pymarlin.plugins import BatchSizeLimit, FreshSchedules, KeptSeed, ModelFile, Period
from hookline_pymarlin.ranks import DistributedTrainingArguments
from hookline_pymarlin.stats import StatInitArguments
from hookline_pymarlin.writers import Stdout, Writer, WriterInitArguments

log = logging.getLogger("hookline.pymarlin")


@dataclass
class DefaultCheckpointerArguments:
    """When checkpoints are saved, and from which a run goes on."""

    checkpoint: bool = True
    delete_existing_checkpoints: bool = False
    period: int = 1
    """Epochs from one checkpoint to the next, from the first epoch on; the last is saved as well."""
    save_dir: str = "checkpoints"
    """Where the folders of runs are."""
    model_state_save_dir: str | None = "checkpoints"
    """Where the answer of the module's `get_state` is saved when training ends; None for nowhere."""
    load_dir: str | None = None
    """The folder of a run to go on with, or the folder that runs are in, for the newest of `file_prefix`.

    If it is `save_dir` and there is no run yet, training begins anew.
    """
    load_filename: str | None = None
    """One checkpoint in `checkpoints` of that run's folder, instead of the newest."""
    file_prefix: str = "model"
    """What the run is called; the model is saved as `<file_prefix>_model_<epoch>.<file_ext>`."""
    file_ext: str = "pt"
    log_level: str = "INFO"
    """From which level the plugin checkpoint logs."""

    def __post_init__(self) -> None:
        if self.delete_existing_checkpoints:
            raise ValueError(
                "delete_existing_checkpoints=True is not done here: a run has a folder of its own, so those of others "
                "are never in its way; leave it away, and remove folders of runs by hand"
            )
        if self.period < 1:
            raise ValueError(f"period={self.period} must be at least 1 epoch")
        if not re.fullmatch(r"\w[\w.-]*", self.file_prefix):
            raise ValueError(
                f"file_prefix={self.file_prefix!r} names a run: give letters, digits, '_', '-' and '.' alone"
            )
        if not self.load_dir and self.load_filename is not None:
            raise ValueError(f"load_filename={self.load_filename!r} is looked for in load_dir, which is not given")

    @property
    def model_path(self) -> str:
        """The path of the model that is saved when training ends, with a place for the index of the last epoch."""
        return f"{self.model_state_save_dir}/{self.file_prefix}_model_{{}}.{self.file_ext}"

    def resume(self) -> str | bool:
        """Return where to go on.

        Raises:
            ValueError: it is not there; a run never begins anew where another was asked for.
        """
        if not self.load_dir:
            return False
        folder = Path(self.load_dir)
        if not (folder / "checkpoints").is_dir():
            runs = [run for run in folder.glob(f"{self.file_prefix}-*") if any(run.glob("checkpoints/step-*"))]
            if not runs and self.load_filename is None and folder.resolve() == Path(self.save_dir).resolve():
                log.warning("load_dir=%r is save_dir, and has no run with a checkpoint: begin anew", self.load_dir)
                return False
            if not runs:
                raise ValueError(f"load_dir={self.load_dir!r} {self._lacks(folder)}")
            folder = max(runs, key=lambda run: int(run.name.rpartition("-")[2]))
        if self.load_filename is None:
            return str(folder)
        one = folder / "checkpoints" / self.load_filename
        if not one.is_dir():
            there = ", ".join(sorted(path.name for path in one.parent.iterdir() if path.is_dir()))
            raise ValueError(f"load_filename={self.load_filename!r} is not in {one.parent}; it has {there}")
        return str(one)

    def _lacks(self, folder: Path) -> str:
        """Say what a folder does not have."""
        files = sorted(path.name for path in folder.glob(f"{self.file_prefix}_*.{self.file_ext}"))
        if files:
            return (
                f"has files of PyMarlin's own, {files[-1]}, and no run. Load the weights yourself, before Trainer(…): "
                f"module.load_state_dict(torch.load({str(folder / files[-1])!r}, weights_only=True)"
                "['module_interface_state']), and leave load_dir away; optimizers and epochs then begin anew"
            )
        return (
            f"is neither the folder of a run nor one that has runs called {self.file_prefix}-1, {self.file_prefix}-2 … "
            "with a checkpoint"
        )


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
    distributed_training_args: DistributedTrainingArguments | None = None
    writers: Sequence[Any] = ("stdout", "aml", "tensorboard")
    """"stdout", "tensorboard", "aml", and objects of `Writer`."""
    stats_args: StatInitArguments = field(default_factory=StatInitArguments)
    writer_args: WriterInitArguments = field(default_factory=WriterInitArguments)
    disable_tqdm: bool = False
    """Show no bars beside the lines of the writer stdout."""
    log_level: str = "INFO"
    backend: str = "sp"
    amp_backend_native: bool = False
    """Without effect, as in PyMarlin: `backend` decides."""
    amp_backend_apex: bool = False
    """Without effect, as in PyMarlin."""
    amp_level_apex: str = "O1"
    differential_privacy_args: Any = None
    seed: int | None = None
    """Of all random states. None: that of the run that goes on; else what the script gave to torch, or 0 with ddp."""

    def __post_init__(self) -> None:
        for name, kind in (
            ("checkpointer_args", DefaultCheckpointerArguments),
            ("stats_args", StatInitArguments),
            ("writer_args", WriterInitArguments),
        ):
            if isinstance(given := getattr(self, name), dict):  # as a YAML has it
                setattr(self, name, made(kind, given, name))
        for name in NUMBERS:
            setattr(self, name, as_number(name, getattr(self, name)))
        check_backend(self.backend, f"backend={self.backend!r}")
        self._check_unused()
        if self.differential_privacy_args is not None:
            raise ValueError(f"differential_privacy_args is not here: {GONE['sp-dp']}")
        self._check_ranks()
        if self.clip_grads and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be above 0; clip_grads=False does not clip")
        if self.gpu_batch_size_limit < 1:
            raise ValueError(f"gpu_batch_size_limit={self.gpu_batch_size_limit} must be at least 1")

    def _check_unused(self) -> None:
        if self.amp_backend_native and self.amp_backend_apex:
            raise ValueError("amp_backend_native and amp_backend_apex exclude each other")
        for name in ("amp_backend_native", "amp_backend_apex"):
            if getattr(self, name) and not self.backend.endswith("-amp"):
                log.warning(
                    "%s=True has no effect, as in PyMarlin: backend=%r trains in full precision; backend=%r in fp16",
                    name, self.backend, f"{self.backend}-amp",
                )  # fmt: skip
        if self.amp_level_apex != "O1":
            said = "amp_level_apex=%r has no effect: fp16 is that of torch, which has no levels"
            log.warning(said, self.amp_level_apex)

    def _check_ranks(self) -> None:
        _, rank, processes = launched()
        given = self.distributed_training_args
        if given is not None and (
            not isinstance(given, DistributedTrainingArguments)
            or (given.global_rank, given.world_size) != (rank, processes)
        ):
            raise ValueError(
                f"distributed_training_args={given!r} is not here: this is rank {rank} of {processes}, as the launcher "
                "says (hookline fit --nproc, torchrun, SLURM, MPI); leave it None"
            )

    def options(self, kept_seed: int | None) -> dict[str, Any]:
        """Return the options of `hookline.Trainer`, with the seed of the run that goes on, if there is one."""
        checkpoints = self.checkpointer_args
        return {
            "epochs": self.epochs,
            "train_batch_size": self.train_batch_size,
            "val_batch_size": self.val_batch_size,
            "max_train_steps_per_epoch": self.max_train_steps_per_epoch or None,
            "max_val_steps_per_epoch": self.max_val_steps_per_epoch or None,
            "reset_optimizers_schedulers": self.reset_optimizers_schedulers,
            "log_every": f"{self.stats_args.log_steps} steps",
            "device": "auto" if self.use_gpu else "cpu",
            "seed": self._seed(kept_seed),
            "runs_folder": checkpoints.save_dir,
            "run_name": checkpoints.file_prefix,
        }

    def _seed(self, kept: int | None) -> int:
        if self.seed is not None or kept is not None:
            return self.seed if self.seed is not None else int(kept or 0)
        if not self.backend.startswith("ddp"):
            return torch.initial_seed() % 2**63
        if launched()[1] == 0:
            log.warning("with ddp all ranks need one seed, so torch.manual_seed has no effect: seed=0 is taken")
        return 0

    def plugins(self) -> dict[str, Any]:
        """Return the plugins by name, with their options or as objects."""
        checkpoints = self.checkpointer_args
        plugins: dict[str, Any] = {
            "jsonl": {},
            **{name: dict(options) for name, options in BACKENDS[self.backend].items()},
            "gpu_batch_size_limit": BatchSizeLimit(self.gpu_batch_size_limit),
            "kept_seed": KeptSeed(),
        }
        if "amp" in plugins and not (self.use_gpu and torch.cuda.is_available()):
            log.warning("backend=%r trains in full precision on a CPU, as in PyMarlin", self.backend)
            del plugins["amp"]
        if self.clip_grads:
            plugins["clip"] = {"max_norm": self.max_grad_norm}
        if self.reset_optimizers_schedulers:
            plugins["fresh_schedules"] = FreshSchedules()
        if checkpoints.checkpoint:
            plugins["checkpoint"] = {"every": f"{self.epochs + 1} epochs", "keep_last": None}  # at the end alone
            plugins["period"] = Period(checkpoints.period)
            if checkpoints.model_state_save_dir:
                plugins["model_file"] = ModelFile(checkpoints.model_path)
        elif checkpoints.load_dir:
            plugins["checkpoint"] = {"every": None}
        if self.stats_args.update_system_stats:
            plugins["monitor"] = {"cpu_utilization": True, "gpu_utilization": True}
        return {**plugins, **self._named_writers()}

    def own_writers(self) -> list[Writer]:
        """Return the objects among the writers, and the one that prints lines.

        Raises:
            TypeError: an object that is none.
        """
        own = [writer for writer in self.writers if not isinstance(writer, str)]
        for writer in own:
            if not isinstance(writer, Writer):
                raise TypeError(
                    f"writers: a {type(writer).__name__} is no writer: subclass hookline_pymarlin.Writer, or give "
                    "'stdout' or 'tensorboard'"
                )
        return [*own, *([Stdout()] if "stdout" in self.writers else [])]

    def _named_writers(self) -> dict[str, Any]:
        plugins: dict[str, Any] = {}
        for writer in self.writers:
            if writer == "stdout":
                if not self.disable_tqdm:
                    plugins["progress"] = {}
            elif writer == "tensorboard":
                plugins["tensorboard"] = {"folder": self._tb_log_dir()}
            elif writer == "aml":
                if "AZUREML_RUN_ID" in os.environ:  # elsewhere it does nothing in PyMarlin, too
                    log.warning("the writer 'aml' is not here; the plugin mlflow does its work")
            elif isinstance(writer, str):
                raise ValueError(f"writers: {writer!r} must be stdout, tensorboard, aml or a Writer of your own")
        return plugins

    def _tb_log_dir(self) -> str:
        """Return the folder of TensorBoard below that of the run."""
        folder, parent = self.writer_args.tb_log_dir, self.writer_args.tb_logpath_parent_env
        where = f"tb_log_dir={folder!r}"
        if parent is not None and parent in os.environ:
            where, folder = f"tb_logpath_parent_env={parent!r}", os.path.join(os.environ[parent], folder)
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise ValueError(
                f"{where}: TensorBoard's folder lies in the folder of the run, and {folder!r} does not; give it below "
                "the run, as 'logs', and the folder of runs by checkpointer_args: save_dir"
            )
        return folder


NUMBERS = (
    "epochs",
    "train_batch_size",
    "gpu_batch_size_limit",
    "val_batch_size",
    "max_train_steps_per_epoch",
    "max_val_steps_per_epoch",
    "max_grad_norm",
)


def as_number(name: str, value: Any) -> Any:
    """Return the number that a text from a command line or a YAML has, such as "20" or "1e-3".

    Raises:
        ValueError: it has none.
    """
    if not isinstance(value, str):
        return value
    try:
        return float(value) if name == "max_grad_norm" else int(value)
    except ValueError:
        raise ValueError(f"{name}={value!r} is no number") from None


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
