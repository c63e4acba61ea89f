"""Row E of the fault catalogue: signals save once and end in order, whenever they come; a second one ends at once.

Each run is `hookline fit` in a process of its own. The run R without a signal is what its end is compared with.
"""

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
from hookline.testing import TinyModule
from hookline.testing.faults import PRELOADED, Child, at_file, at_hook, run
from hookline_checkpoint import storage
from hookline_checkpoint.compare import differences
from hookline_checkpoint.layout import unpack
from hookline_runs import read_run

pytestmark = pytest.mark.plugins
PRELOADED += [__name__, "hookline.config", "hookline_accumulate", "hookline_runs.jsonl", "hookline_signals"]

STEPS = 14
HOOKS = {  # where a signal may come, and how often at least each is reached before the last step begins
    "take_window": 12,
    "update": 12,
    "call_model": 12,
    "run_backward": 12,
    "on_end_backward": 12,
    "step_optimizer": 12,
    "on_end_train_step": 12,
    "on_boundary": 12,
    "on_end_val_step": 7,
    "on_end_train_epoch": 1,
    "get_run_state": 2,
    "save": 2,
}


@dataclass(eq=False)
class SignalAt(CallbackInterface):
    """Send signals to the own process where a hook is reached for the `nth` time."""

    hook: str = "update"
    nth: int = 1
    signals: str = "SIGTERM"

    @hookimpl
    def on_setup(self, trainer):
        def send():
            for name in self.signals.split():
                signal.raise_signal(signal.Signals[name])

        trainer.plugins.register(at_hook(self.hook, send, self.nth), "the fault")


class Paced(TinyModule):
    """Says each step, takes 10 ms for it, and waits in step 12 until something has been sent."""

    def train_step(self, global_step, batch, device):
        print("step", global_step, flush=True)
        time.sleep(0.01)
        if global_step == 12:
            until(Path("sent").exists)
        return super().train_step(global_step, batch, device)


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


def fit(folder, words, point=None, send="SIGKILL"):
    """Run `hookline fit`, and send a signal to the own process at an operation on a file of a checkpoint."""
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    if point is None:
        sys.exit(main(["fit", "run.yaml", *words]))
    with at_file(folder / "runs" / "run-1" / "checkpoints", point, lambda: signal.raise_signal(signal.Signals[send])):
        sys.exit(main(["fit", "run.yaml", *words]))


def prepared(folder, module="hookline.testing.TinyModule", window=1, **plugins):
    config = {
        "module": {"_target_": module},
        "trainer": {"epochs": 2, "train_batch_size": 8 * window, "val_batch_size": 8, "device": "cpu"},
        "plugins": {"signals": {}, "checkpoint": {"every": "100 steps"}, "jsonl": {}, **plugins},
    }
    if window > 1:
        config["plugins"]["accumulate"] = {"steps": window}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def sent_at(hook, nth, signals="SIGTERM"):
    return {"_plugin_": f"{__name__}.SignalAt", "hook": hook, "nth": nth, "signals": signals}


def checkpoints(folder):
    return storage.listed(folder / "runs" / "run-1" / "checkpoints")


def record(folder):
    return read_run(folder / "runs" / "run-1")


def assert_resumes_to(whole, folder, *words):
    outcome = run(fit, folder, ["plugins.fault=null", "--resume", *words])
    assert outcome.code == 0, outcome.output
    assert "from scratch" not in outcome.output
    different = differences(checkpoints(whole)[0], checkpoints(folder)[0])
    assert [line for line in different if not line.startswith("trainer.counters.seconds:")] == []
    assert record(folder).status == "finished"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = prepared(tmp_path_factory.mktemp("whole"))
    assert run(fit, folder, []).code == 0
    return folder


def drawn(seed):
    """Draw a place for a signal, and say which."""
    chance = random.Random(seed)
    hook = chance.choice(list(HOOKS))
    nth = chance.randint(1, HOOKS[hook])
    print(f"seed {seed}: {hook} for the {nth}. time")
    return hook, nth


def fresh_seeds(count):
    return random.SystemRandom().sample(range(10**9), count)


# E1 -----------------------------------------------------------------------------------


def terminated_at(hook, nth, folder, whole):
    every = "2 steps" if hook in ("save", "get_run_state") else "100 steps"
    prepared(folder, fault=sent_at(hook, nth), checkpoint={"every": every, "keep_last": None})
    outcome = run(fit, folder, [])
    assert outcome.code == 143, outcome.output
    newest = storage.read_manifest(checkpoints(folder)[0])
    assert "received SIGTERM" in newest["reason"]
    assert 0 < newest["step"] < STEPS
    if every == "100 steps":
        assert len(checkpoints(folder)) == len(record(folder).checkpoints) == 1
    assert (record(folder).status, record(folder).reason) == ("preempted", "received SIGTERM")
    assert_resumes_to(whole, folder)


def test_e1_sigterm_anywhere_saves_once_and_the_resumed_run_has_the_same_bits(tmp_path, whole):
    for seed in fresh_seeds(2):
        (tmp_path / str(seed)).mkdir()
        terminated_at(*drawn(seed), tmp_path / str(seed), whole)


@pytest.mark.slow
@pytest.mark.parametrize("hook", HOOKS)
def test_e1_sigterm_at_each_hook(hook, tmp_path, whole):
    for seed in fresh_seeds(3):
        nth = random.Random(seed).randint(1, HOOKS[hook])
        print(f"seed {seed}: for the {nth}. time")
        (tmp_path / str(seed)).mkdir()
        terminated_at(hook, nth, tmp_path / str(seed), whole)


def sigterm_from_outside(seed, folder, whole):
    step = random.Random(seed).randint(1, 11)
    print(f"seed {seed}: behind the line 'step {step}'")
    child = Child(fit, prepared(folder, f"{__name__}.Paced"), [])
    until(lambda: f"step {step}\n" in child.output)
    child.signal(signal.SIGTERM)
    (folder / "sent").touch()
    outcome = child.wait()
    assert outcome.code == 143, outcome.output
    assert len(checkpoints(folder)) == 1
    assert_resumes_to(whole, folder)


def test_e1_sigterm_from_outside_at_a_random_moment(tmp_path, whole):
    for seed in fresh_seeds(2):
        (tmp_path / str(seed)).mkdir()
        sigterm_from_outside(seed, tmp_path / str(seed), whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(6))
def test_e1_sigterm_from_outside_at_more_moments(number, tmp_path, whole):
    sigterm_from_outside(*fresh_seeds(1), tmp_path, whole)


def test_e1_the_exit_code_can_be_chosen(tmp_path, whole):
    folder = prepared(tmp_path, fault=sent_at("update", 5), signals={"exit_codes": {"SIGTERM": 75}})
    assert run(fit, folder, []).code == 75
    assert_resumes_to(whole, folder)


@pytest.fixture(scope="module")
def whole_of_windows(tmp_path_factory):
    folder = prepared(tmp_path_factory.mktemp("windows"), window=3, signals={"within_window": True})
    assert run(fit, folder, []).code == 0
    return folder


# Windows of 3, 3 and 1 micro-batches make an epoch: the micro-batch, the steps before it, its number in its window.
WITHIN = [(1, 0, 1), (2, 0, 2), (4, 1, 1), (5, 1, 2), (8, 3, 1), (12, 4, 2)]


@pytest.mark.parametrize(
    ("micro_batch", "step", "part"),
    [pytest.param(*case, marks=[pytest.mark.slow] if case[0] in (1, 2, 4, 12) else []) for case in WITHIN],
)
def test_e1_within_a_window_it_ends_behind_the_micro_batch(micro_batch, step, part, tmp_path, whole_of_windows):
    fault = sent_at("run_backward", micro_batch)
    folder = prepared(tmp_path, window=3, signals={"within_window": True}, fault=fault)
    outcome = run(fit, folder, [])
    assert outcome.code == 143, outcome.output
    (path,) = checkpoints(folder)
    assert path.name == f"step-{step:012d}-{part:06d}"
    window = unpack(path, 0)["window"]
    assert len(window["outputs"]) == part
    assert all(gradient.abs().sum() > 0 for gradient in window["gradients"].values())
    assert_resumes_to(whole_of_windows, folder)


def test_e1_sigusr1_saves_and_training_goes_on(tmp_path, whole):
    folder = prepared(tmp_path, fault=sent_at("on_end_backward", 5, "SIGUSR1"))
    outcome = run(fit, folder, [])
    assert outcome.code == 0, outcome.output
    last, first = checkpoints(folder)
    assert storage.verify(first)["reason"] == "received SIGUSR1"
    assert storage.step_of(first) == 5
    assert [line.partition(":")[0] for line in differences(checkpoints(whole)[0], last)] == ["trainer.counters.seconds"]


# E3 -----------------------------------------------------------------------------------


def assert_nothing_torn(folder, whole, steps):
    """See that what is listed is good, and that the run goes on from there."""
    for path in checkpoints(folder):
        storage.verify(path)
    assert [storage.step_of(path) for path in checkpoints(folder)] == steps
    outcome = run(fit, folder, ["plugins.fault=null", "--resume"])
    assert outcome.code == 0, outcome.output
    assert "damaged" not in outcome.output
    different = differences(checkpoints(whole)[0], checkpoints(folder)[0])
    assert [line for line in different if not line.startswith("trainer.counters.seconds:")] == []
    left = [path.name for path in (folder / "runs" / "run-1").rglob(".t*")]
    assert left == []


@pytest.mark.parametrize("hook", ["update", "on_end_backward", "on_boundary"])
def test_e3_a_second_sigterm_ends_at_once(hook, tmp_path, whole):
    fault = sent_at(hook, 6, "SIGTERM SIGTERM")
    folder = prepared(tmp_path, fault=fault, checkpoint={"every": "4 steps"})
    outcome = run(fit, folder, [])
    assert outcome.code == -signal.SIGTERM, outcome.output
    assert record(folder).status == "crashed"
    assert_nothing_torn(folder, whole, [4])


POINTS = [
    "mkdir .tmp-*", "open model.safetensors", "write model.safetensors", "fsync optim.safetensors", "write state.json",
    "open manifest.json", "write manifest.json", "fsync manifest.json", "fsync .tmp-*", "rename step-*", "fsync .",
]  # fmt: skip


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=[] if point.startswith("rename") else [pytest.mark.slow]) for point in POINTS]
)
@pytest.mark.parametrize("second", ["SIGKILL", "SIGTERM"])
def test_e3_a_grace_that_is_shorter_than_the_save(second, point, tmp_path, whole):
    folder = prepared(tmp_path, fault=sent_at("update", 6))
    outcome = run(fit, folder, [], point, second)
    assert outcome.code == -signal.Signals[second], outcome.output
    assert_nothing_torn(folder, whole, [6] if point == "fsync ." else [])


def test_e3_what_was_saved_before_is_gone_on_with(tmp_path, whole):
    folder = prepared(tmp_path, fault=sent_at("update", 6), checkpoint={"every": "4 steps"})
    outcome = run(fit, folder, [], "rename step-000000000006", "SIGKILL")
    assert outcome.code == -signal.SIGKILL, outcome.output
    assert_nothing_torn(folder, whole, [4])


# E4 -----------------------------------------------------------------------------------


def test_e4_sigint_once_saves_and_ends_with_130(tmp_path, whole):
    folder = prepared(tmp_path, fault=sent_at("call_model", 4, "SIGINT"))
    outcome = run(fit, folder, [])
    assert outcome.code == 130, outcome.output
    assert [storage.step_of(path) for path in checkpoints(folder)] == [4]
    assert (record(folder).status, record(folder).reason) == ("preempted", "received SIGINT")
    assert_resumes_to(whole, folder)


@pytest.mark.parametrize("hook", ["call_model", "on_boundary"])
def test_e4_sigint_twice_ends_at_once(hook, tmp_path, whole):
    folder = prepared(tmp_path, fault=sent_at(hook, 6, "SIGINT SIGINT"), checkpoint={"every": "4 steps"})
    outcome = run(fit, folder, [])
    assert outcome.code == 130, outcome.output
    assert "hookline: interrupted" in outcome.output
    assert (record(folder).status, record(folder).reason) == ("failed", "KeyboardInterrupt: ")
    assert_nothing_torn(folder, whole, [4])


# E7 -----------------------------------------------------------------------------------


def is_stopped(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("seconds", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_e7_a_run_that_was_stopped_for_a_while_goes_on(seconds, tmp_path, whole):
    child = Child(fit, prepared(tmp_path, f"{__name__}.Paced"), [])
    until(lambda: "step 3\n" in child.output)
    child.signal(signal.SIGSTOP)
    until(lambda: is_stopped(child.pid))
    said = child.output
    time.sleep(seconds)  # it is the fault
    assert child.output == said
    assert "step 12" not in said
    child.signal(signal.SIGCONT)
    (tmp_path / "sent").touch()
    outcome = child.wait()
    assert outcome.code == 0, outcome.output
    ends = [checkpoints(folder)[0] for folder in (whole, tmp_path)]
    assert [line.partition(":")[0] for line in differences(*ends)] == ["trainer.counters.seconds"]
