"""The options of a trainer, and the folder of a run that they name."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hookline.cadence import every, seconds
from hookline.installed import nearest

log = logging.getLogger("hookline.options")

CHECKPOINTS = "checkpoints"  # the subfolder of a run's folder that holds what can be resumed from


@dataclasses.dataclass
class Options:
    """The options of a trainer: keywords of `Trainer`, or the node `trainer:` of a configuration."""

    epochs: int | None = None
    """Epochs to train; 1 unless `max_steps` or `max_time` says when to end."""
    train_batch_size: int = 1
    """Samples of one optimizer step, over all ranks and micro-batches."""
    val_batch_size: int = 1
    """Samples of one evaluation batch on one rank."""
    max_steps: int | None = None
    """Optimizer steps after which training ends."""
    max_time: str | None = None
    """Time of training after which it ends, all sessions of the run together: "90 s", "10 min", "1h"."""
    max_train_steps_per_epoch: int | None = None
    """Optimizer steps after which an epoch ends."""
    max_val_steps_per_epoch: int | None = None
    """Batches after which an evaluation of one loader ends."""
    evaluate_every: str | None = "epoch"
    """Cadence of validation: "epoch", "2 epochs", "500 steps" …; null for none."""
    eval_when_start: bool = False
    """Validate before the first step."""
    eval_when_finish: bool = True
    """Validate at the end of training, unless that has just been done."""
    sanity_val_steps: int = 0
    """Validation batches to try before training; their metrics are dropped."""
    report_loss_after_eval: bool = True
    """Tell the loss of a validation when it is over; false: also that so far, every `log_every` of its batches."""
    log_every: str = "50 steps"
    """Cadence at which interval values are copied off the device and logged."""
    train_loss_metric_name: str = "train_loss"
    val_loss_metric_name: str = "val_loss"
    seed: int = 0
    """Seed of the order of samples and of all random states."""
    device: str = "auto"
    """Device of this rank; auto is CUDA where there is one, else the CPU."""
    keep_loaders: bool = False
    """Ask for loaders once instead of every epoch, so that their workers live on."""
    loader_timeout: str | None = "10 min"
    """How long a batch of loading workers may take; null to wait for ever."""
    reset_optimizers_schedulers: bool = False
    """Resume with fresh optimizers and schedulers."""
    schedulers: str = "as_built"
    """Of a schedule that a resumed run builds otherwise, for more epochs say: go on with it "as_built" now, from the
    place that was come to, or "as_saved", as it was."""
    resume: str | bool = False
    """Go on with the newest run of this name (true), or with the run or checkpoint at a path."""
    run_name: str = "run"
    runs_folder: str = "runs"
    """Where run folders are made: `<runs_folder>/<run_name>-<number>`."""


def make_options(given: Mapping[str, Any]) -> Options:
    """Return the options of a trainer from keywords.

    Raises:
        TypeError: a keyword that is none, with the nearest that is.
        ValueError: a value that cannot be.
    """
    known = [field.name for field in dataclasses.fields(Options)]
    for name in given:
        if name not in known:
            raise TypeError(f"Trainer has no option {name!r}{nearest(name, known)}; it has {', '.join(known)}")
    options = Options(**given)
    if isinstance(options.resume, os.PathLike):
        options.resume = os.fspath(options.resume)
    for cadence in (options.evaluate_every, options.log_every):
        if cadence is not None:
            every(cadence)
    if options.evaluate_every is not None and every(options.evaluate_every).unit == "evaluations":
        raise ValueError(
            f"evaluate_every={options.evaluate_every!r} counts evaluations by themselves; count steps or epochs"
        )
    if not options.report_loss_after_eval and every(options.log_every).unit != "steps":
        raise ValueError(f"report_loss_after_eval=False: log_every={options.log_every!r} must then count steps")
    if options.schedulers not in ("as_built", "as_saved"):
        raise ValueError(f"schedulers={options.schedulers!r} must be as_built or as_saved")
    for duration in (options.max_time, options.loader_timeout):
        if duration is not None:
            seconds(duration)
    least = {"epochs": 0, "max_steps": 0, "sanity_val_steps": 0}
    for name, value in dataclasses.asdict(options).items():
        if type(value) is int and name != "seed" and value < least.get(name, 1):
            raise ValueError(f"{name}={value} must be at least {least.get(name, 1)}")
    if not re.fullmatch(r"[\w.-]{1,200}", options.run_name) or options.run_name.startswith("."):
        raise ValueError(f"run_name={options.run_name!r} must be a plain name of letters, digits, '_', '-' and '.'")
    return options


# The folder of a run ------------------------------------------------------------------


def run_folder(options: Options, training: bool) -> Path:
    """Return the folder of the run that shall be gone on with, or the next free one.

    Raises:
        ValueError: there is no run to go on with. A training then begins from scratch, and says so.
    """
    resume = options.resume
    if isinstance(resume, str):
        path = Path(resume)
        if not path.is_dir():
            raise ValueError(f"resume={resume!r} is no folder of a run")
        for folder in (path, path.parent):  # a checkpoint, or the folder of them, may be named as well as the run
            if folder.name == CHECKPOINTS and folder != Path(options.runs_folder):
                return folder.parent
        return path
    runs = _numbered_runs(options)
    if resume and not runs:
        there = f"there is no run {options.run_name!r} in {options.runs_folder} to resume"
        if not training:
            raise ValueError(there)
        log.warning("%s: starting from scratch", there)
    last = max(runs, default=0)
    return runs[last] if resume and runs else Path(options.runs_folder) / f"{options.run_name}-{last + 1}"


def _numbered_runs(options: Options) -> dict[int, Path]:
    pattern = re.compile(re.escape(options.run_name) + r"-(\d+)")
    folder = Path(options.runs_folder)
    names = os.listdir(folder) if folder.is_dir() else []  # a glob would take what may not be read for empty
    return {int(match[1]): folder / match[0] for match in map(pattern.fullmatch, names) if match}
