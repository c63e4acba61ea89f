"""Signals in real processes, and in this one where a second signal would not end it."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hookline import CallbackInterface, hookimpl
from hookline.testing import Memory, TinyModule, check_plugin, digest, tiny_trainer
from hookline_signals import Signals

MODULE = """
import os
import signal
import sys

from torch.utils.data import DataLoader, Dataset

from hookline.testing import TinyModule

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored


class Paused(TinyModule):
    '''Waits at a step until it is told to go on, twice, so that what was sent before has arrived.'''

    def __init__(self, at: int = 0, workers: int = 0):
        super().__init__()
        self.at, self.workers = at, workers

    def train_step(self, global_step, batch, device):
        print("step", global_step, flush=True)
        if global_step == self.at:
            for word in ("first", "second"):
                print(word, flush=True)
                sys.stdin.readline()
        return super().train_step(global_step, batch, device)

    def get_train_dataloader(self, sampler, batch_size):
        data = super().get_train_dataloader(sampler, batch_size).dataset
        if not self.workers:
            return DataLoader(data, batch_size, sampler=sampler(data))
        gated = Gated(data)
        workers = {"num_workers": self.workers, "multiprocessing_context": "fork"}
        return DataLoader(gated, batch_size, sampler=sampler(gated), **workers)


class Gated(Dataset):
    '''Loads the fourth batch when it is told to.'''

    def __init__(self, data):
        self.data, self.loaded = data, 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.loaded += 1
        if self.loaded == 25:
            os.read(os.open("gate", os.O_RDONLY), 1)
        return self.data[index]
"""
CONFIG = """
module: {_target_: paused.Paused}
trainer: {epochs: 2, train_batch_size: 8, val_batch_size: 8, device: cpu}
plugins:
  signals: {}
  checkpoint: {every: 100 steps}
"""
FILES = ("model.safetensors", "optim.safetensors", "rank-0000.safetensors")


class Run:
    """A process of the command line that may be paused."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        (folder / "paused.py").write_text(MODULE)
        (folder / "run.yaml").write_text(CONFIG)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hookline", "fit", "run.yaml", *arguments],
            cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def until(self, word: str) -> None:
        seen = []
        for line in self.process.stdout:
            if line.strip() == word:
                return
            seen.append(line)
        raise AssertionError(f"{word!r} was never said: {''.join(seen)}")

    def go_on(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output


def checkpoints(folder: Path, run: str) -> list[Path]:
    return sorted((folder / "runs" / run / "checkpoints").glob("*"))


@pytest.mark.plugins
def test_sigterm_saves_once_ends_with_143_and_the_resumed_run_has_the_same_bits(tmp_path):
    whole = Run(tmp_path, "trainer.run_name=whole")
    cut = Run(tmp_path, "trainer.run_name=cut", "module.at=10")
    cut.until("first")
    cut.process.send_signal(signal.SIGTERM)
    cut.go_on()
    cut.go_on()
    code, output = cut.end()
    assert code == 143
    assert "step 11" not in output
    assert [path.name for path in checkpoints(tmp_path, "cut-1")] == ["step-000000000010"]
    manifest = (checkpoints(tmp_path, "cut-1")[0] / "manifest.json").read_text()
    assert "received SIGTERM" in manifest
    code, output = Run(tmp_path, "trainer.run_name=cut", "--resume").end()
    assert code == 0
    assert "step 11" in output
    assert "step 10\n" not in output
    assert whole.end()[0] == 0
    ends = [checkpoints(tmp_path, run)[-1] for run in ("whole-1", "cut-1")]
    assert [end.name for end in ends] == ["step-000000000014"] * 2
    for name in FILES:
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name


@pytest.mark.plugins
@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (signal.SIGINT, signal.SIGINT, 130),
        (signal.SIGTERM, signal.SIGTERM, -signal.SIGTERM),
    ],
)
def test_a_second_signal_ends_at_once(first, second, code, tmp_path):
    run = Run(tmp_path, "module.at=3")
    run.until("first")
    run.process.send_signal(first)
    run.go_on()
    run.until("second")
    run.process.send_signal(second)
    ended, output = run.end()
    assert ended == code
    assert "\nstep" not in f"\n{output}"
    assert checkpoints(tmp_path, "run-1") == []


@pytest.mark.plugins
def test_ctrl_c_reaches_forked_workers_too_and_ends_none_of_them(tmp_path):
    os.mkfifo(tmp_path / "gate")
    gate = os.open(tmp_path / "gate", os.O_RDWR)
    run = Run(tmp_path, "module.at=3", "module.workers=1", "plugins.signals.exit_codes={SIGINT: 75}")
    run.until("first")
    os.killpg(run.process.pid, signal.SIGINT)
    run.go_on()
    run.go_on()
    os.write(gate, b"1")
    code, output = run.end()
    os.close(gate)
    assert code == 75, output
    assert [path.name for path in checkpoints(tmp_path, "run-1")] == ["step-000000000003"]


class Signalled(TinyModule):
    """Sends signals to its own process in the middle of a step."""

    def __init__(self, number, at=3):
        super().__init__()
        self.number, self.at = number, at

    def train_step(self, global_step, batch, device):
        if global_step == self.at:
            signal.raise_signal(self.number)
        return super().train_step(global_step, batch, device)


@pytest.fixture
def handlers():
    """Handlers of this test's own, so that they can be told from all others."""

    def mine(number, frame):
        raise InterruptedError(f"the former handler of {number}")

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    former = {number: signal.signal(number, mine) for number in numbers}
    yield mine
    for number, handler in former.items():
        signal.signal(number, handler)


def now():
    return {signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}


@pytest.mark.plugins
def test_a_second_signal_may_be_another_one(handlers):
    class Twice(Signalled):
        def train_step(self, global_step, batch, device):
            loss = super().train_step(global_step, batch, device)
            if global_step == self.at:
                signal.raise_signal(signal.SIGINT)
            return loss

    with pytest.raises(InterruptedError, match=f"the former handler of {signal.SIGINT:d}"):
        tiny_trainer([Signals()], Twice(signal.SIGTERM)).train()
    assert now() == {handlers}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_ends_at_the_boundary_with_one_save(number, code, handlers):
    memory = Memory()
    trainer = tiny_trainer([Signals(), memory], Signalled(number))
    trainer.train()
    assert (trainer.status, trainer.exit_code, trainer.stop_reason) == ("preempted", code, f"received {number.name}")
    assert list(memory.states) == [3]
    assert now() == {handlers}


@pytest.mark.parametrize(("within", "steps", "phase"), [(False, 1, 0), (True, 0, 2)])
def test_within_a_window_it_need_not_wait_for_the_step(within, steps, phase, handlers):
    class Windows(CallbackInterface):
        @hookimpl
        def get_window_size(self):
            return 3

    class Second(Signalled):
        batches = 0

        def train_step(self, global_step, batch, device):
            self.batches += 1
            if self.batches == 2:
                signal.raise_signal(signal.SIGTERM)
            return TinyModule.train_step(self, global_step, batch, device)

    memory = Memory()
    module = Second(signal.SIGTERM)
    trainer = tiny_trainer([Signals(within_window=within), memory, Windows()], module, train_batch_size=24)
    trainer.train()
    assert (trainer.status, trainer.exit_code, trainer.global_step) == ("preempted", 143, steps)
    assert len(memory.state.get("window", {"outputs": []})["outputs"]) == phase
    whole, resumed = (tiny_trainer([plugin, Windows()], train_batch_size=24) for plugin in (Memory(), memory))
    whole.train()
    resumed.train()
    assert digest(whole.module.state_dict()) == digest(resumed.module.state_dict())


def test_one_save_also_where_the_cadence_is_due(handlers):
    class Counting(Memory):
        reasons = ()

        @hookimpl(wrapper=True, specname="save")
        def count(self, reason):
            self.reasons = (*self.reasons, reason)
            return (yield)

    memory = Counting(every="3 steps")
    tiny_trainer([memory, Signals()], Signalled(signal.SIGTERM)).train()
    assert memory.reasons == ("every 3 steps, received SIGTERM",)


def test_sigusr1_saves_and_training_goes_on(handlers):
    memory, plain = Memory(), tiny_trainer()
    plain.train()
    trainer = tiny_trainer([Signals(), memory], Signalled(signal.SIGUSR1))
    trainer.train()
    assert (trainer.status, trainer.exit_code) == ("finished", 0)
    assert list(memory.states) == [3, 14]
    assert digest(trainer.module.state_dict()) == digest(plain.module.state_dict())
    assert now() == {handlers}


def test_which_signals_do_what_can_be_chosen(handlers):
    plugin = Signals(stop_on=["SIGUSR1"], save_on=["SIGUSR2"], exit_codes={"SIGUSR1": 99})
    trainer = tiny_trainer([plugin], Signalled(signal.SIGUSR1))
    trainer.train()
    assert (trainer.status, trainer.exit_code) == ("preempted", 99)
    with pytest.raises(InterruptedError, match=f"the former handler of {signal.SIGTERM:d}"):
        tiny_trainer([plugin], Signalled(signal.SIGTERM)).train()
    assert now() == {handlers}


def test_a_signal_in_the_last_step_leaves_a_finished_run(handlers):
    trainer = tiny_trainer([Signals()], Signalled(signal.SIGTERM, at=14))
    trainer.train()
    assert (trainer.status, trainer.exit_code) == ("finished", 0)


def test_the_next_run_is_not_ended_by_the_signal_of_the_one_before(handlers):
    plugin = Signals()
    tiny_trainer([plugin], Signalled(signal.SIGTERM)).train()
    trainer = tiny_trainer([plugin])
    trainer.train()
    assert trainer.status == "finished"


def test_former_handlers_are_back_after_an_error(handlers):
    class Broken(TinyModule):
        def train_step(self, global_step, batch, device):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tiny_trainer([Signals()], Broken()).train()
    assert now() == {handlers}


def test_in_an_evaluation_signals_do_what_they_did_before(handlers):
    class Evaluated(TinyModule):
        def val_step(self, global_step, batch, device):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(InterruptedError, match="the former handler"):
        tiny_trainer([Signals()], Evaluated()).validate()


def test_in_a_validation_of_training_they_wait_for_the_boundary(handlers):
    class Evaluated(TinyModule):
        def val_step(self, global_step, batch, device):
            if signal.getsignal(signal.SIGTERM) is not handlers:  # once, as the former handler takes the second
                signal.raise_signal(signal.SIGTERM)
            return super().val_step(global_step, batch, device)

    memory = Memory()
    trainer = tiny_trainer([Signals(), memory], Evaluated(), evaluate_every="epoch")
    trainer.train()
    assert (trainer.status, list(memory.states), trainer.counters.evaluations) == ("preempted", [7], 1)


def test_what_is_ignored_stays_ignored(handlers):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts a job in the background
    trainer = tiny_trainer([Signals()], Signalled(signal.SIGINT))
    trainer.train()
    assert trainer.status == "finished"
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_outside_of_the_main_thread_it_warns_and_handles_nothing(handlers):
    told = []

    class Watched(TinyModule):
        def train_step(self, global_step, batch, device):
            told.append(now())
            return super().train_step(global_step, batch, device)

    def train():
        with pytest.warns(UserWarning, match="outside of the main thread, which alone can handle signals"):
            trainer.train()

    trainer = tiny_trainer([Signals()], Watched())
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert trainer.status == "finished"
    assert told == [{handlers}] * 14


def test_contract():
    check_plugin(Signals)
    check_plugin(Signals, stop_on=[], save_on=[])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_on": ["SIGKILL"]}, r"signals\.stop_on: 'SIGKILL' is no signal that a program can catch; write names"),
        ({"save_on": ["USR1"]}, r"signals\.save_on: 'USR1' is no signal that a program can catch"),
        ({"save_on": ["SIGINT"]}, r"signals\.stop_on and signals\.save_on both name SIGINT; leave it in one"),
        ({"exit_codes": {"SIGHUP": 3}}, r"signals\.exit_codes\.SIGHUP=3: only signals of stop_on end a run: SIGTERM"),
        ({"exit_codes": {"SIGINT": 0}}, r"signals\.exit_codes\.SIGINT=0 must be from 1 to 255; 0 would say"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Signals(**options)
