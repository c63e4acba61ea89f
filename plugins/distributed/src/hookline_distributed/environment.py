"""Who this process is among those of a run: what launchers say of it in the environment."""

from __future__ import annotations

import os
import re
from typing import NamedTuple


class Place(NamedTuple):
    """A process among those of a run."""

    rank: int
    local_rank: int
    """Among those of its machine."""
    world_size: int
    launcher: str


NAMES = {  # variables of rank, local rank and number of ranks, by launcher
    "torchrun": ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    "SLURM": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPI": ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
}
ALONE = Place(0, 0, 1, "none")


def find() -> Place:
    """Return the place that the environment gives to this process; `ALONE` where no launcher speaks.

    Raises:
        ValueError: a launcher says only half of it, or no numbers.
    """
    for launcher, names in NAMES.items():
        values = {name: os.environ[name] for name in names if os.environ.get(name)}
        rank_name, _, size_name = names
        if launcher == "SLURM" and size_name not in values:  # a script of sbatch itself, which srun did not start
            continue
        if rank_name not in values and size_name not in values:
            continue
        for here, missing in ((rank_name, size_name), (size_name, rank_name)):
            if missing not in values:
                raise ValueError(
                    f"{here}={values[here]} is in the environment, but no {missing}: a launcher sets both; unset it to "
                    "train in one process"
                )
        try:
            rank, local_rank, world_size = (int(values.get(name, "0")) for name in names)
        except ValueError:
            raise ValueError(
                f"{launcher} says {said(values)} in the environment; these must be whole numbers"
            ) from None
        if not (0 <= rank < world_size and local_rank >= 0):
            raise ValueError(f"{launcher} says {said(values)} in the environment: ranks go from 0 to {world_size - 1}")
        return Place(rank, local_rank, world_size, launcher)
    return ALONE


def said(values: dict[str, str]) -> str:
    """Return variables as one writes them."""
    return " ".join(f"{name}={value}" for name, value in values.items())


def address(place: Place) -> tuple[str, int]:
    """Return host and port at which the ranks meet.

    Raises:
        ValueError: nobody says where.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if place.launcher == "SLURM":
        host = host or _first_node(os.environ.get("SLURM_STEP_NODELIST", ""))
        port = port or str(15000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000)
    if not host or not port:
        raise ValueError(
            f"{place.launcher} started {place.world_size} processes, but does not say where they meet: set MASTER_ADDR "
            "to the host of rank 0 and MASTER_PORT to a free port of it, in all of them"
        )
    try:
        return host, int(port)
    except ValueError:
        raise ValueError(f"MASTER_PORT={port!r} is no port") from None


def _first_node(nodes: str) -> str:
    """Return the first of a list of hosts as SLURM writes it: `gpu[03-07,11]-ib,login1`."""
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", nodes).partition(",")[0]
