"""Figures of the machine: its processors and its memory by psutil, its GPUs by NVIDIA's management library."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch

log = logging.getLogger("hookline.monitor")

PERIOD = 1.0
"""Seconds from one look at the GPUs to the next; the driver itself averages over about as much."""
GIB = 2**30


def need(package: str, option: str, requirement: str) -> Any:
    """Import a package that an option needs.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"monitor.{option} needs {package}, which cannot be imported ({error}): `pip install '{requirement}'`"
        ) from error


class Processors:
    """How busy the processors were, and how much memory is in use."""

    def __init__(self) -> None:
        self._psutil = importlib.import_module("psutil")
        self._process = self._psutil.Process()

    def clocks(self) -> tuple[float, float]:
        """Return seconds that only grow: those in which processors were idle, and those that this process had."""
        idle, own = self._psutil.cpu_times(), self._process.cpu_times()
        return idle.idle + getattr(idle, "iowait", 0.0), own.user + own.system

    def figures(self, seconds: float, idle: float, own: float) -> dict[str, float]:
        """Return figures by name of an interval.

        Args:
            seconds: how long it was.
            idle: how far the first of `clocks` went in it.
            own: how far the second.
        """
        memory = self._psutil.virtual_memory()
        return {
            "cpu/utilization": 100 * min(max(1 - idle / (seconds * self._psutil.cpu_count()), 0.0), 1.0),
            "cpu/memory": (memory.total - memory.available) / GIB,
            "process/utilization": 100 * own / seconds,
            "process/memory": self._process.memory_info().rss / GIB,
        }


class Gpus:
    """How busy the GPUs that torch sees were, and how much of their memory is in use, by whomever."""

    def __init__(self, library: Any, handles: list[Any]) -> None:
        self._library, self._handles = library, handles
        self._seen: list[list[tuple[float, float]]] = []

    def look(self) -> None:
        """Look once."""
        use, memory = self._library.nvmlDeviceGetUtilizationRates, self._library.nvmlDeviceGetMemoryInfo
        self._seen.append([(use(handle).gpu, memory(handle).used / GIB) for handle in self._handles])

    def figures(self) -> dict[str, float]:
        """Return by name the mean of the use and the most of the memory that were seen since the last call."""
        if not self._seen:
            self.look()
        seen, self._seen = self._seen, []
        figures: dict[str, float] = {}
        for number, looks in enumerate(zip(*seen, strict=True)):
            uses, memories = zip(*looks, strict=True)
            figures |= {f"gpu_{number}/utilization": sum(uses) / len(uses), f"gpu_{number}/memory": max(memories)}
        return figures

    def close(self) -> None:
        """Let go of the library."""
        self._library.nvmlShutdown()


def find_gpus() -> Gpus | None:
    """Return the GPUs that torch sees, in its order; where there is none to be seen, say so and return None."""
    library = importlib.import_module("pynvml")
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        log.warning("monitor.gpu_utilization: there are no figures of GPUs: %s", error)
        return None
    names = [f"GPU-{torch.cuda.get_device_properties(n).uuid}" for n in range(torch.cuda.device_count())]
    try:
        handles = [library.nvmlDeviceGetHandleByUUID(name) for name in names]
        gpus = Gpus(library, handles)
        gpus.look()
    except library.NVMLError as error:
        names, why = [], str(error)
    else:
        why = "torch sees none"
    if not names:
        log.warning("monitor.gpu_utilization: there are no figures of GPUs: %s", why)
        library.nvmlShutdown()
        return None
    return gpus
