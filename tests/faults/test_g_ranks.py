"""Row G of the fault catalogue: what breaks on one of two ranks ends both of them, in bounded time.

Faults are placed at hooks, on one rank only; the plugin that places them is on both, since ranks whose plugins
differ are refused. A fault notes when it came, so that tests see how long the others outlived it.
"""

import errno
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from hookline import sharded
from hookline.testing import TinyModule, digest, run_ranks, tiny_trainer
from hookline.testing.faults import PRELOADED, at_file, at_hook, failing, kill, run
from hookline.testing.ranks import Ranks
from hookline_checkpoint import storage

pytestmark = [pytest.mark.plugins, pytest.mark.xdist_group("ranks")]
PRELOADED += [__name__, "hookline_ddp", "hookline_guard", "hookline_watchdog"]

SOON = 10  # seconds in which all are gone
SAVING = {"checkpoint": {"every": "2 steps"}, "guard": {"errors": ["any"], "every": "1 steps"}}


class Broken(Exception):
    pass


def loop_for_ever(folder):
    while True:
        pass


def stop_this_process(folder):
    os.kill(os.getpid(), signal.SIGSTOP)


def raise_beside_a_stopped_rank(folder):
    until(lambda: is_stopped(folder, 1))
    raise Broken("on purpose")


ACTIONS = {
    "raises": lambda folder: failing(Broken("on purpose"))(),
    "raises beside a stopped one": raise_beside_a_stopped_rank,
    "is killed": lambda folder: kill(),
    "exits": lambda folder: os._exit(3),
    "is stopped": stop_this_process,
    "loops": loop_for_ever,
    "sleeps": lambda folder: time.sleep(100),
}


def faults_at(hook, nth, faults, folder):
    """Return a plugin that does the actions named by rank where a hook is reached for the `nth` time."""

    def act():
        rank = os.environ["RANK"]
        if int(rank) in faults:
            (folder / f"part-{rank}").write_text(f"{time.monotonic()} {os.getpid()}")
            (folder / f"part-{rank}").rename(folder / f"fault-{rank}")  # whoever sees it sees it whole
            ACTIONS[faults[int(rank)]](folder)

    return at_hook(hook, act, nth)


def train(folder, faults, hook="on_boundary", nth=3, plugins=None):
    """Train on this rank, and do what `faults` says by rank."""
    torch.set_num_threads(1)
    plugins = {**(plugins or {}), "ddp": {}, "fault": faults_at(hook, nth, faults, folder)}
    trainer = tiny_trainer(plugins, TinyModule(samples=48), runs_folder=str(folder))  # 2 epochs of 6 steps
    trainer.train()
    return digest(trainer.module.state_dict()), trainer.global_step


def noted(folder, rank):
    when, pid = (folder / f"fault-{rank}").read_text().split()
    return float(when), int(pid)


def outlived(folder, rank):
    """Return how many seconds ago the fault of a rank came."""
    return time.monotonic() - noted(folder, rank)[0]


def is_stopped(folder, rank):
    if not (folder / f"fault-{rank}").exists():
        return False
    _, pid = noted(folder, rank)
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def codes(outcomes):
    return [outcome.code for outcome in outcomes]


def outputs(outcomes):
    return "\n".join(f"--- rank {rank}\n{outcome.output}" for rank, outcome in enumerate(outcomes))


# G1, G2 -------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("hook", ["on_boundary", pytest.param("call_model", marks=pytest.mark.slow)])
def test_g1_a_rank_that_raises_ends_all_and_says_why(hook, rank, tmp_path):
    outcomes = run_ranks(train, 2, tmp_path, {rank: "raises"}, hook, 3, SAVING)
    assert outlived(tmp_path, rank) < SOON
    assert codes(outcomes) == [1, 1], outputs(outcomes)
    assert "Broken: on purpose" in outcomes[rank].output
    assert f"raised in {hook} by plugin 'fault'" in outcomes[rank].output
    assert "Broken" not in outcomes[1 - rank].output


def test_g1_the_way_out_waits_for_no_other_rank(tmp_path):
    ranks = Ranks(train, 2, tmp_path, {0: "raises beside a stopped one", 1: "is stopped"}, "on_boundary", 3, SAVING)
    raised = ranks.children[0].wait()
    assert outlived(tmp_path, 0) < SOON
    assert raised.code == 1, raised.output
    assert "Broken: on purpose" in raised.output
    assert is_stopped(tmp_path, 1)
    ranks.children[1].signal(signal.SIGKILL)
    assert ranks.children[1].wait().code == -signal.SIGKILL


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("action", "code"),
    [("is killed", -signal.SIGKILL), pytest.param("exits", 3, marks=pytest.mark.slow)],
)
def test_g2_a_rank_that_is_gone_ends_the_other(action, code, rank, tmp_path):
    outcomes = run_ranks(train, 2, tmp_path, {rank: action}, "run_backward", 3, SAVING)
    assert outlived(tmp_path, rank) < SOON
    assert outcomes[rank].code == code
    assert outcomes[1 - rank].code == 1, outputs(outcomes)


# G3, G4 -------------------------------------------------------------------------------

WATCHED = {"watchdog": {"timeout": "3 s", "start_timeout": "1 min", "save_timeout": "3 s"}}


def stacks(folder):
    """Return what the watchdogs have left, by rank."""
    return {int(path.stem[-4:]): path.read_text() for path in folder.glob("run-*/watchdog-*/rank-*.txt")}


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_g3_a_rank_that_loops_ends_all_with_the_stacks_of_all(rank, tmp_path):
    outcomes = run_ranks(train, 2, tmp_path, {rank: "loops"}, "on_boundary", 3, WATCHED)
    assert outlived(tmp_path, rank) < SOON
    assert codes(outcomes) == [124, 124], outputs(outcomes)
    left = stacks(tmp_path)
    assert left.keys() == {0, 1}
    assert "in loop_for_ever" in left[rank]
    assert "in loop_for_ever" in outcomes[rank].output
    assert "loop_for_ever" not in left[1 - rank]
    for text in left.values():
        assert "phase: training, after step 3" in text
    assert any("no sign of life for 3 s (watchdog.timeout)" in text for text in left.values())
    for recorded in tmp_path.glob("run-*/watchdog-*/rank-*.json"):
        assert "gloo:all_reduce" in [entry["profiling_name"] for entry in json.loads(recorded.read_text())["entries"]]
    assert len([*tmp_path.glob("run-*/watchdog-*/rank-*.json")]) == 2


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_g3_a_rank_that_is_stopped_is_killed_by_the_other(rank, tmp_path):
    outcomes = run_ranks(train, 2, tmp_path, {rank: "is stopped"}, "on_boundary", 3, WATCHED)
    assert outlived(tmp_path, rank) < SOON
    assert outcomes[rank].code == -signal.SIGKILL
    assert outcomes[1 - rank].code == 124, outputs(outcomes)
    _, pid = noted(tmp_path, rank)
    assert f"killed rank {rank} (process {pid} on" in outcomes[1 - rank].output
    assert stacks(tmp_path).keys() == {1 - rank}


def test_g3_a_stopped_rank_is_killed_when_a_collective_is_given_up(tmp_path):
    plugins = {"watchdog": {}, "distributed": {"timeout": "3 s"}}
    outcomes = run_ranks(train, 2, tmp_path, {1: "is stopped"}, "on_boundary", 3, plugins)
    assert outlived(tmp_path, 1) < SOON
    assert codes(outcomes) == [1, -signal.SIGKILL], outputs(outcomes)
    said = outcomes[0].output.lower()
    assert "timed out" in said or "timeout" in said, said  # gloo says it in either way
    assert stacks(tmp_path) == {}


@pytest.mark.parametrize(
    ("rank", "hook", "phase", "expected"),
    [
        (0, "save", "save, after step 6", [124, 124]),
        pytest.param(1, "save", "save, after step 6", [124, 124], marks=pytest.mark.slow),
        pytest.param(
            1, "evaluate", "the start of an evaluation (val), after step 6", [124, 124], marks=pytest.mark.slow
        ),
        pytest.param(1, "on_end_val_step", "evaluation (val), after step 6", [124, 124], marks=pytest.mark.slow),
        pytest.param(0, "on_begin_run", "the start, after step 0", [124, 124], marks=pytest.mark.slow),
        (1, "on_begin_run", "the start, after step 0", [124, 124]),
        pytest.param(1, "setup_optimizers", "the start, after step 0", [124, 124], marks=pytest.mark.slow),
        (1, "on_end_run", "teardown, after step 12", [0, 124]),
    ],
)
def test_g4_a_rank_that_hangs_elsewhere_names_the_phase(rank, hook, phase, expected, tmp_path):
    start = "6 s" if "start" in phase else "1 min"
    plugins = {"watchdog": {"timeout": "5 s", "start_timeout": start, "save_timeout": "3 s"}, "checkpoint": {}}
    outcomes = run_ranks(train, 2, tmp_path, {rank: "sleeps"}, hook, 1, plugins)
    assert outlived(tmp_path, rank) < 2 * SOON
    assert codes(outcomes) == expected, outputs(outcomes)
    assert f"phase: {phase}" in outcomes[rank].output
    assert f'{Path(__file__).name}", line' in outcomes[rank].output


# G5 -----------------------------------------------------------------------------------


def train_on_a_bad_disk(folder, point):
    """Train with a checkpoint every two steps; rank 0, which writes, has a full disk at the second."""
    error = failing(OSError(errno.ENOSPC, "No space left on device")) if os.environ["RANK"] == "0" else int
    with at_file(folder, point, error, nth=2):
        return train(folder, {}, plugins={"checkpoint": {"every": "2 steps"}})


@pytest.mark.parametrize(
    "point",
    [
        "write model.safetensors",
        pytest.param("write rank-0001.safetensors", marks=pytest.mark.slow),
        pytest.param("fsync manifest.json", marks=pytest.mark.slow),
        pytest.param("rename step-*", marks=pytest.mark.slow),
    ],
)
def test_g5_no_rank_believes_in_a_checkpoint_that_failed(point, tmp_path):
    began = time.monotonic()
    outcomes = run_ranks(train_on_a_bad_disk, 2, tmp_path, point)
    assert time.monotonic() - began < 2 * SOON
    assert codes(outcomes) == [1, 1], outputs(outcomes)
    assert "No space left on device" in outcomes[0].output
    (path,) = storage.listed(tmp_path / "run-1" / "checkpoints")
    storage.verify(path)
    assert storage.step_of(path) == 2


# G6 -----------------------------------------------------------------------------------


class Uneven(TinyModule):
    """Has fewer batches on rank 0 than on rank 1."""

    def get_train_dataloader(self, sampler, batch_size):
        batches = {"0": 3, "1": 5}[os.environ["RANK"]]
        return sharded([(self.inputs[:4], self.targets[:4], torch.arange(4))] * batches)


def train_unevenly(folder, uneven):
    torch.set_num_threads(1)
    plugins = {"ddp": {}, "distributed": {"uneven": uneven}}
    trainer = tiny_trainer(plugins, Uneven(), runs_folder=str(folder), epochs=2)
    trainer.train()
    return digest(trainer.module.state_dict()), trainer.global_step


def test_g6_uneven_batches_are_dropped_or_refused_before_the_first_step(tmp_path):
    dropped = run_ranks(train_unevenly, 2, tmp_path, "drop")
    assert codes(dropped) == [0, 0], outputs(dropped)
    assert dropped[0].value == dropped[1].value
    assert dropped[0].value[1] == 6
    refused = run_ranks(train_unevenly, 2, tmp_path, "error")
    assert codes(refused) == [1, 1]
    for outcome in refused:
        assert "the ranks have 3, 5 batches" in outcome.output


# G10 ----------------------------------------------------------------------------------


class Slow(TinyModule):
    """Takes half a second longer for each step on one rank."""

    def __init__(self, slow_rank):
        super().__init__(samples=24)
        self.slow_rank = str(slow_rank)

    def train_step(self, global_step, batch, device):
        if os.environ["RANK"] == self.slow_rank:
            time.sleep(0.5)
        return super().train_step(global_step, batch, device)


def train_slowly(folder, slow_rank):
    torch.set_num_threads(1)
    plugins = {"ddp": {}, "watchdog": {"timeout": "5 s"}, "distributed": {"timeout": "5 s"}}
    trainer = tiny_trainer(plugins, Slow(slow_rank), runs_folder=str(folder))
    trainer.train()
    return digest(trainer.module.state_dict()), trainer.global_step


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_g10_a_slow_rank_changes_no_bit(rank, tmp_path):
    quick = run_ranks(train_slowly, 2, tmp_path, None)
    slow = run_ranks(train_slowly, 2, tmp_path, rank)
    assert codes(quick) == codes(slow) == [0, 0], outputs(quick) + outputs(slow)
    assert len({outcome.value for outcome in quick + slow}) == 1
    assert quick[0].value[1] == 6


# G11 ----------------------------------------------------------------------------------


def meet_at(rank, address, port, watchdog):
    """Try to join a run of two ranks at an address."""
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR=address, MASTER_PORT=str(port))
    tiny_trainer({"watchdog": watchdog, "distributed": {"start_timeout": "5 s"}}).train()


@pytest.mark.parametrize(
    ("rank", "address", "said"),
    [
        (0, "localhost", "EADDRINUSE"),
        pytest.param(1, "no-such-host.invalid", "no-such-host.invalid", marks=pytest.mark.slow),
    ],
)
def test_g11_a_wrong_meeting_place_is_said_in_time(rank, address, said):
    with socket.create_server(("localhost", 0)) as taken:
        began = time.monotonic()
        outcome = run(meet_at, rank, address, taken.getsockname()[1], {})
    assert time.monotonic() - began < 2 * SOON
    assert outcome.code == 1, outcome.output
    assert "within 5 s (distributed.start_timeout)" in outcome.output
    assert said in outcome.output


def test_g11_a_port_where_nobody_answers_is_left_to_the_watchdog():
    with socket.create_server(("localhost", 0)) as mute:  # torch waits for its first word without a timeout
        began = time.monotonic()
        outcome = run(meet_at, 1, "localhost", mute.getsockname()[1], {"start_timeout": "3 s"})
    assert time.monotonic() - began < SOON
    assert outcome.code == 124, outcome.output
    assert "no sign of life for 3 s (watchdog.start_timeout); phase: the start, after step 0" in outcome.output
    assert "hookline_distributed" in outcome.output
