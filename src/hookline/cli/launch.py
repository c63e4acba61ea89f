"""Several processes of one command on this machine: torch's elastic agent starts them, and they report to it."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CODES = "HOOKLINE_EXIT_CODES"  # the folder in which processes leave with which code their run has ended in order
GRACE = "600"  # seconds for a save after a signal; a second signal, or whoever sent the first, ends it sooner
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")

# The launcher -------------------------------------------------------------------------


def launch(words: Sequence[str], nproc: str, max_restarts: int) -> int:
    """Run a command in several processes; return its exit code.

    0 where all ended with 0, that of a preempted run where all were, 128 + its number where a signal
    ended it before, else 1.

    Args:
        words: the command, without what concerns the launcher.
        nproc: how many processes, or "auto" for one a CUDA device.
        max_restarts: how often all are started anew when one has failed.

    Raises:
        ValueError: `nproc` is no number of processes, or this is one of several already.
    """
    if "RANK" in os.environ:
        raise ValueError(
            f"--nproc={nproc} would start processes within process {os.environ['RANK']} of a run that a launcher has "
            "started already; leave --nproc and --max-restarts away here"
        )
    number = _processes(nproc)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if number > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", GRACE)
    with tempfile.TemporaryDirectory(prefix="hookline-") as folder:
        os.environ[CODES] = folder
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=number,
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=max_restarts,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        heard = [name for name in SIGNALS if signal.getsignal(signal.Signals[name]) is not signal.SIG_IGN]
        config.signals_to_handle = ",".join(heard)  # what `nohup` and `&` have ignored stays so
        command = ["-u", "-m", "hookline", *(word.replace("$", "$$") for word in words)]  # the agent fills in $names
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            ended = [f"rank {rank} {_how(failure.exitcode)}" for rank, failure in sorted(error.failures.items())]
            print(f"hookline: {', '.join(ended)}", file=sys.stderr)
            return 1
        except SignalException as error:
            codes = _codes(folder)
            return max(codes) if len(codes) == number else 128 + error.sigval
        finally:
            del os.environ[CODES]
        return max(_codes(folder), default=0)


def _processes(nproc: str) -> int:
    if nproc == "auto":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--nproc=auto starts one process a CUDA device, and there is none here: give a number")
        return torch.cuda.device_count()
    if not nproc.isdecimal() or int(nproc) < 1:
        raise ValueError(f"--nproc={nproc} is no number of processes; write one from 1, or auto for one a CUDA device")
    return int(nproc)


def _codes(folder: str) -> list[int]:
    return [int(path.read_text()) for path in Path(folder).glob("*.code")]


def _how(code: int) -> str:
    return f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


# Each of its processes ----------------------------------------------------------------


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function such that an agent, where one has started this process, is told what it raises."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return function
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(function)


def report(code: int) -> int:
    """Return what this process shall end with, now that its run has ended in order with an exit code.

    The agent takes every code but 0 for a failure: it would start a preempted run anew, and end the ranks
    that are still saving. So the launcher is told the code by a file.
    """
    folder = os.environ.get(CODES)
    if folder is None:
        return code
    Path(folder, f"{os.environ['RANK']}.code").write_text(str(code))
    return 0


def launched() -> int:
    """Return how many processes a launcher that speaks as torchrun does has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def restarts() -> int:
    """Return how often an agent may start this process anew."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def remember(run_dir: Path) -> None:
    """Let later attempts know the folder of the run."""
    if restarts() and (store := _agents_store()) is not None:
        store.set(_key(_attempt()), str(run_dir))


def remembered() -> str | None:
    """Return the folder of the run that an earlier attempt has begun, and say so; None where there is none."""
    attempt = _attempt()
    if not attempt:
        return None
    store, folder = _agents_store(), None
    for earlier in range(attempt if store is not None else 0):
        if store.check([_key(earlier)]):
            folder = store.get(_key(earlier)).decode()
    if os.environ["RANK"] == "0":
        does = f"going on with {folder}" if folder else "no attempt has left a run to go on with"
        print(f"hookline: started anew ({attempt} of at most {restarts()} times): {does}", file=sys.stderr)
    return folder


def _attempt() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _key(attempt: int) -> str:
    return f"folder of the run of attempt {attempt}"


def _agents_store() -> Any:
    """Connect to the store that the agent hosts for all attempts, where it does."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)
