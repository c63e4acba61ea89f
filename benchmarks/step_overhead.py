"""What a step costs beyond the loop one would write by hand, as ratios within one process.

    python benchmarks/step_overhead.py [--json] [--repeats 40] [--optimizer SGD]

Trains the 32-64-10 perceptron on batches of 32 with one thread and AdamW, in turn by

- `plain`: a hand-written loop that calls the network,
- `contract`: a hand-written loop that calls the module in the contract's way,
- `hookline`: a `Trainer` without plugins,
- `plain_route`: the same, with each hook called where it stands, in place of its body where nobody plugs in,
- `by_hand`: a hand-written loop that does the work of the standard set: clips, updates an
  accuracy, writes a line of JSON every 50 steps,
- `standard`: a `Trainer` with progress, jsonl, clip, checkpoint and metrics.

Each loop is timed from inside, between two batches of one run, so that setting up does not count.
The runs take turns, so that a machine that slows down slows all of them; the least time of each
is its cost, and the median of the ratios of neighbouring runs is their ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hookline import ModuleInterface, Stage, Trainer
from hookline.plugins import PluginManager

WARM, TIMED = 100, 1000
OPTIMIZER: type[torch.optim.Optimizer] = torch.optim.AdamW
BATCH = torch.randn(32, 32), torch.randint(0, 10, (32,))


class Clock:
    """Gives the same batch again and again, and reads the time at the first that counts and behind the last."""

    def __len__(self) -> int:
        return WARM + TIMED

    def __iter__(self) -> Iterator[Any]:
        for number in range(WARM + TIMED):
            if number == WARM:
                begin = time.perf_counter()
            yield BATCH
        self.microseconds = (time.perf_counter() - begin) / TIMED * 1e6


class Mlp(ModuleInterface):
    """The network, its loss and its optimizer."""

    def __init__(self, clock: Clock, with_outputs: bool = False) -> None:
        super().__init__()
        self.clock, self.with_outputs = clock, with_outputs
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        inputs, targets = batch
        logits = self.net(inputs)
        loss = nn.functional.cross_entropy(logits, targets)
        return (loss, logits, targets) if self.with_outputs else loss

    def get_train_dataloader(self, sampler: type, batch_size: int) -> Any:
        return self.clock

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int | None, epochs: int) -> Any:
        return [OPTIMIZER(self.parameters(), 0.001)], []


def plain(clock: Clock) -> None:
    module = Mlp(clock)
    net, ((optimizer,), _) = module.net, module.get_optimizers_schedulers(1, 1)
    for inputs, targets in clock:
        loss = nn.functional.cross_entropy(net(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def contract(clock: Clock) -> None:
    module = Mlp(clock)
    (optimizer,), _ = module.get_optimizers_schedulers(1, 1)
    for step, batch in enumerate(clock):
        loss = module(stage=Stage.TRAIN, global_step=step + 1, batch=batch, device="cpu")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def hookline(clock: Clock) -> None:
    Trainer(Mlp(clock), train_batch_size=32, device="cpu").train()


def plain_route(clock: Clock) -> None:
    straighten = PluginManager.straighten
    PluginManager.straighten = lambda self: None  # type: ignore[method-assign]
    try:
        hookline(clock)
    finally:
        PluginManager.straighten = straighten  # type: ignore[method-assign]


def by_hand(clock: Clock) -> None:
    from torchmetrics.classification import MulticlassAccuracy

    module, accuracy, losses = Mlp(clock, with_outputs=True), MulticlassAccuracy(10), []
    (optimizer,), _ = module.get_optimizers_schedulers(1, 1)
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log.jsonl", "a") as log:
        for step, batch in enumerate(clock):
            loss, logits, targets = module(stage=Stage.TRAIN, global_step=step + 1, batch=batch, device="cpu")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            accuracy.update(logits.detach(), targets)
            losses.append(loss.detach())
            if (step + 1) % 50 == 0:
                log.write(json.dumps({"step": step + 1, "train_loss": torch.stack(losses).mean().item()}) + "\n")
                log.flush()
                losses.clear()
        torch.save([module.state_dict(), optimizer.state_dict()], Path(folder) / "checkpoint.pt")


def standard(clock: Clock) -> None:
    from torchmetrics.classification import MulticlassAccuracy

    from hookline_checkpoint import Checkpoint
    from hookline_clip import Clip
    from hookline_metrics import Metrics
    from hookline_progress import Progress
    from hookline_runs import Jsonl

    with tempfile.TemporaryDirectory() as folder:
        plugins = [Progress(), Jsonl(), Clip(1.0), Checkpoint(), Metrics(train={"accuracy": MulticlassAccuracy(10)})]
        options: dict[str, Any] = {"train_batch_size": 32, "device": "cpu", "runs_folder": folder}
        Trainer(Mlp(clock, with_outputs=True), plugins, log_every="50 steps", **options).train()


def measure(loops: list[Callable[[Clock], None]], repeats: int) -> dict[str, list[float]]:
    """Return the microseconds a step of each loop, one number a turn."""
    times: dict[str, list[float]] = {loop.__name__: [] for loop in loops}
    for turn in range(repeats + 1):
        for loop in loops:
            clock = Clock()
            loop(clock)
            if turn:  # the first turn warms up
                times[loop.__name__].append(clock.microseconds)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print figures for machines")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--optimizer", default="AdamW", help="of torch.optim; SGD is the quickest, so the hardest case")
    arguments = parser.parse_args()
    global OPTIMIZER
    OPTIMIZER = getattr(torch.optim, arguments.optimizer)
    torch.set_num_threads(1)
    times = measure([plain, contract, hookline, plain_route], arguments.repeats)
    times |= measure([by_hand, standard], max(arguments.repeats // 4, 3))

    def ratio(one: str, other: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[one], times[other], strict=True)), 3)

    figures = {
        "optimizer": arguments.optimizer,
        "microseconds_per_step": {name: round(min(values), 1) for name, values in times.items()},
        "hookline_over_contract": ratio("hookline", "contract"),
        "hookline_over_plain": ratio("hookline", "plain"),
        "hookline_over_plain_route": ratio("hookline", "plain_route"),
        "standard_extra_microseconds": round(
            statistics.median(a - b for a, b in zip(times["standard"], times["by_hand"], strict=True)), 1
        ),
    }
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
