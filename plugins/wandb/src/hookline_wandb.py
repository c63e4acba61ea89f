"""Track runs with Weights & Biases: in the run's folder, or on a server."""

from __future__ import annotations

import html
import importlib
import inspect
import json
import os
import re
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hookline import Stage
from hookline.tracking import Run, Table, Tracker

__version__ = "0.1.0"

MODES = ("offline", "online")
SET_BY = {  # what sets arguments of wandb.init
    **{name: f"the option wandb.{name}" for name in ("project", "entity", "name", "group", "tags", "mode")},
    **dict.fromkeys(("dir", "id", "config", "resume"), "the plugin, from the run"),
}
FOLDERS = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR")
SETTINGS = {
    "console": "off",  # what is printed stays as it is
    "disable_git": True,
    "init_timeout": 30.0,
    "x_disable_meta": True,  # it holds the command, and so what the configuration masks
    "x_transaction_log_flush_interval": 0.1,  # the SDK's 15 s would be lost when a run is killed
}
BATCH = "validation_batch"  # the name under which rows within validations have their place
BLOCK = 32768
MAGIC = b":W&B"


@dataclass(eq=False)
class Wandb(Tracker):
    """Hand what is logged to Weights & Biases."""

    mode: str = "offline"
    """`offline` writes below the run's folder, to be sent by `wandb sync` or never; `online` sends to a server."""
    project: str | None = None
    """Project on the server; null for the SDK's own choice."""
    entity: str | None = None
    """User or team to whom the run belongs; null for the default of the account."""
    name: str | None = None
    """Name of the run; null for that of its folder."""
    group: str | None = None
    """Group of runs that it belongs to."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""
    init: dict[str, Any] = field(default_factory=dict)
    """Other arguments of `wandb.init`, such as `notes`, `job_type` and `settings`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise ValueError(
                f"wandb.mode={self.mode!r} must be one of {', '.join(MODES)}; to turn it off, write `wandb: null`"
            )
        self.refuse_set(self.init, SET_BY)
        settings = self.init.get("settings") or {}
        if not isinstance(settings, Mapping):
            raise ValueError(f"wandb.init.settings must be a mapping of names to values, not {settings!r}")
        self._log: RunLog | None = None
        self._row = 0
        self._set: list[str] = []

    @property
    def local(self) -> bool:
        """Whether it is written below the run's folder."""
        return self.mode == "offline"

    def start(self, run: Run) -> str:
        """Begin a run, or one more part of the run that is gone on with; return its id.

        Raises:
            ValueError: wandb is not installed, `init` names what it does not know, or there is no key for the server.
        """
        wandb = self.import_sdk("wandb", "'wandb>=0.31'")
        settings = {**SETTINGS, "silent": self.local, **(self.init.get("settings") or {})}
        known = inspect.signature(wandb.init).parameters
        self.refuse_unknown("init", self.init, "wandb.init", known.keys() - SET_BY.keys())
        self.refuse_unknown("init.settings", settings, "wandb.Settings", wandb.Settings.model_fields)
        self._wandb = wandb
        self._last: float | None = None  # the last place that is stored already, where training comes to it again
        self._names: set[str] = set()  # and what is stored of it
        try:
            if self.local:
                self._stay_below(run.folder / "wandb")
            else:
                if "base_url" in settings:  # by `login(host=...)` it would become the user's own for good
                    wandb.setup(settings=wandb.Settings(base_url=settings["base_url"]))
                if not wandb.login(prompt=False, verify=False):
                    raise ValueError("there is no key for the server: set WANDB_API_KEY, or call `wandb login` once")
            self._wait_for_a_later_name(run.folder / "wandb", run.id)
            self._run = wandb.init(
                mode=self.mode,
                project=self.project,
                entity=self.entity,
                name=self.name or run.name,
                group=self.group,
                tags=list(self.tags) or None,
                dir=str(run.folder),
                config=dict(run.config),
                id=run.id,
                resume=None if run.id is None else "allow",
                **{"reinit": "create_new", **self.init, "settings": wandb.Settings(**settings)},
            )
        except BaseException:
            self._free_folders()
            raise
        self._row = self._last_batch = 0
        self._within: set[str] = set()  # names that rows within validations have
        self._run.define_metric(self.axis)
        self._run.define_metric("*", step_metric=self.axis)
        if run.id is not None:
            self._find_last(run)
        if run.stage is not Stage.TRAIN:
            self._last = None  # an evaluation is not done again
        if self.local:
            self._log = RunLog(Path(self._run.settings.sync_file))
        return str(self._run.id)

    def log_metrics(self, metrics: Mapping[str, float], place: float) -> None:
        """Log values as one row, with their place."""
        self._add(dict(metrics), place)

    def log_batch(self, metrics: Mapping[str, float], batch: int) -> None:
        """Log values as one row, with the number of the validation batch, if it is not stored already."""
        if batch > self._last_batch:
            self._last_batch = batch
            for name in metrics.keys() - self._within:
                self._run.define_metric(name, step_metric=BATCH)
            self._within |= metrics.keys()
            self._run.log({**metrics, BATCH: batch}, step=self._row, commit=True)
            self._row += 1

    def log_text(self, name: str, text: str, place: float) -> None:
        """Log a text as a page, which a server shows."""
        page = f"<pre>{html.escape(text)}</pre>"
        self._add({name: lambda: self._wandb.Html(page, inject=False, data_is_not_path=True)}, place)

    def log_image(self, name: str, pixels: Any, place: float) -> None:
        """Log an image."""
        self._add({name: lambda: self._wandb.Image(pixels)}, place)

    def log_histogram(self, name: str, values: Any, place: float) -> None:
        """Log a histogram of 64 bins."""
        self._add({name: lambda: self._wandb.Histogram(values)}, place)

    def log_table(self, name: str, table: Table, place: float) -> None:
        """Log a table; a cell that is no number, text or truth value becomes its text."""
        columns, rows = list(table.columns), table.plain_rows
        self._add({name: lambda: self._wandb.Table(columns=columns, data=rows, allow_mixed_types=True)}, place)

    def log_file(self, name: str, path: Path, place: float) -> None:
        """Log a file or a folder as a version of the artifact of this name."""
        plain = re.sub(r"[^\w.-]", "-", name)
        artifact = self._wandb.Artifact(f"{plain}-{self._run.id}", type="model", metadata={self.axis: place})
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def finish(self, status: str) -> None:
        """End the run, as failed unless it is finished or was stopped."""
        if status == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if status in ("finished", "stopped") else 1)
        self._wait_for(lambda log: log.ended)
        self._log = None
        self._free_folders()

    def catch_up(self) -> None:
        """Wait until all that was logged so far is taken, and in the file."""
        super().catch_up()
        self._wait_for(lambda log: log.next_row >= self._row)

    def _wait_for(self, stored: Callable[[RunLog], bool]) -> None:
        """Wait until something is in the file: a process of the SDK writes it, and a kill takes what it has not yet."""
        log = self._log
        if log is not None and not self.wait_until(lambda: stored(log.read())):
            self._log = None  # that process is gone, say: not again at each save

    def _wait_for_a_later_name(self, folder: Path, identity: str | None) -> None:
        """Wait until the folder of one more part of a run gets a name of its own: it says the second of its start."""
        self.wait_until(lambda: not any(folder.glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{identity}")))

    def _add(self, values: Mapping[str, Any], place: float) -> None:
        """Log a row of values, or of functions that make them, without those that are stored already."""
        if self._last is not None:
            if place < self._last:
                return
            if place > self._last:
                self._last = None
            else:
                values = {name: value for name, value in values.items() if name not in self._names}
        if values:
            made = {name: value() if callable(value) else value for name, value in values.items()}
            self._run.log({**made, self.axis: place}, step=self._row, commit=True)
            self._row += 1

    def _find_last(self, run: Run) -> None:
        """Find where the run stands that is gone on with: the number of its next row, and its last place."""
        self._row = self._run.step
        self._last = self._run.summary.get(self.axis)
        self._last_batch = int(self._run.summary.get(BATCH) or 0)
        own = self._run.settings.sync_file
        for path in sorted((run.folder / "wandb").glob(f"*run-*-{run.id}/*.wandb"), key=lambda path: path.parent.name):
            if self.mode == "online" or str(path) == own:
                continue
            log = RunLog(path)
            for row in log.rows():
                self._last_batch = max(self._last_batch, row.get(BATCH, 0))
                place = row.get(self.axis)
                if place is None:  # a row of a validation
                    continue
                if place != self._last:
                    self._last, self._names = place, set()
                self._names |= row.keys()
            self._row = max(self._row, log.next_row)

    def _stay_below(self, folder: Path) -> None:
        """Have the SDK write nothing elsewhere; who has said where in the environment is obeyed."""
        folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        chosen = {name: str(folder / name.split("_")[1].lower()) for name in FOLDERS}
        chosen["WANDB_ERROR_REPORTING"] = "false"
        self._set = [name for name in chosen if name not in os.environ]
        os.environ.update({name: chosen[name] for name in self._set})

    def _free_folders(self) -> None:
        for name in self._set:
            os.environ.pop(name, None)
        self._set = []


class RunLog:
    """Reads the rows of a run from the SDK's file, also while it is written.

    The file is a header of seven bytes and the log format of LevelDB: records, in pieces where they cross the border
    of a block.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = 7
        self.next_row = 0
        """The number behind that of the last row which was read."""
        self.ended = False
        """Whether the end of the run was read."""

    def read(self) -> RunLog:
        """Read what has come since the last call; return itself."""
        for _ in self.rows():
            pass
        return self

    def rows(self) -> Iterator[dict[str, Any]]:
        """Give the rows that have come since the last call; a torn end waits for the next."""
        record_class = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
        for data in self._records():
            record = record_class.FromString(data)
            self.ended = self.ended or record.WhichOneof("record_type") == "exit"
            if record.WhichOneof("record_type") == "history":
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                self.next_row = record.history.step.num + 1
                yield items

    def _records(self) -> Iterator[bytes]:
        if not self.path.exists():  # the process of the SDK has not begun to write it
            return
        begin = self._at // BLOCK * BLOCK
        with self.path.open("rb") as file:
            if file.read(len(MAGIC)) not in (MAGIC, b""):
                raise ValueError(f"{self.path} is no file of a run of wandb")
            file.seek(begin)
            content = file.read()
        at, parts = self._at - begin, b""
        while at + 7 <= len(content):
            if BLOCK - at % BLOCK < 7:
                at += BLOCK - at % BLOCK
                continue
            _, size, kind = struct.unpack_from("<IHB", content, at)
            if kind == 0 or at + 7 + size > len(content):
                return
            parts += content[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # whole, or the last piece
                self._at = begin + at
                yield parts
                parts = b""
