"""What a module's `self.logger` is: all trackers of the run, in the words of Lightning's loggers."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hookline
from hookline_lightning.files.plain import plain
from hookline_lightning.logs import experiments


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
