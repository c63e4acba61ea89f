"""Loggers under Lightning's names: each stands for a tracker of hookline; those of users run as they are."""

from __future__ import annotations

import abc
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hookline
from hookline import CallbackInterface, Stage, hookimpl
from hookline_lightning import experiments
from hookline_lightning.plain import plain

__all__ = ["CSVLogger", "CometLogger", "Logger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"]

PACKAGES = ("lightning.", "pytorch_lightning.")
MODELS = "name plugin model_saving: what it writes goes to the trackers"


class Logger(abc.ABC):
    """What users derive loggers of their own from; the run calls its methods on rank 0.

    It has the metaclass of the package's, or an object could not become one of both.
    """

    @property
    def name(self) -> str | None:
        """Of the experiment."""
        return None

    @property
    def version(self) -> int | str | None:
        """Of the run in it."""
        return None

    @property
    def save_dir(self) -> str | None:
        """Where it writes."""
        return None

    @property
    def log_dir(self) -> str | None:
        """Where it writes of this run."""
        return None

    @property
    def experiment(self) -> Any:
        """The object of a service behind it."""
        return None

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Take values."""

    def log_hyperparams(self, params: Any, *arguments: Any, **options: Any) -> None:
        """Take parameters."""

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Take a graph."""

    def save(self) -> None:
        """Write what is taken."""

    def finalize(self, status: str) -> None:
        """End."""

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Hear of a checkpoint."""


class RunLogger(Logger):
    """Leads what is logged to all trackers of the run; before it begins, what is logged waits."""

    plugin = ""
    kind: type[experiments.Experiment] = experiments.OfAny

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._view: Any = None
        self._waiting: list[tuple[str, Any]] = []
        self._experiment_here: Any = None
        self.hparams: dict[str, Any] = {}
        """What `log_hyperparams` was given before the run."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(
            f"the logger that hookline gives to Lightning's modules has no {name!r}; texts, images, tables and files "
            "go to all trackers by self.trainer.core.log_object(name, value)"
        )

    # The run ------------------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """Return the options of the plugin."""
        return {}

    def place(self) -> tuple[str, str] | None:
        """Return the folder of runs and the name of the run that the logger asks for, or None."""
        return None

    def connect(self, view: Any) -> None:
        """Be of a run."""
        self._view = view

    def tell_waiting(self) -> None:
        """Log what was logged before the run began."""
        waiting, self._waiting = self._waiting, []
        for name, value in waiting:
            self._log(name, value)

    @property
    def _core(self) -> Any:
        return self._view.core if self._view is not None and self._view.is_connected else None

    def _log(self, name: str, value: Any) -> None:
        core = self._core
        if core is None or core.status in ("not started",):
            self._waiting.append((name, value))
        elif core.status != "running":
            core.say_once(f"logger: {name!r} was logged after the run had ended, and no tracker takes it any more")
        elif name:
            core.log_object(name, value)
        else:
            core.log(**value)

    # Lightning's words --------------------------------------------------------------------

    @property
    def experiment(self) -> Any:
        """What takes the calls of the service's own object."""
        if self._experiment_here is None:
            self._experiment_here = self.kind(self)
        return self._experiment_here

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log values, at the step under way."""
        core = self._core
        if step is not None and core is not None and abs(int(step) - core.global_step) > 1:
            core.say_once(
                f"logger.log_metrics(step={int(step)}): values lie at the step of the run, which is {core.global_step}"
                "; the option axis of a tracker places them by another value",
                about="logger step",
            )
        self._log("", dict(metrics))

    def log_hyperparams(self, params: Any, metrics: Any = None, *arguments: Any, **options: Any) -> None:
        """Log parameters: before the run into its configuration, later as a text."""
        found = plain(params if isinstance(params, Mapping) else vars(params), [])
        if self._core is None or self._core.status == "not started":
            self.hparams.update(found)
        elif found:
            self._log("hparams", "\n".join(f"{name}: {value}" for name, value in found.items()))
        if isinstance(metrics, Mapping):
            self.log_metrics(metrics)

    def log_object(self, name: str, value: Any) -> None:
        """Log a text, an image, a figure, a table or a file."""
        self._log(name, value)

    def log_image(self, key: str, images: list[Any], step: int | None = None, **captions: Any) -> None:
        """Log images."""
        for number, one in enumerate(images):
            self._log(key if len(images) == 1 else f"{key}/{number}", experiments.as_object(one))

    def log_text(self, key: str, columns: Any = None, data: Any = None, dataframe: Any = None, **_: Any) -> None:
        """Log texts as a table."""
        self.log_table(key, columns, data, dataframe)

    def log_table(self, key: str, columns: Any = None, data: Any = None, dataframe: Any = None, **_: Any) -> None:
        """Log a table."""
        if dataframe is not None:
            columns, data = list(dataframe.columns), dataframe.values.tolist()
        self._log(key, hookline.tracking.Table(columns, data))

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Say that no tracker takes it."""
        self._say("log_graph: no tracker takes a graph; `torch.export` keeps one, and plugin summary shows the layers")

    def watch(self, model: Any, *arguments: Any, **options: Any) -> None:
        """Say that no tracker does it."""
        self._say("watch: no tracker looks into the model; plugin monitor logs grad_norm")

    def unwatch(self, model: Any) -> None:
        """Do nothing."""

    def _say(self, text: str) -> None:
        if self._core is not None:
            self._core.say_once(f"logger.{text}")

    @property
    def name(self) -> str | None:
        """Of the run's kind."""
        return str(self._core.options.run_name) if self._core is not None else None

    @property
    def version(self) -> int | str | None:
        """The number of the run's folder."""
        number = self._folder.name.rpartition("-")[2]
        return int(number) if number.isdigit() else self._folder.name

    @property
    def save_dir(self) -> str | None:
        """The folder of runs."""
        return str(self._folder.parent)

    @property
    def log_dir(self) -> str | None:
        """The folder of the run."""
        return str(self._folder)

    root_dir = save_dir

    @property
    def run_id(self) -> str:
        """The name of the run's folder."""
        return self._folder.name

    @property
    def _folder(self) -> Path:
        if self._core is None:
            raise RuntimeError("the folder of a logger is known when its run has begun; ask in on_fit_start or later")
        return Path(self._core.run_dir)


class NoLogger(RunLogger):
    """Takes everything and logs nothing, as in a `fast_dev_run`."""

    kind = experiments.OfNone

    def _log(self, name: str, value: Any) -> None:
        pass


class _InFolder(RunLogger):
    """A logger that says where: `save_dir/name/version-1`, `version-2` and so on."""

    def _keep(self, save_dir: Any, name: str | None, version: int | str | None, prefix: str) -> None:
        self._begin()
        _refuse(self, {"prefix": (prefix, "write it before the names that you log")})
        word = "version" if version is None else str(version) if isinstance(version, str) else f"version_{version}"
        if not re.fullmatch(r"[\w-][\w.-]*", word):
            raise ValueError(f"{type(self).__name__}(version={version!r}) must be a plain name of letters and digits")
        self._place = (os.path.join(os.fspath(save_dir), name or ""), word)
        self._given_name = name

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
        kept = {name: init.pop(name) for name in ("entity", "group", "tags") if init.get(name) is not None}
        self.hparams.update(plain(init.pop("config", None) or {}, []))
        init = {name: value for name, value in init.items() if value is not None and name not in ("resume", "dir")}
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


def _refuse(logger: Any, asked: Mapping[str, tuple[Any, str]]) -> None:
    for name, (value, instead) in asked.items():
        if value:
            raise ValueError(f"{type(logger).__name__}({name}={value!r}) is not honoured here: {instead}")


OWN = {kind.__name__: kind for kind in (CSVLogger, TensorBoardLogger, WandbLogger, MLFlowLogger, CometLogger)}


# Those of the package and of users --------------------------------------------------------


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
        init = {name: value for name, value in logger._wandb_init.items() if name not in ("id", "dir", "resume")}
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
            found.append(_named("csv", {}))
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


def _named(name: str, options: Mapping[str, Any] | None) -> RunLogger:
    logger = RunLogger()
    logger.plugin = name
    logger.kind = {kind.plugin: kind.kind for kind in OWN.values()}.get(name, experiments.OfAny)
    given = dict(options or {})
    logger.options = lambda: given  # type: ignore[method-assign]
    return logger
