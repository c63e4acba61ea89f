"""How long it takes to the first batch of an epoch of many samples, and of one that goes on at 90 % of it.

    python -m benchmarks.peers.resuming accelerate 100000000 [--resumed]

The order is shuffled, and a sample is computed when it is asked for, so that nothing but finding the place costs. Each
does what its documentation shows. Prints one object of JSON: seconds, samples computed till the batch came, the peak of
memory. `python -m benchmarks.peers` calls this twice for each, each time in a process of its own.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.checkpoint import Many, first_step
from benchmarks.peers.work import silence
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

BATCH = 100
WITHOUT = {
    "fabric": "leaves the place to a loop of one's own",
    "lightning": "wants a loader that keeps its place, as torchdata's does",
    "transformers": "skips by accelerate's `skip_first_batches`",
    "ignite": "leaves the place to a loader of one's own",
    "torchtnt": "wants a loader that keeps its place, as torchdata's does",
    "skorch": "does not go on within an epoch",
    "pytorch_accelerated": "does not go on within an epoch",
    "keras": "does not go on within an epoch",
}


def loader(data: Many) -> DataLoader[int]:
    return DataLoader(data, BATCH, sampler=RandomSampler(data, generator=torch.Generator().manual_seed(1)))


def by_hand(data: Many, batch: int) -> Callable[[], Tensor]:
    """Draw the batches before the place, and load none of them."""

    def first() -> Tensor:
        batches = loader(data).batch_sampler
        assert batches is not None
        return torch.tensor([data[index] for index in next(itertools.islice(batches, batch, None))])

    return first


def accelerate(data: Many, batch: int) -> Callable[[], Tensor]:
    from accelerate import Accelerator, skip_first_batches

    def first() -> Tensor:
        prepared = Accelerator(cpu=True).prepare(loader(data))
        given: Tensor = next(iter(skip_first_batches(prepared, batch)))
        return given

    return first


def torchdata(data: Many, batch: int) -> Callable[[], Tensor]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def made(data: Many) -> Any:
        return StatefulDataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(1))

    begun = made(Many(BATCH))
    next(iter(begun))
    state = begun.state_dict()  # after a batch; the random state is that of the epoch's beginning
    sampler = state["_sampler_iter_state"]
    state["_sampler_iter_yielded"] = state["_num_yielded"] = batch
    sampler["samples_yielded"] = sampler["sampler_iter_state"]["yielded"] = batch * BATCH

    def first() -> Tensor:
        stateful = made(data)
        if batch:
            stateful.load_state_dict(state)
        given: Tensor = next(iter(stateful))
        return given

    return first


def hookline(data: Many, batch: int) -> Callable[[], Tensor]:
    from hookline.testing import Memory

    memory = Memory()
    if batch:
        first_step(Many(data.count), memory)
    return lambda: first_step(data, memory, batch).batch


WAYS = {"hookline": hookline, "by_hand": by_hand, "accelerate": accelerate, "torchdata": torchdata}


def first_batch(name: str, samples: int, resumed: bool) -> dict[str, Any]:
    """Return what the first batch costs one of the ways, and the batch."""
    with silence():
        WAYS[name](Many(BATCH), 0)()  # imports what it needs
    data = Many(samples)
    first = WAYS[name](data, samples // BATCH * 9 // 10 if resumed else 0)
    begin = time.perf_counter()
    with silence():
        given = first()
    seconds = round(time.perf_counter() - begin, 3)
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return {"seconds": seconds, "computed": data.computed, "peak_mb": peak, "batch": given.tolist()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    found = first_batch(sys.argv[1], int(sys.argv[2]), "--resumed" in sys.argv)
    print(json.dumps({name: value for name, value in found.items() if name != "batch"}))
