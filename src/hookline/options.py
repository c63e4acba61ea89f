"""The options of a trainer, and the folder of a run."""

from __future__ import annotations

import dataclasses
import logging
import operator
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hookline.cadence import every, seconds
from hookline.installed import nearest

log = logging.getLogger("hookline.options")

CADENCES: dict[str, Callable[[str], Any]] = {
    "evaluate_every": every,
    "log_every": every,
    "max_time": seconds,
    "loader_timeout": seconds,
}
WORDS = {"int": "a whole number", "str": "a text", "bool": "True or False", "None": "None"}
CHECKPOINTS = "checkpoints"  # the subfolder of a run's folder that holds its checkpoints
WHICH = re.compile(r"best|last|\d+")  # of a run's checkpoints, in place of the name: by its metric, its age or its step


@dataclasses.dataclass
class Options:
    """The options of a trainer: keywords of `Trainer`, or the node `trainer:` of a configuration."""

    epochs: int | None = None
    """Epochs to train; 1 unless `max_steps` or `max_time` ends training."""
    train_batch_size: int = 1
    """Samples of one optimizer step, over all ranks and micro-batches (the effective batch size)."""
    val_batch_size: int = 1
    """Samples of one evaluation batch on one rank."""
    max_steps: int | None = None
    """Training ends after this many optimizer steps."""
    max_time: str | None = None
    """Training ends after this time, over all sessions of the run: "90 s", "10 min", "1h"."""
    max_train_steps_per_epoch: int | None = None
    """An epoch ends after this many optimizer steps."""
    max_val_steps_per_epoch: int | None = None
    """An evaluation of one loader ends after this many batches."""
    evaluate_every: str | None = "epoch"
    """Cadence of validation: "epoch", "2 epochs", "500 steps" …; null for none."""
    eval_when_start: bool = False
    """Validate before the first step."""
    eval_when_finish: bool = True
    """Validate at the end of training, unless that step was just validated."""
    sanity_val_steps: int = 0
    """Validation batches of a sanity check before training; its metrics are dropped."""
    report_loss_after_eval: bool = True
    """Log a validation's loss at its end; false: also the loss so far, every `log_every` of its batches."""
    log_every: str = "50 steps"
    """Cadence at which interval values are copied off the device and logged."""
    train_loss_metric_name: str = "train_loss"
    val_loss_metric_name: str = "val_loss"
    seed: int = 0
    """Seed of the order of samples and of all RNG states."""
    device: str = "auto"
    """Device of this rank; auto is CUDA if available, else the CPU."""
    keep_loaders: bool = False
    """Get loaders from the module once instead of every epoch, so that their workers stay alive."""
    loader_timeout: str | None = "10 min"
    """The longest time to wait for a batch of loading workers; null waits for ever."""
    reset_optimizers_schedulers: bool = False
    """Resume with fresh optimizers and schedulers."""
    schedulers: str = "as_built"
    """If a resumed run builds another schedule, for more epochs say: continue with the new one ("as_built") from the
    place that was reached, or with the saved one ("as_saved").
    """
    resume: str | bool | None = False
    """Resume the newest run of this name that has a checkpoint (true), or the run or checkpoint at a path; `best`,
    `last` or a step: of that run. After a run's path, as `runs/mine-1/checkpoints/best`: of the run there.
    """
    run_name: str = "run"
    runs_folder: str = "runs"
    """The parent of run folders: `<runs_folder>/<run_name>-<number>`."""


def make_options(given: Mapping[str, Any]) -> Options:
    """Return the options of a trainer from keywords.

    Raises:
        TypeError: an unknown keyword, with the nearest option; or a value of another type.
        ValueError: an invalid value.
    """
    known = [field.name for field in dataclasses.fields(Options)]
    for name in given:
        if name not in known:
            raise TypeError(f"Trainer has no option {name!r}{nearest(name, known)}; it has {', '.join(known)}")
    options = Options(**given)
    for field in dataclasses.fields(Options):
        setattr(options, field.name, _typed(field, getattr(options, field.name)))
    for name, read in CADENCES.items():
        value = getattr(options, name)
        try:
            if value is not None or name == "log_every":
                read(value)
        except ValueError as error:
            raise ValueError(f"{name}={value!r}: {error}") from None
    if options.evaluate_every is not None and every(options.evaluate_every).unit == "evaluations":
        raise ValueError(
            f"evaluate_every={options.evaluate_every!r} counts evaluations by themselves; count steps or epochs"
        )
    if not options.report_loss_after_eval and every(options.log_every).unit != "steps":
        raise ValueError(f"report_loss_after_eval=False: log_every={options.log_every!r} must then count steps")
    if options.schedulers not in ("as_built", "as_saved"):
        raise ValueError(f"schedulers={options.schedulers!r} must be as_built or as_saved")
    least = {"epochs": 0, "max_steps": 0, "sanity_val_steps": 0}
    for name, value in dataclasses.asdict(options).items():
        if type(value) is int and name != "seed" and value < least.get(name, 1):
            raise ValueError(f"{name}={value} must be at least {least.get(name, 1)}")
    if not re.fullmatch(r"[\w.-]{1,200}", options.run_name) or options.run_name.startswith("."):
        raise ValueError(f"run_name={options.run_name!r} must be a plain name of letters, digits, '_', '-' and '.'")
    return options


def _typed(field: dataclasses.Field[Any], value: Any) -> Any:
    """Return the value of an option, with whole numbers, paths and devices of other libraries in Python's types."""
    kinds = str(field.type).split(" | ")
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif field.name == "device":
        value = str(value)  # a torch.device
    elif "int" in kinds and hasattr(value, "__index__") and not isinstance(value, bool):
        value = operator.index(value)
    known = "None" if value is None else "str" if isinstance(value, str) else type(value).__name__
    if known not in kinds and field.name not in CADENCES:
        wanted = " or ".join(WORDS[kind] for kind in kinds)
        raise TypeError(f"{field.name}={value!r} must be {wanted}, and is a {type(value).__name__}")
    return value


# The folder of a run ------------------------------------------------------------------


def run_folder(options: Options, training: bool) -> Path:
    """Return the folder of the run to resume, or the next free one.

    Raises:
        ValueError: there is no run to resume. A training with `resume=True` instead warns and starts from scratch.
    """
    resume = options.resume
    if isinstance(resume, str) and not WHICH.fullmatch(resume):
        return _named_run(options, resume)
    runs = _numbered_runs(options)
    if resume and not runs:
        there = f"there is no run {options.run_name!r} in {options.runs_folder} to resume"
        if not training or resume is not True:
            names = sorted(_names(Path(options.runs_folder)))
            meant = nearest(options.run_name, {re.sub(r"-\d+$", "", name) for name in names})
            raise ValueError(f"{there}{meant}; it has {', '.join(names[-20:]) or 'no run'}")
        log.warning("%s: starting from scratch", there)
    if resume and runs:
        saved = [number for number, run in runs.items() if any(name[0] != "." for name in _names(run / CHECKPOINTS))]
        if saved and max(saved) < max(runs):
            log.warning("%s has no checkpoint: going on with %s", runs[max(runs)], runs[max(saved)])
        return runs[max(saved or runs)]
    return Path(options.runs_folder) / f"{options.run_name}-{max(runs, default=0) + 1}"


def _named_run(options: Options, resume: str) -> Path:
    """Return the folder of the run that a path or a name says, or that of the checkpoint at this path."""
    for path in (Path(resume), Path(options.runs_folder, resume)):
        which = WHICH.fullmatch(path.name) and path.parent.name == CHECKPOINTS
        if which or path.is_dir():
            for folder in (path, path.parent):  # resume may name a checkpoint, or their folder, instead of the run
                if folder.name == CHECKPOINTS and folder != Path(options.runs_folder) and folder.is_dir():
                    return folder.parent
            if path.is_dir():
                return path
    home = Path(resume).parent if _names(Path(resume).parent) and os.path.dirname(resume) else Path(options.runs_folder)
    names = sorted(_names(home))
    raise ValueError(
        f"resume={resume!r} is no folder of a run, nor a run in {options.runs_folder}"
        f"{nearest(Path(resume).name, names)}; {home} has {', '.join(names[-20:]) or 'no run'}"
    )


def _numbered_runs(options: Options) -> dict[int, Path]:
    pattern = re.compile(re.escape(options.run_name) + r"-(\d+)")
    folder = Path(options.runs_folder)
    return {int(match[1]): folder / match[0] for match in map(pattern.fullmatch, _names(folder)) if match}


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []  # a glob would treat an unreadable folder as empty
