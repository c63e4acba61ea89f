"""ACCMT's trackers, each by the name of the plugin that does its work, and its arguments as that plugin's options."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from hookline_accmt.names import options_of, refuse_unknown


class Tracker:
    """What a tracker is told."""

    plugin: ClassVar[str]
    """The plugin's name."""
    track: ClassVar[str | None] = None
    """The option that the track's name is."""
    run: ClassVar[str | None] = None
    """The option that `run_name` is."""
    init: ClassVar[str | None] = None
    """What other arguments go to, by the option `init`."""

    @classmethod
    def options(cls, track_name: str, logging_dir: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of the plugin, made of those arguments that are its own.

        Raises:
            ValueError: the plugin is not installed, or the service cannot be led to `logging_dir`.
        """
        own = cls.own()
        options = {"axis": "batches", **({cls.track: track_name} if cls.track else {}), **cls.place(logging_dir)}
        options |= {name: value for name, value in arguments.items() if name in own}
        if cls.run is not None and "run_name" in arguments:
            options[cls.run] = arguments["run_name"]
        return options

    @classmethod
    def own(cls) -> list[str]:
        """Return the options of the plugin."""
        return options_of(cls.plugin, f"log_with={cls.__name__}")

    @classmethod
    def of_service(cls) -> list[str]:
        """Return the arguments of the service's own beginning."""
        if cls.init is None:
            return []
        home, _, path = cls.init.partition(":")
        try:
            begin: Any = importlib.import_module(home)
        except ImportError as error:
            raise ValueError(f"log_with={cls.__name__}: {home} cannot be imported: {error}") from error
        for name in path.split("."):
            begin = getattr(begin, name)
        return [*inspect.signature(begin).parameters]

    @classmethod
    def place(cls, logging_dir: str) -> dict[str, Any]:
        """Return the options that lead to `logging_dir`; a path is that of the plugin, in the folder of the run."""
        if "://" in logging_dir:
            raise ValueError(
                f"log_with={cls.__name__}: logging_dir={logging_dir!r} is a URL, which it cannot be led to"
            )
        return {}


class TensorBoard(Tracker):
    """TensorBoard, in `logging_dir` of the run's folder."""

    plugin, init = "tensorboard", "torch.utils.tensorboard:SummaryWriter"

    @classmethod
    def place(cls, logging_dir: str) -> dict[str, Any]:
        """Return where."""
        return {**super().place(logging_dir), "folder": logging_dir}


class WandB(Tracker):
    """Weights & Biases; a URL is that of its server."""

    plugin, track, run, init = "wandb", "project", "name", "wandb:init"

    @classmethod
    def place(cls, logging_dir: str) -> dict[str, Any]:
        """Return where."""
        return {"mode": "online", "init": {"settings": {"base_url": logging_dir}}} if "://" in logging_dir else {}


class CometML(Tracker):
    """Comet."""

    plugin, track, run, init = "comet", "project", "name", "comet_ml:OfflineExperiment"


class Aim(Tracker):
    """Aim; a URL is that of its server."""

    plugin, track, run, init = "aim", "experiment", "name", "aim:Run"

    @classmethod
    def place(cls, logging_dir: str) -> dict[str, Any]:
        """Return where."""
        return {"repo": logging_dir} if "://" in logging_dir else {}


class MLFlow(Tracker):
    """MLflow; a URL is that of its server or store."""

    plugin, track = "mlflow", "experiment"

    @classmethod
    def place(cls, logging_dir: str) -> dict[str, Any]:
        """Return where."""
        return {"tracking_uri": logging_dir} if "://" in logging_dir else {}


class ClearML(Tracker):
    """ClearML."""

    plugin, track, run, init = "clearml", "project_name", "task_name", "clearml:Task.init"


class DVCLive(Tracker):
    """DVCLive."""

    plugin, run, init = "dvclive", "exp_name", "dvclive:Live"


def plugins_of(
    given: Any, track_name: str, logging_dir: str, arguments: Mapping[str, Any], known: Iterable[str]
) -> dict[str, Any]:
    """Return the plugins of one tracker or several, with their options.

    Args:
        given: `log_with`.
        track_name: what they call the run's group.
        logging_dir: where they are led to.
        arguments: theirs.
        known: arguments of the trainer, which one of these may be a slip of.

    Raises:
        TypeError: something that is no tracker, or an argument of none of them, with the nearest that is.
        ValueError: a plugin or its service is not installed.
    """
    listed = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    trackers: list[type[Tracker]] = []
    for one in listed:
        tracker = one if isinstance(one, type) else type(one)
        if not issubclass(tracker, Tracker) or tracker is Tracker:
            kinds = ", ".join(kind.__name__ for kind in Tracker.__subclasses__())
            raise TypeError(f"log_with={one!r} is no tracker; there are {kinds}, imported from hookline_accmt")
        if tracker in trackers:
            raise TypeError(f"log_with names {tracker.__name__} twice")
        trackers.append(tracker)
    plugins = {tracker.plugin: tracker.options(track_name, logging_dir, arguments) for tracker in trackers}
    taken = {name for tracker in trackers for name in tracker.own()}
    if any(tracker.run for tracker in trackers):
        taken.add("run_name")
    left = [name for name in arguments if name not in taken]
    offered = {tracker: tracker.of_service() if left else [] for tracker in trackers}
    refuse_unknown("Trainer", left, [*known, *sorted(taken), *itertools.chain(*offered.values())])
    for tracker, names in offered.items():
        more = {name: arguments[name] for name in left if name in names}
        if more:
            options = plugins[tracker.plugin]
            options["init"] = {**options.get("init", {}), **more}
    return plugins
