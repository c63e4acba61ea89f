"""`hookline plan --schedule` shows the rates that a training then has, and trains nothing."""

import json
import os
import re
import sys

import pytest
import torch

from hookline import CallbackInterface, hookimpl
from hookline.cli import main
from hookline.config import build_trainer, load_config
from hookline.testing import TinyModule

RUN = "module: {_target_: test_schedule.%s}\ntrainer: {epochs: 2, train_batch_size: 8, val_batch_size: 8}\n"


class Mixed(TinyModule):
    """Has schedulers by step and by epoch, a momentum that moves, and groups of two rates."""

    def get_optimizers_schedulers(self, steps, epochs):
        groups = [{"params": self.net[0].parameters()}, {"params": self.net[4].parameters(), "lr": 0.5}]
        first, second = torch.optim.SGD(groups, 0.1, 0.9), torch.optim.Adam(self.net[1].parameters(), 0.2)
        cycle = torch.optim.lr_scheduler.OneCycleLR(first, [0.1, 0.5], steps * epochs)
        return [first, second], [cycle, (torch.optim.lr_scheduler.ExponentialLR(second, 0.5), "epoch")]


class Follows(TinyModule):
    def get_optimizers_schedulers(self, steps, epochs):
        (optimizer,), _ = super().get_optimizers_schedulers(steps, epochs)
        return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)]


class Log(CallbackInterface):
    def __init__(self):
        self.groups = []

    @hookimpl
    def on_begin_optimizer_step(self, trainer):
        self.groups.append([dict(g) for optimizer in trainer.optimizers for g in optimizer.param_groups])


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that writes a configuration of a module of this file, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "test_schedule", sys.modules[__name__])

    def written(module, more=""):
        (tmp_path / "run.yaml").write_text(RUN % module + more)
        return "run.yaml"

    return written


def test_the_rates_are_those_that_a_training_has(write, capsys):
    file = write("Mixed")
    assert main(["plan", "--schedule", file, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    trainer, log = build_trainer(load_config(file)), Log()
    trainer.plugins.register(log, "log")
    trainer.train()
    assert shown == {
        "lr of SGD 0 0": [groups[0]["lr"] for groups in log.groups],
        "momentum of SGD 0 0, SGD 0 1": [groups[0]["momentum"] for groups in log.groups],
        "lr of SGD 0 1": [groups[1]["lr"] for groups in log.groups],
        "lr of Adam 1": [groups[2]["lr"] for groups in log.groups],
    }
    assert len(log.groups) == 14


def test_draws_in_the_terminal(write, capsys):
    assert main(["plan", write("Mixed"), "--schedule"]) == 0
    out = capsys.readouterr().out
    assert "lr of Adam 1: 0.2 at the first step, 0.1 at the last\n" in out
    top = next(line for line in out.splitlines() if line.startswith("      0.2 │"))
    assert re.fullmatch(r"      0\.2 │█{32}▁*", top)  # the first of two epochs
    assert "note" not in out


def test_nothing_is_trained_and_nothing_is_left(write, capsys):
    file = write("Untrained")
    assert main(["plan", file]) == 0  # which seeds this process, as all commands do before they make a module
    before = torch.get_rng_state(), os.listdir()
    assert main(["plan", "--schedule", file]) == 0
    assert torch.equal(torch.get_rng_state(), before[0])
    assert os.listdir() == before[1]


class Untrained(Mixed):
    def train_step(self, global_step, batch, device):
        raise AssertionError("a plan trains nothing")


def test_says_what_it_cannot_know(write, capsys):
    assert main(["plan", "--schedule", write("Follows")]) == 0
    note = "note: ReduceLROnPlateau follows val_loss after each validation: drawn as if it never moved\n"
    assert note in capsys.readouterr().out
    more = ["trainer.epochs=null", "trainer.max_time=10 min"]
    assert main(["plan", "--schedule", write("Follows"), *more]) == 0
    out = capsys.readouterr().out
    assert "note: the number of steps is unknown: drawn as if there were 1000\n" in out
    assert "note: max_time=10 min: drawn as if all steps together took that time\n" in out


@pytest.mark.parametrize(("suffix", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_draws_into_a_file(suffix, begin, write, capsys):
    pytest.importorskip("matplotlib")
    file = f"picture.{suffix}"
    assert main(["plan", write("Mixed"), "--schedule", file]) == 0
    assert capsys.readouterr().out == f"wrote {file}\n"
    with open(file, "rb") as picture:
        assert picture.read(5).startswith(begin)


def test_without_matplotlib_it_says_what_to_install(write, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plan", write("Mixed"), "--schedule", "picture.png"]) == 2
    message = "--schedule picture.png needs matplotlib: pip install matplotlib"
    assert message in capsys.readouterr().err


@pytest.mark.plugins
@pytest.mark.parametrize("by", ["steps", "time"])
def test_shows_the_schedules_of_plugins(by, write, capsys):
    file = write("Bare", f"plugins: {{lr_schedule: {{schedule: linear, by: {by}}}}}\n")
    assert main(["plan", "--schedule", file, "trainer.max_time=1h", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["lr of SGD"] == pytest.approx([0.1 * (1 - step / 14) for step in range(14)], abs=2e-4)


class Bare(TinyModule):
    def get_optimizers_schedulers(self, steps, epochs):
        return [torch.optim.SGD(self.parameters(), 0.1)], []
