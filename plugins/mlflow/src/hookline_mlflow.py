"""Tell MLflow of a run: a store in the folder of the run, or a server."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hookline import Stage
from hookline.tracking import Run, Table, Tracker, below, flat

__version__ = "0.1.0"

ENVIRONMENT = {  # what MLflow does unless the environment says otherwise; requests are tried for about 30 s
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "GIT_PYTHON_REFRESH": "quiet",
}
NEEDS = "'mlflow-skinny>=3.10' sqlalchemy alembic"
METRICS, PARAMETERS, KEY, VALUE = 1000, 100, 250, 6000  # MLflow's own bounds: of a request, and of characters
STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "preempted": "KILLED", "failed": "FAILED"}


@dataclass(eq=False)
class Mlflow(Tracker):
    """Tell MLflow of a run: a store in the folder of the run, or a server."""

    tracking_uri: str | None = None
    """Of a server, or of a store for several runs; none is an SQLite store below the folder of the run."""
    experiment: str = "hookline"
    """Under which name MLflow shows the run; it is made where it does not exist."""
    name: str | None = None
    """Name of the run; null for that of its folder."""
    tags: dict[str, Any] = field(default_factory=dict)
    """Of the run, shown as texts."""

    whole_places = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tracking_uri is not None and not re.match(r"[\w+.-]+:/|databricks(:|$)", self.tracking_uri):
            raise ValueError(
                f"mlflow.tracking_uri={self.tracking_uri!r} is no URI; write one like http://127.0.0.1:5000 or "
                "sqlite:////folder/mlflow.db, or leave it out for a store in the folder of the run"
            )

    @property
    def local(self) -> bool:
        """Whether the store is in the folder of the run."""
        return self.tracking_uri is None

    def start(self, run: Run) -> str:
        """Begin a run of MLflow, or go on with the one that was cut.

        An evaluation on its own is a run of its own, which nobody goes on with.

        Raises:
            ValueError: MLflow is not installed.
        """
        self._unsent: list[Any] = []
        self._late = False  # whether MLflow could not be given what is unsent
        self._stored: Counter[tuple[str, float]] = Counter()  # what will come again, and is there
        self._within: dict[str, int] = {}  # the last batch of validations that is there of a name
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        home = run.folder.resolve() / "mlflow"
        if self.tracking_uri is None:
            home.mkdir(exist_ok=True)
        uri = self.tracking_uri or f"sqlite:///{quote(str(home / 'mlflow.db'))}"
        mlflow = self.import_sdk("mlflow", NEEDS)
        if self.local:
            self.import_sdk("mlflow.store.tracking.sqlalchemy_store", NEEDS)
        self._client: Any = mlflow.MlflowClient(tracking_uri=uri)
        goes_on = run.id is not None and run.stage is Stage.TRAIN
        if goes_on:
            self._go_on(str(run.id), run.place)
        else:
            experiment = self._experiment(None if self.tracking_uri else (home / "artifacts").as_uri())
            tags = {"hookline.stage": run.stage.value, **{name: str(value) for name, value in self.tags.items()}}
            self._run_id: str = self._client.create_run(
                experiment, tags=tags, run_name=self.name or run.name
            ).info.run_id
        self._log_config(run.config)
        return self._run_id

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
        texts = {
            _legal(name): (value if isinstance(value, str) else json.dumps(value, default=str))[:VALUE]
            for name, value in flat(config)
        }
        new = [param(name, text) for name, text in texts.items() if name not in there]
        for first in range(0, len(new), PARAMETERS):
            self._client.log_batch(self._run_id, params=new[first : first + PARAMETERS], synchronous=True)

    def log_metrics(self, metrics: Mapping[str, float], place: float) -> None:
        """Collect values while more waits, and send them at once: a store takes a thousand in the time of five."""
        metric, now = _entity("Metric"), int(time.time() * 1000)
        for name, value in metrics.items():
            key = _legal(name)
            if self._stored[key, place]:
                self._stored[key, place] -= 1
            else:
                self._unsent.append(metric(key, value, now, place))
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


def _legal(name: str) -> str:
    """Return a name as MLflow takes it: other characters are _, and as a path it leads nowhere else."""
    return re.sub(r"[^\w\-. :/]", "_", below(name))[:KEY].strip("/")


def _path(kind: str, name: str, place: float, suffix: str) -> str:
    return f"{kind}/{_legal(name)}/{place:09d}{suffix}"
