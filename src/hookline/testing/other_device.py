"""A device of another type, on the CPU: C++ takes it for the accelerator of a vendor.

`fake_cuda` is made in Python, which sees what waits for a device. Here the dispatcher, the threads of autograd,
autocast and `torch.accelerator` are torch's own, with `other_device.cpp` below them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import types
from pathlib import Path
from typing import Any

import torch
from torch.utils.backend_registration import rename_privateuse1_backend

from hookline.files import replacing

NAME = "other"
SOURCE = Path(__file__).with_suffix(".cpp")


def other_device() -> torch.device:
    """Have the device `other` in this process from now on, and return it.

    It has the numbers of the CPU, random numbers of its own, and autocast. Its tensors refuse to meet those of the CPU.
    torch knows one such device in a process, for good, and takes it for its accelerator: so have it in a process of its
    own, as `on_ranks(function, 1)` makes one.

    The first call compiles it, which takes about a minute, and keeps it where torch keeps extensions
    (`TORCH_EXTENSIONS_DIR`, or the user's cache).

    Raises:
        RuntimeError: there is no C++ compiler, or it fails; or this process has the device of a vendor already.
    """
    if torch._C._get_privateuse1_backend_name() != NAME:
        operators: Any = torch.ops
        operators.load_library(library())
        rename_privateuse1_backend(NAME)
        torch._register_device_module(NAME, _module())  # type: ignore[no-untyped-call]
    return torch.device(NAME, 0)


def why_not() -> str | None:
    """Return why this machine cannot compile the device, or None if it can."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"the device is compiled by {compiler!r}, which is not there: install g++, or name a compiler in CXX"
    return None


def library() -> Path:
    """Return the compiled device; of several processes that want it, one compiles it."""
    import fcntl  # which Windows does not have

    from torch.utils import cpp_extension  # setuptools and 70 modules more, which others of this package do without

    made_of = SOURCE.read_bytes() + torch.__version__.encode()
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()) / "hookline_other"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            if (reason := why_not()) is not None:
                raise RuntimeError(reason)
            with replacing(library) as new:
                _compile(new, cpp_extension.include_paths(), cpp_extension.library_paths())
    return library


def _compile(library: Path, headers: list[str], libraries: list[str]) -> None:
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O0", "-w", "-fPIC", "-shared", "-o", str(library)]
    command += [f"-I{path}" for path in headers]
    command += [str(SOURCE), *(f"-L{path}" for path in libraries)]
    done = subprocess.run([*command, "-ltorch_cpu", "-lc10"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{SOURCE.name} cannot be compiled with torch {torch.__version__}:\n{done.stderr[-2000:]}")


def _module() -> types.ModuleType:
    """Return what stands at `torch.other`: the functions that torch documents for such a module, and asks it for."""
    own: Any = torch.ops.hookline_other

    def seed(number: int) -> None:  # to other numbers than the CPU's, as a real device draws
        own.set_rng_state(torch.Generator().manual_seed((number + 1) % 2**63).get_state())

    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "_is_in_bad_fork": False, "device_count": 1, "current_device": 0,
        "set_device": None, "synchronize": None, "empty_cache": None,
        "get_amp_supported_dtype": [torch.bfloat16, torch.float16],
    }  # fmt: skip
    module = types.ModuleType(f"torch.{NAME}")
    vars(module).update({name: (lambda *_, _answer=answer: _answer) for name, answer in answers.items()})
    vars(module).update(
        device=contextlib.nullcontext,
        manual_seed=seed,
        manual_seed_all=seed,
        get_rng_state=lambda *_: own.get_rng_state(),
        set_rng_state=lambda state, *_: own.set_rng_state(state),
    )
    return module
