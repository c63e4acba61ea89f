"""What launchers say in the environment, and what is made of it."""

import os

import pytest

from hookline_distributed.environment import ALONE, NAMES, address, find


@pytest.fixture(autouse=True)
def said(monkeypatch):
    """Nothing but what a test says."""
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "MASTER_")) or name in NAMES["torchrun"]:
            monkeypatch.delenv(name)

    def say(words):
        for word in words.split():
            monkeypatch.setenv(*word.split("=", 1))

    return say


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ("", ALONE),
        ("RANK=3 LOCAL_RANK=1 WORLD_SIZE=4", (3, 1, 4, "torchrun")),
        ("RANK=3 WORLD_SIZE=4", (3, 0, 4, "torchrun")),  # one process a machine, as a Job of Kubernetes has it
        ("RANK=0 WORLD_SIZE=1", (0, 0, 1, "torchrun")),
        ("RANK= WORLD_SIZE=", ALONE),
        ("SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_STEP_NUM_TASKS=8", (5, 1, 8, "SLURM")),
        ("SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=8", ALONE),  # the script of sbatch itself
        ("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2 RANK=7 LOCAL_RANK=3 WORLD_SIZE=8", (7, 3, 8, "torchrun")),
        (
            "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_SIZE=2",
            (1, 1, 2, "Open MPI"),
        ),
        ("PMI_RANK=2 MPI_LOCALRANKID=0 PMI_SIZE=4", (2, 0, 4, "MPI")),
    ],
)
def test_who_this_process_is(words, place, said):
    said(words)
    assert find() == place


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("RANK=1", "RANK=1 is in the environment, but no WORLD_SIZE: a launcher sets both"),
        ("WORLD_SIZE=4", "WORLD_SIZE=4 is in the environment, but no RANK"),
        ("SLURM_STEP_NUM_TASKS=4", "SLURM_STEP_NUM_TASKS=4 is in the environment, but no SLURM_PROCID"),
        ("OMPI_COMM_WORLD_RANK=4", "but no OMPI_COMM_WORLD_SIZE"),
        ("PMI_SIZE=4", "but no PMI_RANK"),
        (
            "RANK=one WORLD_SIZE=4",
            "torchrun says RANK=one WORLD_SIZE=4 in the environment; these must be whole numbers",
        ),
        ("RANK=4 WORLD_SIZE=4", "torchrun says RANK=4 WORLD_SIZE=4 in the environment: ranks go from 0 to 3"),
        ("RANK=-1 WORLD_SIZE=4", "ranks go from 0 to 3"),
        ("RANK=0 LOCAL_RANK=-1 WORLD_SIZE=4", "ranks go from 0 to 3"),
    ],
)
def test_what_cannot_be_understood(words, message, said):
    said(words)
    with pytest.raises(ValueError, match=message):
        find()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu[03-07,11],login1", "gpu03"),
        ("gpu1,gpu2", "gpu1"),
        ("node[9,12]-ib", "node9-ib"),
        ("rack[2-3]node[4-5]", "rack2node4"),
    ],
)
def test_where_processes_of_slurm_meet(nodes, first, said):
    said(f"SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST={nodes} SLURM_JOB_ID=70001")
    assert address(find()) == (first, 15000 + 70001 % 20000)
    said("MASTER_ADDR=here MASTER_PORT=29400")
    assert address(find()) == ("here", 29400)


def test_nobody_says_where_they_meet(said):
    said("PMI_RANK=0 PMI_SIZE=2 MASTER_ADDR=here")
    with pytest.raises(ValueError, match="MPI started 2 processes, but does not say where they meet: set MASTER_ADDR"):
        address(find())
    said("MASTER_PORT=http")
    with pytest.raises(ValueError, match="MASTER_PORT='http' is no port"):
        address(find())
