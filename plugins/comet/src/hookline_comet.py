"""Track runs with Comet: in archives in the run's folder, or on a server."""

from __future__ import annotations

import csv
import importlib
import inspect
import io
import json
import os
import shutil
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from hookline import Stage
from hookline.files import replacing
from hookline.tracking import Run, Table, Tracker

__version__ = "0.1.0"

MODES = ("offline", "online")
SET_BY = {  # what sets arguments of an experiment
    "project_name": "the option comet.project",
    "workspace": "the option comet.workspace",
    "api_key": "the variable COMET_API_KEY, since it is a secret",
    **dict.fromkeys(("experiment_key", "offline_directory", "disabled"), "the plugin, from the run"),
}
ENVIRONMENT = {  # what the SDK does unless the environment says otherwise
    "COMET_DISABLE_AUTO_LOGGING": "1",  # else it changes other packages when it is imported
    "COMET_DISABLE_ANNOUNCEMENT": "1",
    "COMET_ERROR_TRACKING_ENABLE": "false",
    "COMET_INTERNAL_REPORTING": "false",
    "COMET_LOGGING_CONSOLE": "CRITICAL",
    "COMET_GET_OR_ADD_EXPERIMENT_RETRY_TOTAL": "1",  # its 10 wait for four minutes
    "COMET_HTTP_SESSION_RETRY_TOTAL": "1",
}
SETTINGS = {  # none of it is the tracker's business, and the command line has what the configuration masks
    "auto_log_co2": False,
    "auto_metric_logging": False,
    "auto_output_logging": False,
    "auto_param_logging": False,
    "display_summary_level": 0,
    "log_code": False,
    "log_env_details": False,
    "log_git_metadata": False,
    "log_git_patch": False,
    "log_graph": False,
    "parse_args": False,
}
BATCHES = "validate"  # the SDK's name of the context
MESSAGES, ABOUT = "messages.json", "experiment.json"  # the SDK's own names in an archive


@dataclass(eq=False)
class Comet(Tracker):
    """Hand what is logged to Comet."""

    mode: str = "offline"
    """`offline` writes below the run's folder, to be sent by `comet upload` or never; `online` sends to a server."""
    project: str | None = None
    """Project on the server; null for the SDK's own choice."""
    workspace: str | None = None
    """Workspace that the project belongs to; null for the default of the account."""
    name: str | None = None
    """Name of the experiment; null for that of the run's folder."""
    tags: list[str] = field(default_factory=list)
    """Tags of the experiment."""
    init: dict[str, Any] = field(default_factory=dict)
    """Other arguments of `comet_ml.OfflineExperiment`, or online of `comet_ml.Experiment`, such as `log_code`."""

    whole_places = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise ValueError(
                f"comet.mode={self.mode!r} must be one of {', '.join(MODES)}; to turn it off, write `comet: null`"
            )
        self.refuse_set(self.init, SET_BY)
        self._written: _Written | None = None

    @property
    def local(self) -> bool:
        """Whether it is written below the run's folder."""
        return self.mode == "offline"

    def start(self, run: Run) -> str:
        """Begin an experiment, or one more part of the one that is gone on with; return its key.

        Raises:
            RuntimeError: the server did not take the experiment.
            ValueError: comet_ml is not installed, `init` names what it does not know, or there is no key for the
                server.
        """
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        comet = self.import_sdk("comet_ml", "'comet-ml>=3.58'")
        known = inspect.signature(comet.OfflineExperiment).parameters
        self.refuse_unknown("init", self.init, "an experiment", known.keys() - {*SET_BY, "kwargs"})
        self._stored: Counter[tuple[str, str, float]] = Counter()  # what will come again, and is there
        key = run.id or uuid.uuid4().hex
        if self.local:
            self._begin_part(comet, run, key)
        else:
            kind = comet.Experiment if run.id is None else comet.ExistingExperiment
            self._experiment = self._make(comet, kind, key)
            if not self._experiment.alive:
                raise RuntimeError(
                    "the server of Comet did not take the experiment: see whether it can be reached and whether the "
                    "key in COMET_API_KEY is right; COMET_LOGGING_CONSOLE=ERROR shows more"
                )
        if run.id is None:
            self._experiment.set_name(self.name or run.name)
            self._experiment.add_tags(list(self.tags))
        if self.local:
            self._say_what_it_is()
        if run.config:
            self._experiment.log_parameters(dict(run.config))
        return key

    def _begin_part(self, comet: Any, run: Run, key: str) -> None:
        folder = run.folder.absolute() / "comet"
        folder.mkdir(parents=True, exist_ok=True)
        pack(folder)
        if run.id is not None and run.stage is Stage.TRAIN:
            self._stored = stored(folder, key, run.place, run.batch)
        before = len(list(folder.glob(f"{key}*.zip")))
        self._part = folder / (f"{key}-{before + 1}" if before else key)
        self._part.mkdir()
        kind = comet.ExistingOfflineExperiment if before else comet.OfflineExperiment
        self._experiment = self._make(comet, placed(kind, self._part), key, offline_directory=str(folder))
        self._written = _Written(self._part / MESSAGES)

    def _make(self, comet: Any, kind: Any, key: str, **more: Any) -> Any:
        """Make an experiment beside others of this process, which the SDK would end."""
        arguments = {"project_name": self.project, "workspace": self.workspace, **SETTINGS, **self.init, **more}
        if issubclass(kind, comet.ExistingOfflineExperiment):  # it takes fewer, as others are settled by then
            arguments = {n: value for n, value in arguments.items() if n in inspect.signature(kind).parameters}
        config: Any = importlib.import_module("comet_ml.config")
        other = config.get_global_experiment()
        config.set_global_experiment(None)
        try:
            return kind(experiment_key=key, **arguments)
        finally:
            config.set_global_experiment(other)

    def _say_what_it_is(self) -> None:
        """Write at the start what the SDK writes at the end, so that a part of a killed process is whole as it is."""
        importlib.import_module("comet_ml.offline_utils").write_experiment_meta_file(
            tempdir=str(self._part),
            experiment_key=self._experiment.id,
            workspace=self._experiment.workspace,
            project_name=self._experiment.project_name,
            start_time=self._experiment.start_time,
            stop_time=None,
            tags=self._experiment.get_tags(),
            resume_strategy=self._experiment.resume_strategy,
            user_provided_experiment_key=True,
        )

    def log_metrics(self, metrics: Mapping[str, float], place: float) -> None:
        """Log values, without those that are stored already."""
        if not self._experiment.alive:
            raise RuntimeError("the experiment of Comet has ended")
        new = {name: value for name, value in metrics.items() if not self._is_stored("metric", name, place)}
        if new:
            self._experiment.log_metrics(new, step=place)

    def log_batch(self, metrics: Mapping[str, float], batch: int) -> None:
        """Log values of a validation under way, in the SDK's context for these."""
        new = {name: value for name, value in metrics.items() if not self._is_stored(BATCHES, name, batch)}
        if new:
            with self._experiment.validate():
                self._experiment.log_metrics(new, step=batch)

    def log_text(self, name: str, text: str, place: float) -> None:
        """Log a text; its name is in its metadata, as texts have none in Comet."""
        self._put("text-sample", name, place, lambda about: self._experiment.log_text(text, **about))

    def log_image(self, name: str, pixels: Any, place: float) -> None:
        """Log an image."""
        image = importlib.import_module("PIL.Image").fromarray(pixels)  # the SDK cannot take an array of one colour
        self._put("visualization", name, place, lambda about: self._experiment.log_image(image, name=name, **about))

    def log_histogram(self, name: str, values: Any, place: float) -> None:
        """Log a histogram."""
        log = self._experiment.log_histogram_3d
        self._put("histogram3d", name, place, lambda about: log(values, name=name, **about))

    def log_table(self, name: str, table: Table, place: float) -> None:
        """Log a table as a file of comma-separated values."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([table.columns, *table.rows])
        text.seek(0)
        log = self._experiment.log_asset
        self._put("asset", name, place, lambda about: log(text, file_name=f"{name}.csv", **about))

    def log_file(self, name: str, path: Path, place: float) -> None:
        """Log a file or a folder as a model; a later one of this name takes its place on the server."""
        self._experiment.set_step(place)
        about = {"name": name, self.axis: place}
        if self._experiment.log_model(name, str(path), overwrite=True, metadata=about) is None:
            raise RuntimeError(f"Comet did not take {path}")
        self._settle()  # the SDK copies it later, when another may have taken its place

    def finish(self, status: str) -> None:
        """Say how the run has ended, and end the experiment."""
        self._experiment.log_other("status", status)
        self._settle()
        self._forget()
        self._experiment.end()

    def catch_up(self) -> None:
        """Wait until all that was logged so far is taken, and on disk."""
        super().catch_up()
        self._settle()

    def _settle(self) -> None:
        """Wait until all that was told is on disk: a thread of the SDK writes it, and a kill takes what it has not."""
        if self._written is None:
            return
        written, mark = self._written, self._written.next_mark()
        self._experiment.log_other("hookline.saved", mark)
        if not self.wait_until(lambda: written.has(mark)):
            self._forget()  # that thread is gone, say: not again at each save

    def _forget(self) -> None:
        if self._written is not None:
            self._written.close()
            self._written = None

    def _put(self, kind: str, name: str, place: float, log: Callable[[Mapping[str, Any]], Any]) -> None:
        """Log an object, unless it is stored already."""
        if self._is_stored(kind, name, place):
            return
        if log({"step": place, "metadata": {"name": name}}) is None:
            raise RuntimeError(f"Comet did not take {name}; COMET_LOGGING_CONSOLE=ERROR shows more")

    def _is_stored(self, kind: str, name: str, place: float) -> bool:
        what = (kind, name, place)
        there = self._stored[what] > 0
        if there:
            self._stored[what] -= 1
        return there


class _Written:
    """Says what has come to the end of a file that another thread writes."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("rb")
        self._end = b""
        self._marks = 0

    def next_mark(self) -> str:
        """Return a text that was not in the file yet."""
        self._marks += 1
        return f"{self._marks} times"

    def has(self, mark: str) -> bool:
        """Return whether a mark has been written since the last one was found."""
        wanted = json.dumps(mark).encode()
        self._end += self._file.read()
        found = wanted in self._end
        self._end = self._end[-len(wanted) :]
        return found

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def placed(kind: type, part: Path) -> type:
    """Return a class of offline experiments that are written to this folder and packed into the archive of its name.

    The SDK takes a folder for temporary files, which nobody finds again once the process is killed.
    """
    _, _, suffix = part.name.partition("-")
    return type(
        kind.__name__,
        (kind,),
        {
            "tmpdir": property(lambda _: str(part), lambda _, made: os.rmdir(made)),
            "offline_archive_name_suffix": property(lambda _: suffix, lambda _, made: None),
        },
    )


def pack(folder: Path) -> None:
    """Make archives of what processes that were killed have left, as the SDK does at the end of an experiment."""
    for part in [path for path in folder.iterdir() if path.is_dir()]:
        archive = folder / f"{part.name}.zip"
        if not is_whole(archive) and (part / ABOUT).exists():
            messages = part / MESSAGES
            content = messages.read_bytes()
            messages.write_bytes(content[: content.rfind(b"\n") + 1])  # without a torn line
            with replacing(archive) as made, zipfile.ZipFile(made, "w") as file:
                for path in part.iterdir():
                    file.write(path, path.name)
        shutil.rmtree(part)
    for archive in folder.glob("*.zip"):
        if not is_whole(archive):  # the SDK makes an empty one first
            archive.unlink()


def is_whole(archive: Path) -> bool:
    """Return whether an archive was finished."""
    if not zipfile.is_zipfile(archive):
        return False
    with zipfile.ZipFile(archive) as file:
        return {MESSAGES, ABOUT} <= set(file.namelist())


def stored(folder: Path, key: str, place: float, batch: int) -> Counter[tuple[str, str, float]]:
    """Return how often what is in the archives of an experiment for later places: kind, name and place."""
    found: Counter[tuple[str, str, float]] = Counter()
    for archive in folder.glob(f"{key}*.zip"):
        with zipfile.ZipFile(archive) as file, file.open(MESSAGES) as lines:
            for line in lines:
                message = json.loads(line)
                about = message["payload"]
                if message["type"] == "metric_msg":
                    kind, name, step = (
                        about.get("context") or "metric",
                        about["metric"]["metricName"],
                        about["metric"]["step"],
                    )
                elif message["type"] == "file_upload":
                    kind, name, step = (
                        about["upload_type"],
                        about["metadata"].get("name"),
                        about["additional_params"]["step"],
                    )
                else:
                    continue
                if step is not None and step > (batch if kind == BATCHES else place):
                    found[kind, name, step] += 1
    return found
