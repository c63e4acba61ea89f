"""The arguments of Lightning's `Trainer` as options of the run and plugins."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import hookline
from hookline_lightning.run import intervals

AMP = {"bf16-mixed": "bf16", "bf16": "bf16", "16-mixed": "fp16", "16": "fp16"}
WHOLE = {"64-true": "float64", "64": "float64", "16-true": "float16", "bf16-true": "bfloat16"}
FULL = ("32-true", "32", "None")
DEVICES = {"auto": "auto", "cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "mps": "mps"}
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"ddp": {}},
    "ddp_find_unused_parameters_true": {"ddp": {"find_unused_parameters": True}},
    "ddp_find_unused_parameters_false": {"ddp": {}},
    "fsdp": {"fsdp": {}},
    **{
        f"ddp_{start}{'' if unused is None else f'_find_unused_parameters_{unused}'}": {
            "ddp": {"find_unused_parameters": True} if unused == "true" else {}
        }
        for start in ("spawn", "fork", "notebook")
        for unused in (None, "true", "false")
    },
}
PROFILERS = {"simple": "profile", "advanced": "profile", "pytorch": "profile", "SimpleProfiler": "profile",
             "AdvancedProfiler": "profile", "PyTorchProfiler": "profile", "PassThroughProfiler": ""}  # fmt: skip
ENDLESS = "36500 days"
NEVER = 10**12
BAREBONES = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "log_every_n_steps",
             "num_sanity_val_steps", "fast_dev_run", "detect_anomaly", "profiler")  # fmt: skip
STAGES = ("train", "val", "test", "predict")


def defaults(given: SimpleNamespace) -> None:
    """Put what None stands for in the place of it.

    Raises:
        ValueError: `barebones`, and an argument that says otherwise.
    """
    if given.barebones:
        said = [name for name in BAREBONES if getattr(given, name)]
        if said:
            raise ValueError(f"barebones=True turns {', '.join(said)} off; leave it out, or leave barebones out")
        for name in BAREBONES:
            setattr(given, name, 0 if name in ("log_every_n_steps", "num_sanity_val_steps") else False)
    usual = {
        "logger": True, "enable_checkpointing": True, "enable_progress_bar": True, "enable_model_summary": True,
        "log_every_n_steps": 50, "num_sanity_val_steps": 2, "val_check_interval": 1.0, "precision": "32-true",
        "max_steps": -1, **{f"limit_{stage}_batches": 1.0 for stage in STAGES},
    }  # fmt: skip
    for name, value in usual.items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    if given.fast_dev_run:  # as in Lightning, nothing stays of it
        given.enable_checkpointing = False
        given.max_epochs = given.min_epochs = given.max_time = None
        given.max_steps, given.min_steps = int(given.fast_dev_run), None
        given.num_sanity_val_steps, given.val_check_interval, given.check_val_every_n_epoch = 0, 1.0, 1


def options_of(given: SimpleNamespace) -> dict[str, Any]:
    """Return the options of the run.

    Raises:
        ValueError: a value that cannot be, by the argument's name.
    """
    cadence = None if _is_off(given.limit_val_batches) else intervals.cadence(*validation(given))
    return {
        **length(given),
        "evaluate_every": cadence,
        "eval_when_finish": False,
        "sanity_val_steps": 0 if _is_off(given.limit_val_batches) else _sanity(given),
        "log_every": f"{given.log_every_n_steps or NEVER} steps",
        "train_loss_metric_name": "loss",
        "device": _chosen_device(given),
        "seed": _seed(given.seed),
        "runs_folder": os.fspath(given.default_root_dir) if given.default_root_dir is not None else "runs",
        "run_name": "lightning",
    }


def plugins_of(given: SimpleNamespace) -> dict[str, Any]:
    """Return the plugins, by name, with their options.

    Raises:
        ValueError: a value that cannot be, by the argument's name, and what to write instead.
    """
    named: dict[str, Any] = {"jsonl": {}, **strategy_of(given), **_of_precision(given)}
    if given.accumulate_grad_batches != 1:
        named["accumulate"] = {"steps": given.accumulate_grad_batches}
    if limits := _limits(given):
        named["limits"] = limits
    if switches := _switches(given):
        named["backend"] = switches
    if _profiles(given.profiler):
        named["profile"] = {}
    for name, asked in (("summary", given.enable_model_summary), ("progress", given.enable_progress_bar)):
        if asked:
            named[name] = {"depth": 1} if name == "summary" else {}
    if given.enable_checkpointing:
        named["checkpoint"] = {}
    return named


# Length -----------------------------------------------------------------------------------


def length(given: SimpleNamespace) -> dict[str, Any]:
    """Return what says when training ends."""
    steps, epochs = (None if number in (None, -1) else number for number in (given.max_steps, given.max_epochs))
    time = None if given.max_time is None else duration(given.max_time)
    if given.max_epochs is None and steps is None and time is None and not given.timed:
        epochs = 1000
    if epochs is None and steps is None and time is None:
        time = ENDLESS
    return {"epochs": epochs, "max_steps": steps, "max_time": time}


def duration(given: Any, name: str = "max_time") -> str:
    """Return a time as hookline writes it; Lightning's is days, hours, minutes, seconds, a dict or a timedelta."""
    if isinstance(given, Mapping):
        given = timedelta(**given)
    if isinstance(given, timedelta):
        if given.total_seconds() <= 0:
            raise ValueError(f"{name}={given} must be above 0")
        return f"{given.total_seconds():.6f} s"
    parts = str(given).split(":")
    if len(parts) != 4 or not all(part.isdigit() for part in parts):
        hookline.seconds(given, name)
        return str(given)
    days, hours, minutes, rest = map(int, parts)
    return f"{((days * 24 + hours) * 60 + minutes) * 60 + rest} s"


# Evaluation and limits --------------------------------------------------------------------


def validation(given: SimpleNamespace) -> tuple[Any, int | None]:
    """Return `val_check_interval`, a time of it as hookline writes one, and `check_val_every_n_epoch`."""
    interval, epochs = given.val_check_interval, given.check_val_every_n_epoch
    if isinstance(interval, (str, Mapping, timedelta)):
        interval = duration(interval, "val_check_interval")
    intervals.check(interval, epochs)
    return interval, epochs


def _sanity(given: SimpleNamespace) -> int:
    return sys.maxsize if given.num_sanity_val_steps == -1 else given.num_sanity_val_steps


def _is_off(amount: Any) -> bool:
    return amount is not None and amount == 0


def _limits(given: SimpleNamespace) -> dict[str, Any]:
    if given.fast_dev_run:
        return {"fast_dev_run": given.fast_dev_run}
    amounts = {stage: getattr(given, f"limit_{stage}_batches") for stage in STAGES}
    if given.overfit_batches:
        amounts["train"] = amounts["val"] = given.overfit_batches
    return {
        f"{stage}_batches": amount
        for stage, amount in amounts.items()
        if not (isinstance(amount, float) and amount == 1.0) and not _is_off(amount)
    }


# Hardware ---------------------------------------------------------------------------------


def _chosen_device(given: SimpleNamespace) -> str:
    accelerator, chosen = given.accelerator, given.devices
    if accelerator not in DEVICES:
        said = repr(accelerator) if isinstance(accelerator, str) else f"{type(accelerator).__name__}(…)"
        raise ValueError(f"accelerator={said} must be one of {', '.join(DEVICES)}")
    device = DEVICES[accelerator]
    indices = _indices(chosen)
    return f"cuda:{indices[0]}" if device == "cuda" and indices and len(indices) == 1 else device


def _indices(devices: Any) -> list[int] | None:
    """Return the devices that are named one by one, or None where they are a number or a word."""
    if isinstance(devices, str) and "," in devices:
        return [int(one) for one in devices.split(",") if one.strip()]
    return [int(one) for one in devices] if isinstance(devices, Sequence) and not isinstance(devices, str) else None


def strategy_of(given: SimpleNamespace) -> dict[str, Any]:
    """Return the plugins that ranks train one model by."""
    ranks, strategy = int(os.environ.get("WORLD_SIZE", "1")), given.strategy
    indices = _indices(given.devices)
    wanted = len(indices) if indices is not None else given.devices
    count = None if wanted in ("auto", -1, "-1") else int(wanted) * given.num_nodes
    if ranks == 1 and (given.num_nodes > 1 or (count or 1) > 1):
        each = wanted if count is not None else "GPUS"
        where = f"devices={given.devices!r}" if given.num_nodes == 1 else f"num_nodes={given.num_nodes}"
        nodes = "" if given.num_nodes == 1 else f"--nnodes {given.num_nodes} "
        raise ValueError(
            f"{where}: this is one process; a launcher starts more of them, `torchrun {nodes}--nproc-per-node "
            f"{each} script.py`, and each is one device"
        )
    if ranks > 1 and count is not None and count != ranks:
        raise ValueError(
            f"devices={given.devices!r} and num_nodes={given.num_nodes} are {count} processes, and the launcher has "
            f"started {ranks}; write devices='auto', or start as many"
        )
    if ranks > 1 and not given.use_distributed_sampler:
        raise ValueError(
            "use_distributed_sampler=False: loaders are shared between ranks here, those with a DistributedSampler "
            "too; of a loader that gives this rank's part alone return hookline.sharded(loader), and leave it out"
        )
    if strategy == "auto":
        named = dict(STRATEGIES["ddp"]) if ranks > 1 else {}
    elif isinstance(strategy, str) and strategy in STRATEGIES:
        named = {name: dict(options) for name, options in STRATEGIES[strategy].items()}
    else:
        said = repr(strategy) if isinstance(strategy, str) else f"{type(strategy).__name__}(…)"
        raise ValueError(
            f"strategy={said} must be auto or one of {', '.join(STRATEGIES)}; others are plugins, with their options: "
            'plugins={"ddp": {"static_graph": True}}, {"deepspeed": {…}}'
        )
    if given.sync_batchnorm and ranks > 1:
        named["sync_batchnorm"] = {}
    return named


def _of_precision(given: SimpleNamespace) -> dict[str, Any]:
    word = str(given.precision)
    if word in AMP:
        return {"amp": {"precision": AMP[word]}}
    if word in WHOLE:
        return {
            "lightning.precision": {"_plugin_": "hookline_lightning.translating.running.Whole", "dtype": WHOLE[word]}
        }
    if word not in FULL:
        known = [one for one in (*FULL, *AMP, *WHOLE) if one != "None"]
        raise ValueError(f"precision={given.precision!r} must be one of {', '.join(known)}")
    return {}


def _switches(given: SimpleNamespace) -> dict[str, Any]:
    """Return the options of the plugin backend."""
    if given.deterministic not in (None, True, False, "warn"):
        raise ValueError(f"deterministic={given.deterministic!r} must be True, False or 'warn'")
    if given.benchmark and given.deterministic:
        raise ValueError("benchmark=True and deterministic exclude each other; leave one of them out")
    if given.deterministic:
        return {"deterministic": "warn" if given.deterministic == "warn" else "error"}
    return {} if given.benchmark is None else {"cudnn_benchmark": given.benchmark}


def _profiles(profiler: Any) -> bool:
    if profiler in (None, False):
        return False
    kind = profiler if isinstance(profiler, str) else type(profiler).__name__
    if kind not in PROFILERS:
        raise ValueError(
            f"profiler={kind if isinstance(profiler, str) else f'{kind}(…)'}: must be simple, advanced or pytorch, "
            "each of which is the plugin profile here; one of yours wraps the call: with Mine(): trainer.fit(module)"
        )
    return bool(PROFILERS[kind])


def _seed(seed: int | None) -> int:
    """Return the seed: that of the argument, else of `seed_everything`, else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed


def refuse(given: SimpleNamespace) -> None:
    """Refuse by name what has no counterpart.

    Raises:
        ValueError: and what to write instead.
    """
    asked: dict[str, tuple[Callable[[Any], bool], str]] = {
        "reload_dataloaders_every_n_epochs": (
            bool, "loaders are asked for once in a run; give one whose data set looks at the epoch, in "
            "on_train_epoch_start",
        ),
        "model_registry": (bool, "models are files in the folder of the run"),
    }  # fmt: skip
    for name, (is_asked, instead) in asked.items():
        if is_asked(getattr(given, name)):
            raise ValueError(f"{name}={getattr(given, name)!r} is not honoured here: {instead}")
    if given.gradient_clip_algorithm not in (None, "norm", "value"):
        raise ValueError(f"gradient_clip_algorithm={given.gradient_clip_algorithm!r} must be norm or value")
    if given.plugins is not None and not isinstance(given.plugins, Mapping):
        listed = given.plugins if isinstance(given.plugins, (list, tuple)) else [given.plugins]
        if listed:
            raise ValueError(
                f"plugins=[{', '.join(type(one).__name__ for one in listed)}]: these are Lightning's own; precision, "
                "strategy and the launcher say what they do. Plugins of hookline are a mapping of names to options: "
                'plugins={"finite": {"policy": "skip"}}'
            )
        given.plugins = None
