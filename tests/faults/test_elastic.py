"""Row G9 of the fault catalogue: a machine of two is lost, and comes back; the run goes on, and no sample counts twice.

Two agents of torchrun on this machine, each at an address of its own, meet at a store in this process. A machine that
is lost is an agent that is killed with its processes.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from torch.distributed import TCPStore

from hookline.cli import main
from hookline.testing.faults import PRELOADED
from hookline.testing.ranks import run_ranks
from hookline_checkpoint import storage
from hookline_checkpoint.layout import unpack

pytestmark = [pytest.mark.plugins, pytest.mark.xdist_group("ranks"), pytest.mark.slow]
PRELOADED += [__name__, "hookline.config", "hookline_distributed", "hookline_ddp", "hookline_signals"]

SAMPLES, EPOCHS, STEPS = 45, 4, 24  # steps of 8 samples; the last of an epoch has 5: 3 on rank 0, and 2 on rank 1
LOST_AT, BACK_AT = 9, 15

MODULE = f'''
import json, os, time
from pathlib import Path

import torch
from hookline.testing import TinyModule


def until(condition):
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


class Elastic(TinyModule):
    """Writes what it trains on; waits in a step until its machine is lost, and in another until one has come back."""

    def __init__(self):
        super().__init__(samples={SAMPLES}, dropout=0.0)
        self.net[1] = torch.nn.Identity()

    def train_step(self, global_step, batch, device):
        size, ids = int(os.environ["WORLD_SIZE"]), [] if self.trainer.idle else batch[2].tolist()
        line = {{"step": global_step, "round": os.environ["MASTER_PORT"], "time": time.time(), "ids": ids}}
        with open(f"trace-{{os.environ['MACHINE']}}", "a") as file:
            file.write(json.dumps(line) + "\\n")
        Path(f"pid-{{os.environ['MACHINE']}}").write_text(str(os.getpid()))
        if Path("play").exists():
            if size == 2 and global_step == {LOST_AT} and not Path("lost").exists():
                Path(f"waits-{{os.environ['MACHINE']}}").touch()
                until(Path("lost").exists)
            if size == 1 and global_step == {BACK_AT}:
                Path("alone").touch()
                until(signalled)
        return super().train_step(global_step, batch, device)


def signalled():
    """Tell whether this process has been told to end: the agent does that when another machine comes."""
    import signal
    return signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
'''


def prepared(folder):
    (folder / "mine.py").write_text(MODULE)
    config = {
        "module": {"_target_": "mine.Elastic"},
        "trainer": {"epochs": EPOCHS, "train_batch_size": 8, "val_batch_size": 8, "device": "cpu"},
        "plugins": {
            "distributed": {"uneven": "pad", "vote_every": 1, "start_timeout": "60 s"},
            "ddp": {},
            "accumulate": {"micro_batch_size": 4},
            "checkpoint": {"every": "2 steps"},
            "signals": {},
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def command(folder, *words):
    os.chdir(folder)
    os.environ["MACHINE"] = os.environ["RANK"]
    torch.set_num_threads(1)
    sys.exit(main(words))


def until(condition, seconds=100):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


class Machine:
    """An agent of torchrun with one process, at an address of this machine."""

    def __init__(self, number, folder, port):
        self.name = f"127.0.0.{number}"
        conf = "is_host=0,keep_alive_interval=1,keep_alive_max_attempt=10,last_call_timeout=3,join_timeout=120"
        words = [
            *("--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--monitor-interval", "0.1"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "elastic"),
            *("--rdzv-conf", conf, "--local-addr", self.name, "-m", "hookline", "fit", "run.yaml", "--resume"),
        ]
        environment = {
            **os.environ, "MACHINE": str(number), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }  # fmt: skip
        self.folder, self.number = folder, number
        with (folder / f"said-{number}").open("a") as said:
            program = [sys.executable, "-m", "torch.distributed.run", *words]
            self.agent = subprocess.Popen(program, cwd=folder, env=environment, stdout=said, stderr=said)

    def lose(self):
        """Kill the agent and what it has started, as a power cut would."""
        self.agent.kill()
        os.kill(int((self.folder / f"pid-{self.number}").read_text()), signal.SIGKILL)
        self.agent.wait()

    def said(self):
        return (self.folder / f"said-{self.number}").read_text()


def traced(folder):
    """Return the samples of each step over all ranks, of one that was done in several rounds those of the last."""
    lines = [json.loads(line) for path in folder.glob("trace-*") for line in path.read_text().splitlines()]
    lines.sort(key=lambda line: line["time"])
    last = {line["step"]: line["round"] for line in lines}
    found = {step: [] for step in last}
    for line in lines:
        if line["round"] == last[line["step"]]:
            found[line["step"]] += line["ids"]
    return {step: sorted(ids) for step, ids in found.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = prepared(tmp_path_factory.mktemp("whole"))
    for outcome in run_ranks(command, 2, folder, "fit", "run.yaml"):
        assert outcome.code == 0, outcome.output
    return folder


def last(folder):
    return storage.listed(folder / "runs" / "run-1" / "checkpoints")[0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("lost", [1, 2])  # the first has rank 0 at its address, and gets it again
def test_g9_a_machine_that_is_lost_and_comes_back(lost, tmp_path, whole):
    folder = prepared(tmp_path)
    (folder / "play").touch()
    meeting_place = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    machines = {number: Machine(number, folder, meeting_place.port) for number in (1, 2)}
    other = 3 - lost
    try:
        until(lambda: all((folder / f"waits-{number}").exists() for number in (1, 2)))
        machines[lost].lose()
        (folder / "lost").touch()
        until((folder / "alone").exists)
        first = machines[lost]
        machines[lost] = Machine(lost, folder, meeting_place.port)
        codes = {number: machine.agent.wait(120) for number, machine in machines.items()}
        assert codes == {1: 0, 2: 0}, first.said() + machines[other].said()
    except BaseException:
        print(*[f"--- {number}\n{machine.said()}" for number, machine in machines.items()], sep="\n")
        raise
    finally:
        for machine in machines.values():
            machine.agent.kill()
            machine.agent.wait()
    assert [path.name for path in (folder / "runs").iterdir()] == ["run-1"]
    assert storage.step_of(last(folder)) == storage.step_of(last(whole)) == STEPS
    mine, undisturbed = unpack(last(folder), 0), unpack(last(whole), 0)
    torch.testing.assert_close(mine["module"], undisturbed["module"], atol=1e-5, rtol=1e-4)
    assert mine["trainer"]["counters"]["samples"] == undisturbed["trainer"]["counters"]["samples"] == SAMPLES * EPOCHS
    assert traced(folder) == traced(whole)
    for epoch in range(EPOCHS):
        steps = range(epoch * 6 + 1, epoch * 6 + 7)
        used = [number for step in steps for number in traced(folder)[step]]
        assert sorted(used) == list(range(SAMPLES))
