"""Counts of a step of rank 0 of two.

    python -m benchmarks.peers.ranks lightning

starts two processes that average gradients by gloo, and prints what `benchmarks.peers.measure` prints in rank 0.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import Any

from torch.distributed import TCPStore


def start(framework: str, ranks: int = 2) -> str:
    """Return what rank 0 prints.

    Raises:
        RuntimeError: a rank failed; with the end of what it said.
    """
    free = TCPStore("127.0.0.1", 0, is_master=True)  # the system picks a port; the ranks' own store takes it over
    port = free.port
    del free
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    shared |= {"LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "benchmarks.peers.measure", framework, "ranks", "--what", "counts"]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                command, cwd=folder, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **options
            )
            for rank in range(ranks)
        ]
        said = [process.communicate(timeout=600) for process in started]
    for process, (_, error) in zip(started, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"{framework} on {ranks} ranks: {error[-600:]}")
    return said[0][0]


if __name__ == "__main__":
    print(start(sys.argv[1]), end="")
