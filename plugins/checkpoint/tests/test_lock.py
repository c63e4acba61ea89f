"""One job writes into a run folder; what a dead one has left stops nobody."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from hookline import CallbackInterface, ModuleInterface, Trainer, hookimpl
from hookline_checkpoint import Checkpoint, storage
from hookline_checkpoint.lock import Lock, LockedError


class Line(ModuleInterface):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 1)

    def train_step(self, global_step, batch, device):
        return self.net(batch).mean()

    def get_train_dataloader(self, sampler, batch_size):
        return [torch.ones(2, 1)] * 2

    def get_optimizers_schedulers(self, steps, epochs):
        return [torch.optim.SGD(self.parameters(), 0.01)], []


class During(CallbackInterface):
    """Does something in the middle of the second step."""

    def __init__(self, does: Any) -> None:
        self.does = does

    @hookimpl
    def on_begin_optimizer_step(self, trainer):
        if trainer.global_step == 1:
            self.does()


def train(folder: Path, *plugins: Any, every: Any = "1 step", resume: Any = True) -> Trainer:
    trainer = Trainer(Line(), [Checkpoint(every), *plugins], epochs=2, runs_folder=str(folder), resume=resume)
    trainer.train()
    return trainer


def lock_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """Write a lock into a run folder: ours, but for the changes."""
    lock = Lock(folder)
    lock.release()
    (folder / ".lock").mkdir()
    owner = {**lock.owner, **changes}
    (folder / ".lock/owner.json").write_text(json.dumps(owner))
    return owner


def dead_pid() -> int:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    return int(gone.stdout)


WRITER = """
import os, sys
from pathlib import Path
from hookline_checkpoint.lock import Lock
Lock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_second_job_is_refused_and_told_whose_it_is(tmp_path):
    train(tmp_path, every="2 steps")
    before = sorted(path for path in (tmp_path / "run-1").rglob("*"))
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "run-1")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"locked\n"
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        trainer = Trainer(Line(), [Checkpoint()], epochs=3, runs_folder=str(tmp_path), resume=True)
        with pytest.raises(LockedError) as raised:
            trainer.train()
        said = f"process {other.pid} on {socket.gethostname()} (boot {boot}), since 20"
        assert str(raised.value).startswith(f"{tmp_path / 'run-1'} belongs to another job: {said}")
        assert f"If it is surely gone, remove {tmp_path / 'run-1/.lock'}" in str(raised.value)
        assert sorted(path for path in (tmp_path / "run-1").rglob("*") if ".lock" not in str(path)) == before
        trainer = Trainer(Line(), [Checkpoint(None)], epochs=3, runs_folder=str(tmp_path), resume=True)
        trainer.train()  # who writes nothing needs no lock
        other.send_signal(signal.SIGKILL)
    Trainer(Line(), [Checkpoint()], epochs=3, runs_folder=str(tmp_path), resume=True).train()
    assert not (tmp_path / "run-1/.lock").exists()


def test_two_trainers_of_one_process_are_two_jobs(tmp_path):
    def second():
        with pytest.raises(LockedError, match=rf"process {os.getpid()} on"):
            train(tmp_path)

    train(tmp_path, During(second))
    assert [path.name for path in (tmp_path / "run-1").iterdir()] == ["checkpoints"]
    assert len(storage.listed(tmp_path / "run-1/checkpoints")) == 3


def test_the_lock_is_released_whatever_happens(tmp_path):
    def fail():
        assert list((tmp_path / "run-1/.lock").iterdir())
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        train(tmp_path, During(fail))
    assert not (tmp_path / "run-1/.lock").exists()
    trainer = train(tmp_path)
    trainer.options.epochs = 3
    trainer.train()  # again, with the same plugin
    assert trainer.global_step == 6
    assert [path.name for path in (tmp_path / "run-1").iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("changes", [{"pid": "dead"}, {"boot": "an-earlier-one"}, {"started": "1"}])
def test_the_lock_of_a_dead_owner_is_taken_over(changes, tmp_path, caplog):
    caplog.set_level("INFO", "hookline")
    changes = {"pid": dead_pid()} if "pid" in changes else changes
    owner = lock_of(tmp_path, **changes)
    lock = Lock(tmp_path)
    (kept,) = (tmp_path / ".lock").iterdir()
    assert json.loads(kept.read_text()) == lock.owner
    assert f".lock was left by process {owner['pid']}, which is dead; took it over" in caplog.text
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"host": "elsewhere", "pid": 0}, {"pid": 1, "started": ""}, {"pid": None}])
def test_who_may_be_alive_keeps_it(changes, tmp_path):
    changes = {"host": "elsewhere", "pid": dead_pid()} if "host" in changes else changes
    lock_of(tmp_path, **changes)
    with pytest.raises(LockedError, match="belongs to another job"):
        Lock(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"pid": {}}'])
def test_a_lock_that_cannot_be_read_is_not_taken_for_none(content, tmp_path):
    (tmp_path / ".lock").mkdir()
    (tmp_path / ".lock/owner.json").write_text(content)
    with pytest.raises(LockedError, match=r"If it is surely gone, remove .*\.lock"):
        Lock(tmp_path)


def test_a_lock_that_was_taken_away_is_said(tmp_path, caplog):
    lock = Lock(tmp_path)
    shutil.rmtree(tmp_path / ".lock")
    other = Lock(tmp_path)
    lock.release()
    assert "is not ours any more" in caplog.text
    other.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_one_gets_it(stale, tmp_path):
    if stale:
        lock_of(tmp_path, pid=dead_pid())

    def take(_):
        try:
            return Lock(tmp_path)
        except LockedError:
            return None

    with ThreadPoolExecutor(8) as pool:
        locks = [lock for lock in pool.map(take, range(8)) if lock is not None]
    (lock,) = locks
    lock.release()
    assert list(tmp_path.iterdir()) == []
