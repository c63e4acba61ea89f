"""Track runs with Aim: in a repository in the run's folder, in one for several runs, or on a server."""

from __future__ import annotations

import atexit
import importlib
import inspect
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hookline.tracking import Run, Table, Tracker, below

__version__ = "0.1.0"

SET_BY = {  # what sets arguments of aim.Run
    "repo": "the option aim.repo",
    "experiment": "the option aim.experiment",
    **dict.fromkeys(("run_hash", "read_only", "force_resume"), "the plugin, from the run"),
}
PATIENCE = 10.0  # seconds that a server has at the exit of the process
SETTINGS = {"capture_terminal_logs": False, "log_system_params": False, "system_tracking_interval": None}


@dataclass(eq=False)
class Aim(Tracker):
    """Hand what is logged to Aim."""

    repo: str | None = None
    """Folder of a repository for several runs, or a server, `aim://host:port`; null for one below the run's folder."""
    experiment: str | None = None
    """Experiment that the run belongs to; null for Aim's own choice."""
    name: str | None = None
    """Name of the run; null for that of its folder."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""
    artifacts_uri: str | None = None
    """Where files go, `file:///folder` or `s3://bucket`; null for a folder below the run's."""
    init: dict[str, Any] = field(default_factory=dict)
    """Other arguments of `aim.Run`, such as `system_tracking_interval`."""

    whole_places = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.artifacts_uri is not None and "://" not in self.artifacts_uri:
            raise ValueError(
                f"aim.artifacts_uri={self.artifacts_uri!r} is no URI; write one like file:///folder or s3://bucket"
            )
        self.refuse_set(self.init, SET_BY)

    @property
    def local(self) -> bool:
        """Whether the repository is on disk."""
        return self.repo is None or not self.repo.startswith("aim://")

    def start(self, run: Run) -> str:
        """Begin a run of Aim, or go on with the one that was cut; return its hash.

        Raises:
            ValueError: aim is not installed, or `init` names what it does not know.
        """
        self._aim: Any = self.import_sdk("aim", "'aim>=3.29'")
        known = inspect.signature(self._aim.Run).parameters
        self.refuse_unknown("init", self.init, "aim.Run", known.keys() - SET_BY.keys())
        home = run.folder.absolute() / "aim"
        if self.repo is None:
            home.mkdir(parents=True, exist_ok=True)
        repo = self.repo or str(home)
        again = run.id is not None  # the lock of a process that was killed is there then
        options = {**SETTINGS, **self.init, "experiment": self.experiment, "force_resume": again}
        self._run = self._aim.Run(run.id, repo=repo, **options)
        if not self.local:
            atexit.unregister(clean_up)
            atexit.register(clean_up)  # to be called before Aim's own
        if run.id is None:
            self._run.name = self.name or run.name
            for tag in self.tags:
                self._run.add_tag(tag)
        self._run["config"] = run.plain_config
        self._run["stage"] = run.stage.value
        self._run.set_artifacts_uri(self.artifacts_uri or f"file://{home / 'artifacts'}")
        return str(self._run.hash)

    def log_metrics(self, metrics: Mapping[str, float], place: float) -> None:
        """Track values."""
        self._run.track({name: float(value) for name, value in metrics.items()}, step=place)

    def log_batch(self, metrics: Mapping[str, float], batch: int) -> None:
        """Track values of a validation under way, by the number of its batch."""
        self.log_metrics(metrics, batch)

    def log_text(self, name: str, text: str, place: float) -> None:
        """Track a text."""
        self._track(name, self._aim.Text(text), place)

    def log_image(self, name: str, pixels: Any, place: float) -> None:
        """Track an image."""
        self._track(name, self._aim.Image(pixels), place)

    def log_histogram(self, name: str, values: Any, place: float) -> None:
        """Track a distribution."""
        self._track(name, self._aim.Distribution(values), place)

    def log_table(self, name: str, table: Table, place: float) -> None:
        """Track a table as a text, in Markdown: Aim has none that has steps."""
        self.log_text(name, table.markdown, place)

    def log_file(self, name: str, path: Path, place: float) -> None:
        """Keep a file, or a folder, as an artifact; a later one of that name takes its place."""
        if path.is_dir():
            self._run.log_artifacts(str(path), below(name), block=True)
        else:
            self._run.log_artifact(str(path), f"{below(name)}/{path.name}", block=True)

    def finish(self, status: str) -> None:
        """Say how the run has ended, and close it."""
        self._run["status"] = status
        if status in ("finished", "stopped"):
            self._run.report_successful_finish()
        self._run.close()

    def _track(self, name: str, value: Any, place: float) -> None:
        self._run.track(value, name=name, step=place)


def clean_up() -> None:
    """Do what Aim does when a process exits, but not for ever: it would wait for a server that is gone."""
    cleanup: Any = importlib.import_module("aim.ext.cleanup").AutoClean.cleanup
    atexit.unregister(cleanup)
    thread = threading.Thread(target=cleanup, daemon=True)
    thread.start()
    thread.join(PATIENCE)
