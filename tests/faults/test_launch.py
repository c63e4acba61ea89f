"""Row G8 of the fault catalogue: a run whose ranks are killed is started anew, and ends with the same bits.

Each run is `hookline fit --nproc 2` in processes of its own. The run R without a fault is what its end is
compared with.
"""

import os
import subprocess
import sys

import pytest
import torch
import yaml

from hookline.cli import main
from hookline.testing.faults import PRELOADED
from hookline.testing.ranks import run_ranks
from hookline_checkpoint import storage
from hookline_checkpoint.compare import differences

pytestmark = [pytest.mark.plugins, pytest.mark.xdist_group("ranks")]
PRELOADED += [__name__, "hookline.config", "hookline_distributed", "hookline_ddp", "hookline_runs.jsonl"]

KILLED = '''
import os, signal
from dataclasses import dataclass, field
from hookline import CallbackInterface, hookimpl


@dataclass(eq=False)
class Killed(CallbackInterface):
    """Kill one rank at a hook of a step, another step for each attempt."""

    hook: str = "on_end_backward"
    steps: list[int] = field(default_factory=list)
    rank: int = 1

    def at(self, hook, trainer):
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        if (hook, trainer.rank) == (self.hook, self.rank) and self.steps[attempt:][:1] == [trainer.global_step]:
            os.kill(os.getpid(), signal.SIGKILL)

    @hookimpl
    def on_begin_run(self, trainer):
        self.at("on_begin_run", trainer)

    @hookimpl
    def on_end_backward(self, trainer):
        self.at("on_end_backward", trainer)

    @hookimpl
    def on_boundary(self, trainer):
        self.at("on_boundary", trainer)

    @hookimpl(wrapper=True)
    def save(self, trainer):
        self.at("save", trainer)
        return (yield)
'''


def prepared(folder):
    (folder / "killed.py").write_text(KILLED)
    config = {
        "module": {"_target_": "hookline.testing.TinyModule", "samples": 52},
        "trainer": {"epochs": 2, "train_batch_size": 8, "val_batch_size": 8, "device": "cpu"},
        "plugins": {"ddp": {}, "checkpoint": {"every": "2 steps"}, "killed": {"_plugin_": "killed.Killed"}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def command(folder, *words):
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.exit(main(words))


def last(folder, run="run-1"):
    return storage.listed(folder / "runs" / run / "checkpoints")[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = prepared(tmp_path_factory.mktemp("whole"))
    for outcome in run_ranks(command, 2, folder, "fit", "run.yaml"):
        assert outcome.code == 0, outcome.output
    return last(folder)


def launched(folder, code, *words):
    line = [sys.executable, "-m", "hookline", "fit", "run.yaml", "--nproc", "2", *words]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == code, done.stderr
    return done.stderr


def assert_same_end(one, other):
    assert [line for line in differences(one, other) if not line.startswith("trainer.counters.seconds:")] == []


def test_g8_a_rank_that_is_killed_once(tmp_path, whole):
    folder = prepared(tmp_path)
    err = launched(folder, 0, "--max-restarts", "1", "plugins.killed.steps=[9]")
    assert "hookline: started anew (1 of at most 1 times): going on with runs/run-1\n" in err
    assert "starting from scratch" not in err
    assert [path.name for path in (folder / "runs").iterdir()] == ["run-1"]
    assert_same_end(whole, last(folder))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("hook", "steps"),
    [("on_end_backward", [5, 9]), ("on_boundary", [4, 12]), ("save", [4, 10]), ("on_end_backward", [1, 1])],
)
def test_g8_a_rank_that_is_killed_twice(hook, steps, rank, tmp_path, whole):
    folder = prepared(tmp_path)
    fault = (f"plugins.killed.hook={hook}", f"plugins.killed.steps={steps}", f"plugins.killed.rank={rank}")
    err = launched(folder, 0, "--max-restarts", "2", "--resume-or-start", *fault)
    assert "there is no run 'run' in runs to resume: starting from scratch" in err
    assert err.count("started anew") == 2
    assert ("no checkpoint yet in runs/run-1/checkpoints: starting from scratch" in err.partition("anew")[2]) == (
        steps[0] == 1
    )
    assert [path.name for path in (folder / "runs").iterdir()] == ["run-1"]
    assert_same_end(whole, last(folder))


@pytest.mark.slow
def test_g8_it_goes_on_with_its_own_run_and_not_with_the_newest_of_its_name(tmp_path, whole):
    folder = prepared(tmp_path)
    for outcome in run_ranks(command, 2, folder, "fit", "run.yaml", "trainer.epochs=1"):
        assert outcome.code == 0, outcome.output
    launched(
        folder,
        0,
        "--max-restarts",
        "1",
        "plugins.killed.hook=on_begin_run",
        "plugins.killed.steps=[0]",
        "plugins.killed.rank=0",
    )
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["run-1", "run-2"]
    assert storage.step_of(last(folder)) == 7
    assert_same_end(whole, last(folder, "run-2"))


@pytest.mark.slow
def test_g8_more_kills_than_restarts_end_it_and_it_can_be_gone_on_with(tmp_path, whole):
    folder = prepared(tmp_path)
    err = launched(folder, 1, "--max-restarts", "1", "plugins.killed.steps=[5,9]")
    assert "rank 1 was ended by SIGKILL" in err.splitlines()[-1]
    for outcome in run_ranks(command, 2, folder, "fit", "run.yaml", "--resume"):
        assert outcome.code == 0, outcome.output
    assert_same_end(whole, last(folder))
