"""Tell MLflow of a run: a store in the folder of the run, or a server."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hookline import Stage
from hookline.tracking import Run, Table, Tracker

__version__ = "0.1.0"

ENVIRONMENT = {  # what MLflow does unless the environment says otherwise; requests are tried for about 30 s
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "GIT_PYTHON_REFRESH": "quiet",
}
METRICS, PARAMETERS, KEY, VALUE = 1000, 100, 250, 6000  # MLflow's own bounds: of a request, and of characters
STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "preempted": "KILLED", "failed": "FAILED"}


@dataclass(eq=False)
class Mlflow(Tracker):
    """Tell MLflow of a run: a store in the folder of the run, or a server."""

    tracking_uri: str | None = None
    """Of a server, or of a store for several runs; none is an SQLite store below the folder of the run."""
    experiment: str = "hookline"
    """Under which name MLflow shows the run; it is made where it does not exist."""
    tags: dict[str, Any] = field(default_factory=dict)
    """Of the run, shown as texts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axis == "seconds":
            raise ValueError(
                "mlflow.axis='seconds': places are whole numbers in MLflow, which keeps the time of each value as "
                "well; take steps, batches, samples or epochs"
            )
        if self.tracking_uri is not None and not re.match(r"[\w+.-]+:/|databricks(:|$)", self.tracking_uri):
            raise ValueError(
                f"mlflow.tracking_uri={self.tracking_uri!r} is no URI; write one like http://127.0.0.1:5000 or "
                "sqlite:////folder/mlflow.db, or leave it out for a store in the folder of the run"
            )

    def start(self, run: Run) -> str | None:
        """Begin a run of MLflow, or go on with the one that was cut.

        An evaluation on its own is a run of its own, which nobody goes on with.

        Raises:
            RuntimeError: MLflow is not installed.
        """
        self._unsent: list[Any] = []
        self._late = False  # whether MLflow could not be given what is unsent
        self._stored: Counter[tuple[str, int]] = Counter()  # what will come again, and is there
        self._within: dict[str, int] = {}  # the last batch of validations that is there of a name
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        home = run.folder.resolve() / "mlflow"
        if self.tracking_uri is None:
            home.mkdir(exist_ok=True)
        try:
            uri = self.tracking_uri or f"sqlite:///{quote(str(home / 'mlflow.db'))}"
            self._client: Any = importlib.import_module("mlflow").MlflowClient(tracking_uri=uri)
        except ImportError as error:
            raise RuntimeError(
                f"MLflow cannot be imported ({error}); `pip install 'mlflow-skinny>=3.10' sqlalchemy alembic`"
            ) from error
        goes_on = run.id is not None and run.stage is Stage.TRAIN
        if goes_on:
            self._go_on(str(run.id), run.place)
        else:
            experiment = self._experiment(None if self.tracking_uri else (home / "artifacts").as_uri())
            tags = {"hookline.stage": run.stage.value, **{name: str(value) for name, value in self.tags.items()}}
            self._run_id: str = self._client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
        self._log_config(run.config)
        return self._run_id if run.stage is Stage.TRAIN else None

    def _go_on(self, run_id: str, place: float) -> None:
        self._run_id = run_id
        names = self._client.get_run(run_id).data.metrics
        histories = ((name, self._client.get_metric_history(run_id, name)) for name in names)
        self._stored = Counter(
            (name, kept.step) for name, history in histories for kept in history if kept.step > place
        )
        self._client.update_run(run_id, status="RUNNING")

    def _experiment(self, artifacts: str | None) -> str:
        found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            with contextlib.suppress(importlib.import_module("mlflow").MlflowException):  # another run has just made it
                return str(self._client.create_experiment(self.experiment, artifact_location=artifacts))
            found = self._client.get_experiment_by_name(self.experiment)
        return str(found.experiment_id)

    def _log_config(self, config: Mapping[str, Any]) -> None:
        """Keep the configuration whole, and its values as parameters, which MLflow never lets change."""
        self._client.log_text(self._run_id, json.dumps(config, indent=1, default=str), "config.json")
        there, param = self._client.get_run(self._run_id).data.params, _entity("Param")
        new = [param(name, value) for name, value in dict(_parameters(config)).items() if name not in there]
        for first in range(0, len(new), PARAMETERS):
            self._client.log_batch(self._run_id, params=new[first : first + PARAMETERS], synchronous=True)

    def log_metrics(self, metrics: Mapping[str, float], place: float) -> None:
        """Collect values while more waits, and send them at once: a store takes a thousand in the time of five."""
        metric, now, step = _entity("Metric"), int(time.time() * 1000), int(place)
        for name, value in metrics.items():
            key = _legal(name)
            if self._stored[key, step]:
                self._stored[key, step] -= 1
            else:
                self._unsent.append(metric(key, value, now, step))
        self._send_if_due()

    def log_batch(self, metrics: Mapping[str, float], batch: int) -> None:
        """Collect values with the number of the validation batch for their step, without those that are stored."""
        metric, now = _entity("Metric"), int(time.time() * 1000)
        for name, value in metrics.items():
            key = _legal(name)
            if key not in self._within:
                history = self._client.get_metric_history(self._run_id, key)
                self._within[key] = max((kept.step for kept in history), default=0)
            if batch > self._within[key]:
                self._within[key] = batch
                self._unsent.append(metric(key, value, now, batch))
        self._send_if_due()

    def log_text(self, name: str, text: str, place: float) -> None:
        """Keep a text as an artifact."""
        self._client.log_text(self._run_id, text, _path("texts", name, place, ".txt"))
        self._send_if_due()

    def log_image(self, name: str, pixels: Any, place: float) -> None:
        """Keep an image as an artifact."""
        self._client.log_image(self._run_id, pixels, _path("images", name, place, ".png"))
        self._send_if_due()

    def log_table(self, name: str, table: Table, place: float) -> None:
        """Keep a table as an artifact, as MLflow writes tables."""
        text = json.dumps({"columns": table.columns, "data": table.rows}, default=str)
        self._client.log_text(self._run_id, text, _path("tables", name, place, ".json"))
        self._send_if_due()

    def log_file(self, name: str, path: Path, place: float) -> None:
        """Keep a file, or a folder, as an artifact; a later one of that name takes its place."""
        put = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        put(self._run_id, str(path), f"files/{_legal(name)}")
        self._send_if_due()

    def get_state(self) -> dict[str, Any]:
        """Answer the base's state, but when a store in the folder of the run has all that stands before a save."""
        if self.tracking_uri is None:
            self.catch_up()
        return super().get_state()

    def finish(self, status: str) -> None:
        """Send what is left, and end the run of MLflow."""
        try:
            self._send()
        finally:
            self._client.set_terminated(self._run_id, STATUS[status])

    def _send_if_due(self) -> None:
        if self._late or len(self._unsent) >= METRICS or not self.waiting:
            self._send()

    def _send(self) -> None:
        """Send what was collected; what is refused stays, and is tried again with the next call."""
        self._late = bool(self._unsent)
        while self._unsent:
            self._client.log_batch(self._run_id, metrics=self._unsent[:METRICS], synchronous=True)
            del self._unsent[:METRICS]
        self._late = False


def _entity(name: str) -> Any:
    return getattr(importlib.import_module("mlflow.entities"), name)


def _parameters(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Give the values of a tree as texts, by dotted names."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _parameters(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield _legal(f"{prefix}{name}"), text[:VALUE]


def _legal(name: str) -> str:
    """Return a name as MLflow takes it: other characters are _, and as a path it leads nowhere else."""
    parts = [re.sub(r"[^\w\-. :]", "_", part) for part in name.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:KEY].strip("/") or "_"


def _path(kind: str, name: str, place: float, suffix: str) -> str:
    return f"{kind}/{_legal(name)}/{int(place):09d}{suffix}"
