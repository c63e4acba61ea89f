"""Run ClearML's SDK for one run: started as a program by the plugin, which speaks to it through a pipe.

It imports nothing of hookline, so that its process is small.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import inspect
import io
import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

GRACE = 20.0  # seconds in which what was reported is still sent when the process of the run has gone
BATCHES = "validation batches"  # a chart, since they count something else


class RunFailed(Exception):
    """What the SDK takes for the reason why a task has failed."""


class Service:
    """One task."""

    task: Any = None

    def start(
        self,
        home: Path,
        arguments: Mapping[str, Any],
        config: dict[str, Any],
        stage: str,
        before: str | None,
        place: int,
        batch: int,
    ) -> str:
        """Begin a task, or go on with one from a place and a validation batch on; return its id.

        Raises:
            ValueError: an argument that `Task.init` does not have.
        """
        self._lock = (home / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # the process of a run that was killed may be still at work
        from clearml import Task

        known = inspect.signature(Task.init).parameters
        for name in arguments:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f", did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"clearml.init: Task.init has no argument {name!r}{hint}")
        offline = Task.is_offline()
        self._stored = home / "offline" / before / "metrics.jsonl" if before and offline else None
        self.drop(place, batch)
        self.task = Task.init(
            **{"auto_resource_monitoring": False, **arguments},
            reuse_last_task_id=False,
            continue_last_task=before or False,
            auto_connect_arg_parser=False,
            auto_connect_frameworks={"detect_repository": False},  # nor a look at git, and for updates
            auto_connect_streams=False,
        )
        self.task.set_initial_iteration(0)  # it would add one to each place of a task that is gone on with
        self.task.connect(config, name="config")
        self.task.set_parameters_as_dict({"hookline": {"stage": stage, "status": "running"}})
        self._logger = self.task.get_logger()
        if offline:
            self._stored = Path(str(self.task.get_offline_mode_folder())) / "metrics.jsonl"
        return str(self.task.id)

    def drop(self, place: float, batch: float) -> None:
        """Drop what is stored from a place, or a validation batch, on; a server keeps one value of each anyway."""
        if self.task is not None:
            self.flush()
        if self._stored is None or not self._stored.exists():
            return
        kept = []
        for line in self._stored.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # one that is torn
                events = json.loads(line)
                kept.append(
                    [event for event in events if event["iter"] < (batch if event["metric"] == BATCHES else place)]
                )
        part = self._stored.with_suffix(".part")
        part.write_text("".join(json.dumps(events) + "\n" for events in kept if events), encoding="utf-8")
        os.replace(part, self._stored)

    def log_metrics(self, metrics: Mapping[str, float], where: str, place: int) -> None:
        """Report values; of those that are no numbers, which it would make 0, a line of the log."""
        for name, value in metrics.items():
            if math.isfinite(value):
                self._logger.report_scalar(*titled(name), value=value, iteration=place)
        self._report_odd(metrics, where)

    def log_batch(self, metrics: Mapping[str, float], batch: int) -> None:
        """Report values of a validation under way."""
        for name, value in metrics.items():
            if math.isfinite(value):
                self._logger.report_scalar(BATCHES, name, value=value, iteration=batch)
        self._report_odd(metrics, f"validation batch {batch}")

    def _report_odd(self, metrics: Mapping[str, float], where: str) -> None:
        odd = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if odd:
            self._logger.report_text(f"{', '.join(odd)} at {where}", print_console=False)

    def log_text(self, name: str, text: str, place: int) -> None:
        """Report a text."""
        self._sample(name, io.StringIO(text), ".txt", place)

    def log_image(self, name: str, pixels: Any, place: int) -> None:
        """Report an image."""
        from PIL import Image

        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        stream.seek(0)
        self._sample(name, stream, ".png", place)

    def _sample(self, name: str, stream: Any, ending: str, place: int) -> None:
        # the SDK counts files from 0 in each process, and those of before would be lost: so the place is in the name
        extension = f".{place:09d}{ending}"
        self._logger.report_media(
            *titled(name), iteration=place, stream=stream, file_extension=extension, max_history=1
        )

    def log_histogram(self, name: str, values: Any, place: int) -> None:
        """Report a histogram."""
        import numpy

        counts, edges = numpy.histogram(values, bins=64)
        labels = [f"{(low + high) / 2:.4g}" for low, high in itertools.pairwise(edges)]
        self._logger.report_histogram(*titled(name), values=counts.tolist(), iteration=place, xlabels=labels)

    def log_table(self, name: str, lines: Sequence[Sequence[Any]], place: int) -> None:
        """Report a table, the names of its columns first."""
        self._logger.report_table(*titled(name), iteration=place, table_plot=lines)

    def log_file(self, name: str, path: Path, place: int) -> None:
        """Upload a file or a folder.

        Raises:
            RuntimeError: the SDK could not.
        """
        if not self.task.upload_artifact(
            name, artifact_object=str(path), metadata={"place": place}, wait_on_upload=True
        ):
            raise RuntimeError(f"{path} could not be uploaded as the artifact {name}")

    def flush(self) -> None:
        """Wait until all that was reported is stored."""
        self.task.flush(wait_for_uploads=True)

    def end(self, status: str) -> None:
        """End the task as the SDK does when the program that it watches ends this way."""
        if self.task is None:
            return
        self.task.set_parameter("hookline/status", status)
        self.flush()
        if status in ("finished", "stopped"):
            self.task.close()
        elif status == "preempted":
            raise KeyboardInterrupt
        else:
            raise RunFailed("the run has failed")


def titled(name: str) -> tuple[str, str]:
    """Return the title of a chart and the name of a curve in it."""
    title, _, series = name.partition("/")
    return title or name, series or title or name


def leave_after(parent: int) -> None:
    """End this process some time after the one that started it, whatever it waits for."""
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(GRACE)
    os._exit(1)


def main(descriptor: int) -> None:
    """Do what is asked, until the end or until nobody is there to ask."""
    parent, service = os.getppid(), Service()
    threading.Thread(target=leave_after, args=[parent], daemon=True).start()
    connection = Connection(descriptor)
    status = "failed"
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            while not connection.poll(0.5):
                if os.getppid() != parent:  # though another process of the run holds the pipe
                    raise EOFError
            what, arguments = connection.recv()
            if what == "end":
                (status,) = arguments
                break
            try:
                answer = True, getattr(service, what)(*arguments)
            except Exception as error:
                answer = False, f"{type(error).__name__}: {error}"
            connection.send(answer)
    service.end(status)


if __name__ == "__main__":
    main(int(sys.argv[1]))
