"""Log a run with DVCLive: files below the run's folder that DVC reads."""

from __future__ import annotations

import importlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hookline import Stage
from hookline.files import replacing
from hookline.tracking import Run, Table, Tracker, below

__version__ = "0.1.0"

SET_BY = {  # what sets arguments of Live
    "report": "the option dvclive.report",
    "save_dvc_exp": "the option dvclive.save_dvc_exp",
    "exp_name": "the option dvclive.exp_name",
    "exp_message": "the option dvclive.exp_message",
    "dir": "the plugin: values go below the run's folder",
    "resume": "the plugin, from the run",
    "monitor_system": "the plugin: it is off, and the plugin monitor logs what the machine does",
}
OF_A_REPOSITORY = ("exp_name", "exp_message", "dvcyaml", "cache_images")
REPORTS = ("md", "html", "notebook")
BATCHES = "validation_batches"  # a folder of metrics, since their steps count something else


@dataclass(eq=False)
class Dvclive(Tracker):
    """Hand what is logged to DVCLive, which writes it below the folder of the run."""

    report: str | None = None
    """A report that is made when the run ends: `md`, `html` or `notebook`; null for none."""
    save_dvc_exp: bool = False
    """Use the repository of DVC around the working folder: models are tracked there, and the run is an experiment."""
    exp_name: str | None = None
    """Name of the experiment; null for one that DVC finds."""
    exp_message: str | None = None
    """Message of the experiment's commit."""
    init: dict[str, Any] = field(default_factory=dict)
    """Other arguments of `dvclive.Live`: `dvcyaml`, `cache_images`."""

    local = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.report is not None and self.report not in REPORTS:
            raise ValueError(f"dvclive.report={self.report!r} must be one of {', '.join(REPORTS)}, or null")
        self.refuse_set(self.init, SET_BY)
        for name in OF_A_REPOSITORY:
            if not self.save_dvc_exp and (self.init.get(name) or getattr(self, name, None)):
                raise ValueError(f"dvclive: {name} is about a repository of DVC: it needs dvclive.save_dvc_exp=true")

    def start(self, run: Run) -> str:
        """Begin to write, or go on with the files of the run that was cut.

        An evaluation on its own has a folder of its own.

        Raises:
            ValueError: DVCLive is not installed, or `init` names what `Live` does not have.
        """
        live: Any = self.import_sdk("dvclive", "'dvclive>=3.49.1,<4' hydra-core==1.3.0").Live
        known = inspect.signature(live).parameters
        self.refuse_unknown("init", self.init, "Live", known.keys() - SET_BY.keys())
        training = run.stage is Stage.TRAIN
        self._folder = run.folder / ("dvclive" if training else f"dvclive-{run.stage.value}")
        goes_on = training and run.id is not None
        self._summary: dict[str, Any] = self._go_on(run) if goes_on else {}
        self._last, self._last_batch = run.place, run.batch
        if not self.save_dvc_exp:  # it would make a repository of any of git, and tell DVC Studio
            live = type("Live", (live,), {"_init_dvc": lambda self: None, "_init_studio": lambda self: None})
        self._live = live(
            dir=str(self._folder),
            resume=goes_on,
            report=self.report,
            save_dvc_exp=self.save_dvc_exp,
            exp_name=self.exp_name,
            exp_message=self.exp_message,
            **({"dvcyaml": None} if not self.save_dvc_exp else {}),
            **self.init,
        )
        self._live.step = number(run.place)
        self._live.log_params(run.plain_config)
        return "dvclive"

    def _go_on(self, run: Run) -> dict[str, Any]:
        """Drop what training comes to again, and what is torn; return the last values."""
        self._drop(lambda place: place > run.place, lambda batch: batch > run.batch)
        (self._folder / "params.yaml").unlink(missing_ok=True)
        summary = self._folder / "metrics.json"
        try:
            values: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            summary.unlink(missing_ok=True)
            return {}
        return {name: value for name, value in values.items() if name not in ("step", "status")}

    def _drop(self, place: Callable[[float], bool] | None, batch: Callable[[float], bool] | None) -> None:
        """Drop the rows of places, or of validation batches, and last ones that are not whole."""
        metrics = self._folder / "plots" / "metrics"
        for path in [*metrics.rglob("*.tsv")]:
            unwanted = batch if path.is_relative_to(metrics / BATCHES) else place
            if unwanted is None:
                continue
            head, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
            kept = [row for row in rows if row.endswith("\n") and not unwanted(float(row.split("\t")[0]))]
            if kept:
                with replacing(path) as new:
                    new.write_text("".join([head, *kept]), encoding="utf-8")
            else:
                path.unlink()

    def log_metrics(self, metrics: Mapping[str, float], place: float) -> None:
        """Add a row for each value; where training goes back, rows that stand behind are dropped."""
        if place < self._last:
            self._drop(lambda stored: stored >= place, None)
        self._last = place
        self._log("", metrics, number(place))

    def log_batch(self, metrics: Mapping[str, float], batch: int) -> None:
        """Add a row for each value of a validation under way, in a folder of their own."""
        if batch < self._last_batch:
            self._drop(None, lambda stored: stored >= batch)
        self._last_batch = batch
        self._log(f"{BATCHES}/", metrics, batch)

    def _log(self, folder: str, metrics: Mapping[str, float], step: float) -> None:
        self._live.step = step
        for name, value in metrics.items():
            legal_name = folder + legal(name)
            self._live.summary = {}  # it would nest names by their slashes, and fail where one begins another
            self._live.log_metric(legal_name, float(value))
            self._summary[legal_name] = value if math.isfinite(value) else str(float(value))
        self._live.step = number(self._last)
        if not self.waiting:
            self._summarize()

    def _summarize(self) -> None:
        self._live.summary = {**self._summary}
        self._live.make_summary()

    def log_image(self, name: str, pixels: Any, place: float) -> None:
        """Write a PNG file."""
        self._live.log_image(f"{legal(name)}/{number(place)}.png", pixels)

    def log_histogram(self, name: str, values: Any, place: float) -> None:
        """Write the counts of 64 bins as a plot."""
        counts, edges = importlib.import_module("numpy").histogram(values, bins=64)
        points = [
            {"from": float(low), "to": float(high), "count": int(count)}
            for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
        ]
        self._live.log_plot(f"{legal(name)}/{number(place)}", points, x="from", y="count", template="simple")

    def log_table(self, name: str, table: Table, place: float) -> None:
        """Write a table as a plot; a cell that is no number, text or truth value becomes its text."""
        columns = [str(column) for column in table.columns]
        points = [dict(zip(columns, row, strict=True)) for row in table.plain_rows]
        self._live.log_plot(f"{legal(name)}/{number(place)}", points, x=columns[0], y=columns[1:] or columns)

    def log_file(self, name: str, path: Path, place: float) -> None:
        """Track a file or a folder, where a repository is used; DVC keeps them nowhere else."""
        if self.save_dvc_exp:
            self._live.log_artifact(str(path), type="model", name=legal(name).replace("/", "-"))

    def finish(self, status: str) -> None:
        """Write the last values, with the status among them, and what else comes at the end."""
        self._summary["status"] = status
        self._summarize()
        if self.save_dvc_exp:
            self._live.end()
        else:
            self._live.make_report()


def number(place: float) -> float:
    """Return a place as DVC's readers take steps: whole where it is."""
    return int(place) if place == int(place) else place


def legal(name: str) -> str:
    """Return a name that leads nowhere else as a path, and has a column of its own beside the step."""
    whole = below(name.replace("\\", "/"))
    return f"{whole}_" if whole.rpartition("/")[2] == "step" else whole
