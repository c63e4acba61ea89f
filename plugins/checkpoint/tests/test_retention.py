"""Which checkpoints stay, and that a good one is there at every instant."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hookline import CallbackInterface, ModuleInterface, Trainer, hookimpl
from hookline_checkpoint import Checkpoint, storage
from hookline_checkpoint.retention import Retention, retain

LOSSES = [5.0, 2.0, 4.0, 1.0, 3.0, 6.0]  # of the evaluations after steps 1 to 6


class Told(ModuleInterface):
    """Two steps an epoch; the loss of the evaluation is what `LOSSES` says."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 1)

    def train_step(self, global_step, batch, device):
        return self.net(batch).mean()

    def val_step(self, global_step, batch, device):
        return torch.tensor(LOSSES[global_step - 1])

    def get_train_dataloader(self, sampler, batch_size):
        return [torch.ones(2, 1)] * 2

    def get_val_dataloaders(self, sampler, batch_size):
        return [torch.ones(2, 1)]

    def get_optimizers_schedulers(self, steps, epochs):
        return [torch.optim.SGD(self.parameters(), 0.01)], []


def trained(
    folder: Path,
    *plugins: Any,
    epochs: int = 3,
    evaluate_every: str | None = "1 step",
    module: Any = None,
    sanity: int = 0,
    **options: Any,
) -> None:
    given = {"every": "1 step", "keep_last": 1} | options
    resume = given.pop("resume", False)
    Trainer(
        module or Told(),
        [Checkpoint(**given), *plugins],
        epochs=epochs,
        evaluate_every=evaluate_every,
        sanity_val_steps=sanity,
        runs_folder=str(folder),
        resume=resume,
    ).train()


def home(folder: Path) -> Path:
    return folder / "run-1/checkpoints"


def steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in storage.listed(home(folder))]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


class Faults:
    """Is told of each operation on files before it is done, which a fault can stop."""

    def __init__(self) -> None:
        self.told: Callable[[str, tuple[Any, ...]], None] | None = None
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        told = self.told
        if told is not None and event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open", "shutil.rmtree"):
            self.told = None  # what it does itself is not told
            try:
                told(event, args)
            finally:
                self.told = told


FAULTS = Faults()  # a hook of the interpreter cannot be taken away


@pytest.fixture
def faults():
    yield FAULTS
    FAULTS.told = None


# Which --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, [6]),
        ({"keep_every": "3 steps"}, [6, 3]),
        ({"keep_every": "epoch"}, [6, 4, 2]),
        ({"keep_every": "2 epochs"}, [6, 4]),
        ({"keep_best": 1}, [6, 4]),
        ({"keep_best": 2}, [6, 4, 2]),
        ({"keep_best": 2, "mode": "max"}, [6, 1]),
        ({"keep_best": 1, "keep_every": "5 steps", "keep_last": 2}, [6, 5, 4]),
        ({"keep_best": 9}, [6, 5, 4, 3, 2, 1]),
    ],
)
def test_rules(options, left, tmp_path):
    trained(tmp_path, **options)
    assert steps(tmp_path) == left


def test_the_middle_of_an_epoch_is_no_epoch(tmp_path):
    """Steps 3 and 5 are in epochs 1 and 2, which are not complete."""
    trained(tmp_path, every=["3 steps", "5 steps"], keep_every="epoch")
    assert steps(tmp_path) == [6]


def test_of_one_evaluation_the_checkpoint_next_to_it_counts(tmp_path):
    trained(tmp_path, keep_best=2, evaluate_every="2 steps")  # 2: 2.0, 4: 1.0, 6: 6.0; 3 and 5 have the same metrics
    assert steps(tmp_path) == [6, 4, 2]


def test_rules_hold_over_a_resume_whatever_the_times_of_files_are(tmp_path):
    trained(tmp_path, keep_best=1, keep_every="3 steps", epochs=2)
    assert steps(tmp_path) == [4, 3]
    for number, path in enumerate(storage.listed(home(tmp_path))):
        os.utime(path, (number, number))
    trained(tmp_path, keep_best=1, keep_every="3 steps", resume=True)
    assert steps(tmp_path) == [6, 4, 3]


def test_only_good_ones_are_the_best(tmp_path):
    trained(tmp_path, keep_last=9, epochs=2)
    flip(home(tmp_path) / "step-000000000004/state.json")
    trained(tmp_path, keep_best=1, resume=str(home(tmp_path) / "step-000000000003"), epochs=3)
    assert steps(tmp_path) == [6, 4]  # 4 was done again, which made it good
    flip(home(tmp_path) / "step-000000000004/model.safetensors")
    retain(home(tmp_path) / "step-000000000006", Retention(1, None, 2, "val_loss", "min"), set())
    assert steps(tmp_path) == [6]


def test_a_value_that_is_no_number_is_never_the_best(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "LOSSES", [float("nan"), 2.0, float("-inf"), 3.0, 3.0, float("nan")])
    trained(tmp_path, keep_best=1)
    assert steps(tmp_path) == [6, 2]
    assert storage.verify(home(tmp_path) / "step-000000000006")["metrics"] == {"val_loss": "nan"}


class Scores(Told):
    """Has no loss; logs the values of `LOSSES` by another name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def val_step(self, global_step, batch, device):
        self.log(**{self.name: LOSSES[global_step - 1]})


class Blind(Told):
    """Has nothing to evaluate on."""

    def get_val_dataloaders(self, sampler, batch_size):
        return None


@pytest.mark.parametrize(
    ("name", "mode", "left"),
    [
        ("val_accuracy", None, [6, 1]),
        ("val_mse", None, [6, 4]),
        ("val_score", "max", [6, 1]),
        ("val_acc", "min", [6, 4]),
    ],
)
def test_the_best_is_what_the_name_or_the_option_says(name, mode, left, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "LOSSES", [7.0, 2.0, 4.0, 1.0, 3.0, 6.0])
    trained(tmp_path, module=Scores(name), keep_best=1, monitor=name, mode=mode)
    assert steps(tmp_path) == left


def test_a_monitor_of_which_nobody_knows_asks_for_the_mode_before_any_step(tmp_path):
    said = "checkpoint.monitor='val_score': nobody knows whether the smallest or the largest value of 'val_score' is"
    with pytest.raises(ValueError, match=said):
        trained(tmp_path, keep_best=1, monitor="val_score")
    assert steps(tmp_path) == []


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_monitor_that_no_evaluation_has_ends_the_run_when_its_state_is_saved(asynchronous, tmp_path):
    given = {"keep_best": 1, "every": "5 steps", "evaluate_every": "3 steps", "asynchronous": asynchronous}
    said = (
        "checkpoint.monitor='val_los': the evaluation has no metric 'val_los'; it has val_loss (what a training "
        "step logs is not among it). Correct the name, or log this value in every evaluation; step 3 is saved, to go on"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        trained(tmp_path, monitor="val_los", mode="min", **given)
    assert steps(tmp_path) == [3]
    trained(tmp_path, resume=True, **given)
    assert steps(tmp_path) == [6, 3]


def test_a_monitor_that_no_evaluation_has_is_found_before_any_step_where_that_is_known(tmp_path):
    with pytest.raises(ValueError, match="checkpoint.monitor='val_loss': the evaluation has no metric 'val_loss'; it"):
        trained(tmp_path, module=Scores("val_acc"), keep_best=1, sanity=1)
    assert steps(tmp_path) == []


def test_why_none_is_kept_as_the_best_is_said_at_the_end(tmp_path, caplog, monkeypatch):
    trained(tmp_path, module=Blind(), keep_best=1)
    monkeypatch.setitem(globals(), "LOSSES", [float("nan")] * 6)
    trained(tmp_path, keep_best=2)
    monkeypatch.setitem(globals(), "LOSSES", [1.0] + [float("nan")] * 5)
    trained(tmp_path, keep_best=3)
    assert [text for text in caplog.messages if text.startswith("checkpoint.")] == [
        "checkpoint.keep_best=1 has kept none as the best: no evaluation came after a step",
        "checkpoint.keep_best=2 has kept none as the best: no evaluation gave a finite val_loss",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep_every": "often"}, r"checkpoint\.keep_every='often': 'often' is not a cadence"),
        ({"keep_every": "10 min"}, r"checkpoint\.keep_every='10 min' counts seconds; count steps or epochs"),
        ({"keep_every": "0.5 epoch"}, r"checkpoint\.keep_every='0\.5 epoch' is a fraction; checkpoints stay by whole"),
        ({"keep_best": -1}, r"checkpoint\.keep_best=-1 must be at least 0"),
        ({"mode": "least"}, r"checkpoint\.mode='least' must be min or max, or null"),
        ({"monitor": "val_acc"}, r"checkpoint\.monitor='val_acc' and mode=None say what is the best, and keep_best=0"),
        ({"mode": "max"}, r"checkpoint\.monitor='val_loss' and mode='max' say what is the best, and keep_best=0 keeps"),
        ({"keep_last": None, "keep_best": 2}, r"checkpoint\.keep_last=null keeps all checkpoints, so keep_every and"),
    ],
)
def test_rules_that_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        Checkpoint(**options)


# What is read back --------------------------------------------------------------------


class Garbles(CallbackInterface):
    """Is a disk that keeps another bit of a file than was written, of the checkpoints from a step on."""

    def __init__(self, faults: Faults, step: int, once: bool = False) -> None:
        self.faults, self.once = faults, once
        self.name = f"step-{step:012d}"

    @hookimpl
    def on_begin_train(self) -> None:
        def garble(event: str, args: tuple[Any, ...]) -> None:
            if event == "os.rename" and ".tmp-" in str(args[0]) and Path(args[1]).name >= self.name:
                flip(Path(args[0]) / "model.safetensors")
                self.name = "t" if self.once else self.name

        self.faults.told = garble

    @hookimpl
    def on_end_run(self) -> None:
        self.faults.told = None


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("keep_last", [1, 2])
def test_older_ones_stay_where_the_newest_is_not_what_was_written(keep_last, asynchronous, tmp_path, faults):
    said = r"step-000000000004 reads back as something else than was written: model.safetensors has not the SHA-256"
    with pytest.raises(OSError, match=said):
        trained(tmp_path, Garbles(faults, 4), keep_last=keep_last, asynchronous=asynchronous)
    assert [step for step in steps(tmp_path) if storage.is_good(home(tmp_path) / f"step-{step:012d}")] == [3, 2][
        :keep_last
    ]
    trained(tmp_path, keep_last=keep_last, resume=True)
    assert steps(tmp_path) == [6, 5][:keep_last]


def test_the_next_save_tries_again_where_errors_are_gone_on_with(tmp_path, faults, caplog):
    trained(tmp_path, Garbles(faults, 6), on_error="go_on")
    assert [storage.is_good(path) for path in storage.listed(home(tmp_path))] == [False, True]
    assert steps(tmp_path) == [6, 5]
    assert "no checkpoint could be written: " in caplog.text
    assert "step-000000000006 reads back as something else than was written" in caplog.text
    trained(tmp_path / "another", Garbles(faults, 4, once=True), on_error="go_on")
    assert steps(tmp_path / "another") == [6]


# At every instant ---------------------------------------------------------------------


def test_a_good_one_is_there_before_and_after_every_file_operation(tmp_path, faults):
    trained(tmp_path, epochs=1)
    (first,) = storage.listed(home(tmp_path))
    checked = []

    def check(event, args):
        if event in ("os.remove", "os.rmdir") or str(home(tmp_path)) in str(args):
            assert any(storage.is_good(path) for path in storage.listed(home(tmp_path))), (event, args)
            checked.append(event)

    faults.told = check
    trained(tmp_path, resume=True)
    faults.told = None
    assert steps(tmp_path) == [6]
    assert not first.exists()
    assert len(checked) > 90
    assert {"os.rename", "os.remove", "shutil.rmtree", "os.mkdir"} <= set(checked)


@pytest.mark.parametrize("stage", ["model.safetensors", "state.json", "manifest.json", "step-000000000003"])
def test_a_save_that_fails_anywhere_leaves_what_was_good(stage, tmp_path, faults):
    trained(tmp_path, epochs=1)

    def fail(event, args):
        if event == "os.rename" and str(args[1]).endswith(stage):
            raise OSError(5, "Input/output error")
        if event == "open" and ".tmp-" in str(args[0]) and str(args[0]).endswith(stage):
            raise OSError(28, "No space left on device")

    faults.told = fail
    with pytest.raises(OSError, match="No space left|Input/output"):
        trained(tmp_path, resume=True)
    faults.told = None
    assert steps(tmp_path) == [2]
    assert storage.is_good(home(tmp_path) / "step-000000000002")
    assert [path.name for path in home(tmp_path).iterdir()] == ["step-000000000002"]
    trained(tmp_path, resume=True)
    assert steps(tmp_path) == [6]


class KilledError(BaseException):
    """The process dies, as far as one process can play it."""


def test_a_half_deleted_one_is_never_listed_and_swept_later(tmp_path, faults):
    trained(tmp_path, epochs=1, keep_last=2)
    removed = []

    def die(event, args):
        if event == "os.remove" and "owner-" not in str(args[0]):
            removed.append(args)
            if len(removed) == 3:
                raise KilledError

    faults.told = die
    with pytest.raises(KilledError):
        trained(tmp_path, resume=True)
    faults.told = None
    assert steps(tmp_path) == [3, 2]
    (trash,) = [path for path in home(tmp_path).iterdir() if path.name.startswith(".trash-")]
    assert len(list(trash.iterdir())) == 5  # of 7
    trained(tmp_path, resume=True)
    assert [path.name for path in home(tmp_path).iterdir()] == ["step-000000000006"]


def test_a_delete_that_fails_is_a_warning_and_tried_again(tmp_path, faults, caplog):
    class Mender(CallbackInterface):
        @hookimpl
        def on_checkpoint(self, path):
            if path.name.endswith("4"):
                faults.told = None

    def fail(event, args):
        if event == "os.rename" and ".trash-" in str(args[1]):
            raise OSError(16, "Device or resource busy")

    faults.told = fail
    trained(tmp_path, Mender())
    assert steps(tmp_path) == [6]
    said = [record for record in caplog.records if "cannot be removed" in record.message]
    assert {record.levelname for record in said} == {"WARNING"}
    assert len(said) == 1 + 2 + 3  # after steps 2, 3 and 4
    assert "is not needed any more and cannot be removed now: [Errno 16] Device or resource busy" in said[0].message
