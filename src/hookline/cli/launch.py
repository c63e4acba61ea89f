"""Several processes of one command on this machine: torch's elastic agent starts and watches them."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CODES = "HOOKLINE_EXIT_CODES"  # the folder for the exit codes of runs that ended in order
LAUNCHER = "HOOKLINE_LAUNCHER"  # the process id of the launcher
COMMAND = "HOOKLINE_COMMAND"  # what the user has typed behind `hookline`
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
GRACE = "600"  # seconds for a save after a signal; a second signal, or the sender of the first, may end it sooner
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
STARTED = {  # the environment variables of launchers: rank, number of processes
    "torchrun": ("RANK", "WORLD_SIZE"),
    "SLURM": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),  # srun alone sets the second
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPI": ("PMI_RANK", "PMI_SIZE"),
}

# The launcher -------------------------------------------------------------------------


def launch(words: Sequence[str], nproc: str, max_restarts: int, typed: str) -> int:
    """Run a command in several processes; return its exit code.

    0 if all processes ended with 0; the code of a preempted run if all were preempted; 128 + the signal's number if a
    signal ended the run before; 2 if one of them has told a mistake of the user; else 1.

    Args:
        words: the command, without the launcher's options.
        nproc: the number of processes, or "auto" for one per CUDA device.
        max_restarts: how often all processes restart after one has failed.
        typed: what the user has typed behind `hookline`, for messages.

    Raises:
        ValueError: `nproc` is not a number of processes, or a launcher has already started this process.
    """
    launcher, rank, others = launched()
    if launcher == "torchrun" or others > 1:
        raise ValueError(
            f"--nproc={nproc} would start processes within process {rank} of a run that a launcher has started already "
            f"({launcher}); leave --nproc and --max-restarts away here"
        )
    number = _processes(nproc)
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    if number > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", GRACE)
    with tempfile.TemporaryDirectory(prefix="hookline-") as folder:
        os.environ[CODES], os.environ[LAUNCHER], os.environ[COMMAND] = folder, str(os.getpid()), typed
        config = _configuration(number, folder, max_restarts)
        command = ["-u", "-m", "hookline", *(word.replace("$", "$$") for word in words)]  # the agent substitutes $names
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            if 2 in {failure.exitcode for failure in error.failures.values()}:
                return 2  # a mistake of the user, which one of them has told
            ended = [f"rank {rank} {_how(failure.exitcode)}" for rank, failure in sorted(error.failures.items())]
            print(f"hookline: {', '.join(ended)}", file=sys.stderr)
            return 1
        except SignalException as error:
            codes = _codes(folder)
            return max(codes) if len(codes) == number else 128 + error.sigval
        finally:
            del os.environ[CODES], os.environ[LAUNCHER], os.environ[COMMAND]
        return max(_codes(folder), default=0)


def _configuration(number: int, folder: str, max_restarts: int) -> Any:
    """Return the configuration of torch's agent for this many processes on this machine, with logs in the folder."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

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
    config.signals_to_handle = ",".join(heard)  # signals ignored by `nohup` or `&` stay ignored
    return config


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
    """Return the function so that it reports exceptions to the agent, if one has started this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return function
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(function)


def end_with_agent() -> None:
    """Let the system end this process when its agent is gone, which could no longer end it.

    Only on Linux; elsewhere, if you kill an agent with SIGKILL, end its processes too.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    parent = os.getppid()
    if parent != int(os.environ.get(LAUNCHER, parent)):  # the launcher is gone already
        os._exit(1)


def report(code: int) -> int:
    """Return the exit code for this process after a run that ended in order with an exit code.

    The agent treats every code but 0 as a failure: it would restart a preempted run, and end the ranks that are still
    saving. So a file tells the launcher the code.
    """
    folder = os.environ.get(CODES)
    if folder is None:
        return code
    Path(folder, f"{os.environ['RANK']}.code").write_text(str(code))
    return 0


def is_first_to_say(text: str) -> bool:
    """Tell whether no other process that this agent has started here for this attempt has said this before."""
    note = _note()
    if note is None:
        return True
    digest = hashlib.sha256(f"{_attempt()} {text}".encode()).hexdigest()
    try:
        note.with_name(f"hookline-said-{digest}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def launched() -> tuple[str, str, int]:
    """Return the launcher of this process, its rank and the number of processes; "", "" and 1 without a launcher.

    The first launcher found counts: torchrun, say, if srun has started torchrun.
    """
    for launcher, (rank, number) in STARTED.items():
        if os.environ.get(rank) and (launcher == "torchrun" or os.environ.get(number)):
            said = os.environ.get(number, "")
            return launcher, os.environ[rank], int(said) if said.isdecimal() else 1
    return "", "", 1


def restarts() -> int:
    """Return how often an agent may restart this process."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def remember(run_dir: Path) -> None:
    """Save the run's folder for restarted processes on this machine."""
    if (note := _note()) is not None:
        note.write_text(str(run_dir))


def reminder() -> Any:
    """Return a plugin that saves the run's folder on machines where it is known only after ranks have met."""
    from hookline.interfaces import CallbackInterface
    from hookline.marks import hookimpl

    class Reminder(CallbackInterface):
        observer = True

        @hookimpl
        def on_begin_train(self, trainer: Any) -> None:
            remember(trainer.run_dir)

    return Reminder()


def remembered() -> str | None:
    """Return, and print, the folder of the run that earlier processes of this agent began; None if there is none."""
    attempt, note = _attempt(), _note()
    folder = (note.read_text() or None) if note is not None and note.exists() else None
    if (attempt or folder) and os.environ["RANK"] == "0":
        does = f"going on with {folder}" if folder else "no attempt has left a run to go on with"
        why = "started anew (machines have come or gone)"
        if attempt:
            why = f"started anew ({attempt} of at most {restarts()} times)"
        print(f"hookline: {why}: {does}", file=sys.stderr)
    return folder


def _attempt() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _note() -> Path | None:
    """Return the file in the agent's own folder in which processes leave a note for later ones; None without an agent.

    The agent outlives them, whether they failed or machines joined or left; it does not count the latter.
    """
    attempt = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parent.parent  # …/attempt_0/0/error.json
    return attempt.parent / "hookline-run" if attempt.name.startswith("attempt_") else None
