"""The command `hookline ray`: starts workers of Ray Train, each of which is one rank of `hookline fit`.

This process hosts a store in which ranks leave with which code they have ended, and which run can be gone on with.
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from hookline.commands import new_parser
from hookline_ray import FOLDER, STORE, connect

EXAMPLES = """\
What stands behind these options is for `hookline fit`.

examples:
  hookline ray fit run.yaml -p ddp --workers 2
  hookline ray fit run.yaml -p ddp --workers 8 --gpus --max-failures 3 --address auto
  hookline ray fit run.yaml trainer.epochs=3 -p ddp --workers 2 --resume
"""
STORE_MEMORY = 100_000_000  # bytes of Ray's object store where it is started here: nothing is put into it


def main(words: Sequence[str]) -> int:
    """Run the command with the words behind its name; return its exit code: that of the run.

    Raises:
        ValueError: what the user can mend.
    """
    options, rest = _parser().parse_known_args(words)
    if options.workers < 1 or options.max_failures < 0:
        raise ValueError(
            f"--workers={options.workers} must be at least 1, and --max-failures={options.max_failures} at least 0"
        )
    for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_TRAIN_V2_ENABLED", "1"), ("RAY_DEDUP_LOGS", "0")):
        os.environ.setdefault(name, value)
    ray = _import("ray")
    command = [sys.executable, "-m", "hookline", "fit", *rest, "-p", "ray"]
    checked = subprocess.run([*command, "--print-config"], stdout=subprocess.DEVNULL, check=False)
    if checked.returncode:  # said once, before anything is started
        return checked.returncode
    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    own = {"num_cpus": options.workers, "include_dashboard": False, "object_store_memory": STORE_MEMORY}
    ray.init(address=address, **(own if address == "local" else {}))
    try:
        return _train(options, [*rest, "-p", "ray"])
    finally:
        ray.shutdown()


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("hookline ray", "Run a configuration on workers of Ray Train.", EXAMPLES)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    fit = commands.add_parser("fit", help="train a module", epilog=EXAMPLES, allow_abbrev=False,
                              formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    fit.add_argument("--workers", type=int, required=True, metavar="N", help="how many; each is one rank")
    fit.add_argument("--gpus", action="store_true", help="give each worker a GPU")
    fit.add_argument(
        "--max-failures", type=int, default=0, metavar="N",
        help="how often all start anew, from the newest checkpoint, when one has failed (default: 0)",
    )  # fmt: skip
    fit.add_argument(
        "--address", help="the cluster: auto, or host:port (default: RAY_ADDRESS, else one is started on this machine)"
    )
    return parser


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"`hookline ray` starts workers of Ray Train, which cannot be imported ({error}): "
            "`pip install 'ray[train]>=2.60'`"
        ) from error


def _train(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Train on workers; return the exit code."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    train, torch, backend = (_import(f"ray.train{name}") for name in ("", ".torch", ".backend"))
    host = _import("ray.util").get_node_ip_address()
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    run = {
        "words": list(words),
        "folder": os.getcwd(),
        "path": sys.path,
        "store": f"{host}:{store.port}",
        "max_failures": options.max_failures,
    }
    # Ranks are joined by the run itself. A process takes the device of its number, so it must see those of the others.
    ours = type("Ranks", (backend.Backend,), {"share_cuda_visible_devices": True})
    config = type("RanksConfig", (torch.TorchConfig,), {"backend_cls": property(lambda config: ours)})
    failures = train.FailureConfig(max_failures=options.max_failures, max_preemption_failures=options.max_failures)
    with tempfile.TemporaryDirectory(prefix="hookline-ray-") as folder:  # checkpoints are in the folder of the run
        trainer = torch.TorchTrainer(
            work,
            train_loop_config=run,
            torch_config=config(),
            scaling_config=train.ScalingConfig(num_workers=options.workers, use_gpu=options.gpus),
            run_config=train.RunConfig(storage_path=folder, failure_config=failures),
        )
        try:
            trainer.fit()
        except SystemExit:  # Ray's answer to Ctrl-C, which says that all is well
            raise KeyboardInterrupt from None
        except train.TrainingFailedError as error:
            print(f"hookline: {error}", file=sys.stderr)
            return 1
    return max(int(store.get(_code_of(rank))) for rank in range(options.workers))


def _code_of(rank: int) -> str:
    return f"exit code of rank {rank}"


def work(run: Mapping[str, Any]) -> None:
    """Be one rank of `hookline fit`: what each worker does, in a process of its own.

    Raises:
        RuntimeError: the run has failed.
        FileNotFoundError: the folder in which the command was given is not on this machine.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    context, store, words = _import("ray.train").get_context(), connect(run["store"]), list(run["words"])
    rank, meeting = context.get_world_rank(), None
    if rank == 0:
        host = _import("ray.util").get_node_ip_address()
        place = TCPStore(host, 0, is_master=True, wait_for_workers=False)  # of this attempt alone
        attempt = store.add("attempts", 1) - 1
        folder = store.get(FOLDER).decode() if store.check([FOLDER]) else None
        meeting = host, place.port, attempt, folder
    host, port, attempt, folder = _import("ray.train.collective").broadcast_from_rank_zero(meeting)
    if folder is not None:
        words += ["--resume", folder]
    if attempt and rank == 0:
        does = f"going on with {folder}" if folder else "no attempt has left a run to go on with"
        print(f"hookline: started anew (attempt {attempt + 1}): {does}", file=sys.stderr)
    os.environ |= {
        STORE: run["store"],
        "RANK": str(rank),
        "LOCAL_RANK": str(context.get_local_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # there is a store at that address already
        "TORCHELASTIC_MAX_RESTARTS": str(run["max_failures"]),
    }
    os.chdir(run["folder"])
    sys.path += [entry for entry in run["path"] if entry not in sys.path]
    sys.argv = ["hookline", "fit", *words]
    try:
        runpy.run_module("hookline", run_name="__main__")
    except SystemExit as end:
        if end.code == 1:
            raise RuntimeError(f"rank {rank} has ended with exit code 1") from end
        store.set(_code_of(rank), str(end.code or 0))
