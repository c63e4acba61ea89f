"""Errors of real runs: what is saved of them is a state that the run has been in, and they are raised all the same."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from hookline import CallbackInterface, hookimpl
from hookline.testing import Memory, TinyModule, check_plugin, digest, tiny_trainer
from hookline_guard import Guard

LAST = 14


class Raising(TinyModule):
    """Raises once, at a place in the step after `at` steps."""

    def __init__(self, error, at=10, place="forward"):
        super().__init__()
        self.error, self.at, self.place = error, at, place

    def rise(self, place, step):
        if (place, step) == (self.place, self.at):
            raise self.error

    def train_step(self, global_step, batch, device):
        outputs = super().train_step(global_step, batch, device)  # batch norm and randomness have moved
        self.rise("forward", global_step - 1)
        return outputs

    @hookimpl
    def on_end_backward(self, global_step):
        self.rise("backward", global_step)

    @hookimpl
    def on_end_optimizer_step(self, trainer):
        self.rise("optimizer", trainer.global_step)

    @hookimpl
    def on_end_train_step(self, global_step):
        self.rise("step", global_step - 1)

    @hookimpl
    def on_end_validation(self, global_step):
        self.rise("validation", global_step - 1)


def failing(plugins, module, **options):
    trainer = tiny_trainer(plugins, module, evaluate_every="1 steps", **options)
    with pytest.raises(type(module.error)) as raised:
        trainer.train()
    assert raised.value is module.error
    assert trainer.status == "failed"
    return trainer


def end_of(trainer):
    state = trainer.hook.get_run_state(trainer=trainer)
    state["trainer"]["counters"]["seconds"] = None
    return digest(state)


@pytest.fixture(scope="module")
def whole():
    trainer = tiny_trainer([Memory()], evaluate_every="1 steps")  # who hears boundaries has losses kept
    trainer.train()
    return end_of(trainer)


@pytest.mark.parametrize("place", ["forward", "backward", "optimizer", "step", "validation"])
@pytest.mark.parametrize(("every", "at", "saved"), [("1 steps", 9, 9), ("4 steps", 10, 8), ("epoch", 9, 7)])
def test_what_is_saved_goes_on_to_the_same_bits(place, every, at, saved, whole):
    memory = Memory()
    module = Raising(torch.OutOfMemoryError("out of memory"), at, place)
    failing([Guard(every=every), memory], module)
    assert list(memory.states) == [saved]
    resumed = tiny_trainer([Memory(memory.state)], evaluate_every="1 steps")
    resumed.train()
    assert resumed.global_step == LAST
    assert end_of(resumed) == whole


@pytest.mark.plugins
def test_what_checkpoint_stores_of_it_goes_on_to_the_same_bits(tmp_path, whole):
    checkpoint = {"checkpoint": {"every": "100 steps"}}
    module = Raising(ZeroDivisionError(), place="optimizer")
    failing({**checkpoint, "guard": {"every": "4 steps"}}, module, runs_folder=str(tmp_path))
    resumed = tiny_trainer(checkpoint, evaluate_every="1 steps", runs_folder=str(tmp_path), resume=True)
    resumed.train()
    assert len(resumed.module.seen) == LAST - 8
    assert end_of(resumed) == whole


def test_it_changes_no_bit_of_the_run(whole):
    trainer = tiny_trainer([Guard(every="1 steps")], evaluate_every="1 steps")
    trainer.train()
    assert end_of(trainer) == whole


@pytest.mark.parametrize(
    ("errors", "error", "saves"),
    [
        (["any"], ZeroDivisionError(), True),
        (["error"], ZeroDivisionError(), True),
        (["error"], KeyboardInterrupt(), False),
        (["any"], SystemExit(3), True),
        (["keyboard"], KeyboardInterrupt(), True),
        (["keyboard"], MemoryError(), False),
        (["out_of_memory"], torch.OutOfMemoryError("of the device"), True),
        (["out_of_memory"], RuntimeError("CUDA out of memory"), True),
        (["out_of_memory"], RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (["out_of_memory"], MemoryError(), True),
        (["out_of_memory"], RuntimeError("shapes cannot be multiplied"), False),
        (["out_of_memory"], ValueError("out of memory"), False),
        (["keyboard", "out_of_memory"], KeyboardInterrupt(), True),
        (["keyboard", "out_of_memory"], ZeroDivisionError(), False),
    ],
)
def test_which_errors_lead_to_a_save(errors, error, saves):
    memory = Memory()
    failing([Guard(errors=errors, every="1 steps"), memory], Raising(error))
    assert list(memory.states) == ([10] if saves else [])


def test_memory_that_really_runs_out_is_known():
    class Greedy(TinyModule):
        def train_step(self, global_step, batch, device):
            if global_step == 3:
                torch.empty(2**58)
            return super().train_step(global_step, batch, device)

    memory = Memory()
    with pytest.raises(RuntimeError, match="alloc|memory"):
        tiny_trainer([Guard(["out_of_memory"], "1 steps"), memory], Greedy()).train()
    assert list(memory.states) == [2]


def test_what_is_on_disk_already_is_not_saved_again(caplog):
    memory = Memory(every="5 steps")
    failing([Guard(every="5 steps"), memory], Raising(ZeroDivisionError(), at=12))
    assert list(memory.states) == [5, 10]
    assert "guard has nothing to save: it holds no state that is newer than what is saved" in caplog.text


def test_it_says_what_it_saved(caplog):
    failing([Guard(every="4 steps"), Memory()], Raising(ZeroDivisionError()))
    assert "guard had the state of step 8 saved; the run raised after step 10" in caplog.text


def test_it_says_that_nobody_saves(caplog):
    failing([Guard(every="4 steps")], Raising(ZeroDivisionError()))
    assert "guard has the state of step 8, but nobody saves it: name a plugin that does" in caplog.text


def test_a_save_that_fails_is_told_with_the_error():
    class Full(CallbackInterface):
        @hookimpl
        def save(self):
            raise OSError("no space left")

    module = Raising(ZeroDivisionError())
    failing([Guard(every="4 steps"), Full()], module)
    assert any("and then OSError: no space left" in note for note in module.error.__notes__)


def test_with_several_ranks_nothing_is_saved(caplog):
    class Two(CallbackInterface):
        @hookimpl
        def get_ranks(self):
            return 0, 0, 2

    memory = Memory()
    failing([Guard(every="1 steps"), memory, Two()], Raising(ZeroDivisionError(), at=2))
    assert memory.states == {}
    assert "guard saves nothing: other ranks may still be training" in caplog.text


def test_an_evaluation_saves_nothing_of_the_training_before():
    class Evaluated(TinyModule):
        broken = False

        def val_step(self, global_step, batch, device):
            if self.broken:
                raise ZeroDivisionError
            return super().val_step(global_step, batch, device)

    class Refusing(Memory):
        @hookimpl
        def save(self, trainer):
            return bool(trainer.status == "failed" and super().save(trainer))

    memory, module = Refusing(), Evaluated()
    trainer = tiny_trainer([Guard(every="1 steps"), memory], module)
    trainer.train()
    module.broken = True
    with pytest.raises(ZeroDivisionError):
        trainer.validate()
    assert memory.states == {}


PROGRAM = """
import sys

from hookline.testing import TinyModule


class Paused(TinyModule):
    def train_step(self, global_step, batch, device):
        if global_step == 6:
            print("paused", flush=True)
            sys.stdin.readline()
        return super().train_step(global_step, batch, device)
"""
CONFIG = """
module: {_target_: paused.Paused}
trainer: {epochs: 2, train_batch_size: 8, val_batch_size: 8, device: cpu}
plugins:
  guard: {errors: [keyboard], every: 2 steps}
  checkpoint: {every: epoch}
"""


@pytest.mark.plugins
def test_ctrl_c_in_a_real_run(tmp_path):
    (tmp_path / "paused.py").write_text(
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n" + PROGRAM
    )
    (tmp_path / "run.yaml").write_text(CONFIG)
    process = subprocess.Popen(
        [sys.executable, "-m", "hookline", "fit", "run.yaml"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "paused\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "guard had the state of step 4 saved; the run raised after step 5" in errors
    assert [path.name for path in (tmp_path / "runs" / "run-1" / "checkpoints").iterdir()] == ["step-000000000004"]


def test_contract():
    check_plugin(Guard)
    check_plugin(Guard, errors=["keyboard"], every="epoch")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"errors": ["oom"]}, r"guard\.errors=\['oom'\] must name at least one of keyboard, out_of_memory, error, any"),
        ({"errors": []}, r"guard\.errors=\[\] must name at least one of"),
        ({"every": "100"}, r"guard\.every='100': .* is not a cadence"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Guard(**options)
