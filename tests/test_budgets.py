"""What a step costs, in counts: Python calls, host syncs, memory. Time is measured in benchmarks/."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch

from hookline import CallbackInterface, ModuleInterface, Stage, Trainer, hookimpl
from hookline.testing import calls_per_step

ROOT = Path(__file__).parent.parent
BATCH = torch.randn(32, 32), torch.randint(0, 10, (32,))


class Mlp(ModuleInterface):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches
        self.net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def train_step(self, global_step, batch, device):
        inputs, targets = batch
        return torch.nn.functional.cross_entropy(self.net(inputs), targets)

    def get_train_dataloader(self, sampler, batch_size):
        return [BATCH] * self.batches

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), 0.01)], []


def hand_written(steps):
    module = Mlp(steps)
    (optimizer,), _ = module.get_optimizers_schedulers(steps, 1)
    for step, batch in enumerate(module.get_train_dataloader(None, 32)):
        module(stage=Stage.TRAIN, global_step=step + 1, batch=batch, device="cpu").backward()
        optimizer.step()
        optimizer.zero_grad()


def hookline(steps, plugins=()):
    Trainer(Mlp(steps), plugins, train_batch_size=32, device="cpu").train()


def test_an_unplugged_step_is_plain_python():
    by_hand, ours = calls_per_step(hand_written), calls_per_step(hookline)
    assert ours.calls - by_hand.calls <= 15
    assert ours.syncs == by_hand.syncs == 0


class Deaf(CallbackInterface):
    """Implements nothing, as most methods of most plugins."""


class Hears(CallbackInterface):
    @hookimpl
    def on_end_train_step(self, global_step): ...


def test_a_plugin_is_paid_for_only_where_it_plugs_in():
    unplugged = calls_per_step(hookline).calls
    assert calls_per_step(lambda steps: hookline(steps, [Deaf()])).calls == pytest.approx(unplugged, abs=0.1)
    assert calls_per_step(lambda steps: hookline(steps, [Hears()])).calls - unplugged <= 9


class Logs(CallbackInterface):
    @hookimpl
    def on_log(self, metrics): ...


def test_logging_copies_once_per_flush_and_waits_for_nothing_else():
    assert calls_per_step(lambda steps: hookline(steps, [Logs()])).syncs == 0


@pytest.mark.parametrize("plugins", [(), (Logs(),)])
def test_memory_is_flat(plugins):
    sizes = []

    class Watch(CallbackInterface):
        @hookimpl
        def on_boundary(self, global_step):
            if global_step in (2_000, 10_000):
                sizes.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    try:
        Trainer(Mlp(10_000), [Watch(), *plugins], train_batch_size=32, device="cpu").train()
    finally:
        tracemalloc.stop()
    assert sizes[1] - sizes[0] < 30_000


@pytest.mark.plugins
def test_the_benchmark_runs():
    command = [sys.executable, str(ROOT / "benchmarks" / "step_overhead.py"), "--json", "--repeats", "1"]
    figures = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert figures["microseconds_per_step"].keys() == {
        *("plain", "contract", "hookline", "plain_route", "by_hand", "standard"),
    }
    assert 0.5 < figures["hookline_over_contract"] < 3  # what it is exactly, a busy machine cannot tell


@pytest.mark.plugins
def test_the_benchmark_of_checkpoints_runs(tmp_path):
    small = ["--megabytes", "6", "--held", "6", "--rounds", "1", "--folder", str(tmp_path)]
    command = [sys.executable, str(ROOT / "benchmarks" / "checkpoint.py"), "--json", *small]
    figures = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert figures.keys() == {"save_and_load", "in_the_background", "position"}
    assert figures["save_and_load"]["save_over_torch_save"] > 0
    assert figures["position"]["seconds_to_the_first_batch_after_90_percent"] < 10
