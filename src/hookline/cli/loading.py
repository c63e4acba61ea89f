"""How a configuration loads its data: some steps are trained, and the time that they wait for batches is measured."""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from hookline.cli.machine import OK, PROBLEM, WARNING, Finding, usable_cores
from hookline.commands import UserError, mendable, read_configuration
from hookline.config import build_trainer
from hookline.interfaces import CallbackInterface
from hookline.marks import hookimpl

WARMUP, STEPS = 3, 20
MUCH = 0.2
"""Which part of a step may wait for data."""
BEGINNING = 0.1
"""Which part of an epoch the first batch may take."""
ROOM = 0.4
"""Which part of a device's memory is little."""


@dataclass
class Loading:
    """How some steps of a run were, and what its loader is like."""

    device: str = "cpu"
    cores: int = 1
    waits: list[float] = field(default_factory=list)
    """Seconds until the batches of a step were there."""
    steps: list[float] = field(default_factory=list)
    """Seconds of whole steps, without evaluations."""
    first: float = 0.0
    """Seconds until the first batch of all, in which workers start."""
    steps_per_epoch: int | None = None
    workers: int | None = None
    """Of torch's `DataLoader`; None for other loaders."""
    pinned: bool = False
    kept: bool = False
    """Whether the loader and its workers live for all epochs."""
    batch_size: int = 1
    memory: float | None = None
    """Which part of the device's memory was used at most."""

    @property
    def waiting(self) -> float:
        """Which part of the steps waited for data."""
        return sum(self.waits) / max(sum(self.steps), 1e-12)

    @property
    def beginning(self) -> float:
        """Which part of an epoch goes by until workers have started that do not live on."""
        if not self.workers or self.kept or not self.steps_per_epoch or not self.steps:
            return 0.0
        return self.first / (self.first + statistics.median(self.steps) * (self.steps_per_epoch - 1))


class Watch(CallbackInterface):
    """Measures steps, then ends the run."""

    def __init__(self) -> None:
        self.seen = Loading(cores=usable_cores())
        self._count, self._began = 0, 0.0

    @hookimpl(wrapper=True)
    def setup_loader(self, trainer: Any, loader: Any, stage: Any) -> Any:
        """Look at the loader of training as the module gave it."""
        if stage.value == "train":
            seen = self.seen
            seen.workers = loader.num_workers if isinstance(loader, torch.utils.data.DataLoader) else None
            seen.pinned = bool(getattr(loader, "pin_memory", False))
            seen.kept = trainer.options.keep_loaders
        return (yield)

    @hookimpl(wrapper=True)
    def take_window(self, trainer: Any) -> Any:
        """Measure the waiting."""
        self._began = time.perf_counter()
        window = yield
        self._waited = time.perf_counter() - self._began
        self.seen.first = self.seen.first or self._waited
        return window

    @hookimpl(tryfirst=True)
    def on_end_train_step(self, trainer: Any) -> None:
        """Measure the step, and end the run with the last one."""
        self._count += 1
        if self._count > WARMUP:
            if not trainer.on_cpu:
                torch.accelerator.synchronize()  # a step ends with its kernels
            self.seen.waits.append(self._waited)
            self.seen.steps.append(time.perf_counter() - self._began)
        if self._count == WARMUP + STEPS:
            trainer.stop("the steps to look at are done", "preempted", 0, alone=False)

    def end(self, trainer: Any) -> Loading:
        """Return what was seen."""
        seen = self.seen
        seen.device, seen.batch_size = trainer.device.type, trainer.options.train_batch_size
        seen.steps_per_epoch = trainer.totals.steps_per_epoch
        if seen.device == "cuda":
            whole = torch.cuda.get_device_properties(trainer.device).total_memory
            seen.memory = torch.cuda.max_memory_allocated(trainer.device) / whole
        return seen


def look_at(options: argparse.Namespace) -> Iterator[Finding]:
    """Train some steps of a configuration, without observers, in a folder that is thrown away; yield what was found."""
    try:
        with mendable(ValueError, TypeError), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            overrides = (f"trainer.runs_folder={folder}", "trainer.resume=false")
            less = ("trainer.sanity_val_steps=0", "trainer.eval_when_start=false")
            trainer = build_trainer(read_configuration(options, *overrides, *less))
            for _, plugin in trainer.plugins.listed():
                if getattr(plugin, "observer", False):
                    trainer.plugins.unregister(plugin)
            trainer.plugins.register(watch := Watch(), "doctor")
            trainer.train()
            seen = watch.end(trainer)
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        yield Finding(PROBLEM, "training", f"it fails: {text}; `hookline fit` shows where")
        return
    yield from advice(seen)


def advice(seen: Loading) -> Iterator[Finding]:
    """Yield how the data are loaded, and what would be better."""
    if seen.steps:
        yield _waiting(seen)
    else:
        text = f"training ended within {WARMUP} steps, so nothing can be said of a step"
        yield Finding(WARNING, "data loading", text)
    if seen.workers is not None and seen.workers > seen.cores:
        text = f"{seen.workers} workers share {seen.cores} usable core(s): DataLoader(num_workers={seen.cores})"
        yield Finding(WARNING, "num_workers", text)
    if seen.beginning > BEGINNING:
        text = f"workers start anew in each epoch, which takes {seen.beginning:.0%} of it: trainer.keep_loaders=true"
        yield Finding(WARNING, "workers", text)
    if seen.device == "cuda" and seen.workers is not None and not seen.pinned:
        text = "Python waits while a batch is copied to the device: DataLoader(pin_memory=True)"
        yield Finding(WARNING, "pin_memory", text)
    if seen.batch_size == 1:
        yield Finding(WARNING, "batch size", "trainer.train_batch_size=1, its default: each step trains one sample")
    elif seen.memory is not None and seen.memory < ROOM:
        yield Finding(OK, "batch size", f"{seen.memory:.0%} of the device's memory was used: a larger batch has room")


def _waiting(seen: Loading) -> Finding:
    text = f"{seen.waiting:.0%} of a step waits for data ({len(seen.steps)} steps)"
    if seen.waiting <= MUCH:
        return Finding(OK, "data loading", text)
    if seen.workers is None:
        cure = "its loader is not torch's DataLoader; does it load in parallel?"
    elif seen.workers >= seen.cores or seen.cores == 1:
        busy = f"{seen.workers} workers and {seen.cores} usable core(s)"
        cure = f"there are {busy}, so make loading cheaper: prepare the samples once, use smaller files"
    else:
        rest = (sum(seen.steps) - sum(seen.waits)) / len(seen.steps)
        load = statistics.median(seen.steps) * seen.workers or statistics.median(seen.waits)  # in one process
        wanted = min(seen.cores, max(seen.workers + 1, math.ceil(load / max(rest, 1e-9))))
        cure = f"DataLoader(num_workers={wanted}) instead of {seen.workers}"
    return Finding(WARNING, "data loading", f"{text}: {cure}")
