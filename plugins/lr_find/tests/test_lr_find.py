"""The curve has the numbers of a loop by hand, and nothing of the sweep remains."""

import itertools
import json
import math
import re

import pytest
import torch

from hookline import CallbackInterface, hookimpl
from hookline.testing import Memory, PlainModule, TinyModule, digest, on_ranks, tiny_trainer, train_tiny
from hookline_lr_find import LrFind, Point, said, steepest
from hookline_lr_find.commands import main

FEW = {"low": 1e-4, "high": 10.0, "steps": 20}


def train(plugins, module=None, **options):
    trainer = tiny_trainer(plugins, module, **options)
    trainer.train()
    return trainer


# The curve ----------------------------------------------------------------------------


class Groups(TinyModule):
    """Has two groups, one of which learns ten times as slowly, and its batches in a list."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.batches = [(x, x.sum(1, keepdim=True), torch.arange(6)) for x in torch.randn(5, 6, 8)]

    def get_train_dataloader(self, sampler, batch_size):
        return self.batches

    def get_optimizers_schedulers(self, steps, epochs):
        groups = [{"params": self.net[0].parameters(), "lr": 0.001}, {"params": self.net[4].parameters()}]
        optimizer = torch.optim.SGD(groups, 0.01, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def sweep_by_hand(rates, window, clip):
    torch.manual_seed(1)
    module = Groups()
    (optimizer,), _ = module.get_optimizers_schedulers(1, 1)
    windows = [module.batches[at : at + window] for at in range(0, len(module.batches), window)]
    losses = []
    for rate, taken in zip(rates, itertools.cycle(windows), strict=False):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate * 0.1, rate
        found = [torch.nn.functional.mse_loss(module.net(inputs), targets) for inputs, targets, _ in taken]
        for loss in found:
            (loss / len(taken)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_([*module.net[0].parameters(), *module.net[4].parameters()], clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(loss.item() for loss in found) / len(taken))
    return losses


@pytest.mark.plugins
@pytest.mark.parametrize(
    ("plugins", "window", "clip"),
    [({}, 1, None), ({"accumulate": {"steps": 2}}, 2, None), ({"clip": {"max_norm": 0.5}}, 1, 0.5)],
)
@pytest.mark.parametrize("scale", ["exponential", "linear"])
def test_the_curve_is_that_of_a_loop_by_hand(plugins, window, clip, scale):
    torch.manual_seed(1)
    lr_find = LrFind(0.001, 0.1, 12, scale, smoothing=0.5, diverged=None)
    train({"lr_find": lr_find, **plugins}, Groups(), train_batch_size=12)
    parts = [step / 11 for step in range(12)]
    rates = [0.001 * 100**part if scale == "exponential" else 0.001 + 0.099 * part for part in parts]
    points = lr_find.found.points
    assert [point.rate for point in points] == pytest.approx(rates, rel=1e-12)
    assert [point.loss for point in points] == sweep_by_hand([point.rate for point in points], window, clip)
    mean = 0.0
    for step, point in enumerate(points):
        mean = 0.5 * mean + 0.5 * point.loss
        assert point.smoothed == pytest.approx(mean / (1 - 0.5 ** (step + 1)))


def test_ends_when_the_loss_diverges():
    lr_find = LrFind(0.01, 1e6, 40, smoothing=0.0, diverged=4.0)
    train([lr_find])
    losses = [point.loss for point in lr_find.found.points]
    assert lr_find.found.diverged
    assert len(losses) < 40
    assert max(losses[n] / min(losses[: n + 1]) for n in range(len(losses))) <= 4


class Spoilt(TinyModule):
    """Has a loss of NaN from its fourth step on, while it is tried."""

    tried = 0

    def train_step(self, global_step, batch, device):
        loss, others = super().train_step(global_step, batch, device)
        self.tried += 1
        return (loss * math.nan if self.trainer.idle and self.tried > 3 else loss), others


@pytest.mark.plugins
@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_a_loss_of_nan_ends_the_sweep_and_not_the_run(policy):
    lr_find = LrFind(**FEW, diverged=None)
    trainer = train({"lr_find": lr_find, "finite": {"policy": policy, "max_skips": 0, "every": "1 steps"}}, Spoilt())
    assert (lr_find.found.diverged, len(lr_find.found.points)) == (True, 3)
    assert (trainer.status, trainer.global_step, trainer.counters.skipped_steps) == ("finished", 14, 0)
    assert digest(trainer.module.state_dict()) == digest(train([]).module.state_dict())


def line(losses):
    return [Point(10.0 ** (n / 10), loss, loss) for n, loss in enumerate(losses)]


def test_suggests_where_the_loss_falls_most_steeply():
    falls = [1 / (1 + math.exp(n - 30)) for n in range(50)]
    assert steepest(line(falls)) == pytest.approx(10.0**3)
    assert steepest(line(falls[::-1])) is None
    assert steepest(line([1.0] * 50)) is None
    assert steepest(line([3.0, 2.0])) is None
    torch.manual_seed(0)
    scattered = torch.randn(100).tolist()
    assert steepest(line(scattered)) is None
    noisy = [loss + 0.02 * noise for loss, noise in zip(falls, scattered, strict=False)]
    assert steepest(line(noisy)) == pytest.approx(10.0**3, rel=1)


# Nothing remains ----------------------------------------------------------------------


class Heard(CallbackInterface):
    def __init__(self):
        self.heard = []

    @hookimpl
    def on_log(self, metrics, global_step):
        self.heard.append(("log", global_step, dict(metrics)))

    @hookimpl
    def on_end_train_step(self, global_step, train_step_collated_outputs):
        self.heard.append(("step", global_step, digest(train_step_collated_outputs)))

    @hookimpl
    def on_end_validation(self, metrics):
        self.heard.append(("validation", None, dict(metrics)))


class Counting(TinyModule):
    """Counts in attributes and buffers, logs, and draws when an epoch begins."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()), persistent=False)
        self.epochs = []

    def train_step(self, global_step, batch, device):
        self.count += len(batch[0])
        self.log(shown=self.count)
        return super().train_step(global_step, batch, device)

    @hookimpl
    def on_begin_train_epoch(self):
        self.epochs.append(torch.rand(()).item())


SETTINGS = [
    ({}, {}),
    ({"accumulate": {"steps": 2}, "clip": {"max_norm": 0.1}, "ema": {"decay": 0.5}}, {"train_batch_size": 16}),
    ({"amp": {"precision": "fp16"}, "finite": {"policy": "rollback", "every": "3 steps"}}, {}),
    ({"sam": {}, "finite": {}}, {"sanity_val_steps": 1, "eval_when_start": True, "max_train_steps_per_epoch": 5}),
    ({"checkpoint": {"every": "1 steps"}, "monitor": {"grad_norm": True}}, {"evaluate_every": "3 steps"}),
]


@pytest.mark.plugins
@pytest.mark.parametrize(("plugins", "options"), SETTINGS, ids=["plain", "window", "fp16", "sam", "checkpoint"])
def test_training_has_the_bits_of_one_without_it(plugins, options, tmp_path):
    ends = []
    for lr_find in ({}, {"lr_find": FEW}):
        memory, heard = Memory(every="1 steps"), Heard()
        kept = {} if "checkpoint" in plugins else {"memory": memory}
        named = {**plugins, **lr_find, **kept, "heard": heard}
        trainer = train(named, Counting(), log_every="1 steps", runs_folder=str(tmp_path), **options)
        for state in memory.states.values():
            state["trainer"]["counters"]["seconds"] = 0
        module, optimizers = trainer.module, [optimizer.state_dict() for optimizer in trainer.optimizers]
        heard = [row for row in heard.heard if "monitor" not in plugins or row[0] != "log"]  # which has seconds
        states = digest(memory.states), digest(module.state_dict()), digest(optimizers)
        ends.append((states, module.count.item(), module.epochs, module.seen, heard))
    assert ends[0] == ends[1]
    assert ends[0][-1]


@pytest.mark.plugins
def test_a_gradient_norm_that_is_logged_once_in_an_interval_is_that_of_training():
    logs = []
    for lr_find in ({}, {"lr_find": FEW}):
        heard = Heard()
        monitor = {"grad_norm": True, "throughput": False}
        train({"monitor": monitor, **lr_find, "heard": heard}, log_every="1h", evaluate_every=None)
        logs.append(
            [metrics["grad_norm"] for kind, _, metrics in heard.heard if kind == "log" and "grad_norm" in metrics]
        )
    assert logs[0] == logs[1] != []


class Stream(torch.utils.data.IterableDataset):
    """Gives samples in their order, one after the other."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return (self.dataset[number] for number in range(len(self.dataset)))


class Stateful(TinyModule):
    def get_train_dataloader(self, sampler, batch_size):
        stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
        return stateful.StatefulDataLoader(
            Stream(super().get_train_dataloader(sampler, batch_size).dataset), batch_size
        )


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # by torchdata itself
def test_a_run_with_a_stateful_loader_resumes_at_each_step_with_the_same_bits():
    whole = Memory(every="1 steps")
    expected = digest(train([whole], Stateful()).module.state_dict())
    swept = Memory(every="1 steps")
    assert digest(train([LrFind(**FEW), swept], Stateful()).module.state_dict()) == expected
    for step in (1, 6, 7, 9):
        assert swept.states[step].get("loader") == whole.states[step].get("loader")
        assert digest(train([Memory(swept.states[step])], Stateful()).module.state_dict()) == expected, step


def test_a_resumed_run_does_no_sweep():
    memory, lr_find = Memory(every="1 steps"), LrFind(**FEW)
    expected = train([memory, LrFind(**FEW)])
    for step in (1, 7, 13):
        lr_find = LrFind(**FEW)
        resumed = train([Memory(memory.states[step]), lr_find])
        assert lr_find.found is None
        assert digest(resumed.module.state_dict()) == digest(expected.module.state_dict())


def test_an_object_that_another_trainer_had_sweeps_anew():
    lr_find = LrFind(**FEW)
    train([lr_find])
    first = lr_find.found
    train([lr_find])
    assert lr_find.found is not first
    assert lr_find.found == first


@pytest.mark.plugins
def test_ranks_sweep_alike_and_train_as_without():
    ranks = on_ranks(with_and_without, 2, {"ddp": {}, "accumulate": {"steps": 2}})
    assert ranks[0] == ranks[1]
    found, swept, plain = ranks[0]
    assert swept == plain
    alone, *_ = with_and_without({"accumulate": {"steps": 4}})
    assert [point.loss for point in found.points] == pytest.approx([point.loss for point in alone.points], rel=1e-3)


def with_and_without(plugins):
    lr_find = LrFind(1e-4, 0.1, 10, diverged=None)
    swept, plain = (train_tiny({**plugins, **more}, PlainModule) for more in ({"lr_find": lr_find}, {}))
    return lr_find.found, digest(swept.weights), digest(plain.weights)


# What is told -------------------------------------------------------------------------


def test_a_run_writes_points_and_a_picture(tmp_path, caplog):
    pytest.importorskip("plotext", reason="plotext is not installed")
    caplog.set_level("INFO", "hookline.lr_find")
    lr_find = LrFind(**FEW)
    trainer = train([lr_find], runs_folder=str(tmp_path))
    kept = json.loads((trainer.run_dir / "lr_find" / "points.json").read_text())
    assert kept["suggestion"] == lr_find.found.suggestion
    assert kept["points"][3] == vars(lr_find.found.points[3])
    assert (trainer.run_dir / "lr_find" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert said(lr_find.found) in caplog.text
    assert "smoothed loss by learning rate" in caplog.text


CONFIG = """
module: {_target_: hookline.testing.TinyModule}
trainer: {train_batch_size: 25, device: cpu}
plugins:
  lr_find: {low: 0.0001, high: 10, steps: 40}
  jsonl: {}
  checkpoint: {}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


@pytest.mark.plugins
def test_the_command_prints_a_table_the_curve_and_the_suggestion(place, capsys):
    assert main(["run.yaml", "--plot", "curve.svg"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rate", "loss", "smoothed"]
    assert re.match(r"suggested learning rate [\d.e-]+, where the loss falls most steeply: \d+ rates tried", lines[-1])
    assert any("┤" in line for line in lines)
    assert sorted(path.name for path in place.iterdir()) == ["curve.svg", "run.yaml"]  # no run is left


@pytest.mark.plugins
def test_the_command_prints_json(place, capsys):
    code = main(["run.yaml", "plugins.lr_find.steps=8", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert len(told["points"]) == 8
    assert code == (told["suggestion"] is None)
    lr_find = LrFind(0.0001, 10, 8)
    train([lr_find], train_batch_size=25)
    assert [point["loss"] for point in told["points"]] == [point.loss for point in lr_find.found.points]


@pytest.mark.plugins
def test_the_command_says_what_is_wrong(place, capsys):
    from hookline.cli import main as hookline

    assert hookline(["lr-find", "run.yaml", "--plot", "curve.what"]) == 2
    assert "the picture curve.what cannot be written" in capsys.readouterr().err
    assert hookline(["lr-find", "run.yaml", "plugins.lr_find.low=-1"]) == 2
    assert "lr_find.low=-1.0 must be above 0" in capsys.readouterr().err


# Mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0.0}, "lr_find.low=0.0 must be above 0 and below lr_find.high=10.0, both finite"),
        ({"low": 1.0, "high": 1.0}, "lr_find.low=1.0 must be above 0 and below lr_find.high=1.0"),
        ({"high": math.inf}, "below lr_find.high=inf, both finite"),
        ({"steps": 1}, "lr_find.steps=1 must be at least 2"),
        ({"scale": "log"}, "lr_find.scale='log' must be one of exponential, linear"),
        ({"smoothing": 1.0}, "lr_find.smoothing=1.0 must be from 0 to below 1, such as 0.9"),
        ({"diverged": 1.0}, "lr_find.diverged=1.0 must be above 1, or null never to end early"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LrFind(**options)


def test_refuses_rates_of_zero():
    with pytest.raises(ValueError, match="lr_find: all learning rates of the optimizers are 0, so none can be swept"):
        train([LrFind(**FEW)], TinyModule(lr=0.0))
