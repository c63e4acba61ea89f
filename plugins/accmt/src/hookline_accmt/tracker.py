"""ACCMT's trackers, each by the name of the plugin that does its work, and its arguments as that plugin's options."""

from __future__ import annotations

import importlib
import inspect
import itertools
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from hookline_accmt.names import options_of, refuse_unknown

DEFAULT = "logs"  # of `logging_dir`

log = logging.getLogger("hookline.accmt")


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
    scheme: ClassVar[str] = "http"
    """What the URL of its server begins with."""
    server: ClassVar[str] = "it has no server, but writes files: give a folder"
    """What to do instead of giving a URL."""

    @classmethod
    def options(cls, track_name: str, logging_dir: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of the plugin, made of those arguments that are its own; warn of what it has no place for.

        Raises:
            ValueError: the plugin is not installed, or the service cannot be led to `logging_dir`.
        """
        own = cls.own()
        options = {"axis": "batches", **({cls.track: track_name} if cls.track else {})}
        url = url_of(logging_dir, cls.scheme)
        options |= cls.at_folder(logging_dir) if url is None else cls.at_server(url)
        options |= {name: value for name, value in arguments.items() if name in own}
        if "run_name" in arguments:
            options |= cls.named(str(arguments["run_name"]), options)
        if "tags" in arguments:
            options |= cls.tagged(arguments["tags"], own)
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
    def at_folder(cls, folder: str) -> dict[str, Any]:
        """Return the options that lead to a folder: none, as the plugin writes into the folder of the run."""
        if folder != DEFAULT:
            log.warning(
                "log_with=%s: logging_dir=%r is not used, since its files lie in the folder of the run, in %r",
                cls.__name__, folder, cls.plugin,
            )  # fmt: skip
        return {}

    @classmethod
    def at_server(cls, url: str) -> dict[str, Any]:
        """Return the options that lead to a server.

        Raises:
            ValueError: it cannot be led to one.
        """
        raise ValueError(f"log_with={cls.__name__}: logging_dir={url!r} is a URL, and {cls.server}")

    @classmethod
    def named(cls, run_name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the option that `run_name` is, beside others."""
        if cls.run is None:
            return cls.unused("run_name", run_name)
        return {cls.run: run_name}

    @classmethod
    def tagged(cls, tags: Any, own: Iterable[str]) -> dict[str, Any]:
        """Return the option that `tags` are: one text or several, or what is told of each by name."""
        if "tags" not in own:
            return cls.unused("tags", tags)
        return {"tags": [tags] if isinstance(tags, str) else [*tags]}

    @classmethod
    def unused(cls, name: str, value: Any) -> dict[str, Any]:
        """Warn of what the tracker has no place for."""
        log.warning("log_with=%s has no place for %s=%r, which is not used", cls.__name__, name, value)
        return {}


class TensorBoard(Tracker):
    """TensorBoard, in `logging_dir` of the run's folder, or in an absolute path; the run's name is a folder in it."""

    plugin, init = "tensorboard", "torch.utils.tensorboard:SummaryWriter"

    @classmethod
    def at_folder(cls, folder: str) -> dict[str, Any]:
        """Return where."""
        return {"folder": folder}

    @classmethod
    def named(cls, run_name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return where."""
        return {"folder": str(Path(options["folder"]) / run_name)}


class WandB(Tracker):
    """Weights & Biases; a URL is that of its server."""

    plugin, track, run, init = "wandb", "project", "name", "wandb:init"

    @classmethod
    def at_server(cls, url: str) -> dict[str, Any]:
        """Return where."""
        return {"mode": "online", "init": {"settings": {"base_url": url}}}


class CometML(Tracker):
    """Comet."""

    plugin, track, run, init = "comet", "project", "name", "comet_ml:OfflineExperiment"
    server = "Comet's server is said by the variable COMET_URL_OVERRIDE: set it, and leave logging_dir out"


class Aim(Tracker):
    """Aim; a URL is that of its server, a path its repository."""

    plugin, track, run, init = "aim", "experiment", "name", "aim:Run"
    scheme = "aim"

    @classmethod
    def at_folder(cls, folder: str) -> dict[str, Any]:
        """Return where."""
        return {"repo": folder} if Path(folder).is_absolute() else super().at_folder(folder)

    @classmethod
    def at_server(cls, url: str) -> dict[str, Any]:
        """Return where."""
        return {"repo": url}


class MLFlow(Tracker):
    """MLflow; a URL is that of its server or store."""

    plugin, track, run = "mlflow", "experiment", "name"

    @classmethod
    def at_server(cls, url: str) -> dict[str, Any]:
        """Return where."""
        return {"tracking_uri": url}

    @classmethod
    def tagged(cls, tags: Any, own: Iterable[str]) -> dict[str, Any]:
        """Return them by name, as MLflow has them."""
        names = [tags] if isinstance(tags, str) else tags
        return {"tags": dict(tags) if isinstance(tags, Mapping) else dict.fromkeys(names, "true")}


class ClearML(Tracker):
    """ClearML."""

    plugin, track, run, init = "clearml", "project_name", "task_name", "clearml:Task.init"
    server = "ClearML's server is said by the variable CLEARML_API_HOST: set it, give offline=False, leave this out"


class DVCLive(Tracker):
    """DVCLive."""

    plugin, run, init = "dvclive", "exp_name", "dvclive:Live"

    @classmethod
    def named(cls, run_name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the name, which is of an experiment in a repository of DVC."""
        if options.get("save_dvc_exp"):
            return super().named(run_name, options)
        return cls.unused("run_name without save_dvc_exp=True", run_name)


def url_of(logging_dir: str, scheme: str) -> str | None:
    """Return the URL that is meant: one, or a host with a port, or this machine; None for a folder."""
    if "://" in logging_dir:
        return logging_dir
    if re.fullmatch(r"localhost|[\d.]{7,15}|[\w.-]+:\d{1,5}(/.*)?", logging_dir):
        return f"{scheme}://{logging_dir}"
    return None


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
    kinds = {kind.__name__.lower(): kind for kind in Tracker.__subclasses__()}
    for one in listed:
        tracker = kinds.get(one.lower()) if isinstance(one, str) else one if isinstance(one, type) else type(one)
        if tracker is None or not issubclass(tracker, Tracker) or tracker is Tracker:
            offer = ", ".join(kind.__name__ for kind in kinds.values())
            raise TypeError(f"log_with={one!r} is no tracker; there are {offer}, imported from hookline_accmt")
        if tracker in trackers:
            raise TypeError(f"log_with names {tracker.__name__} twice")
        trackers.append(tracker)
    plugins = {tracker.plugin: tracker.options(track_name, logging_dir, arguments) for tracker in trackers}
    taken = {"run_name", "tags", *(name for tracker in trackers for name in tracker.own())}
    if not trackers:
        if url_of(logging_dir, "http") is not None:
            raise ValueError(f"logging_dir={logging_dir!r} is a URL, and log_with names no tracker to lead there")
        for name in ("run_name", "tags"):
            if name in arguments:
                log.warning("%s=%r is of a tracker, and log_with names none, so it is not used", name, arguments[name])
    left = [name for name in arguments if name not in taken]
    offered = {tracker: tracker.of_service() if left else [] for tracker in trackers}
    refuse_unknown("Trainer", left, [*known, *sorted(taken), *itertools.chain(*offered.values())])
    for tracker, names in offered.items():
        more = {name: arguments[name] for name in left if name in names}
        if more:
            options = plugins[tracker.plugin]
            options["init"] = {**options.get("init", {}), **more}
    return plugins
