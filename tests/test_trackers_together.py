"""Several trackers in one run: each is told the same, each keeps it, and none that fails harms another."""

import signal
import threading
import warnings
from dataclasses import dataclass

import pytest
import torch
from tests.tracker_readers import READERS, points_of

from hookline import CallbackInterface, hookimpl
from hookline.installed import installed, load
from hookline.testing import Memory, Told, digest, tiny_trainer
from hookline.testing.faults import kill, run
from hookline.tracking import Tracker

pytestmark = pytest.mark.plugins
QUICK = ["csv", "tensorboard"]
ALL = sorted(set(READERS) & set(installed()))
OPTIONS = {"log_every": "1 steps", "evaluate_every": "3 steps"}


@dataclass(eq=False)
class Raises(Tracker):
    """Can begin, and nothing else."""

    def start(self, run):
        """Begin."""

    def log_metrics(self, metrics, place):
        raise ConnectionError("no network")


@dataclass(eq=False)
class Hangs(Tracker):
    """Begins when it is let."""

    close_timeout: str = "1 s"

    def __post_init__(self):
        super().__post_init__()
        self.go = threading.Event()

    def start(self, run):
        self.thread = threading.current_thread()
        self.go.wait(60)

    def log_metrics(self, metrics, place):
        """Keep nothing."""


class Stores(CallbackInterface):
    """Stores the state after step 4, and kills the process after step 9, when all have all on disk."""

    @hookimpl
    def on_boundary(self, trainer, global_step):
        if global_step == 4:
            trainer.save("fourth")
        if global_step == 9:
            for name in ALL:
                trainer.plugins.get_plugin(name).get_state()
            kill()

    @hookimpl
    def save(self, trainer):
        torch.save(trainer.hook.get_run_state(trainer=trainer), trainer.run_dir / "state.pt")
        return True


def trained(names, folder, *beside, **options):
    """Train with trackers; return the bits of the model and what was told."""
    told = Told()
    trackers = [load(name)(close_timeout="2 min") for name in names]
    trainer = tiny_trainer([*trackers, *beside, told], runs_folder=str(folder), **OPTIONS, **options)
    trainer.train()
    return digest(trainer.module.state_dict()), told.points


def quietly(function, *arguments):
    """Do something in a process of its own, where SDKs may warn as they like."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return function(*arguments)


def in_a_process(function, *arguments):
    outcome = run(quietly, function, *arguments, timeout=200)
    assert outcome.code == 0, outcome.output
    return outcome.value


def read(names, folder):
    return {name: points_of(name, folder) for name in names}


def check(kept, told):
    """Assert that every tracker has every point once."""
    for tracker, points in kept.items():
        exact = tracker != "tensorboard"  # which keeps float32
        wanted = {
            name: [(step, value if exact else torch.tensor(value).item()) for step, value in values]
            for name, values in told.items()
        }
        assert points == wanted, tracker


@pytest.mark.slow
def test_every_tracker_can_be_read_back():
    trackers = {name for name in installed() if issubclass(load(name), Tracker)}
    assert trackers <= set(READERS)


def test_two_keep_the_same_beside_one_that_raises_and_one_that_hangs(tmp_path, caplog):
    hangs = Hangs()
    bits, told = trained(QUICK, tmp_path, Raises(), hangs)
    assert len(told["train_loss"]) == 14
    check(read(QUICK, tmp_path / "run-1"), told)
    assert (bits, told) == trained([], tmp_path)
    assert "raises is switched off, and training goes on without it: 3 failures in a row" in caplog.text
    assert "hangs has not taken all within 1 s (close_timeout): the run ends without" in caplog.text
    hangs.go.set()
    hangs.thread.join(30)
    assert not hangs.thread.is_alive()


def beside_others_that_fail(folder):
    return trained(ALL, folder, Raises(), Hangs())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_keep_the_same_beside_one_that_raises_and_one_that_hangs(tmp_path):
    bits, told = in_a_process(beside_others_that_fail, tmp_path)
    assert len(told["train_loss"]) == 14
    check(in_a_process(read, ALL, tmp_path / "run-1"), told)
    assert (bits, told) == trained([], tmp_path / "alone")


def until_killed(folder):
    quietly(trained, ALL, folder, Stores())


def resumed(folder):
    state = torch.load(folder / "run-1" / "state.pt", weights_only=False)
    return trained(ALL, folder, Memory(state), resume=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_go_on_after_a_kill_with_each_place_once(tmp_path):
    killed = run(until_killed, tmp_path, timeout=200)
    assert killed.code == -signal.SIGKILL, killed.output
    assert max(points_of("csv", tmp_path / "run-1")["train_loss"])[0] >= 8  # some come again, then
    bits, told = in_a_process(resumed, tmp_path)
    assert [step for step, _ in told["train_loss"]] == list(range(5, 15))
    whole = trained([], tmp_path / "alone")
    check(in_a_process(read, ALL, tmp_path / "run-1"), whole[1])
    assert bits == whole[0]
