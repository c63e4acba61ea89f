"""A run that is killed anywhere and resumed ends with the bits of one that was not.

Run as a program (`python test_resume.py <folder> <step at which to die>`) it is one such run.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from hookline import CallbackInterface, ModuleInterface, Trainer, hookimpl
from hookline_checkpoint import Checkpoint

STEPS = 15  # 3 epochs of 5 batches: 37 samples by 8, the last batch of 5


class Noisy(Dataset):
    """Numbers with an augmentation that draws at random wherever it is loaded."""

    def __init__(self) -> None:
        self.x = torch.randn(37, 6, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return index, self.x[index] + 0.1 * torch.rand(6), self.x[index].sum()


def collate(samples: list[Any]) -> Any:
    ids, x, y = default_collate(samples)
    return ids, x * random.uniform(0.9, 1.1), y


class Net(ModuleInterface):
    def __init__(self, workers: int = 0, scheduler: str = "step") -> None:
        super().__init__()
        self.workers, self.scheduler = workers, scheduler
        generator = torch.Generator().manual_seed(2)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(6, 8),
            torch.nn.BatchNorm1d(8),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(8, 1),
        )
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        self.trace: list[Any] = []

    def train_step(self, global_step: int, batch: Any, device: Any) -> torch.Tensor:
        ids, x, y = batch
        loss = (self.layers(x).squeeze(1) - y).pow(2).mean()
        self.trace.append((global_step, ids.tolist(), loss.item()))
        return loss

    def val_step(self, global_step: int, batch: Any, device: Any) -> torch.Tensor:
        _, x, y = batch
        return (self.layers(x).squeeze(1) - y).pow(2).mean()

    def get_train_dataloader(self, sampler: type, batch_size: int) -> DataLoader[Any]:
        data = Noisy()
        return DataLoader(data, batch_size, sampler=sampler(data), collate_fn=collate, num_workers=self.workers)

    def get_val_dataloaders(self, sampler: type, batch_size: int) -> DataLoader[Any]:
        data = Noisy()
        return DataLoader(data, batch_size, sampler=sampler(data), collate_fn=collate)

    def get_optimizers_schedulers(self, steps: int | None, epochs: int) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), 0.02)
        if self.scheduler == "validation":
            return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)]
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, (steps or 5) * epochs)]


class KilledError(BaseException):
    """The process dies, as far as one process can play it."""


@dataclass(eq=False)
class Killer(CallbackInterface):
    """Dies in the middle of the step after `step`."""

    step: int = 1000
    really: bool = False
    logged: list[Any] = field(default_factory=list)

    @hookimpl
    def on_begin_optimizer_step(self, trainer: Trainer) -> None:
        if trainer.global_step == self.step:
            if self.really:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KilledError

    @hookimpl
    def on_log(self, metrics: Any, global_step: int) -> None:
        self.logged.append((global_step, dict(metrics)))


def hashed(tree: Any) -> Any:
    """Return the tree with a hash of its bits in the place of each tensor."""
    if isinstance(tree, torch.Tensor):
        raw = tree.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return [str(tree.dtype), list(tree.shape), hashlib.sha256(raw).hexdigest()]
    if isinstance(tree, dict):
        return {str(key): hashed(value) for key, value in tree.items() if key != "seconds"}
    if isinstance(tree, (list, tuple)):
        return [hashed(value) for value in tree]
    return repr(tree)


def final(trainer: Trainer) -> Any:
    """Return everything that the end of a run is, but for the time that it took."""
    return hashed(trainer.hook.get_run_state(trainer=trainer))


def trainer_for(folder: Path, killer: Killer, module: Net | None = None, **options: Any) -> Trainer:
    every = options.pop("every", "1 steps")
    keep_last = options.pop("keep_last", 2)
    plugins = [Checkpoint(every=every, keep_last=keep_last), killer]
    given = {"epochs": 3, "train_batch_size": 8, "val_batch_size": 16, "seed": 7, "log_every": "2 steps"} | options
    return Trainer(module or Net(), plugins, runs_folder=str(folder), **given)


def until_killed(folder: Path, step: int, module: Net | None = None, **options: Any) -> Trainer:
    trainer = trainer_for(folder, Killer(step), module, **options)
    with pytest.raises(KilledError):
        trainer.train()
    return trainer


@dataclass
class Outcome:
    """What a run came to; the random states are the process's, so they are read when it ends."""

    final: Any
    trace: list[Any]
    logged: list[Any]


def straight(module: Net | None = None, **options: Any) -> Outcome:
    """Train without any checkpoint."""
    watcher = Killer(step=1000)
    given = {"epochs": 3, "train_batch_size": 8, "val_batch_size": 16, "seed": 7, "log_every": "2 steps"} | options
    trainer = Trainer(module or Net(), [watcher], **given)
    trainer.train()
    return Outcome(final(trainer), trainer.module.trace, watcher.logged)


def resumed(folder: Path, killer: Killer | None = None, module: Net | None = None, **options: Any) -> Trainer:
    """Go on in a process whose random states are others."""
    torch.manual_seed(99)
    random.seed(99)
    trainer = trainer_for(folder, killer or Killer(), module, resume=True, **options)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def whole() -> Outcome:
    return straight()


@pytest.mark.parametrize("step", range(STEPS))
def test_killed_after_any_step(whole, step, tmp_path):
    first, second = Killer(step), Killer()
    killed = trainer_for(tmp_path, first, every=f"{step or 1} steps")
    with pytest.raises(KilledError):
        killed.train()
    again = resumed(tmp_path, second, every=None)
    assert killed.module.trace[:step] + again.module.trace == whole.trace
    assert [row for row in first.logged if row[0] <= step] + second.logged == whole.logged
    assert final(again) == whole.final


@pytest.mark.parametrize("step", [2, 5, 13])
def test_workers_change_nothing(whole, step, tmp_path):
    until_killed(tmp_path, step, every=f"{step} steps")
    again = resumed(tmp_path, module=Net(workers=2), every=None)
    assert again.module.trace == whole.trace[step:]
    assert final(again) == whole.final


@pytest.mark.parametrize("every", ["epoch", "3 steps", "eval", "20 samples", ["epoch", "4 steps"]])
@pytest.mark.parametrize("step", [6, 10])
def test_the_steps_since_the_checkpoint_are_trained_again(every, step, tmp_path):
    options = {"evaluate_every": "3 steps"}
    expected = straight(Net(scheduler="validation"), **options)
    until_killed(tmp_path, step, Net(scheduler="validation"), every=every, **options)
    again = resumed(tmp_path, module=Net(scheduler="validation"), every=every, **options)
    trained = len(again.module.trace)
    assert again.module.trace == expected.trace[STEPS - trained :]
    assert final(again) == expected.final


def test_killed_again_and_again(whole, tmp_path):
    until_killed(tmp_path, 4, every="3 steps")
    for step in (5, 6, 9, 14):
        with pytest.raises(KilledError):
            resumed(tmp_path, Killer(step), every="3 steps")
    assert final(resumed(tmp_path, every="3 steps")) == whole.final


@pytest.mark.parametrize("step", [1, 5, 8])
def test_stopped_instead_of_killed(whole, step, tmp_path):
    @dataclass(eq=False)
    class Stopper(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, trainer, global_step):
            if global_step == step:
                trainer.stop("enough for today")

    options = {"epochs": 3, "train_batch_size": 8, "val_batch_size": 16, "seed": 7, "log_every": "2 steps"}
    plugins = [Checkpoint("epoch"), Stopper()]
    Trainer(Net(), plugins, runs_folder=str(tmp_path), eval_when_finish=False, **options).train()
    again = resumed(tmp_path)
    assert again.module.trace == whole.trace[step:]
    assert final(again) == whole.final


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_windows_of_several_batches(step, tmp_path):
    class Window(CallbackInterface):
        @hookimpl
        def get_window_size(self):
            return 2

    def trainer(killer: Killer, **options: Any) -> Trainer:
        given = {"epochs": 2, "train_batch_size": 16, "val_batch_size": 16, "runs_folder": str(tmp_path)} | options
        return Trainer(Net(), [Checkpoint("1 step"), Window(), killer], **given)

    whole = trainer(Killer(), run_name="whole")
    whole.train()
    assert whole.global_step == 6
    expected = final(whole)
    with pytest.raises(KilledError):
        trainer(Killer(step)).train()
    again = trainer(Killer(), resume=True)
    again.train()
    assert final(again) == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda o: [torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS)],
        lambda o: [torch.optim.lr_scheduler.MultiStepLR(o, [3, 8, 9])],
        lambda o: [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step)],
        lambda o: [torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=4, cycle_momentum=False)],
        lambda o: [torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4)],
        lambda o: [(torch.optim.lr_scheduler.ExponentialLR(o, 0.5), "epoch")],
        lambda o: [
            torch.optim.lr_scheduler.SequentialLR(
                o,
                [
                    torch.optim.lr_scheduler.LinearLR(o, total_iters=4),
                    torch.optim.lr_scheduler.PolynomialLR(o, 9),
                ],
                [5],
            )
        ],
    ],
    ids=["one_cycle", "multi_step", "lambda", "cyclic", "restarts", "per_epoch", "sequential"],
)
def test_schedulers(make, tmp_path):
    class Scheduled(Net):
        def get_optimizers_schedulers(self, steps, epochs):
            optimizer = torch.optim.Adam(self.parameters(), 0.02)
            return [optimizer], make(optimizer)

    expected = straight(Scheduled())
    until_killed(tmp_path, 7, Scheduled(), every="7 steps")
    assert final(resumed(tmp_path, module=Scheduled(), every=None)) == expected.final


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
        lambda p: torch.optim.AdamW([{"params": p[:2], "weight_decay": 0.1}, {"params": p[2:], "amsgrad": True}], 0.01),
        lambda p: torch.optim.RMSprop(p, 0.01, centered=True),
        lambda p: torch.optim.LBFGS(p, 0.1, max_iter=2),
        lambda p: torch.optim.Adafactor(p, 0.01),
    ],
    ids=["sgd", "adamw_groups", "rmsprop", "lbfgs", "adafactor"],
)
def test_optimizers(make, tmp_path):
    class Optimized(Net):
        def get_optimizers_schedulers(self, steps, epochs):
            return [make([*self.parameters()])], []

        @hookimpl
        def update(self, trainer, window):
            if not isinstance(trainer.optimizers[0], torch.optim.LBFGS):
                return trainer.plugins.get_plugin("core").update(trainer, window)
            outputs = []

            def closure():
                trainer.zero_grad()
                outputs[:] = trainer.hook.run_window(trainer=trainer, window=window)
                return outputs[0][0].detach()

            trainer.step(closure=closure)
            return outputs

    expected = straight(Optimized())
    until_killed(tmp_path, 7, Optimized(), every="7 steps")
    assert final(resumed(tmp_path, module=Optimized(), every=None)) == expected.final


def test_resuming_a_finished_run_trains_nothing_and_touches_nothing(whole, tmp_path):
    def files() -> list[Any]:
        return sorted((str(p), p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in tmp_path.rglob("*"))

    trainer_for(tmp_path, Killer()).train()
    before = files()
    again = resumed(tmp_path)
    assert again.module.trace == []
    assert files() == before
    assert final(again)["module"] == whole.final["module"]


def test_a_longer_run_from_a_finished_one(tmp_path):
    class Steady(Net):
        def get_optimizers_schedulers(self, steps, epochs):
            return [torch.optim.Adam(self.parameters(), 0.02)], []

    expected = straight(Steady(), epochs=4)
    trainer_for(tmp_path, Killer(), Steady(), epochs=2).train()
    assert final(resumed(tmp_path, module=Steady(), epochs=4)) == expected.final


def start(folder: Path, step: int, *arguments: str) -> int:
    """Run this file as a program; its output goes to a file, which orphaned workers may keep open."""
    command = [sys.executable, __file__, str(folder), str(step), *arguments]
    with open(folder / "output", "w") as output:
        return subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=60, check=False).returncode


def test_a_process_that_is_killed(whole, tmp_path):
    assert start(tmp_path, 8) == -signal.SIGKILL, (tmp_path / "output").read_text()
    assert start(tmp_path, 1000, "resume") == 0, (tmp_path / "output").read_text()
    told = json.loads((tmp_path / "told").read_text())
    assert told["final"] == json.loads(json.dumps(whole.final))
    assert told["trace"] == json.loads(json.dumps(whole.trace[8:]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    killer = Killer(int(sys.argv[2]), really=True)
    one = trainer_for(Path(sys.argv[1]), killer, Net(workers=2), resume=len(sys.argv) > 3)
    one.train()
    (Path(sys.argv[1]) / "told").write_text(json.dumps({"final": final(one), "trace": one.module.trace}))
