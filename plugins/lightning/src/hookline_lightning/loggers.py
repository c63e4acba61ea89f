"""Loggers under Lightning's names: each stands for a tracker of hookline."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

from hookline_lightning.files.plain import plain
from hookline_lightning.logs import experiments
from hookline_lightning.logs.run_logger import Logger, RunLogger

__all__ = ["CSVLogger", "CometLogger", "Logger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"]

log = logging.getLogger("hookline.lightning")

MODELS = "name plugin model_saving: what it writes goes to the trackers"


class _InFolder(RunLogger):
    """A logger that says where: `save_dir/name/version-1`, `version-2` and so on."""

    def _keep(self, save_dir: Any, name: str | None, version: int | str | None, prefix: str) -> None:
        self._begin()
        _refuse(self, {"prefix": (prefix, "write it before the names that you log")})
        word = "version" if version is None else str(version) if isinstance(version, str) else f"version_{version}"
        if not re.fullmatch(r"[\w-][\w.-]*", word):
            raise ValueError(f"{type(self).__name__}(version={version!r}) must be a plain name of letters and digits")
        self._place = (os.path.join(os.fspath(save_dir), name or ""), word)
        self._given_name, self._given_folder = name, os.fspath(save_dir)

    @property
    def save_dir(self) -> str:
        """As it was given."""
        return str(self._given_folder)

    @property
    def root_dir(self) -> str:
        """The folder of runs."""
        return str(self._place[0])

    def place(self) -> tuple[str, str] | None:
        """Return where."""
        return self._place

    @property
    def name(self) -> str | None:
        """As it was given."""
        return self._given_name


class CSVLogger(_InFolder):
    """Stands for the plugin csv."""

    plugin, kind = "csv", experiments.OfCsv

    def __init__(
        self, save_dir: Any, name: str | None = "lightning_logs", version: int | str | None = None, prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:  # fmt: skip
        self._keep(save_dir, name, version, prefix)
        _warn(self, {"flush_logs_every_n_steps": (flush_logs_every_n_steps, 100)})


class TensorBoardLogger(_InFolder):
    """Stands for the plugin tensorboard; what `SummaryWriter` takes besides goes to it."""

    plugin, kind = "tensorboard", experiments.OfTensorBoard

    def __init__(
        self, save_dir: Any, name: str | None = "lightning_logs", version: int | str | None = None,
        log_graph: bool = False, default_hp_metric: bool = True, prefix: str = "", sub_dir: Any = None, **init: Any,
    ) -> None:  # fmt: skip
        self._keep(save_dir, name, version, prefix)
        _refuse(self, {"log_graph": (log_graph, "no tracker takes a graph; name plugin summary")})
        self._options = {"folder": os.fspath(sub_dir)} if sub_dir is not None else {}
        self._options |= {"init": init} if init else {}

    def options(self) -> dict[str, Any]:
        """Return the options of the plugin."""
        return self._options


class WandbLogger(RunLogger):
    """Stands for the plugin wandb; other arguments of `wandb.init` go to it."""

    plugin, kind = "wandb", experiments.OfWandb

    def __init__(
        self, name: str | None = None, save_dir: Any = ".", version: str | None = None, offline: bool = False,
        dir: Any = None, id: str | None = None, anonymous: bool | None = None, project: str | None = None,
        log_model: bool | str = False, experiment: Any = None, prefix: str = "", checkpoint_name: str | None = None,
        add_file_policy: str = "mutable", **init: Any,
    ) -> None:  # fmt: skip
        self._begin()
        _refuse(
            self,
            {
                "version": (version, "a resumed run of hookline goes on with its own"),
                "log_model": (log_model, MODELS),
                "id": (id, "a resumed run of hookline goes on with its own"),
                "experiment": (experiment, "the tracker begins its run itself"),
                "prefix": (prefix, "write it before the names that you log"),
                "anonymous": (anonymous, "log in, or say offline=True"),
            },
        )  # fmt: skip
        _warn(
            self,
            {
                "save_dir": (save_dir, "."), "dir": (dir, None), "checkpoint_name": (checkpoint_name, None),
                "add_file_policy": (add_file_policy, "mutable"), "resume": (init.pop("resume", None), None),
            },
        )  # fmt: skip
        project = project or os.environ.get("WANDB_PROJECT", "lightning_logs")
        kept = {name: init.pop(name) for name in ("entity", "group", "tags") if init.get(name) is not None}
        self.hparams.update(plain(init.pop("config", None) or {}, []))
        init = {name: value for name, value in init.items() if value is not None}
        self._given_name = project or name
        self._options = {
            "mode": "offline" if offline else "online",
            **{key: value for key, value in (("name", name), ("project", project)) if value is not None},
            **kept,
            **({"init": init} if init else {}),
        }

    def options(self) -> dict[str, Any]:
        """Return the options of the plugin."""
        return self._options


class MLFlowLogger(RunLogger):
    """Stands for the plugin mlflow."""

    plugin, kind = "mlflow", experiments.OfMlflow

    def __init__(
        self, experiment_name: str = "lightning_logs", run_name: str | None = None, tracking_uri: str | None = None,
        tags: Mapping[str, Any] | None = None, save_dir: Any = "./mlruns", log_model: bool | str = False,
        prefix: str = "", artifact_location: str | None = None, run_id: str | None = None,
        synchronous: bool | None = None,
    ) -> None:  # fmt: skip
        self._begin()
        _refuse(
            self,
            {
                "log_model": (log_model, MODELS), "prefix": (prefix, "write it before the names that you log"),
                "artifact_location": (artifact_location, "the server or the run's folder says where"),
                "run_id": (run_id, "a resumed run of hookline goes on with its own"),
            },
        )  # fmt: skip
        _warn(self, {"save_dir": (save_dir, "./mlruns"), "synchronous": (synchronous, None)})
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._run_name_given = run_name
        self._options = {
            "experiment": experiment_name,
            **({"tracking_uri": uri} if uri else {}),
            **({"tags": {name: str(value) for name, value in tags.items()}} if tags else {}),
        }

    def options(self) -> dict[str, Any]:
        """Return the options of the plugin."""
        return self._options

    def place(self) -> tuple[str, str] | None:
        """Return the run's name, which is that in MLflow."""
        return ("", self._run_name_given) if self._run_name_given else None


class CometLogger(RunLogger):
    """Stands for the plugin comet; other arguments of its experiment go to it."""

    plugin, kind = "comet", experiments.OfComet

    def __init__(
        self, *, api_key: str | None = None, workspace: str | None = None, project: str | None = None,
        experiment_key: str | None = None, mode: str | None = None, online: bool | None = None,
        prefix: str | None = None, **init: Any,
    ) -> None:  # fmt: skip
        self._begin()
        _refuse(
            self,
            {
                "api_key": (api_key, "put it into the environment, COMET_API_KEY: keys do not belong into programs"),
                "experiment_key": (experiment_key, "a resumed run of hookline goes on with its own"),
                "mode": (None if mode in (None, "get_or_create", "create") else mode, "each run is one of its own"),
                "prefix": (prefix, "write it before the names that you log"),
            },
        )  # fmt: skip
        kept = {name: init.pop(name) for name in ("name", "tags") if init.get(name) is not None}
        self._options = {
            "mode": "offline" if online is False else "online",
            **{key: value for key, value in (("workspace", workspace), ("project", project)) if value is not None},
            **kept,
            **({"init": init} if init else {}),
        }

    def options(self) -> dict[str, Any]:
        """Return the options of the plugin."""
        return self._options


def _warn(logger: Any, given: Mapping[str, tuple[Any, Any]]) -> None:
    """Warn of arguments that say where or when something is written, each with its default."""
    if lost := [f"{name}={value!r}" for name, (value, usual) in given.items() if value != usual]:
        log.warning("%s(%s) has no effect here: trackers write below the run's folder, in the background",
                    type(logger).__name__, ", ".join(lost))  # fmt: skip


def _refuse(logger: Any, asked: Mapping[str, tuple[Any, str]]) -> None:
    for name, (value, instead) in asked.items():
        if value:
            raise ValueError(f"{type(logger).__name__}({name}={value!r}) is not honoured here: {instead}")


OWN = {kind.__name__: kind for kind in (CSVLogger, TensorBoardLogger, WandbLogger, MLFlowLogger, CometLogger)}
