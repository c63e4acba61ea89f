"""A step, compiled by blocks and as a whole window, against the same step in Python, at three sizes on a CPU.

python benchmarks/compiled.py [--json] [--turns 9]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
import warnings
from typing import Any

import torch
from peers.work import WORKS, Work

from hookline import ModuleInterface, Trainer

SIZES = {"mlp": 200, "cnn": 60, "transformer": 2}
"""Works of benchmarks/peers, with the steps of one turn."""
WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "blocks": {"compile": {}},
    "window": {"compile": {"scope": "window"}},
}
WARM = 4


class Module(ModuleInterface):
    """The network of a work, with AdamW and clipping to 1.0."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net, self.work = work.net(), work

    def train_step(self, global_step: int, batch: Any, device: Any) -> torch.Tensor:
        inputs, targets = batch
        return self.work.loss(self.net(inputs), targets)

    def get_train_dataloader(self, sampler: type, batch_size: int) -> Any:
        return list(itertools.islice(iter(self.work.batches(WARM)), WARM))

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int | None, epochs: int) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-4)


def begun(work: Work, plugins: dict[str, Any]) -> Trainer:
    """Return a trainer that has done the first steps, and compiled what there is to compile."""
    trainer = Trainer(Module(work), {"clip": {"max_norm": 1.0}, **plugins}, train_batch_size=32, device="cpu")
    trainer.train()
    return trainer


def cost(trainer: Trainer, batches: list[Any], steps: int) -> float:
    """Return the CPU seconds of a step, which other programs of the machine disturb less than seconds."""
    begin = time.process_time()
    for batch in itertools.islice(itertools.cycle(batches), steps):
        trainer.training.take_step([batch])
    return (time.process_time() - begin) / steps


def measured(name: str, turns: int) -> dict[str, Any]:
    """Return the CPU seconds of each way, and what part of the eager step of the same turn it takes."""
    work, trainers, compiling = WORKS[name], {}, {}
    for way, plugins in WAYS.items():
        begin = time.perf_counter()
        trainers[way] = begun(work, plugins)
        compiling[way] = round(time.perf_counter() - begin, 1)
    batches = list(itertools.islice(iter(work.batches(8)), 8))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(turns):
        for way, trainer in trainers.items():
            seconds[way].append(cost(trainer, batches, SIZES[name]))
    ratios = {way: [a / b for a, b in zip(of, seconds["eager"], strict=True)] for way, of in seconds.items()}
    return {
        way: {
            "us": round(1e6 * statistics.median(seconds[way])),
            "of_eager": round(statistics.median(ratios[way]), 2),
            "from_to": [round(edge, 2) for edge in (min(ratios[way]), max(ratios[way]))],
            "first_steps_s": compiling[way],
        }
        for way in WAYS
    }


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--size", choices=SIZES, action="append")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {name: measured(name, given.turns) for name in given.size or SIZES}
    if given.json:
        machine = {"torch": torch.__version__, "python": platform.python_version(), "load": os.getloadavg()}
        print(json.dumps({"machine": machine, "sizes": found}))
        return
    for name, ways in found.items():
        for way, row in ways.items():
            print(f"{name:12} {way:7} {row}")


if __name__ == "__main__":
    main()
