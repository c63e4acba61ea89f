"""Two machines: network namespaces with a cable between, that is cut in the middle of a run and put back.

What docs/launch.md shows for several machines is what is started on them.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from hookline.cli import main
from hookline.testing.faults import PRELOADED
from hookline.testing.ranks import run_ranks
from hookline_checkpoint import storage
from hookline_checkpoint.compare import differences

pytestmark = [pytest.mark.plugins, pytest.mark.xdist_group("ranks")]
PRELOADED += [__name__, "hookline_ddp", "hookline_watchdog"]

PAGE = (Path(__file__).parent.parent.parent / "docs" / "launch.md").read_text()
HOSTS = {"node1": "10.213.7.1", "node2": "10.213.7.2"}  # seen in the namespaces alone, whoever else uses them
PODS = {"train-0.train": "10.213.7.1", "train-1.train": "10.213.7.2"}
BOUND = 25  # seconds after a cut in which all of both machines has ended, torchrun too
LOST = "has lost another rank, or waited for it longer than 4 s (distributed.timeout)"

MODULE = '''
import os, time
from pathlib import Path
from hookline.testing import TinyModule


class Mine(TinyModule):
    """Waits in a step until it is told to go on."""

    def __init__(self, wait_at: int = 0):
        super().__init__(samples=48)
        self.wait_at = wait_at

    def train_step(self, global_step, batch, device):
        if global_step == self.wait_at:
            Path(f"waits-{os.environ['RANK']}").touch()
            deadline = time.monotonic() + 60
            while not Path("go").exists() and time.monotonic() < deadline:
                time.sleep(0.001)
        return super().train_step(global_step, batch, device)
'''


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True, timeout=30).stdout


class Machines:
    """Two network namespaces; each has a host's name, an address, and one end of a cable."""

    def __init__(self, hosts):
        self.hosts = hosts
        self.started = []
        self.names = [f"hookline-{os.getpid()}-{host}" for host in hosts]
        self.ends = [f"hl{os.getpid()}-{number}" for number in (1, 2)]
        self.files = [Path("/etc/netns", name) for name in self.names]  # `ip netns exec` puts them over those of /etc

    def build(self):
        known = "".join(f"{address} {host} {host.partition('.')[0]}\n" for host, address in self.hosts.items())
        for name, files in zip(self.names, self.files, strict=True):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            files.mkdir(parents=True)
            (files / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
            self.give_up(name, 4)
        there = [("name", end, "netns", name) for end, name in zip(self.ends, self.names, strict=True)]
        ip("link", "add", *there[0], "type", "veth", "peer", *there[1])
        for name, end, address in zip(self.names, self.ends, self.hosts.values(), strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")

    def give_up(self, name, retries):
        """Set how often a machine sends again what nobody answers: 4 are some 6 seconds, 8 are 100."""
        ip("netns", "exec", name, "sh", "-c", f"echo {retries} > /proc/sys/net/ipv4/tcp_retries2")

    def remove(self):
        """Kill what still runs there, and remove all; the cable goes with its ends."""
        for name, files in zip(self.names, self.files, strict=True):
            shutil.rmtree(files, ignore_errors=True)
            with contextlib.suppress(subprocess.CalledProcessError):
                for pid in self.processes(name):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                ip("netns", "delete", name)
        for process in self.started:
            process.kill()
            process.wait(30)

    def processes(self, name):
        return [int(pid) for pid in ip("netns", "pids", name).split()]

    def set_link(self, state):
        ip("-n", self.names[1], "link", "set", self.ends[1], state)

    def set_neighbours(self, *words):
        for name, end, other in zip(self.names, self.ends, reversed(self.hosts.values()), strict=True):
            ip("-n", name, "neighbour", words[0], other, *words[1:], "dev", end)

    def start(self, folder, *words):
        """Start torchrun on both."""
        for number, (host, name) in enumerate(zip(self.hosts, self.names, strict=True)):
            in_it = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c"]
            in_it += ['echo "$0" > /proc/sys/kernel/hostname && exec "$@"', host.partition(".")[0]]
            with (folder / f"said-by-{host}").open("a") as said:
                command = [*in_it, sys.executable, "-m", "torch.distributed.run", *words]
                environment = {**os.environ, "JOB_COMPLETION_INDEX": str(number)}
                process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said)
            self.started.append(process)
        return self.started[-len(self.hosts) :]


@contextlib.contextmanager
def connected(hosts):
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` here, which makes network namespaces")
    two = Machines(hosts)
    try:
        try:
            two.build()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        yield two
    finally:
        two.remove()


@pytest.fixture
def machines():
    with connected(HOSTS) as two:
        yield two


@pytest.fixture
def folder(tmp_path):
    return prepared(tmp_path)


def prepared(folder):
    (folder / "mine.py").write_text(MODULE)
    config = {
        "module": {"_target_": "mine.Mine"},
        "trainer": {"epochs": 2, "train_batch_size": 8, "val_batch_size": 8, "device": "cpu"},
        "plugins": {
            "ddp": {},
            "distributed": {"timeout": "4 s"},
            "checkpoint": {"every": "2 steps"},
            "watchdog": {"timeout": "30 s"},
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def command(folder, *words):
    """Be a process of the command `hookline`."""
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.exit(main(words))


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def words_of_the_page():
    """Return what the page says for one of several machines, for machines with one process each."""
    (line,) = re.findall(r"^torchrun (--nnodes 2 .*)$", PAGE, re.M)
    return line.replace("--nproc-per-node 8", "--nproc-per-node 1").replace("--max-restarts 3 ", "").split()


def said(folder):
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(folder.glob("said-by-*")))


def last(folder):
    return storage.listed(folder / "runs" / "run-1" / "checkpoints")[0]


CUTS = {
    "the link is down": (lambda two: two.set_link("down"), lambda two: two.set_link("up")),
    "packets are lost": (
        lambda two: two.set_neighbours("replace", "lladdr", "02:00:00:00:00:99", "nud", "permanent"),
        lambda two: two.set_neighbours("delete"),
    ),
}


def cut_in_a_step(machines, folder, cut, *words):
    """Start a run on both machines, cut the cable while they are in a step, and let them go on."""
    processes = machines.start(folder, *words, "module.wait_at=6")
    waits = [folder / f"waits-{rank}" for rank in (0, 1)]
    until(lambda: all(path.exists() for path in waits) or any(process.poll() is not None for process in processes))
    assert [process.poll() for process in processes] == [None, None], said(folder)
    CUTS[cut][0](machines)
    (folder / "go").touch()
    return processes


def assert_same_bits(whole, folder):
    different = differences(last(whole), last(folder))
    assert [line for line in different if not line.startswith("trainer.counters.seconds:")] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a run of the same two ranks that nothing disturbed."""
    folder = prepared(tmp_path_factory.mktemp("whole"))
    for outcome in run_ranks(command, 2, folder, "fit", "run.yaml"):
        assert outcome.code == 0, outcome.output
    return folder


@pytest.mark.parametrize("cut", ["the link is down", pytest.param("packets are lost", marks=pytest.mark.slow)])
def test_a_cut_ends_both_and_the_run_goes_on_with_the_same_bits(cut, machines, folder, whole):
    processes = cut_in_a_step(machines, folder, cut, *words_of_the_page())
    began = time.monotonic()
    assert [process.wait(60) for process in processes] == [1, 1]
    assert time.monotonic() - began < BOUND, said(folder)
    for host, rank in zip(HOSTS, (0, 1), strict=True):
        text = (folder / f"said-by-{host}").read_text()
        assert f"rank {rank} of 2 {LOST}" in text
    CUTS[cut][1](machines)
    for process in machines.start(folder, *words_of_the_page(), "--resume"):
        assert process.wait(60) == 0, said(folder)
    assert_same_bits(whole, folder)
    assert [machines.processes(name) for name in machines.names] == [[], []]


@pytest.mark.slow
def test_a_run_that_may_restart_goes_on_by_itself_when_the_cable_is_back(machines, folder, whole):
    cut = "packets are lost"
    for name in machines.names:
        machines.give_up(name, 8)
    processes = cut_in_a_step(machines, folder, cut, "--max-restarts", "1", *words_of_the_page())
    until(lambda: all(LOST in (folder / f"said-by-{host}").read_text() for host in HOSTS))
    CUTS[cut][1](machines)
    for process in processes:
        assert process.wait(100) == 0, said(folder)
    assert "started anew (1 of at most 1 times): going on with runs/run-1" in said(folder)
    assert_same_bits(whole, folder)


@pytest.mark.slow
def test_the_job_for_kubernetes_trains(folder, whole):
    (text,) = re.findall(r'^```[^\n]*title="job.yaml"[^\n]*\n(.*?)^```$', PAGE, re.M | re.S)
    _, job = yaml.safe_load_all(text)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    torchrun, *words = (word.replace("--nproc-per-node=8", "--nproc-per-node=1") for word in container["command"])
    assert torchrun == "torchrun"
    with connected(PODS) as pods:
        for process in pods.start(folder, *words):
            assert process.wait(60) == 0, said(folder)
    assert_same_bits(whole, folder)
