"""Row A of the fault catalogue: a run that is killed anywhere and goes on ends with the bits of one that was not.

Each run is a process of its own with the real plugins, killed by SIGKILL, and compared with a run R of the same
scenario without a fault: its last checkpoint by `hookline checkpoints diff`, samples and loss of each batch, the log.
Four epochs of 250 samples make 128 micro-batches of 8 (the last of an epoch has 2), or 44 steps in windows of 3.
"""

import functools
import hashlib
import json
import logging
import math
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import MeanSquaredError

from hookline import CallbackInterface, ModuleInterface, Trainer, hookimpl
from hookline.testing import Memory, TinyModule, digest, tiny_trainer
from hookline.testing.faults import PRELOADED, at_hook, kill, run
from hookline_accumulate import Accumulate
from hookline_amp import Amp
from hookline_checkpoint import Checkpoint
from hookline_checkpoint.compare import differences
from hookline_clip import Clip
from hookline_metrics import Metrics
from hookline_model_saving import ModelSaving
from hookline_runs import Jsonl, read_run
from hookline_signals import Signals

pytestmark = pytest.mark.plugins
PRELOADED.append(__name__)

STEPS, BATCHES = 44, 128
KILLED = -signal.SIGKILL

# The scenario -------------------------------------------------------------------------


class Samples(Dataset):
    """Numbers that are augmented at random wherever they are loaded."""

    def __init__(self, count=250):
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(count, 6, generator=generator)
        self.targets = self.inputs.sum(1, keepdim=True)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return index, self.inputs[index] + 0.1 * torch.rand(6), self.targets[index]


class Net(ModuleInterface):
    workers = 0
    persistent = False
    samples = 250

    def __init__(self):
        super().__init__()
        self.data = Samples(self.samples)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(6, 12),
            torch.nn.BatchNorm1d(12),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(12, 8),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(8, 1),
        )
        generator = torch.Generator().manual_seed(2)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.4, generator=generator)

    def train_step(self, global_step, batch, device):
        _, inputs, targets = batch
        predictions = self.layers(inputs).float()
        loss = torch.nn.functional.mse_loss(predictions, targets)
        self.log(over="epoch", epoch_loss=loss)
        self.log(over="epoch", reduce="max", epoch_worst=loss)
        self.log(reduce="last", last_loss=loss)
        return loss, predictions, targets

    def val_step(self, global_step, batch, device):
        _, inputs, targets = batch
        predictions = self.layers(inputs).float()
        return torch.nn.functional.mse_loss(predictions, targets), predictions, targets

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(
            self.data,
            batch_size,
            sampler=sampler(self.data),
            num_workers=self.workers,
            persistent_workers=self.persistent,
        )

    def get_val_dataloaders(self, sampler, batch_size):
        data = torch.utils.data.Subset(self.data, range(40))
        return DataLoader(data, batch_size, sampler=sampler(data))

    def get_optimizers_schedulers(self, steps, epochs):
        optimizer = torch.optim.Adam(self.parameters(), 0.02)
        return [optimizer], [lr_scheduler.CosineAnnealingLR(optimizer, steps * epochs)]


class Trace(CallbackInterface):
    """Writes down the number, the samples and the loss of each micro-batch."""

    @hookimpl(wrapper=True)
    def forward_backward(self, trainer, batch, index):
        outputs = yield
        row = [trainer.counters.batches + index, batch[0].tolist(), float(outputs[0].detach()).hex()]
        with (trainer.run_dir / "trace.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        return outputs


class Cut(CallbackInterface):
    """Ends training behind the micro-batch of this number, in the middle of its window."""

    def __init__(self, after=0):
        self.after = self.batches = after

    @hookimpl
    def on_end_backward(self, trainer):
        self.batches -= 1
        if self.batches == 0 and self.after:
            trainer.stop("cut", "preempted", 143, within_window=True)


def usual(every):
    """Return the plugins that most scenarios run with."""
    return [
        Checkpoint(every, keep_last=2, strict=True),
        Accumulate(3),
        Metrics(train={"mse": MeanSquaredError()}, val={"mse": MeanSquaredError()}),
        ModelSaving(["best_valid_loss", "best_train_loss"]),
        Clip(1.0),
        Signals(),
        Jsonl(),
    ]


NEVER = ("on_boundary", 10**9)


def trainer_of(
    folder, resume=False, fault=NEVER, cut=0, make=Net, plugins=usual, every="5 steps", others=(), **options
):
    """Return a trainer of the scenario that dies at the `nth` call of a hook, where `fault` names one."""
    hook, nth = fault
    given = {"epochs": 4, "train_batch_size": 24, "val_batch_size": 16, "seed": 7, "log_every": "3 steps"} | options
    everyone = [*plugins(every), *others, at_hook(hook, kill, nth), Cut(cut), Trace()]
    return Trainer(make(), everyone, runs_folder=str(folder), resume=resume, device="cpu", **given)


def train(folder, *args, **options):
    """Train in this process, which is a child's, and knows nothing of the randomness of the one before."""
    torch.manual_seed(random.SystemRandom().getrandbits(60))
    trainer = trainer_of(folder, *args, **options)
    trainer.train()
    return {"step": trainer.global_step, "status": trainer.status, "code": trainer.exit_code}


def child(folder, *args, **options):
    """Train in a process of its own."""
    return run(functools.partial(train, folder, *args, **options))


def killed(folder, fault, **options):
    """Train in a process that dies at a place."""
    outcome = child(folder, fault=fault, **options)
    assert outcome.code == KILLED, f"not killed at {fault}: {outcome}"
    return outcome


def finished(folder, steps=STEPS, **options):
    """Train in a process that comes to the end."""
    outcome = child(folder, **options)
    assert outcome.value == {"step": steps, "status": "finished", "code": 0}, outcome.output
    return outcome


# What is compared ---------------------------------------------------------------------


def last_checkpoint(folder):
    return max((folder / "run-1" / "checkpoints").glob("step-*"))


def trace(folder):
    """Return samples and loss by the number of the batch; what was trained again counts as it was at last."""
    lines = map(json.loads, (folder / "run-1" / "trace.jsonl").read_text().splitlines())
    rows = {number: (ids, loss) for number, ids, loss in lines}
    return [rows[number] for number in sorted(rows)]


def logged(folder):
    """Return what was logged, by step and name."""
    rows = read_run(folder / "run-1").rows
    return [{name: repr(value) for name, value in row.items() if name != "seconds"} for row in rows]


def models(folder):
    """Return what stands in the files of the saved models; with ties the bytes of a file are others each time."""
    home, found = folder / "run-1" / "models", {}
    for path in home.rglob("*.*"):
        name = str(path.relative_to(home))
        found[name] = digest(load_file(path)) if path.suffix == ".safetensors" else json.loads(path.read_text())
    return found


def assert_same(folder, whole, hint=""):
    """Fail with what differs between a run and the one without a fault."""
    apart = differences(last_checkpoint(whole), last_checkpoint(folder))
    assert [line for line in apart if not line.startswith("trainer.counters.seconds:")] == [], hint
    assert trace(folder) == trace(whole), hint
    assert logged(folder) == logged(whole), hint
    assert models(folder) == models(whole), hint


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Return a function that gives the folder of R with these options, trained once."""
    kept = {}

    def folder_of(**options):
        key = repr(sorted(options.items(), key=str))
        if key not in kept:
            kept[key] = tmp_path_factory.mktemp("whole")
            outcome = child(kept[key], **options)
            assert outcome.code == 0, outcome.output
        return kept[key]

    return folder_of


def test_the_reference_is_what_it_is_said_to_be(reference, tmp_path):
    whole = reference()
    rows = trace(whole)
    assert len(rows) == BATCHES
    for epoch in range(4):
        ids = [number for row in rows[32 * epoch : 32 * epoch + 32] for number in row[0]]
        assert sorted(ids) == list(range(250))
        assert [len(row[0]) for row in rows[32 * epoch : 32 * epoch + 32]] == [8] * 31 + [2]
    assert len({str(rows[32 * epoch]) for epoch in range(4)}) == 4
    columns = {"train_mse", "val_mse", "val_loss", "epoch_loss", "epoch_worst", "train_loss_epoch"}
    assert columns <= set(logged(whole)[3])
    assert {"best_valid_loss/model.safetensors", "best_train_loss/model.json"} <= set(models(whole))
    finished(tmp_path)
    assert_same(tmp_path, whole)


def test_a_difference_is_named(reference, tmp_path):
    finished(tmp_path, seed=8)
    with pytest.raises(AssertionError, match=r"module\.layers\.0\.weight: \d+ of 72 elements differ"):
        assert_same(tmp_path, reference())


# A1, A2 kills at random places --------------------------------------------------------

PLACES = {  # how often a hook is reached in R, at least
    "take_window": 48,
    "prepare_batch": BATCHES,
    "call_model": BATCHES,
    "scale_loss": BATCHES,
    "run_backward": BATCHES,
    "on_end_backward": BATCHES,
    "on_begin_optimizer_step": STEPS,
    "step_optimizer": STEPS,
    "on_end_optimizer_step": STEPS,
    "step_schedulers": STEPS,
    "on_end_train_step": STEPS,
    "on_end_val_step": 12,
    "on_end_validation": 4,
    "on_end_train_epoch": 4,
    "on_begin_train_epoch": 4,
    "filter_log": 23,
    "on_boundary": STEPS,
    "save": 9,
    "on_checkpoint": 9,
}


def places(seed, count):
    """Draw where to kill, repeatably."""
    chance = random.Random(seed)
    hooks = [chance.choice([*PLACES]) for _ in range(count)]
    return [(hook, chance.randint(1, PLACES[hook])) for hook in hooks]


def killed_and_resumed(folder, faults, **options):
    """Kill a run, and each resume of it, at these places, where it reaches them; then let it come to its end."""
    fell = 0
    for number, fault in enumerate(faults):
        outcome = child(folder, fault=fault, resume=number > 0, **options)
        assert outcome.code in ((KILLED, 0) if number else (KILLED,)), outcome.output
        fell += outcome.code == KILLED
    finished(folder, resume=True, **options)
    return fell


@pytest.mark.parametrize("place", places(1, 2), ids=str)
def test_a1_killed_at_a_random_place(place, reference, tmp_path):
    killed_and_resumed(tmp_path, [place])
    assert_same(tmp_path, reference(), f"places(1, 2): {place}")


@pytest.mark.slow
@pytest.mark.parametrize("place", places(2, 12), ids=str)
def test_a1_killed_at_12_random_places(place, reference, tmp_path):
    killed_and_resumed(tmp_path, [place])
    assert_same(tmp_path, reference(), f"places(2, 12): {place}")


def nearer(seed, count):
    """Draw places in the first sixth of what is left, so that each of several kills is reached."""
    return [(hook, 1 + nth % max(PLACES[hook] // 6, 1)) for hook, nth in places(seed, count)]


def test_a1_killed_twice(reference, tmp_path):
    faults = nearer(3, 2)
    assert killed_and_resumed(tmp_path, faults) == 2
    assert_same(tmp_path, reference(), f"nearer(3, 2): {faults}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 18))
def test_a1_killed_again_and_again(seed, reference, tmp_path):
    faults = nearer(seed, 4)
    assert killed_and_resumed(tmp_path, faults) >= 2
    assert_same(tmp_path, reference(), f"nearer({seed}, 4): {faults}")


class Loading(Net):
    workers = 2


class Persistent(Loading):
    persistent = True


PERSISTENT = {"make": Persistent, "keep_loaders": True}


def test_a2_killed_with_persistent_workers(reference, tmp_path):
    options = PERSISTENT | {"epochs": 2}
    killed(tmp_path, ("run_backward", 45), **options)
    finished(tmp_path, 22, resume=True, **options)
    assert_same(tmp_path, reference(**options))
    assert trace(tmp_path) == trace(reference(epochs=2))  # the number of workers changes no bit either


@pytest.mark.slow
@pytest.mark.parametrize("place", places(5, 12), ids=str)
def test_a2_killed_with_persistent_workers_at_12_random_places(place, reference, tmp_path):
    killed_and_resumed(tmp_path, [place], **PERSISTENT)
    assert_same(tmp_path, reference(**PERSISTENT), f"places(5, 12): {place}")


@pytest.mark.slow
@pytest.mark.parametrize("place", places(6, 3), ids=str)
def test_a2_killed_with_workers_of_each_epoch(place, reference, tmp_path):
    killed_and_resumed(tmp_path, [place], make=Loading)
    assert_same(tmp_path, reference(make=Loading), f"places(6, 3): {place}")


# A4 after each micro-batch of an epoch ------------------------------------------------

TWO = {"epochs": 2, "every": "2 steps"}
QUICK = [2, 32]


def check_killed_after(k, reference, folder):
    killed(folder, ("on_end_backward", k), **TWO)
    finished(folder, 22, resume=True, **TWO)
    assert_same(folder, reference(**TWO), f"k={k}")


def check_cut_after(k, reference, folder):
    steps, inside = k // 32 * 11 + k % 32 // 3, k % 32 % 3 != 0
    outcome = child(folder, cut=k, **TWO)
    assert outcome.value == {"step": steps, "status": "preempted", "code": 143}, outcome.output
    assert (last_checkpoint(folder).name != f"step-{steps:012}") == inside
    killed(folder, ("on_end_backward", 2), resume=True, **TWO)  # it can be gone on with more than once
    finished(folder, 22, resume=True, **TWO)
    assert_same(folder, reference(**TWO), f"k={k}")


@pytest.mark.parametrize("k", QUICK)
def test_a4_killed_after_a_micro_batch(k, reference, tmp_path):
    check_killed_after(k, reference, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("k", [k for k in range(1, 34) if k not in QUICK])
def test_a4_killed_after_each_micro_batch(k, reference, tmp_path):
    check_killed_after(k, reference, tmp_path)


@pytest.mark.parametrize("k", [7, 8])
def test_a4_cut_within_a_window(k, reference, tmp_path):
    check_cut_after(k, reference, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("k", [k for k in range(1, 34) if k not in (7, 8)])
def test_a4_cut_after_each_micro_batch(k, reference, tmp_path):
    check_cut_after(k, reference, tmp_path)


# A5 the end of an epoch ---------------------------------------------------------------


def check_end_of_epoch(fault, every, again, reference, folder, **options):
    """Kill at a place and go on; `again` micro-batches are then trained twice, and no others."""
    whole = reference(every=every, **options)
    killed(folder, fault, every=every, **options)
    finished(folder, resume=True, every=every, **options)
    assert_same(folder, whole, f"{fault} {every}")
    assert len((folder / "run-1" / "trace.jsonl").read_text().splitlines()) == BATCHES + again


ENDS = [
    # where, cadence of checkpoints, micro-batches from the last checkpoint to there that have been written down
    (("on_begin_train_epoch", 2), "11 steps", 0),  # a checkpoint on the last batch of the epoch
    (("on_end_val_step", 5), "5 steps", 5),  # inside the second validation, after step 22
]
MORE_ENDS = [
    (("on_end_backward", 33), "11 steps", 0),
    (("on_end_backward", 34), "11 steps", 1),
    (("on_end_val_step", 1), "5 steps", 2),
    (("on_end_val_step", 3), "epoch", 32),
    (("on_end_val_step", 6), "epoch", 32),
    (("on_begin_train_epoch", 3), "epoch", 0),
    (("on_end_train_epoch", 2), "epoch", 32),
    (("on_end_validation", 1), "1 step", 2),
    (("save", 1), "epoch", 32),
    (("save", 4), "epoch", 32),
    (("filter_log", 5), "11 steps", 32),  # the values of the epoch
    (("on_end_train", 1), "5 steps", 0),  # all is trained and saved
    (("on_end_run", 1), "5 steps", 0),
]


@pytest.mark.parametrize(("fault", "every", "again"), ENDS, ids=str)
def test_a5_killed_at_the_end_of_an_epoch(fault, every, again, reference, tmp_path):
    check_end_of_epoch(fault, every, again, reference, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "every", "again"), MORE_ENDS, ids=str)
def test_a5_killed_at_any_end_of_an_epoch(fault, every, again, reference, tmp_path):
    check_end_of_epoch(fault, every, again, reference, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("nth", "again"), [(1, 12), (5, 9), (9, 5)])
def test_a5_killed_inside_a_validation_in_mid_epoch(nth, again, reference, tmp_path):
    check_end_of_epoch(("on_end_val_step", nth), "5 steps", again, reference, tmp_path, evaluate_every="4 steps")


def test_a5_killed_between_the_last_checkpoint_and_the_last_line_of_the_log(reference, tmp_path):
    killed(tmp_path, ("filter_log", 23))  # of 14 intervals, 4 validations, 4 epochs and the rest
    assert last_checkpoint(tmp_path).name == f"step-{STEPS:012}"
    assert logged(tmp_path) != logged(reference())
    finished(tmp_path, resume=True)
    assert_same(tmp_path, reference())


# A7 before the first checkpoint, A8 after the end, A9 a longer run --------------------


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (("on_end_backward", 14), "no checkpoint yet in .*checkpoints: starting from scratch"),
        (("get_device", 1), "there is no run 'run' in .* to resume: starting from scratch"),
    ],
    ids=str,
)
def test_a7_killed_before_the_first_checkpoint(fault, said, reference, tmp_path):
    killed(tmp_path, fault)
    assert re.search(said, finished(tmp_path, resume=True).output)
    assert_same(tmp_path, reference())


def files(folder):
    """Return time and hash of each file and folder but the record, to which each session adds lines."""
    found = [path for path in folder.rglob("*") if path.name != "metrics.jsonl"]
    return {
        str(path): (path.stat().st_mtime_ns, path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest())
        for path in found
    }


def test_a8_a_finished_run_is_left_as_it_is(reference, tmp_path):
    shutil.copytree(reference(), tmp_path, dirs_exist_ok=True)
    before, record = files(tmp_path), (tmp_path / "run-1" / "metrics.jsonl").read_text()
    assert "nothing is left to train" in finished(tmp_path, resume=True).output
    assert files(tmp_path) == before
    assert (tmp_path / "run-1" / "metrics.jsonl").read_text().startswith(record)
    assert logged(tmp_path) == logged(reference())


def fit(path, *words):
    from hookline.cli import main

    return main(["fit", str(path), *words])


def test_a8_the_command_line_ends_with_0_on_a_finished_run(tmp_path):
    config = {
        "module": {"_target_": "hookline.testing.TinyModule"},
        "trainer": {"epochs": 2, "train_batch_size": 8, "device": "cpu", "runs_folder": str(tmp_path)},
        "plugins": {"checkpoint": {"every": "5 steps", "strict": True}, "jsonl": {}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    trained = run(fit, tmp_path / "run.yaml")
    assert (trained.code, last_checkpoint(tmp_path).name) == (0, f"step-{14:012}"), trained.output
    before = files(tmp_path)
    command = [sys.executable, "-m", "hookline", "fit", str(tmp_path / "run.yaml"), "trainer.resume=true"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 0, again.stderr
    assert "nothing is left to train: the run is at step 14, epoch 2" in again.stderr
    assert files(tmp_path) == before


class Steady(Net):
    """Its schedulers know no end."""

    def get_optimizers_schedulers(self, steps, epochs):
        optimizer = torch.optim.Adam(self.parameters(), 0.02)
        return [optimizer], [lr_scheduler.ExponentialLR(optimizer, 0.97), (lr_scheduler.StepLR(optimizer, 2), "epoch")]


LONGER = {"make": Steady, "log_every": "2 steps"}


def test_a9_a_longer_run_equals_one_that_was_that_long_from_the_beginning(reference, tmp_path):
    finished(tmp_path, 22, epochs=2, **LONGER)
    finished(tmp_path, resume=True, **LONGER)
    assert_same(tmp_path, reference(**LONGER))


@pytest.mark.slow
def test_a9_longer_from_mid_epoch_and_killed_on_the_way(reference, tmp_path):
    options = LONGER | {"eval_when_finish": False}
    finished(tmp_path, 18, max_steps=18, **options)
    killed(tmp_path, ("on_end_backward", 20), resume=True, **options)
    finished(tmp_path, resume=True, **options)
    assert_same(tmp_path, reference(**options))


# A10 the scaler of float16 ------------------------------------------------------------


class Overflow(CallbackInterface):
    """Makes the gradients of steps 4 and 9 infinite, and logs what the scaler and the scheduler do."""

    @hookimpl
    def on_end_backward(self, trainer):
        if trainer.global_step in (3, 8):
            next(trainer.module.parameters()).grad.view(-1)[0] = math.inf

    @hookimpl
    def on_end_train_step(self, trainer):
        state = trainer.plugins.get_plugin("amp").get_state()
        moved = trainer.schedulers[0].scheduler.last_epoch
        skipped = trainer.counters.skipped_steps
        trainer.log(reduce="last", moved=moved, skipped=skipped, **state)


def mixed(every):
    return [*usual(every), Amp("fp16", init_scale=1024.0, growth_interval=3), Overflow()]


MIXED = {"plugins": mixed, "epochs": 2, "log_every": "1 step"}


def check_scaler(fault, every, reference, folder):
    killed(folder, fault, every=every, **MIXED)
    finished(folder, 22, resume=True, every=every, **MIXED)
    assert_same(folder, reference(every=every, **MIXED), f"{fault} {every}")


def test_a10_killed_between_two_overflows(reference, tmp_path):
    check_scaler(("on_end_backward", 22), "5 steps", reference, tmp_path)
    rows = {int(row["step"]): row for row in logged(tmp_path)}
    scales = [float(rows[step]["scale"]) for step in range(1, 11)]
    assert scales == [1024, 1024, 2048, 1024, 1024, 1024, 2048, 2048, 1024, 1024]
    assert [float(rows[step]["growth_tracker"]) for step in range(1, 11)] == [1, 2, 0, 0, 1, 2, 0, 1, 0, 1]
    assert [float(rows[step]["moved"]) for step in range(1, 11)] == [1, 2, 3, 3, 4, 5, 6, 7, 7, 8]
    assert (float(rows[22]["skipped"]), float(rows[22]["moved"])) == (2, 20)


@pytest.mark.slow
@pytest.mark.parametrize("every", ["1 step", "3 steps", "4 steps"])
@pytest.mark.parametrize("fault", [("on_end_optimizer_step", 4), ("on_boundary", 4), ("step_optimizer", 9)], ids=str)
def test_a10_killed_at_an_overflow(fault, every, reference, tmp_path):
    check_scaler(fault, every, reference, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("k", [10, 11])
def test_a10_cut_within_the_window_of_an_overflow(k, reference, tmp_path):
    assert child(tmp_path, cut=k, **MIXED).value["status"] == "preempted"
    finished(tmp_path, 22, resume=True, **MIXED)
    assert_same(tmp_path, reference(**MIXED))


# A11 schedulers -----------------------------------------------------------------------


class Warmup:
    """A callable with a state."""

    def __init__(self, steps):
        self.steps = steps

    def __call__(self, step):
        return min(1.0, (step + 1) / self.steps)


def sequential(o):
    return lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o, 0.2, 1.0, 4), lr_scheduler.PolynomialLR(o, 9)], [5])


def chained(o):
    return lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o, 0.5, 6), lr_scheduler.ExponentialLR(o, 0.9)])


SCHEDULERS = {
    "chained": lambda o: [chained(o)],
    "constant": lambda o: [lr_scheduler.ConstantLR(o, 0.5, 9)],
    "cosine": lambda o: [lr_scheduler.CosineAnnealingLR(o, 21)],
    "restarts": lambda o: [lr_scheduler.CosineAnnealingWarmRestarts(o, 4, T_mult=2)],
    "cyclic": lambda o: [lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=4, mode="exp_range", gamma=0.99)],
    "cyclic_own": lambda o: [lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=4, scale_fn=lambda x: 0.9**x)],
    "exponential": lambda o: [lr_scheduler.ExponentialLR(o, 0.9)],
    "lambda": lambda o: [lr_scheduler.LambdaLR(o, lambda step: 0.9**step)],
    "lambda_object": lambda o: [lr_scheduler.LambdaLR(o, Warmup(12))],
    "linear": lambda o: [lr_scheduler.LinearLR(o, 0.1, 1.0, 15)],
    "multi_step": lambda o: [lr_scheduler.MultiStepLR(o, [3, 8, 9, 15])],
    "multiplicative": lambda o: [lr_scheduler.MultiplicativeLR(o, lambda step: 0.95)],
    "one_cycle": lambda o: [lr_scheduler.OneCycleLR(o, 0.1, total_steps=44, three_phase=True)],
    "plateau": lambda o: [lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5, cooldown=1)],
    "polynomial": lambda o: [lr_scheduler.PolynomialLR(o, 18, 2.0)],
    "sequential": lambda o: [sequential(o)],
    "step": lambda o: [lr_scheduler.StepLR(o, 4)],
    "swa": lambda o: [torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=12)],
    "per_epoch": lambda o: [(lr_scheduler.ExponentialLR(o, 0.5), "epoch")],
    "per_step_and_epoch": lambda o: [lr_scheduler.StepLR(o, 5), (lr_scheduler.CosineAnnealingLR(o, 3), "epoch")],
    "per_validation": lambda o: [(lr_scheduler.StepLR(o, 1), "validation")],
}


def test_a11_every_scheduler_of_torch_is_there():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1, momentum=0.9)
    made = {type(s[0] if isinstance(s, tuple) else s) for make in SCHEDULERS.values() for s in make(optimizer)}
    known = {getattr(lr_scheduler, name) for name in lr_scheduler.__all__}
    assert known - made == {lr_scheduler.LRScheduler}


def scheduled(name, base=Net):
    class Scheduled(base):
        def get_optimizers_schedulers(self, steps, epochs):
            optimizer = torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)
            return [optimizer], SCHEDULERS[name](optimizer)

    return Scheduled()


class Rates(CallbackInterface):
    """Keeps and logs what a scheduler changes, at each boundary and at each step."""

    def __init__(self):
        self.rates = {}

    @hookimpl
    def on_end_train_step(self, trainer):
        group = trainer.optimizers[0].param_groups[0]
        trainer.log(reduce="last", lr=group["lr"], momentum=group["momentum"])

    @hookimpl
    def on_boundary(self, trainer, global_step):
        group = trainer.optimizers[0].param_groups[0]
        self.rates[global_step] = float(group["lr"]), group["momentum"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a11_a_scheduler_goes_on(name):
    def rates_of(memory):
        rates = Rates()
        module = scheduled(name, TinyModule)
        trainer = tiny_trainer([memory, rates], module, epochs=3, evaluate_every="3 steps")
        trainer.train()
        assert trainer.global_step == 21
        return rates.rates

    kept = Memory(every="1 step")
    whole = rates_of(kept)
    assert len(set(whole.values())) > 1, "it does nothing"
    for step in (5, 14):
        memory = Memory(kept.states[step])
        assert rates_of(memory) == {at: rate for at, rate in whole.items() if at > step}
        assert digest(memory.state["schedulers"]) == digest(kept.states[21]["schedulers"])


def rated(every):
    return [*usual(every), Rates()]


def check_scheduler(name, reference, folder):
    options = {"make": functools.partial(scheduled, name), "plugins": rated, "epochs": 2, "log_every": "1 step"}
    options |= {"evaluate_every": "3 steps"}
    killed(folder, ("on_end_backward", 24), **options)
    finished(folder, 22, resume=True, **options)
    assert_same(folder, reference(**options), name)


def test_a11_a_scheduler_goes_on_from_a_file(reference, tmp_path):
    check_scheduler("sequential", reference, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "sequential"])
def test_a11_each_scheduler_goes_on_from_a_file(name, reference, tmp_path):
    check_scheduler(name, reference, tmp_path)


# A12 a metric of the epoch, A13 what plugins keep -------------------------------------


@pytest.mark.parametrize(
    "nth", [40, pytest.param(63, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow)]
)
def test_a12_a_metric_of_the_epoch_under_way_when_killed(nth, reference, tmp_path):
    options = {"epochs": 2, "every": "4 steps"}
    killed(tmp_path, ("on_end_backward", nth), **options)
    finished(tmp_path, 22, resume=True, **options)
    ours, theirs = ({row["step"]: row for row in logged(folder)} for folder in (tmp_path, reference(**options)))
    for name in ("train_mse", "train_loss_epoch", "epoch_loss", "epoch_worst", "val_mse"):
        assert ours["22"][name] == theirs["22"][name], name
    assert_same(tmp_path, reference(**options))


class Average(CallbackInterface):
    """Keeps a moving average of the weights, and evaluates and exports that one."""

    weights = None

    @hookimpl
    def on_begin_train(self, trainer):
        if self.weights is None:
            self.weights = {name: weight.detach().clone() for name, weight in trainer.module.named_parameters()}

    @hookimpl
    def on_end_train_step(self, trainer):
        for name, weight in trainer.module.named_parameters():
            self.weights[name].lerp_(weight.detach(), 0.1)

    def exchange(self, module):
        with torch.no_grad():
            for name, weight in module.named_parameters():
                kept = weight.clone()
                weight.copy_(self.weights[name])
                self.weights[name].copy_(kept)

    @hookimpl(wrapper=True)
    def evaluate(self, trainer):
        self.exchange(trainer.module)
        metrics = yield
        self.exchange(trainer.module)
        return metrics

    def get_state(self):
        return {"weights": self.weights}

    def update_state(self, state):
        self.weights = state["weights"]


class Patience(CallbackInterface):
    """Stops training when two evaluations in a row have not been better than the best."""

    def __init__(self):
        self.best, self.best_step, self.worse = math.inf, 0, 0

    @hookimpl
    def on_end_validation(self, trainer, global_step, metrics):
        if metrics["val_loss"] < self.best:
            self.best, self.best_step, self.worse = metrics["val_loss"], global_step, 0
        else:
            self.worse += 1
        if self.worse == 2:
            trainer.stop(f"no better since step {self.best_step}")

    def get_state(self):
        return vars(self)

    def update_state(self, state):
        vars(self).update(state)


def averaging(every):
    return [*usual(every), Average(), Patience()]


AVERAGED = {"plugins": averaging, "evaluate_every": "2 steps", "epochs": 8}


def check_what_plugins_keep(fault, reference, folder, **options):
    whole = reference(**AVERAGED)
    ended = [json.loads(line) for line in (whole / "run-1" / "metrics.jsonl").read_text().splitlines()][-1]
    best = models(whole)["best_valid_loss/model.json"]["step"]
    assert (ended["status"], ended["reason"]) == ("stopped", f"no better since step {best}")
    assert best > 20
    killed(folder, fault, **AVERAGED)
    outcome = child(folder, resume=True, **AVERAGED)
    assert outcome.value == {"step": ended["step"], "status": "stopped", "code": 0}, outcome.output
    assert_same(folder, whole, f"{fault}")


def test_a13_a_stop_an_average_and_the_best_model(reference, tmp_path):
    check_what_plugins_keep(("on_end_backward", 56), reference, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [("on_end_val_step", 28), ("on_end_validation", 9), ("on_boundary", 20), ("save", 4), ("on_end_train_epoch", 1)],
    ids=str,
)
def test_a13_killed_anywhere(fault, reference, tmp_path):
    check_what_plugins_keep(fault, reference, tmp_path)


# A16 another run ----------------------------------------------------------------------


class Ranks(CallbackInterface):
    @hookimpl
    def get_ranks(self):
        return 0, 0, 2


def net_of(samples):
    net = Net()
    net.data = Samples(samples)
    return net


class Other(Net):
    pass


def in_windows_of_2(every):
    return [Accumulate(2) if isinstance(plugin, Accumulate) else plugin for plugin in usual(every)]


def without_clip(every):
    return [plugin for plugin in usual(every) if not isinstance(plugin, Clip)]


CHANGES = {
    "world_size": ({"others": [Ranks]}, ["world_size: was 1, is 2", "plugins: now with ranks"]),
    "batch": ({"train_batch_size": 48}, ["train_batch_size: was 24, is 48", "batches_per_epoch: was 32, is 16"]),
    "length": (
        {"make": functools.partial(net_of, 200)},
        ["batches_per_epoch: was 32, is 25", "samples: was 250, is 200"],
    ),
    "seed": ({"seed": 8}, ["seed: was 7, is 8"]),
    "window": ({"plugins": in_windows_of_2}, ["window_size: was 3, is 2", "batches_per_epoch: was 32, is 21"]),
    "plugins": ({"plugins": without_clip}, ["plugins: now without clip"]),
    "code": ({"make": Other}, ["module: was Net, is Other"]),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    killed(folder, ("on_end_backward", 20))
    return folder


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_a16_what_is_another_run_is_refused_or_told(change, said, begun, tmp_path, caplog):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    before = files(tmp_path)

    def make(strict):
        options = change | {"others": [other() for other in change.get("others", ())]}
        trainer = trainer_of(tmp_path, resume=True, max_steps=7, **options)
        trainer.plugins.get_plugin("checkpoint").strict = strict
        return trainer

    with pytest.raises(ValueError, match="what follows is not what an unbroken run would do") as refused:
        make(strict=True).train()
    listed = str(refused.value).partition("was written otherwise: ")[2].partition(". Either go on as before")
    assert listed[0].split("; ") == said
    assert "turn checkpoint.strict off to go on nevertheless" in listed[2]
    assert {path: kept for path, kept in files(tmp_path).items() if path in before} == before
    caplog.clear()
    trainer = make(strict=False)
    trainer.train()
    told = [record for record in caplog.records if "is not what an unbroken run would do" in record.message]
    assert [record.levelno for record in told] == [logging.WARNING]
    assert told[0].message.endswith(f"was written otherwise: {'; '.join(said)}")
    assert (trainer.status, trainer.global_step) == ("finished", 7)


def test_a16_data_that_are_shorter_by_less_than_a_batch(begun, tmp_path, caplog):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="written otherwise: samples: was 250, is 249"):
        trainer_of(tmp_path, resume=True, make=functools.partial(net_of, 249), max_steps=7).train()


# A17 streams --------------------------------------------------------------------------


class Stream(IterableDataset):
    """Gives the same samples each time."""

    def __init__(self):
        self.given = 0

    def __iter__(self):
        data = Samples()
        for self.given in range(len(data)):
            yield self.given, data.inputs[self.given], data.targets[self.given]


class StreamWithState(Stream):
    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        raise AssertionError("the trainer drops what lies before its place, and asks for no state")


class Drawing(Stream):
    """Draws at random; loading is seeded for each batch."""

    def __iter__(self):
        for number, inputs, target in super().__iter__():
            yield number, inputs + torch.rand(6), target


def streaming(kind):
    class Streaming(Steady):
        def get_train_dataloader(self, sampler, batch_size):
            return DataLoader(kind(), batch_size)

    return Streaming()


def check_stream(kind, reference, folder):
    options = {"make": functools.partial(streaming, kind), "epochs": 2}
    killed(folder, ("on_end_backward", 20), **options)
    outcome = finished(folder, 22, resume=True, **options)
    said = "the training loader is a stream: its first 15 batches are loaded and dropped"
    assert outcome.output.count(said) == 1
    assert "This is exact if the stream gives the same each time" in outcome.output
    return reference(**options)


@pytest.mark.parametrize("kind", [Stream, StreamWithState, pytest.param(Drawing, marks=pytest.mark.slow)])
def test_a17_a_stream_is_replayed_with_what_it_draws_and_that_is_said(kind, reference, tmp_path):
    assert_same(tmp_path, check_stream(kind, reference, tmp_path))


# A19 ties, buffers and frozen layers --------------------------------------------------


class Tied(Net):
    """Two layers with one weight, a buffer that is not saved, a first layer that is frozen until the third epoch."""

    def __init__(self):
        super().__init__()
        first, second = torch.nn.Linear(12, 12), torch.nn.Linear(12, 12)
        with torch.no_grad():
            first.weight.copy_(torch.eye(12) + 0.1)
            for layer in (first, second):
                layer.bias.zero_()
        second.weight = first.weight
        self.layers = torch.nn.Sequential(*self.layers[:4], first, torch.nn.Tanh(), second, *self.layers[4:])
        self.register_buffer("means", torch.linspace(-0.1, 0.1, 6), persistent=False)
        self.layers[0].requires_grad_(False)

    def on_begin_train_epoch(self, global_step, epoch):
        self.layers[0].requires_grad_(epoch >= 2)

    def train_step(self, global_step, batch, device):
        ids, inputs, targets = batch
        return super().train_step(global_step, (ids, inputs - self.means, targets), device)


class Thawing(Tied):
    """Its first layer is unfrozen once."""

    def on_begin_train_epoch(self, global_step, epoch):
        if epoch == 2:
            self.layers[0].requires_grad_(True)


def check_tied(make, nth, reference, folder):
    killed(folder, ("on_end_backward", nth), make=make)
    finished(folder, resume=True, make=make)
    assert_same(folder, reference(make=make), f"{make.__name__} {nth}")
    assert models(folder)["best_valid_loss/model.json"]["tied"] == {"layers.6.weight": "layers.4.weight"}


@pytest.mark.parametrize("nth", [pytest.param(50, marks=pytest.mark.slow), 80])
def test_a19_ties_buffers_and_frozen_layers(nth, reference, tmp_path):
    check_tied(Tied, nth, reference, tmp_path)


@pytest.mark.parametrize("nth", [pytest.param(80, marks=pytest.mark.slow), 115])
def test_a19_a_layer_that_was_unfrozen_once(nth, reference, tmp_path):
    check_tied(Thawing, nth, reference, tmp_path)
