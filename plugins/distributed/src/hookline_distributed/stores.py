"""Where the ranks of a run meet, and how they leave."""

from __future__ import annotations

import datetime
import functools
import gc
import os
import time
import uuid
from typing import Any

import torch.distributed as dist

from hookline_distributed.environment import Place, address


def meeting(place: Place, init_method: str, timeout: datetime.timedelta, said: str) -> Any:
    """Return the store of this run when all ranks have come to it.

    Args:
        place: of this process among them.
        init_method: the option of this name.
        timeout: how long a rank waits for another.
        said: the same as the user has written it.

    Raises:
        RuntimeError: who has not come in time, or that there is no store.
    """
    rank, world_size = place.rank, place.world_size
    missing: int | None = None
    try:
        if init_method == "env://":
            hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by the launcher
            store = tcp_store(*address(place), rank == 0 and not hosted, timeout)
        else:
            store = file_store(init_method.removeprefix("file://"), world_size)
        missing = 0
        store = round_of(store, rank, world_size, timeout)
        store.set(f"rank {rank}", "")
        for other in range(world_size):
            missing = other
            store.wait([f"rank {other}"], timeout)
    except (RuntimeError, OSError) as error:
        why = "there is no store to meet at" if missing is None else f"rank {missing} has not come"
        raise RuntimeError(
            f"rank {rank} of {world_size} has not met the others within {said} "
            f"(distributed.start_timeout): {why}: {error}"
        ) from error
    return store


@functools.cache
def tcp_store(host: str, port: int, hosts: bool, timeout: datetime.timedelta) -> Any:
    """Return the store at an address, one for the whole life of this process: other ranks may still need it."""
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=hosts, timeout=timeout, wait_for_workers=False, multi_tenant=True
    )


@functools.cache
def file_store(path: str, world_size: int) -> Any:
    """Return the store in a file, one for the whole life of this process."""
    return dist.FileStore(path, world_size)  # type: ignore[attr-defined]


def round_of(store: Any, rank: int, world_size: int, timeout: datetime.timedelta) -> Any:
    """Return a store for those who meet now alone, within one that may have outlived others who met there.

    Nobody counts the rounds: an agent that starts processes anew because machines have come or gone does not, and
    two agents count failures each for itself. So rank 0 names the round, and tells the name whoever asks: by a word
    of his own, which no former process can have left there. Who is told confirms it; until then rank 0
    looks again, since what it has read may have been the question of a former one.
    """
    mine, began = uuid.uuid4().hex, time.monotonic()
    if rank > 0:
        store.set(f"rank {rank} asks", mine)
        store.wait([f"to {mine}"], timeout)
        name = store.get(f"to {mine}").decode()
        store.set(f"{name} {rank}", "")
        return dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    missing = set(range(1, world_size))
    while missing and time.monotonic() - began < timeout.total_seconds():
        for other in list(missing):
            if store.check([f"{mine} {other}"]):
                missing.remove(other)
            elif store.check([f"rank {other} asks"]):
                store.set(f"to {store.get(f'rank {other} asks').decode()}", mine)
        if missing:
            time.sleep(0.01)
    return dist.PrefixStore(mine, store)  # type: ignore[attr-defined]


def leave() -> None:
    """Leave the process group."""
    gc.collect()  # what still holds the group would end the process with SIGABRT
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.02)  # for the same reason: gloo's thread must be gone before Python is
