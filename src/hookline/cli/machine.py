"""What this machine is like: versions, devices, cores and folders. For `hookline doctor`."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from hookline import __version__

OK, WARNING, PROBLEM = "ok", "warning", "problem"
GIB = 2**30
LITTLE, NONE_LEFT = 5 * GIB, GIB // 4
"""Free bytes of a disk that are a warning, and a problem."""
SHARED = GIB // 4
"""Bytes of shared memory that workers of loaders may need."""


class Finding(NamedTuple):
    """One line of the report."""

    level: str
    about: str
    text: str


def versions() -> Iterator[Finding]:
    """Yield the versions of Python, torch and hookline."""
    yield Finding(OK, "python", f"{platform.python_version()}, {sys.executable}")
    yield Finding(OK, "torch", torch.__version__)
    yield Finding(OK, "hookline", f"{__version__}, {Path(__file__).parents[1]}")


def devices() -> Iterator[Finding]:
    """Yield the devices, and what torch can do with them."""
    count = torch.cuda.device_count()
    for index in range(count):
        of = torch.cuda.get_device_properties(index)
        yield Finding(OK, f"cuda:{index}", f"{of.name}, {of.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}")
    if torch.version.cuda and not count:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f"CUDA_VISIBLE_DEVICES={hidden!r}" if hidden is not None else "does `nvidia-smi` show one?"
        yield Finding(WARNING, "cuda", f"torch is built for CUDA {torch.version.cuda} and sees no device: {why}")
    if torch.backends.mps.is_available():
        yield Finding(OK, "mps", "available")
    if not count and not torch.backends.mps.is_available():
        yield Finding(OK, "devices", "the CPU alone")
    cuda: Any = torch.backends.cuda
    kernels = {
        "flash": cuda.is_flash_attention_available() and cuda.flash_sdp_enabled(),
        "memory-efficient": cuda.mem_efficient_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
    }
    if count:
        named = ", ".join(name for name, there in kernels.items() if there)
        yield Finding(OK if kernels["flash"] else WARNING, "attention", f"kernels: {named or 'none'}; math")
    backends = [name for name in ("gloo", "nccl", "mpi") if getattr(dist, f"is_{name}_available", bool)()]
    level = WARNING if not backends or (count > 1 and "nccl" not in backends) else OK
    yield Finding(level, "several ranks", f"backends: {', '.join(backends) or 'none'}")
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if count and importlib.util.find_spec("triton") is None:
        yield Finding(WARNING, "torch.compile", "triton is not installed, which it needs for CUDA")
    elif compiler is None:
        yield Finding(WARNING, "torch.compile", "no C++ compiler was found, which it needs on a CPU: install g++")
    else:
        yield Finding(OK, "torch.compile", compiler)


def cores() -> Iterator[Finding]:
    """Yield how many cores this process may use, and how many threads it does."""
    usable, threads = usable_cores(), torch.get_num_threads()
    text = f"{usable} usable of {os.cpu_count()} cores, {threads} threads of torch"
    if threads > usable:
        yield Finding(WARNING, "cores", f"{text}, which get in each other's way: OMP_NUM_THREADS={usable}")
    else:
        yield Finding(OK, "cores", text)
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).total < SHARED:
        size = shutil.disk_usage(shared).total / 2**20
        yield Finding(
            WARNING,
            "shared memory",
            f"{shared} has {size:.0f} MiB, too little for workers of loaders: docker --shm-size",
        )


def usable_cores() -> int:
    """Return how many cores the system lets this process use, by its affinity and the quota of its container."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return affinity if quota == "max" else max(1, min(affinity, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return affinity


def place(about: str, folder: Path) -> Iterator[Finding]:
    """Yield whether files can be written into a folder, which may be made first, and how many bytes are free."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        yield Finding(PROBLEM, about, f"{folder} cannot be made: {there} is a file")
        return
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        yield Finding(PROBLEM, about, f"nothing can be written into {there}: {error.strerror}")
        return
    free = shutil.disk_usage(there).free
    level = PROBLEM if free < NONE_LEFT else WARNING if free < LITTLE else OK
    yield Finding(level, about, f"{folder} can be written, {free / GIB:.1f} GiB are free")
