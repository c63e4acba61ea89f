"""What the argument `logger` may be: names, loggers of ours and of the package, and those of users, which run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import hookline
from hookline import CallbackInterface, Stage, hookimpl
from hookline_lightning.loggers import OWN
from hookline_lightning.logs import experiments
from hookline_lightning.logs.run_logger import Logger, RunLogger

PACKAGES = ("lightning.", "pytorch_lightning.")


def adopted(logger: Any) -> Any:
    """Return a logger of the package as the one of ours that has its arguments; it stays the same object.

    Raises:
        ValueError: one that has no tracker here.
    """
    kind = type(logger)
    if isinstance(logger, Logger) or not kind.__module__.startswith(PACKAGES):
        return logger
    arguments = _arguments_of(logger)
    if arguments is None:
        raise ValueError(
            f"logger={kind.__name__}(…) has no tracker here: name one, such as logger='csv', or give a logger of yours"
        )
    own = OWN[kind.__name__](**arguments)
    logger.__class__ = type(kind.__name__, (type(own), kind), {"__module__": kind.__module__})
    vars(logger).update(vars(own))
    return logger


def _arguments_of(logger: Any) -> dict[str, Any] | None:
    """Return what a logger of the package was made with."""
    kind = type(logger).__name__
    if kind in ("CSVLogger", "TensorBoardLogger"):
        found = {"save_dir": logger.save_dir, "name": logger.name, "version": logger._version, "prefix": logger._prefix}
        return found if kind == "CSVLogger" else {
            **found, **logger._kwargs, "sub_dir": logger.sub_dir, "log_graph": logger._log_graph,
        }  # fmt: skip
    if kind == "WandbLogger":
        own = ("id", "dir", "resume", "anonymous")
        init = {name: value for name, value in logger._wandb_init.items() if name not in own}
        return {**init, "id": logger._wandb_init.get("id"), "offline": logger._offline, "prefix": logger._prefix,
                "log_model": logger._log_model}  # fmt: skip
    if kind == "MLFlowLogger":
        return {"experiment_name": logger._experiment_name, "run_name": logger._run_name, "tags": logger.tags,
                "tracking_uri": logger._tracking_uri, "log_model": logger._log_model, "prefix": logger._prefix,
                "artifact_location": logger._artifact_location, "run_id": logger._run_id}  # fmt: skip
    return None


class OwnLoggers(CallbackInterface):
    """Calls loggers of users as Lightning does, on rank 0."""

    def __init__(self, loggers: list[Any], hparams: Mapping[str, Any]) -> None:
        self.loggers, self.hparams = loggers, hparams

    @hookimpl
    def on_begin_run(self, trainer: hookline.Trainer, stage: Stage) -> None:
        if trainer.rank == 0 and stage is Stage.TRAIN and self.hparams:
            for logger in self.loggers:
                logger.log_hyperparams(dict(self.hparams))

    @hookimpl
    def on_log(self, trainer: hookline.Trainer, metrics: Mapping[str, float], global_step: int) -> None:
        if trainer.rank == 0:
            for logger in self.loggers:
                logger.log_metrics({**metrics, "epoch": trainer.epoch}, step=global_step)
                logger.save()

    @hookimpl
    def on_end_run(self, trainer: hookline.Trainer, status: str) -> None:
        if trainer.rank == 0:
            for logger in self.loggers:
                logger.finalize("failed" if status == "failed" else "success")


def listed(given: Any) -> list[Any]:
    """Return the loggers that the argument `logger` names, as a list.

    Raises:
        ValueError: something that is none.
    """
    if given is None or given is False:
        return []
    if isinstance(given, Mapping):
        return [_named(name, options) for name, options in given.items()]
    found = []
    for one in given if isinstance(given, (list, tuple)) else [given]:
        if one is True:
            found.append(_named("csv", {}, experiments.OfAny))  # Lightning's would be TensorBoard, if it is installed
        elif isinstance(one, str):
            found.append(_named(one, {}))
        elif callable(getattr(one, "log_metrics", None)):
            found.append(adopted(one))
        else:
            raise ValueError(
                f"logger={type(one).__name__}(…) is no logger: it has no log_metrics; name a tracker, such as "
                "logger='csv'"
            )
    return found


def _named(name: str, options: Mapping[str, Any] | None, kind: type[experiments.Experiment] | None = None) -> RunLogger:
    logger = RunLogger()
    logger.plugin = name
    logger.kind = kind or {one.plugin: one.kind for one in OWN.values()}.get(name, experiments.OfAny)
    given = dict(options or {})
    logger.options = lambda: given  # type: ignore[method-assign]
    return logger
