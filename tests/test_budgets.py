"""What a step costs, in counts: Python calls, host syncs, memory. Time is measured in benchmarks/."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from tests import budgets
from tests.test_house import EACH, NEEDED
from torch.utils.data import DataLoader, TensorDataset

from hookline import CallbackInterface, ModuleInterface, Stage, Trainer, hookimpl
from hookline.installed import installed
from hookline.testing import calls_per_step

ROOT = Path(__file__).parent.parent
MEASURE = {"_target_": "torchmetrics.MeanSquaredError"}
OPTIONS = {  # with which a step of each plugin is counted
    **NEEDED,
    "accumulate": {"steps": 1},
    "metrics": {"train": {"fit": MEASURE}, "inputs": [1, 1]},
    "swa": {"batch_norm": 0},  # else it goes over the data once more in the end
}
WRITTEN = json.loads(budgets.WRITTEN.read_text())
exactly = pytest.mark.skipif(WRITTEN["versions"] != budgets.VERSIONS, reason=f"counted with {WRITTEN['versions']}")
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


def of_the_loop():
    """Return what a step without plugins costs beyond the loop by hand."""
    return budgets.cost(
        lambda *beside: hookline(budgets.STEPS, beside),
        lambda *beside: hand_written(budgets.STEPS),
        begin=Mlp.train_step,
    )


@exactly
def test_a_step_of_the_loop_costs_exactly_what_is_written_down():
    budgets.compare(budgets.LOOP, of_the_loop())


class Stream:
    """Gives batches by an iterator of its own.

    Args:
        batches: what it gives.
        begin: makes the iterator.
    """

    def __init__(self, batches, begin):
        self.batches, self.begin = batches, begin

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return self.begin(self.batches)


def one_by_one(batches):
    yield from batches


def loaded(batches):
    data = TensorDataset(*map(torch.cat, zip(*batches, strict=True)))
    return DataLoader(data, 32)


@pytest.mark.parametrize(
    ("loader", "most"),
    [
        (list, 10),
        (lambda batches: Stream(batches, iter), 12),  # of a list, in which nobody can draw
        (lambda batches: Stream(batches, one_by_one), 14),
        (loaded, 15),
    ],
)
def test_an_unplugged_step_is_plain_python(loader, most, monkeypatch):
    monkeypatch.setattr(Mlp, "get_train_dataloader", lambda self, sampler, batch_size: loader([BATCH] * self.batches))
    by_hand, ours = calls_per_step(hand_written), calls_per_step(hookline)
    assert ours.calls - by_hand.calls <= most
    assert ours.syncs == by_hand.syncs == 0


class Validated(Mlp):
    val_step = Mlp.train_step

    def get_val_dataloaders(self, sampler, batch_size):
        return [BATCH] * self.batches


def test_a_batch_of_an_evaluation_is_plain_python():
    def by_hand(steps):
        module = Validated(steps).eval()
        with torch.no_grad():
            for batch in module.get_val_dataloaders(None, 32):
                module(stage=Stage.VAL, global_step=0, batch=batch, device="cpu")

    ours = calls_per_step(lambda steps: Trainer(Validated(steps), val_batch_size=32, device="cpu").validate())
    assert ours.calls - calls_per_step(by_hand).calls <= 11.5  # and what is done with each 256 losses
    assert ours.syncs == 0


@exactly
@pytest.mark.plugins
@pytest.mark.parametrize("name", EACH)
def test_a_step_of_a_plugin_costs_exactly_what_is_written_down(name, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    budgets.compare(name, budgets.of_plugin(name, OPTIONS.get(name, {})))
    assert "is switched off" not in caplog.text  # a tracker that failed costs little


@pytest.mark.plugins
def test_what_is_written_down_is_of_the_plugins_and_in_their_readmes():
    costs = WRITTEN["costs"]
    assert costs.keys() == {budgets.LOOP, *installed()}
    assert max(max(one["syncs"], one["collectives"]) for one in costs.values()) == 0
    said = {name: budgets.BUDGET.findall(budgets.readme_of(name).read_text()) for name in installed()}
    assert said == {name: [str(costs[name]["calls"])] for name in installed()}


class Noisy(CallbackInterface):
    """Calls one function of its own in each step."""

    @hookimpl
    def on_end_train_step(self, global_step):
        self.more(global_step)

    def more(self, global_step): ...


def test_a_cost_that_changes_names_who_causes_it():
    plain, noisy = (
        budgets.functions_per_step(lambda plugins=plugins: hookline(budgets.STEPS, plugins), begin=Mlp.train_step)
        for plugins in ((), (Noisy(),))
    )
    more = budgets.beyond(noisy, plain)
    assert (more[f"{__name__}:Noisy.more"], more[f"{__name__}:Noisy.on_end_train_step"]) == (1, 1)
    now = {"calls": 1, "syncs": 0, "collectives": 0, "functions": {f"{__name__}:Noisy.more": 1}}
    for name, one in (("a plugin", now), (budgets.LOOP, WRITTEN["costs"][budgets.LOOP] | {"syncs": 1})):
        with pytest.raises(AssertionError, match=f"python -m tests.budgets '{name}'"):
            budgets.compare(name, one)
    with pytest.raises(AssertionError, match=r"\+1 .*:Noisy.more \(0 before, 1 now\)"):
        budgets.compare("a plugin", now)


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
