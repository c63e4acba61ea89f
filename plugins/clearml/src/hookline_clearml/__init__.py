"""Tell ClearML of a run: below the run's folder, or on a server."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import multiprocessing
import os
import site
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hookline import Stage, seconds
from hookline.tracking import Run, Table, Tracker

__version__ = "0.1.0"

GIVEN = (  # arguments that the plugin knows: a process that does nothing else has no parser, frameworks or output
    "reuse_last_task_id", "continue_last_task", "deferred_init", "auto_connect_arg_parser", "auto_connect_frameworks",
    "auto_connect_streams",
)  # fmt: skip
SET_BY = {  # what sets arguments of Task.init
    "project_name": "the option clearml.project_name",
    "task_name": "the option clearml.task_name",
    "tags": "the option clearml.tags",
    **dict.fromkeys(GIVEN, "the plugin"),
}
SETTINGS = "sdk { development { report_use_subprocess: false } }\n"  # a second process would lose points


@dataclass(eq=False)
class Clearml(Tracker):
    """Hand what is logged to ClearML, whose SDK runs in a process of its own."""

    offline: bool = True
    """Whether it is written below the run's folder, to be imported by a server or never; else it is sent to one."""
    project_name: str = "hookline"
    """Project that the task belongs to."""
    task_name: str | None = None
    """Name of the task; null for that of the run's folder."""
    tags: list[str] = field(default_factory=list)
    """Tags of the task."""
    init: dict[str, Any] = field(default_factory=dict)
    """Other arguments of `Task.init`: `task_type`, `output_uri`, `auto_resource_monitoring`."""
    start_timeout: str = "1 min"
    """How long ClearML may take to begin: by itself it would wait for a server for ever."""

    whole_places = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_set(self.init, SET_BY)
        self._start_patience = seconds(self.start_timeout, "clearml.start_timeout")

    @property
    def local(self) -> bool:
        """Whether it is written below the run's folder."""
        return self.offline

    def start(self, run: Run) -> str:
        """Begin a task, or go on with the one that was cut.

        An evaluation on its own is a task of its own, which nobody goes on with.

        Raises:
            RuntimeError: ClearML is not installed, refuses `init`, or does not answer.
        """
        if importlib.util.find_spec("clearml") is None:
            raise RuntimeError("ClearML cannot be imported; `pip install 'clearml>=2.1.12,<3'`")
        training = run.stage is Stage.TRAIN
        home = run.folder.resolve() / "clearml"
        home.mkdir(exist_ok=True)
        self._service = Service(home, self._environment(home))
        self._last, self._last_batch = run.place, run.batch
        arguments = {
            "project_name": self.project_name,
            "task_name": self.task_name or run.name,
            "tags": list(self.tags),
            **({} if training else {"task_type": "testing"}),
            **self.init,
        }
        before = run.id if training else None
        where = run.place + 1, run.batch + 1
        answer = self._service.ask(
            "start", home, arguments, run.plain_config, run.stage.value, before, *where, patience=self._start_patience
        )
        return str(answer)

    def log_metrics(self, metrics: Mapping[str, float], place: float) -> None:
        """Report values; where training goes back, what is stored behind that is dropped offline."""
        if place < self._last:
            self._service.ask("drop", place, math.inf)
        self._last = place
        self._tell("log_metrics", dict(metrics), f"{self.axis} {place:g}", place=place)

    def log_batch(self, metrics: Mapping[str, float], batch: int) -> None:
        """Report values of a validation under way, in a chart of their own."""
        if batch < self._last_batch:
            self._service.ask("drop", math.inf, batch)
        self._last_batch = batch
        self._tell("log_batch", dict(metrics), place=batch)

    def log_text(self, name: str, text: str, place: float) -> None:
        """Report a text as a debug sample."""
        self._tell("log_text", name, text, place=place)

    def log_image(self, name: str, pixels: Any, place: float) -> None:
        """Report an image as a debug sample."""
        self._tell("log_image", name, pixels, place=place)

    def log_histogram(self, name: str, values: Any, place: float) -> None:
        """Report a histogram of 64 bins as a plot."""
        self._tell("log_histogram", name, values, place=place)

    def log_table(self, name: str, table: Table, place: float) -> None:
        """Report a table as a plot; a cell that is no number, text or truth value becomes its text."""
        self._tell("log_table", name, [list(table.columns), *table.plain_rows], place=place)

    def log_file(self, name: str, path: Path, place: float) -> None:
        """Upload a file, or a folder as a zip, as an artifact; a later one of that name takes its place."""
        self._tell("log_file", name, path, place=place)

    def finish(self, status: str) -> None:
        """End the task: preempted it is stopped, failed it is failed, else completed.

        Raises:
            TimeoutError: ClearML has not taken all within `close_timeout`.
        """
        self._service.end(status, self.patience)

    def _tell(self, what: str, *arguments: Any, place: float) -> None:
        """Have something reported, and be on disk if nothing else waits."""
        self._service.ask(what, *arguments, place)
        if self.offline and not self.waiting:
            self._service.ask("flush")

    def _environment(self, home: Path) -> dict[str, str]:
        """Return the environment of the process, and write the file of settings that it names."""
        # without this one, which has the SDK look for other ranks
        environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
        settings = home / "clearml.conf"
        own = Path(environment.get("CLEARML_CONFIG_FILE", "~/clearml.conf")).expanduser()
        if self.offline:
            environment |= {
                "CLEARML_OFFLINE_MODE": "1",
                "CLEARML_CACHE_DIR": str(home),
                "PYTHONUSERBASE": site.getuserbase(),  # which stands below the old one
                "HOME": str(home),
                "TMPDIR": str(home),
            }
            settings.write_text(SETTINGS)
        else:
            environment["CLEARML_OFFLINE_MODE"] = "0"
            settings.write_text((f"include {json.dumps(str(own.resolve()))}\n" if own.exists() else "") + SETTINGS)
        return environment | {"CLEARML_CONFIG_FILE": str(settings)}


class Service:
    """The process of the SDK: it patches the process that it is in, seeds its generators and may hang for ever."""

    def __init__(self, home: Path, environment: Mapping[str, str]) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._log = home / "service.log"
        program = str(Path(__file__).with_name("service.py"))
        with self._log.open("ab") as log, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", program, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # an interrupt from the keyboard is for training
            )

    def ask(self, what: str, *arguments: Any, patience: float | None = None) -> Any:
        """Have something done, and return the answer.

        Raises:
            RuntimeError: the SDK refuses (after that of a start the process is killed), or its process has ended.
            TimeoutError: there is no answer within so many seconds; the process is killed.
        """
        try:
            self._connection.send((what, arguments))
            answered = self._connection.poll(patience)
            done, answer = self._connection.recv() if answered else (False, "")
        except (EOFError, OSError) as error:
            self._kill()
            raise RuntimeError(f"the process of ClearML has ended; {self._log} may say why") from error
        if not answered:
            self._kill()
            raise TimeoutError(f"ClearML has not answered within {patience:g} s; {self._log} may say why")
        if not done:
            if what == "start":
                self._kill()
            raise RuntimeError(answer)
        return answer

    def end(self, status: str, patience: float) -> None:
        """End the task, and the process.

        Raises:
            TimeoutError: that takes longer than so many seconds; the process is killed.
        """
        try:
            with contextlib.suppress(OSError):  # it has ended already
                self._connection.send(("end", (status,)))
            self._process.wait(patience)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"ClearML has not taken all within {patience:g} s; {self._log} may say why") from error
        finally:
            self._kill()

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()
