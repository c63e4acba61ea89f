"""Rows D of the fault catalogue: checkpoints that are written in the background."""

from __future__ import annotations

import copy
import errno
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from tests.faults.test_b_writing import (  # noqa: F401 - `memory` and `threads` are fixtures
    Witness,
    at,
    big_trainer,
    debris,
    good,
    home,
    memory,
    refusing,
    steps,
    threads,
    train,
    wait_for,
)

from hookline import CallbackInterface, hookimpl
from hookline.testing import digest, tiny_trainer
from hookline.testing.faults import at_file, run, watching
from hookline_checkpoint import Checkpoint, CheckpointError, storage
from hookline_checkpoint.layout import unpack

pytestmark = pytest.mark.plugins

LIMIT = 20  # seconds for what takes no time, before the test gives up


def writers():
    return [thread for thread in threading.enumerate() if thread.name == "hookline-checkpoint"]


def hang():
    """Be a disk that does not answer."""
    threading.Event().wait()


class Steps(CallbackInterface):
    """Does something when a step is complete."""

    def __init__(self, does):
        self.does = does

    @hookimpl
    def on_end_train_step(self, trainer, global_step):
        self.does(trainer, global_step)


class Asks(CallbackInterface):
    """Tells when the second state is to be saved."""

    def __init__(self, asked):
        self.asked = asked

    @hookimpl(wrapper=True)
    def save(self, trainer):
        if trainer.global_step == 2:
            self.asked.set()
        return (yield)


# D1 what is saved is what was there -----------------------------------------------------


class Spoiler(CallbackInterface):
    """Changes all that it can get hold of as soon as a save has begun, and lets the writer begin only then."""

    def __init__(self):
        self.kept = {"tensor": torch.zeros(1000), "list": [0], "set": set()}
        self.expected, self.spoiled = {}, threading.Event()

    def get_state(self):
        return self.kept

    def update_state(self, state):
        self.kept = state

    @hookimpl(wrapper=True)
    def save(self, trainer):
        self.kept["tensor"].fill_(trainer.global_step)
        self.kept["list"].append(trainer.global_step)
        self.expected[trainer.global_step] = copy.deepcopy(trainer.hook.get_run_state(trainer=trainer))
        self.spoiled.clear()
        answer = yield
        before = copy.deepcopy(trainer.hook.get_run_state(trainer=trainer))
        with torch.no_grad():
            for tensor in trainer.module.state_dict().values():
                tensor.fill_(-1)
            for state in trainer.optimizers[0].state.values():
                state["exp_avg"].fill_(-1)
            self.kept["tensor"].fill_(-1)
        self.kept["list"].append(-1)
        self.kept["set"].add("spoiled")
        self.spoiled.set()
        self.wait_for_writer(trainer)
        trainer.module.update_state(before["module"])
        return answer

    def wait_for_writer(self, trainer):
        """Stay until the new one is there, so that nothing was put right before it was written."""
        deadline = time.monotonic() + LIMIT
        while not (trainer.run_dir / f"checkpoints/step-{trainer.global_step:012d}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.mark.parametrize("saves", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_d1_what_changes_behind_a_save_is_not_in_it(saves, memory):  # noqa: F811
    spoiler = Spoiler()
    with watching(memory, lambda operation: operation.kind != "write" or spoiler.spoiled.wait(LIMIT), lambda _: None):
        tiny_trainer(
            [Checkpoint("1 step", keep_last=None, asynchronous=True), spoiler],
            epochs=10, max_steps=saves, runs_folder=str(memory),
        ).train()  # fmt: skip
    assert steps(memory) == [*range(saves, 0, -1)]
    for step, expected in spoiler.expected.items():
        assert digest(unpack(at(memory, step), 0)) == digest(expected), step
        assert expected["plugins"]["spoiler"]["tensor"].unique().tolist() == [step]


# D2 the writer raises -------------------------------------------------------------------


def test_d2_an_error_of_the_writer_is_raised_at_the_next_boundary(memory):  # noqa: F811
    """The save of step 2 fails, and training ends where step 3 is complete or its save begins."""
    heard = []

    class Hears(CallbackInterface):
        @hookimpl
        def on_exception(self, exception):
            heard.append(exception)

    wait = Steps(lambda trainer, step: step != 3 or wait_for(lambda: not writers()))
    broken = at_file(memory, "open manifest.json", refusing(errno.ENOSPC), nth=2)
    with broken, pytest.raises(OSError, match="No space left on device") as raised:
        train(memory, 9, wait, Hears(), asynchronous=True)
    assert heard == [raised.value]
    assert [entry.name for entry in raised.traceback].count("_write_file") == 1
    assert [entry.name for entry in raised.traceback].count("on_boundary") == 1
    notes = raised.value.__notes__
    assert len([note for note in notes if f"while saving {at(memory, 2)}" in note]) == 1
    assert [note for note in notes if "save under way" in note] == []
    assert (steps(memory), debris(memory)) == ([1], [])


def train_to_a_failure(folder, nth, code):
    class Watcher(CallbackInterface):
        @hookimpl
        def on_end_run(self, status):
            print("ended as", status)

    with at_file(folder, "write manifest.json", refusing(code), nth=nth):
        train(folder, 3, Watcher(), asynchronous=True)


@pytest.mark.parametrize(("nth", "left"), [(1, []), (3, [2, 1])])
def test_d2_a_process_whose_writer_has_failed_ends_as_failed(nth, left, memory):  # noqa: F811
    """At the first save, and at the last one, which only the end of the run waits for."""
    outcome = run(train_to_a_failure, memory, nth, errno.EDQUOT)
    assert outcome.code == 1
    assert "ended as failed" in outcome.output
    assert outcome.output.count("\nOSError: [Errno 122] Disk quota exceeded\n") == 1
    assert "in _write_file" in outcome.output
    assert f"while saving {at(memory, nth)}; the checkpoints before it are as they were" in outcome.output
    assert (steps(memory), debris(memory)) == (left, [])


def test_d2_where_it_may_go_on_it_does(memory, caplog):  # noqa: F811
    with at_file(memory, "write manifest.json", refusing(errno.EDQUOT), nth=2):
        train(memory, 4, asynchronous=True, on_error="go_on")
    assert caplog.text.count("no checkpoint could be written: [Errno 122] Disk quota exceeded; while saving") == 1
    assert (steps(memory), debris(memory)) == ([4, 3], [])
    with at_file(memory, "write manifest.json", refusing(errno.EDQUOT)):
        train(memory, 5, asynchronous=True, on_error="go_on")
    assert caplog.text.count("no checkpoint could be written") == 2
    assert steps(memory) == [4, 3]


def test_d2_an_error_in_training_keeps_that_of_the_save_under_way(memory):  # noqa: F811
    failed = threading.Event()

    def raise_in_training(trainer, step):
        if step == 2:
            failed.set()
            raise RuntimeError("no luck")

    def fail():
        failed.wait(LIMIT)
        refusing(errno.EIO)()

    with at_file(memory, "fsync manifest.json", fail), pytest.raises(RuntimeError, match="no luck") as raised:
        train(memory, 4, Steps(raise_in_training), asynchronous=True)
    assert "and the save under way failed: OSError: [Errno 5] Input/output error" in raised.value.__notes__
    assert (steps(memory), debris(memory)) == ([], [])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_d2_an_error_in_training_waits_for_the_save_under_way(error, memory):  # noqa: F811
    raising = threading.Event()

    def raise_in_training(trainer, step):
        if step == 2:
            raising.set()
            raise error("no luck")

    with (
        at_file(memory, "fsync manifest.json", lambda: raising.wait(LIMIT)),
        pytest.raises(error, match="no luck") as raised,
    ):
        train(memory, 4, Steps(raise_in_training), asynchronous=True)
    assert [note for note in raised.value.__notes__ if "save" in note] == []
    assert ([*good(home(memory))], debris(memory)) == ([1], [])


def test_d2_whoever_interrupts_the_waiting_does_not_end_the_writer(memory):  # noqa: F811
    """Ctrl-C comes while the save of step 2 waits for that of step 1, which needs a while more."""
    asked = threading.Event()

    def interrupt():
        assert asked.wait(LIMIT)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.5)

    broken = at_file(memory, "fsync manifest.json", interrupt)
    with broken, pytest.raises(KeyboardInterrupt):
        train(memory, 4, Asks(asked), asynchronous=True)
    wait_for(lambda: not writers(), 5)  # its thread may be seen for a moment after what it did
    assert ([*good(home(memory))], debris(memory)) == ([1], [])


def test_d2_the_end_of_training_waits_for_the_last_save(memory):  # noqa: F811
    told, ending = [], threading.Event()

    class Ends(CallbackInterface):
        @hookimpl
        def on_end_train(self):
            told.append("trained")
            ending.set()

    with at_file(memory, "fsync manifest.json", lambda: ending.wait(LIMIT), nth=3):
        train(memory, 3, Witness(told.append), Ends(), asynchronous=True)
    assert told == [1, 2, "trained", 3]
    assert [*good(home(memory))] == [3, 2]
    assert debris(memory) == []


# D3 the writer hangs --------------------------------------------------------------------


def train_on_a_disk_that_hangs(folder, saves, to):
    began = time.monotonic()

    def ask(trainer, step):
        time.sleep(0.05)
        print(f"step {step} after {time.monotonic() - began:.2f} s")
        if step in saves:
            trainer.save("test")

    checkpoint = Checkpoint("1000000 steps", asynchronous=True, timeout="1 s")
    with at_file(folder, "fsync manifest.json", hang, nth=2):
        tiny_trainer([checkpoint, Steps(ask)], runs_folder=str(folder), epochs=10**6, max_steps=to).train()


FOUND_BY = {"the next save": ([1, 2, 3], 9), "a boundary": ([1, 2], 10**6), "the end of training": ([1], 2)}


@pytest.mark.parametrize(("saves", "to"), FOUND_BY.values(), ids=FOUND_BY)
def test_d3_a_writer_that_hangs_is_given_up_and_the_process_ends(saves, to, memory):  # noqa: F811
    outcome = run(train_on_a_disk_that_hangs, memory, saves, to, timeout=30)
    assert outcome.code == 1
    said = "CheckpointError: the save under way has not come to its end within 1 s (checkpoint.timeout)"
    assert outcome.output.count(said) == 1
    last = re.findall(r"step \d+ after (.*) s", outcome.output)[-1]
    print(f"D3: the last step was complete after {last} s")
    assert float(last) < 10
    assert ([*good(home(memory))], len(debris(memory))) == ([1], 1)
    train(memory, 2)
    assert ([*good(home(memory))], debris(memory)) == ([2, 1], [])


def test_d3_after_a_writer_that_hung_the_next_run_saves(memory):  # noqa: F811
    """In one process: the writer that hung wakes up while another one writes, and harms nothing."""
    wake = threading.Event()
    with at_file(memory, "fsync manifest.json", lambda: wake.wait(LIMIT)):
        with pytest.raises(CheckpointError, match=r"not come to its end within 1 s"):
            train(memory, 3, asynchronous=True, timeout="1 s")
        assert good(home(memory)) == {}
        train(memory, 3, Steps(lambda trainer, step: wake.set()), asynchronous=True)
        wait_for(lambda: not writers())
    assert ([*good(home(memory))], debris(memory)) == ([3, 2], [])


# D4 one at a time -----------------------------------------------------------------------


def test_d4_a_save_waits_for_the_one_before(memory, caplog):  # noqa: F811
    caplog.set_level("INFO", "hookline")
    asked, seen = threading.Event(), []

    def hold():
        """Let the writer of step 1 stand still until step 2 is to be saved, and for a while then."""
        assert asked.wait(LIMIT)
        time.sleep(1.1)

    with (
        watching(memory, seen.append, lambda operation: None),
        at_file(memory, "fsync model.safetensors", hold),
    ):
        train(memory, 5, Asks(asked), asynchronous=True, keep_last=None)
    parts = [Path(each.path).parts for each in seen]
    names = [part for each in parts for part in each if part.startswith(".tmp-") and "checkpoints" in each]
    writers = [name for name, before in zip(names, ["", *names], strict=False) if name != before]
    assert len(writers) == len({*writers}) == 5  # none comes back after another one has begun
    commits = [each.path for each in seen if each.kind == "rename" and "step-" in each.path]
    assert [storage.step_of(Path(path)) for path in commits] == [1, 2, 3, 4, 5]
    assert re.search(r"waited \d+\.\d s for the save under way", caplog.text)
    assert [*good(home(memory))] == [5, 4, 3, 2, 1]


# D6 memory ------------------------------------------------------------------------------


def status(name):
    """Return a number of this process's memory, in MB."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000


def peaks(folder, megabytes, saves):
    """Return the peaks of memory of steps before, with, and after saves."""
    found = []

    def measure(trainer, step):
        if 5 <= step < 5 + saves:
            trainer.save("test")
        if step == 6 + saves:
            wait_for(lambda: not writers())
        if step in (2, 5, 6 + saves, 9 + saves):
            found.append(status("VmHWM"))
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        if step == 9 + saves:
            trainer.stop("measured")

    trainer = big_trainer(folder, megabytes, Steps(measure), every="1000000 steps", asynchronous=True)
    trainer.train()
    return found[1:]


@pytest.mark.parametrize(
    ("megabytes", "saves"), [(40, 5), pytest.param(100, 20, marks=pytest.mark.slow)], ids=["40 MB", "100 MB"]
)
def test_d6_memory_for_one_more_state_and_no_longer_than_needed(megabytes, saves, memory, tmp_path):  # noqa: F811
    """One copy of the state, and what is in the hands of the writer; malloc and the like are given a fifth."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("peaks of memory are measured through /proc/self/clear_refs")
    outcome = run(peaks, tmp_path, megabytes, saves, timeout=110)
    assert outcome.code == 0, outcome.output
    before, during, after = outcome.value
    print(f"D6: state {megabytes} MB; peak {before:.0f} MB before, {during:.0f} with {saves} saves, {after:.0f} after")
    assert during - before > 0.8 * megabytes  # else nothing was measured
    assert during - before < 1.2 * megabytes + 32
    assert after - before < 0.2 * megabytes + 32
