"""`hookline trace`: what it counts is what the plugins do, and the run that it measures is the same run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hookline import CallbackInterface, hookimpl
from hookline.cli import main
from hookline.testing import TinyModule, digest, on_ranks
from hookline_profile.commands import _parser

HERE = __name__
OPTIONS = {"train_batch_size": 8, "device": "cpu", "epochs": 3, "log_every": "5 steps", "evaluate_every": "7 steps"}


@dataclass(eq=False)
class Slow(CallbackInterface):
    """Takes far more time than all else in two hooks, of which one is a wrapper, behind its `yield`."""

    def work(self) -> None:
        for _ in range(40):
            torch.linalg.qr(torch.ones(60, 60))

    @hookimpl
    def on_end_backward(self):
        self.work()

    @hookimpl(wrapper=True)
    def run_window(self):
        outputs = yield
        self.work()
        return outputs


@dataclass(eq=False)
class Waits(CallbackInterface):
    """Waits for values: six times a step, and three times before a step goes forward."""

    @hookimpl
    def on_end_train_step(self, trainer, global_step):
        value = torch.ones(3)
        float(value.sum()), value[0].item(), value.cpu(), value.tolist(), value.nonzero()
        if value.any():
            value.sum()

    @hookimpl(wrapper=True)
    def update(self):
        torch.ones(1).item()
        value = yield
        torch.ones(1).item()
        torch.ones(2)[torch.ones(2, dtype=torch.bool)]
        return value


@dataclass(eq=False)
class Bits(CallbackInterface):
    """Writes down the weights and the logged values of each step."""

    file: str = ""

    def __post_init__(self):
        self.told: dict[str, Any] = {}

    @hookimpl
    def on_log(self, metrics, global_step):
        self.told[f"log {global_step}"] = dict(metrics)

    @hookimpl
    def on_boundary(self, trainer, global_step):
        self.told[str(global_step)] = digest(trainer.module.state_dict())
        Path(self.file).write_text(json.dumps(self.told))


@dataclass(eq=False)
class Joins(CallbackInterface):
    """Lets another plugin join in the middle of a run."""

    @hookimpl
    def on_begin_train(self, trainer):
        trainer.plugins.register(Slow(), "later")


class Fails(TinyModule):
    """Cannot be trained for more than nine steps."""

    def train_step(self, global_step, batch, device):
        if global_step > 9:
            raise ValueError("no tenth step")
        return super().train_step(global_step, batch, device)


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def written(plugins=(), module="hookline.testing.TinyModule", **options):
        named = {name: {"_plugin_": f"{HERE}.{name.title()}"} for name in plugins}
        nodes = {"module": {"_target_": module}, "trainer": {**OPTIONS, **options}, "plugins": named}
        Path("run.yaml").write_text(yaml.safe_dump(nodes))

    return written


def traced(capsys, *words):
    assert main(["trace", "run.yaml", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def of(told, hook, plugin):
    (row,) = [row for row in told["rows"] if (row["hook"], row["plugin"]) == (hook, plugin)]
    return row


def test_the_slow_plugin_stands_first(write, capsys):
    write(["slow", "waits"])
    told = traced(capsys, "--steps", "4", "--warmup", "2", "-p", "accumulate", "plugins.accumulate.steps=2")
    assert told["plugins"][0]["plugin"] == "slow"
    assert told["plugins"][0]["share"] > 0.5
    assert {row["plugin"] for row in told["rows"][:2]} == {"slow"}
    assert of(told, "on_end_backward", "slow")["calls"] == 2
    assert of(told, "run_window", "slow")["calls"] == of(told, "update", "core")["calls"] == 1
    assert of(told, "call_model", "core")["phase"] == "forward, with the module's step"
    assert (told["first_step"], told["steps"], told["steps_with_syncs_counted"]) == (3, 4, 4)
    assert sum(row["share"] for row in told["rows"]) == pytest.approx(1)
    assert sum(row["us"] for row in told["rows"]) == pytest.approx(told["us_per_step"])
    assert main(["trace", "run.yaml", "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "steps 6 to 7 on cpu" in out
    assert out.partition("all hooks of")[2].splitlines()[1].startswith("slow ")


def test_what_waits_is_counted_where_it_waits(write, capsys):
    write(["waits"], log_every="999 steps", evaluate_every=None)
    told = traced(capsys, "--steps", "3", "plugins.optimizer={_target_: torch.optim.Adam, replace: true}")
    assert of(told, "on_end_train_step", "waits")["syncs"] == 6
    assert of(told, "update", "waits")["syncs"] == 3
    assert of(told, "step_optimizer", "core")["syncs"] == 0  # Adam reads its counter, which no device has
    assert of(told, "call_model", "core")["syncs"] == 1  # of the module
    assert sum(row["syncs"] for row in told["rows"]) == 10


def test_the_run_is_the_same_and_leaves_nothing(write, tmp_path, capsys):
    write(["bits"])
    assert main(["fit", "run.yaml", f"plugins.bits.file={tmp_path / 'fit'}", "trainer.runs_folder=apart"]) == 0
    plain = json.loads((tmp_path / "fit").read_text())
    before = sorted(tmp_path.iterdir())
    words = (f"plugins.bits.file={tmp_path / 'traced'}", "-p", "checkpoint", "-p", "jsonl")
    traced(capsys, "--steps", "6", "--warmup", "1", *words)
    told = json.loads((tmp_path / "traced").read_text())
    assert {f"{step}" for step in range(1, 14)} | {"log 5", "log 7", "log 10"} <= set(told)
    assert told.items() <= plain.items()
    assert sorted(set(tmp_path.iterdir()) - set(before)) == [tmp_path / "traced"]


def test_the_file_has_each_call_within_those_around_it(write, capsys):
    write(["slow", "joins"])
    told = traced(capsys, "--steps", "3", "--out", "trace.json")
    events = [event for event in json.loads(Path("trace.json").read_text())["traceEvents"] if event["ph"] == "X"]
    assert {event["pid"] for event in events} == {0}
    assert len({event["tid"] for event in events}) == 1
    steps = [event for event in events if event["name"].startswith("step ")]
    assert [event["name"] for event in steps] == ["step 6", "step 7", "step 8"]
    assert len([event for event in events if (event["name"], event["cat"]) == ("on_end_backward", "later")]) == 3
    halves = [event for event in events if (event["name"], event["cat"]) == ("run_window", "slow")]
    assert len(halves) == 6  # before and after what it wraps
    (inner,) = [event for event in events if event["name"] == "run_backward" and event["ts"] < steps[1]["ts"]]
    around = [event["name"] for event in events if event["ts"] < inner["ts"] and ends(event) > ends(inner)]
    assert around == ["step 6", "update", "run_window", "forward_backward"]
    assert min(event["ts"] for event in events) == 0
    assert sum(event["dur"] for event in steps) == pytest.approx(told["us_per_step"] * 3, rel=1e-3)


def ends(event):
    return event["ts"] + event["dur"]


def test_evaluations_and_calls_of_other_stages_stand_apart(write, capsys):
    write(evaluate_every="1 steps")
    told = traced(capsys, "--steps", "2")
    assert of(told, "call_model", "core")["calls"] == 1
    assert of(told, "call_model (val)", "core")["calls"] > 0
    assert of(told, "evaluate", "core")["phase"] == "evaluation"


def on_two_ranks(folder):
    import contextlib
    import io
    import os

    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(["trace", "run.yaml", "--steps", "3", "-p", "ddp", "--out", "trace.json", "--json"])
    return code, out.getvalue()


@pytest.mark.plugins
def test_two_ranks_are_in_one_file_and_rank_zero_tells(write, tmp_path):
    write(module="hookline.testing.tiny.PlainModule")
    (first, told), (second, nothing) = on_ranks(on_two_ranks, 2, tmp_path)
    assert (first, second, nothing) == (0, 0, "")
    assert (json.loads(told)["rank"], json.loads(told)["ranks"]) == (0, 2)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events if event["name"] == "run_backward"} == {0, 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml", "trace.json"]


def test_a_run_that_ends_before_is_told(write, capsys):
    write(epochs=1, max_steps=8)
    assert main(["trace", "run.yaml", "--steps", "5"]) == 0
    out = capsys.readouterr().out
    assert "training ended after 3 of the 5 steps to time" in out or "syncs were counted in 0 of" in out
    write(epochs=1, max_steps=4)
    assert main(["trace", "run.yaml"]) == 2
    assert "training ended before a step could be traced, which takes 5 steps (--warmup)" in capsys.readouterr().err


def test_an_error_while_waiting_is_counted_costs_the_counts_alone(write, capsys):
    write(module=f"{HERE}.Fails")
    assert main(["trace", "run.yaml", "--steps", "3"]) == 0
    assert "syncs were counted in 1 of 3 further steps: ValueError: no tenth step" in capsys.readouterr().out
    assert main(["trace", "run.yaml", "--steps", "9"]) == 1
    assert "in train_step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--warmup", "0"], "--warmup 0 must be at least 1"),
        (["--out", "nowhere/trace.json"], "--out nowhere/trace.json: there is no folder nowhere"),
        (["plugins.clip.max_nrm=1"], "plugins.clip.max_nrm: unknown key"),
    ],
)
def test_what_is_refused(words, said, write, capsys):
    write()
    assert main(["trace", "run.yaml", *words]) == 2
    assert said in capsys.readouterr().err


def test_examples_of_the_help_can_be_parsed():
    from hookline_profile.commands import EXAMPLES

    for line in EXAMPLES.splitlines()[1:]:
        words = line.partition("hookline trace ")[2].partition("   ")[0].split()
        assert _parser().parse_intermixed_args(words).config == "run.yaml"
