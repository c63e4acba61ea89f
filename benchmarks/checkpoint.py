"""What saving and resuming cost, as ratios within one run.

    python benchmarks/checkpoint.py [--json] [--megabytes 1000] [--held 200] [--rounds 5] [--folder .]

- A state of `--megabytes` (a module, and Adam's state of it, twice as large) is saved in turn by
  `torch.save` with a flush to the disk, and by the plugin checkpoint: SHA-256 of every byte, every file and folder
  flushed, and a commit. The ratio is the median over the rounds; the first one warms up.
- It is read in turn by `torch.load` and by the plugin, each in a process of its own, as a resume does, and checked.
- A run with a state of `--held` megabytes saves at every step, in the foreground and in the background: how
  long training is held up by a save. The next step begins when the checkpoint is on the disk.
- A run over ten million samples is resumed at 90 % of its epoch: the time from the beginning of the epoch to the first
  batch.

The folder should be on a disk, not in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from hookline import CallbackInterface, ModuleInterface, Trainer, hookimpl
from hookline.testing import Memory
from hookline_checkpoint import Checkpoint, storage
from hookline_checkpoint.layout import unpack

LAYERS = 32
SAMPLES = 10_000_000


class Large(ModuleInterface):
    """Parameters of a third of so many bytes; Adam has the other two."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        size = megabytes * 10**6 // 4 // 3 // LAYERS
        self.layers = nn.ParameterList([torch.randn(size) for _ in range(LAYERS)])

    def train_step(self, global_step: int, batch: Any, device: Any) -> torch.Tensor:
        return torch.stack([layer.square().mean() for layer in self.layers]).sum()

    def get_train_dataloader(self, sampler: type, batch_size: int) -> Any:
        return [torch.zeros(1)] * 100

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int | None, epochs: int) -> Any:
        return [torch.optim.Adam(self.parameters())], []


class Clock(CallbackInterface):
    """Times each save, as training feels it; and begins the next step when the checkpoint is there."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = 0.0

    @hookimpl(wrapper=True, tryfirst=True)
    def save(self) -> Generator[None, bool, bool]:
        begin = time.perf_counter()
        answer = yield
        self.seconds.append(time.perf_counter() - begin)
        return answer

    @hookimpl(wrapper=True)
    def update(self, trainer: Trainer) -> Generator[None, Any, Any]:
        self.began = self.began or time.perf_counter()
        last = trainer.run_dir / "checkpoints" / f"step-{trainer.global_step:012d}"
        while trainer.global_step and not last.exists():
            time.sleep(0.001)
        return (yield)


class Both(CallbackInterface):
    """Saves each state by `torch.save`, before the plugin does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.theirs: list[float] = []

    @hookimpl(tryfirst=True)
    def on_boundary(self, trainer: Trainer) -> None:
        os.sync()
        begin = time.perf_counter()
        with open(self.folder / "theirs.pt", "wb") as file:
            torch.save(trainer.hook.get_run_state(trainer=trainer), file)
            file.flush()
            os.fsync(file.fileno())
        self.theirs.append(time.perf_counter() - begin)
        os.sync()


def train(megabytes: int, rounds: int, folder: Path, plugins: list[Any]) -> Path:
    """Train so many steps with a checkpoint after each; return the run's folder."""
    options: dict[str, Any] = {"max_steps": rounds + 1, "device": "cpu", "runs_folder": str(folder)}
    trainer = Trainer(Large(megabytes), plugins, **options)
    trainer.train()
    return trainer.run_dir


def saves(megabytes: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Compare a save with `torch.save`, and a load with `torch.load`."""
    clock, both = Clock(), Both(folder)
    run = train(megabytes, rounds, folder, [both, clock, Checkpoint("1 step", keep_last=1)])
    ours = storage.listed(run / "checkpoints")[0]
    loads: dict[str, list[float]] = {"verify": [], "load": [], "torch.load": []}
    for _ in range(rounds):
        for what in loads:
            command = [sys.executable, __file__, "--read", what, str(folder / "theirs.pt"), str(ours)]
            loads[what].append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    pairs = list(zip(clock.seconds, both.theirs, strict=True))[1:]
    return {
        "state_megabytes": megabytes,
        "seconds": {
            "torch.save": round(statistics.median(theirs for _, theirs in pairs), 3),
            "save": round(statistics.median(mine for mine, _ in pairs), 3),
            **{what: round(statistics.median(times), 3) for what, times in loads.items()},
        },
        "save_over_torch_save": median_ratio(*zip(*pairs, strict=True)),
        "verify_over_torch_load": median_ratio(loads["verify"], loads["torch.load"]),
        "load_over_torch_load": median_ratio(loads["load"], loads["torch.load"]),
    }


def read(what: str, theirs: str, ours: str) -> float:
    """Return the seconds that one way of reading takes."""
    begin = time.perf_counter()
    if what == "verify":
        storage.verify(Path(ours))
    elif what == "load":
        unpack(Path(ours), 0)
    else:
        torch.load(theirs, weights_only=True)
    return time.perf_counter() - begin


def held(megabytes: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Compare how long a save holds training up in the foreground and in the background."""
    clocks = {}
    for asynchronous in (False, True):
        clock = clocks[asynchronous] = Clock()
        plugin = Checkpoint("1 step", keep_last=1, asynchronous=asynchronous)
        train(megabytes, rounds, folder / f"held-{asynchronous}", [clock, plugin])
    mine, other = clocks[True].seconds[1:], clocks[False].seconds[1:]
    return {
        "state_megabytes": megabytes,
        "seconds": {
            "foreground": round(statistics.median(other), 3),
            "background": round(statistics.median(mine), 3),
        },
        "background_over_foreground": round(statistics.median(mine) / statistics.median(other), 3),
    }


class Many(Dataset[int]):
    """Samples that cost nothing, so that only finding the place does.

    Args:
        count: of samples.
    """

    def __init__(self, count: int) -> None:
        self.count, self.computed = count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        self.computed += 1
        return index


class First(ModuleInterface):
    """Knows when its epoch began, and when its first batch came and which it was."""

    def __init__(self, data: Many) -> None:
        super().__init__()
        self.data, self.batch = data, torch.zeros(0)
        self.weight = nn.Parameter(torch.zeros(1))
        self.began = self.came = 0.0

    @hookimpl
    def on_begin_train_epoch(self) -> None:
        self.began = time.perf_counter()

    def train_step(self, global_step: int, batch: Any, device: Any) -> torch.Tensor:
        if not self.came:
            self.came, self.batch = time.perf_counter(), batch
        return self.weight.sum()

    def get_train_dataloader(self, sampler: type, batch_size: int) -> Any:
        return DataLoader(self.data, batch_size, sampler=sampler(self.data))

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int | None, epochs: int) -> Any:
        return [torch.optim.SGD(self.parameters(), 0.1)], []


def first_step(data: Many, memory: Memory, steps: int = 0) -> First:
    """Take one step of an epoch of batches of 100, or the one after so many steps, which a memory of one step gives."""
    if steps:
        state = memory.state
        state["trainer"]["counters"] |= {"global_step": steps, "batches": steps, "samples": steps * 100}
        state["trainer"]["cursor"] |= {"position": steps, "consumed": steps * 100}
    module = First(data)
    options: dict[str, Any] = {"train_batch_size": 100, "device": "cpu", "evaluate_every": None}
    Trainer(module, [memory], max_steps=steps + 1, **options).train()
    return module


def position() -> dict[str, Any]:
    """Time the first batch of an epoch from its beginning, and of a run that is resumed at 90 % of it."""
    data, memory = Many(SAMPLES), Memory()
    fresh, resumed = first_step(data, memory), first_step(data, memory, SAMPLES // 100 * 9 // 10)
    return {
        "samples": SAMPLES,
        "seconds_to_the_first_batch": round(fresh.came - fresh.began, 3),
        "seconds_to_the_first_batch_after_90_percent": round(resumed.came - resumed.began, 3),
    }


def median_ratio(one: Any, other: Any) -> float:
    return round(statistics.median(a / b for a, b in zip(one, other, strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print figures for machines")
    parser.add_argument("--megabytes", type=int, default=1000, help="of the state that is saved and loaded")
    parser.add_argument("--held", type=int, default=200, help="megabytes of the state that is saved in the background")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=".", help="where files are written")
    parser.add_argument("--read", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(read(*arguments.read))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        figures = {
            "save_and_load": saves(arguments.megabytes, arguments.rounds, Path(folder)),
            "in_the_background": held(arguments.held, arguments.rounds, Path(folder)),
            "position": position(),
        }
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    for part, values in figures.items():
        print(part)
        for name, value in values.items():
            print(f"  {name}: {value}")


if __name__ == "__main__":
    main()
