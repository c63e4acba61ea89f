"""Rows A14 and E5 of the fault catalogue: two ranks that are killed, or of which one is told to end.

Each rank is `hookline fit` in a process of its own, as a launcher starts it. The run without a fault is what its end is
compared with.
"""

import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from hookline import CallbackInterface, hookimpl
from hookline.cli import main
from hookline.testing import TinyModule, run_ranks
from hookline.testing.faults import PRELOADED, Child, at_hook, kill
from hookline.testing.ranks import Ranks
from hookline_checkpoint import storage
from hookline_checkpoint.compare import differences
from hookline_runs import read_run

pytestmark = [pytest.mark.plugins, pytest.mark.xdist_group("ranks")]
PRELOADED += [__name__, "hookline.config", "hookline_distributed", "hookline_ddp", "hookline_runs.jsonl"]
PRELOADED += ["hookline_signals"]
HOOKS = {  # where a rank may be killed, and how often at least each is reached on it
    "take_window": 14,
    "call_model": 14,
    "run_backward": 14,
    "on_end_backward": 14,
    "step_optimizer": 14,
    "on_boundary": 14,
    "on_end_val_step": 14,
    "get_run_state": 7,
    "save": 7,
    "all_gather": 20,
}


class Recorded(TinyModule):
    """Writes the ids of each training batch into a file of its rank."""

    def __init__(self):
        super().__init__(samples=56)

    def train_step(self, global_step, batch, device):
        with open(f"ids-{os.environ.get('RANK', 0)}", "a") as file:
            file.write(f"{global_step} {batch[2].tolist()}\n")
        return super().train_step(global_step, batch, device)


class Paced(Recorded):
    """Takes 20 ms a step, rank 1 a little more; waits in step 8 until something has been sent."""

    def train_step(self, global_step, batch, device):
        print("step", global_step, flush=True)
        time.sleep(0.02 + 0.01 * (os.environ["RANK"] == "1"))
        if global_step == 8:
            until(Path("sent").exists)
        return super().train_step(global_step, batch, device)


@dataclass(eq=False)
class KillAt(CallbackInterface):
    """Kill this rank at a hook."""

    hook: str = "update"
    nth: int = 1

    @hookimpl
    def on_setup(self, trainer):
        trainer.plugins.register(at_hook(self.hook, kill, self.nth), "the fault")


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


def fit(folder, *words):
    os.chdir(folder)
    sys.exit(main(["fit", "run.yaml", *words]))


def prepared(folder, module="Recorded", **plugins):
    config = {
        "module": {"_target_": f"{__name__}.{module}"},
        "trainer": {"epochs": 2, "train_batch_size": 8, "val_batch_size": 4, "device": "cpu"},
        "plugins": {
            "distributed": {"vote_every": 2},
            "ddp": {},
            "signals": {},
            "jsonl": {},
            "checkpoint": {"every": "2 steps"},
            **plugins,
        },
    }
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def ended(outcomes, code):
    assert [outcome.code for outcome in outcomes] == [code, code], "\n".join(outcome.output for outcome in outcomes)


def checkpoints(folder):
    return storage.listed(folder / "runs" / "run-1" / "checkpoints")


def ids(folder, rank):
    """Return the ids of each step's batch; of a step that was done twice, those of the second time."""
    lines = (folder / f"ids-{rank}").read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines)


def assert_the_same_end(whole, folder):
    assert [path.name for path in (folder / "runs").iterdir()] == ["run-1"]
    different = differences(checkpoints(whole)[0], checkpoints(folder)[0])
    assert {line.partition(":")[0] for line in different} <= {"trainer.counters.seconds"}
    for rank in range(2):
        assert ids(folder, rank) == ids(whole, rank)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = prepared(tmp_path_factory.mktemp("whole"))
    ended(run_ranks(fit, 2, folder), 0)
    return folder


def fresh_seeds(count):
    return random.SystemRandom().sample(range(10**9), count)


# A14 ----------------------------------------------------------------------------------


def killed_and_resumed(seed, folder, whole):
    chance = random.Random(seed)
    prepared(folder)
    for words in ((), ("--resume",)):
        hook = chance.choice(list(HOOKS))
        nth = chance.randint(1, HOOKS[hook])
        print(f"seed {seed}: {hook} for the {nth}. time")
        fault = f"plugins.fault={{_plugin_: {__name__}.KillAt, hook: {hook}, nth: {nth}}}"
        for outcome in run_ranks(fit, 2, folder, *words, fault):
            assert outcome.code != 0 or words, outcome.output  # the second may have had less to do than that
    ended(run_ranks(fit, 2, folder, "--resume"), 0)
    assert_the_same_end(whole, folder)


def test_a14_two_ranks_that_are_killed_end_with_the_same_bits(tmp_path, whole):
    for seed in fresh_seeds(2):
        killed_and_resumed(seed, tmp_path / str(seed), whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(6))
def test_a14_at_more_places(number, tmp_path, whole):
    killed_and_resumed(*fresh_seeds(1), tmp_path, whole)


def test_a14_each_rank_has_random_states_of_its_own_and_the_run_one_record(whole):
    newest = checkpoints(whole)[0]
    states = [(newest / f"rank-000{rank}.safetensors").read_bytes() for rank in range(2)]
    assert states[0] != states[1]
    folder = whole / "runs" / "run-1"
    assert {path.name for path in folder.iterdir()} >= {"config.yaml", "metrics.jsonl", "checkpoints"}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert sum('"val_loss":' in line for line in lines) == 2  # one evaluation an epoch, told once


# Other numbers of ranks ---------------------------------------------------------------


def alone(folder, *words):
    return Child(fit, folder, *words).wait()


@pytest.mark.parametrize("first", [1, 2])
def test_a16_a_run_goes_on_with_another_number_of_ranks(first, tmp_path):
    folder = prepared(tmp_path, checkpoint={"every": "2 steps", "keep_last": None})
    start = {1: lambda *words: [alone(folder, *words)], 2: lambda *words: run_ranks(fit, 2, folder, *words)}
    for outcome in start[first]("trainer.max_steps=4"):
        assert outcome.code == 0, outcome.output
    before = [ids(folder, rank) for rank in range(first)]
    resumed = start[3 - first]("--resume")
    for outcome in resumed:
        assert outcome.code == 0, outcome.output
    assert f"world_size: was {first}, is {3 - first}" in resumed[0].output
    seen = []
    for rank in range(first):
        seen += [number for batch in before[rank].values() for number in json.loads(batch)]
    for rank in range(3 - first):
        seen += [
            number for step, batch in ids(folder, rank).items() if 4 < int(step) <= 7 for number in json.loads(batch)
        ]
    assert sorted(seen) == list(range(56))  # of the first epoch each once
    assert storage.step_of(checkpoints(folder)[0]) == 14


# E5 -----------------------------------------------------------------------------------


def signalled(folder, rank, number):
    """Send a signal to one rank while the other is a step ahead; return how both ended."""
    prepared(folder, "Paced", checkpoint={"every": "100 steps"})
    ranks = Ranks(fit, 2, folder)
    until(lambda: "step 3\n" in ranks.children[rank].output)
    ranks.children[rank].signal(number)
    (folder / "sent").touch()
    return ranks.wait()


@pytest.mark.parametrize("rank", [0, 1])
def test_e5_sigterm_to_one_of_two_ranks_ends_both_at_one_step(rank, tmp_path, whole):
    outcomes = signalled(tmp_path, rank, signal.SIGTERM)
    ended(outcomes, 143)
    (path,) = checkpoints(tmp_path)
    assert storage.read_manifest(path)["reason"] == "received SIGTERM"
    steps = [len(ids(tmp_path, each)) for each in range(2)]
    assert steps == [storage.step_of(path)] * 2
    record = read_run(tmp_path / "runs" / "run-1")
    assert (record.status, record.reason) == ("preempted", "received SIGTERM")
    ended(run_ranks(fit, 2, tmp_path, "--resume"), 0)
    assert_the_same_end(whole, tmp_path)


def test_e5_sigusr1_to_one_of_two_ranks_saves_once_for_both(tmp_path, whole):
    ended(signalled(tmp_path, 1, signal.SIGUSR1), 0)
    last, first = checkpoints(tmp_path)
    assert storage.read_manifest(first)["reason"] == "received SIGUSR1"
    assert storage.step_of(first) < storage.step_of(last) == 14
    assert_the_same_end(whole, tmp_path)
