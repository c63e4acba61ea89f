"""Callbacks of Lightning's package: which of them run, and which are plugins of hookline."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch

log = logging.getLogger("hookline.lightning")

HOMES = (
    "lightning.pytorch", "pytorch_lightning", "hookline_lightning.callbacks", "hookline_lightning.files.checkpoints",
    "hookline_lightning.translating.standing",
)  # fmt: skip
INSTEAD = {  # refused, and what does the same
    "BatchSizeFinder": "the command `hookline batch-find run.yaml`, before a run, or plugin batch_find",
    "LearningRateFinder": "the command `hookline lr-find run.yaml`, before a run, or plugin lr_find",
    "SpikeDetection": 'the plugin finite (plugins={"finite": {"policy": "skip"}}) or guard',
    "ModelPruning": "torch.nn.utils.prune, called by a callback of your own in on_train_epoch_end",
    "WeightAveraging": 'the plugin ema (plugins={"ema": {"decay": 0.999}}) or swa',
}
PROGRESS = ("ProgressBar", "TQDMProgressBar", "RichProgressBar")
SUMMARY = ("ModelSummary", "RichModelSummary")


def name_of(callback: Any) -> str:
    """Return the name of a class of the package that a callback is of, or of ours in its place; else ""."""
    kind = type(callback)
    return kind.__name__ if kind.__module__.startswith(HOMES) else ""


def base_of(callback: Any) -> str:
    """Return the class of the package that a class of the user derives from and that does not run here, or ""."""
    for kind in type(callback).__mro__[1:]:
        if kind.__module__.startswith(HOMES) and (kind.__name__ in TRANSLATED or kind.__name__ in INSTEAD):
            return kind.__name__
    return ""


def translated(callbacks: Iterable[Any], given: SimpleNamespace) -> tuple[list[Any], dict[str, dict[str, Any]]]:
    """Return the callbacks that run, those that write checkpoints last, and the plugins for the others.

    Raises:
        ValueError: a callback that neither runs nor has a plugin, or arguments that its plugin cannot honour.
    """
    run, plugins = [], dict[str, dict[str, Any]]()
    for callback in callbacks:
        if not callable(getattr(type(callback), "__init__", None)) or isinstance(callback, type):
            raise ValueError(f"callbacks: {callback!r} is a class; give an object of it")
        name, base = name_of(callback), base_of(callback)
        if name in INSTEAD or (not name and base in INSTEAD):
            raise ValueError(f"the callback {type(callback).__name__} is not here; write {INSTEAD[name or base]}")
        if name in TRANSLATED:
            for plugin, options in TRANSLATED[name](callback, given).items():
                plugins[plugin] = {**plugins.get(plugin, {}), **options}
        elif base in PROGRESS:
            raise ValueError(
                f"the callback {type(callback).__name__} draws bars of its own, by what {base} keeps of Lightning's "
                "loops; the plugin progress draws them here (callbacks without it), and prog_bar=True shows a value"
            )
        elif base:
            raise ValueError(f"the callback {type(callback).__name__} changes {base}, which is a plugin here: derive "
                             "it from Callback")  # fmt: skip
        else:
            run.append(callback)
    return sorted(run, key=writes_checkpoints), plugins


def writes_checkpoints(callback: Any) -> bool:
    """Tell whether a callback is a `Checkpoint`, which is called behind all others."""
    return any(kind.__name__ == "Checkpoint" and kind.__module__.startswith(HOMES) for kind in type(callback).__mro__)


def replaces(callback: Any, other: Any) -> bool:
    """Tell whether a callback of a module's own takes the place of one of the trainer's: of the same class."""
    return type(callback) is type(other) or (is_of(callback, "ModelCheckpoint") and is_of(other, "ModelCheckpoint"))


def is_of(callback: Any, name: str) -> bool:
    """Tell whether a callback is of a class of the package, or of ours in its place, or derives from it."""
    return any(kind.__name__ == name and kind.__module__.startswith(HOMES) for kind in type(callback).__mro__)


def _warn(callback: Any, *taken: str) -> None:
    """Warn of arguments without a counterpart, which only say how something looks or when it comes."""
    plain = vars(type(callback)())
    changed = {name.lstrip("_"): value for name, value in vars(callback).items() if plain.get(name) != value}
    if lost := [f"{name}={value!r}" for name, value in changed.items() if name not in taken]:
        log.warning("%s(%s) has no effect here: it is a plugin, with options of its own",
                    type(callback).__name__, ", ".join(lost))  # fmt: skip


def _learning_rate(callback: Any, given: SimpleNamespace) -> dict[str, Any]:
    for name in ("log_momentum", "log_weight_decay"):
        if getattr(callback, name):
            raise ValueError(
                f"LearningRateMonitor({name}=True) is not here: the plugin monitor logs learning rates; log the rest "
                "by self.log in on_train_batch_start"
            )
    _warn(callback)
    return {"monitor": {"learning_rate": True}}


def _device_stats(callback: Any, given: SimpleNamespace) -> dict[str, Any]:
    asked, gpu = callback._cpu_stats, torch.cuda.is_available() and given.accelerator != "cpu"
    return {"monitor": {"gpu_utilization": gpu, "cpu_utilization": asked is True or (asked is None and not gpu)}}


def _throughput(callback: Any, given: SimpleNamespace) -> dict[str, Any]:
    log.warning("ThroughputMonitor(batch_size_fn=…) has no effect here: the plugin monitor counts samples itself")
    return {"monitor": {"throughput": True}}


def _progress(callback: Any, given: SimpleNamespace) -> dict[str, Any]:
    if given.enable_progress_bar is False:
        raise ValueError(
            f"enable_progress_bar=False and callbacks=[{type(callback).__name__}(…)]: leave one of them out"
        )
    _warn(callback, "refresh_rate", "enabled")
    given.enable_progress_bar = getattr(callback, "refresh_rate", 1) != 0
    return {}


def _summary(callback: Any, given: SimpleNamespace) -> dict[str, Any]:
    _warn(callback, "max_depth")
    depth = callback._max_depth
    given.enable_model_summary = depth != 0
    return {"summary": {"depth": 1000 if depth == -1 else depth}} if depth else {}


def _accumulation(callback: Any, given: SimpleNamespace) -> dict[str, Any]:
    scheduling = dict(callback.scheduling)
    if given.accumulate_grad_batches != 1:
        raise ValueError("accumulate_grad_batches and GradientAccumulationScheduler both say the window; give one")
    if len(set(scheduling.values())) > 1 or 0 not in scheduling:
        raise ValueError(
            f"GradientAccumulationScheduler({scheduling}): the window is the same all along here; write "
            "accumulate_grad_batches=N, or train in parts by fit(ckpt_path='last') with another N"
        )
    return {"accumulate": {"steps": scheduling[0]}} if scheduling[0] != 1 else {}


def _swa(callback: Any, given: SimpleNamespace) -> dict[str, Any]:
    rates, begin = callback._swa_lrs, callback._swa_epoch_start
    rates = sorted(set(rates)) if isinstance(rates, (list, tuple)) else [rates]
    if len(rates) > 1:
        raise ValueError(
            f"StochasticWeightAveraging(swa_lrs={rates}): one rate for all groups of parameters is possible"
        )
    if callback._avg_fn is not None and getattr(callback._avg_fn, "__name__", "") != "avg_fn":
        raise ValueError(
            "StochasticWeightAveraging(avg_fn=…): the plugin swa takes the mean; name plugin ema for others"
        )
    log.warning(
        "StochasticWeightAveraging is the plugin swa here: it averages the weights behind each epoch, and Lightning "
        "those before each, so the averages are not the same"
    )
    if given.max_epochs not in (None, -1):
        first = int(given.max_epochs * begin) if isinstance(begin, float) else begin
        begin = max(first - 1, 0) / given.max_epochs  # Lightning counts this epoch from 1
    elif not isinstance(begin, float):
        raise ValueError(
            f"StochasticWeightAveraging(swa_epoch_start={begin}) is an epoch, and needs max_epochs; or say a share of "
            "training, 0.8"
        )
    return {
        "swa": {
            "begin": begin, "lr": rates[0], "anneal": callback._annealing_epochs,
            "anneal_strategy": callback._annealing_strategy,
        }
    }  # fmt: skip


def _ema(callback: Any, given: SimpleNamespace) -> dict[str, Any]:
    if callback.update_starting_at_epoch is not None:
        raise ValueError("EMAWeightAveraging(update_starting_at_epoch=…): say update_starting_at_step")
    if hasattr(callback, "decay"):
        decay, buffers = callback.decay, callback.use_buffers
    else:  # the package keeps a function alone: what it leaves of 1 is the decay
        buffers, average = callback._use_buffers, callback._kwargs["avg_fn"]
        decay = round(
            float(average(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64), 1)), 12
        )
    every = callback.update_every_n_steps
    return {
        "ema": {  # Lightning counts the step from 0
            "decay": decay, "every": every, "offset": 1 % every, "begin": callback.update_starting_at_step or 0,
            "buffers": "average" if buffers else "copy",
        }
    }  # fmt: skip


TRANSLATED = {
    "LearningRateMonitor": _learning_rate,
    "DeviceStatsMonitor": _device_stats,
    "ThroughputMonitor": _throughput,
    **dict.fromkeys(PROGRESS, _progress),
    **dict.fromkeys(SUMMARY, _summary),
    "GradientAccumulationScheduler": _accumulation,
    "StochasticWeightAveraging": _swa,
    "EMAWeightAveraging": _ema,
}
