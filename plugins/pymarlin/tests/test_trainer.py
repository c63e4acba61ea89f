"""What programs for PyMarlin do around the loop: seeds, subclasses, checkpoints, attributes, and what is refused."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hookline.testing import TinyModule, digest
from hookline_pymarlin import (
    AbstractCheckpointer,
    Checkpoint,
    DDPTrainerBackend,
    DefaultCheckpointer,
    DefaultCheckpointerArguments,
    DistributedTrainingArguments,
    SingleProcess,
    SingleProcessAmp,
    SingleProcessApexAmp,
    SingleProcessDpSgd,
    Trainer,
    TrainerArguments,
    TrainerBackend,
    build_trainer_backend,
    rank_zero_only,
)
from hookline_runs import read_run

pytestmark = pytest.mark.plugins  # its trainer names those of the house
NOTHING = DefaultCheckpointerArguments(checkpoint=False)


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def arguments(**given):
    return TrainerArguments(
        **{"train_batch_size": 8, "val_batch_size": 8, "writers": [], "use_gpu": False, "checkpointer_args": NOTHING}
        | given
    )


def checkpoints(**given):
    return DefaultCheckpointerArguments(**given)


def train(module=None, **given):
    module = module or TinyModule(samples=16)
    trainer = Trainer(module, arguments(**given))
    trainer.train()
    return trainer


# Seeds --------------------------------------------------------------------------------


class Draws(TinyModule):
    """Remembers what comes first in each batch, and a random number."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def train_step(self, global_step, batch, device):
        self.drawn.append((batch[0][0, 0].item(), torch.rand(()).item()))
        return super().train_step(global_step, batch, device)


def drawn(by_script, **given):
    module = Draws()
    torch.manual_seed(by_script)
    train(module, **given)
    return module.drawn


def test_the_seed_of_the_script_decides():
    assert drawn(1) == drawn(1) != drawn(2)
    assert [first for first, _ in drawn(1)] != [first for first, _ in drawn(2)]
    assert drawn(1, seed=5) == drawn(2, seed=5)


def test_a_seed_that_comes_too_late_is_told_of(caplog):
    torch.manual_seed(3)
    trainer = Trainer(TinyModule(samples=16), arguments(epochs=2))
    another = Trainer(TinyModule(samples=16), arguments(epochs=2))
    another.train()
    trainer.validate()
    trainer.train()
    assert "torch.manual_seed" not in caplog.text
    trainer = Trainer(TinyModule(samples=16), arguments())
    torch.manual_seed(4)
    trainer.train()
    assert "torch.manual_seed(4) came after Trainer(…), which has taken the seed" in caplog.text


def test_with_ddp_the_seed_of_the_script_is_told_of(caplog):
    Trainer(TinyModule(), arguments(backend="ddp"))
    assert "with ddp all ranks need one seed, so torch.manual_seed has no effect: seed=0 is taken" in caplog.text
    caplog.clear()
    Trainer(TinyModule(), arguments(backend="ddp", seed=4))
    assert "seed" not in caplog.text


def test_a_run_that_goes_on_keeps_its_seed():
    def weights(by_script, **given):
        torch.manual_seed(by_script)
        module = TinyModule(samples=16)
        train(module, epochs=3, checkpointer_args=checkpoints(save_dir="c", **given))
        return digest(module.state_dict())

    whole = weights(0)
    assert weights(1, load_dir="c/model-1", load_filename="step-000000000002") == whole


# Backends -----------------------------------------------------------------------------


def test_backends_have_pymarlins_names():
    given = {
        "sp": SingleProcess(),
        "sp-amp": SingleProcessAmp(),
        "ddp": DDPTrainerBackend(SingleProcess()),
        "ddp-amp": DDPTrainerBackend(SingleProcessAmp()),
    }
    assert {name: build_trainer_backend(name).name for name in given} == {name: name for name in given}
    assert {name: backend.name for name, backend in given.items()} == {name: name for name in given}
    assert SingleProcessAmp(enable_amp=False).name == "sp"
    trainer = Trainer(TinyModule(samples=16), arguments(), SingleProcess())
    trainer.train()
    assert trainer.trainer_backend.get_state() == {"global_step_completed": 2, "batches_completed": 2}
    ranks = {row for part in Trainer(TinyModule(), arguments(), given["ddp"]).plan() for row in part["done_by"]}
    assert "ddp" in ranks


class Own(SingleProcess):
    def optimize(self, optimizers, schedulers): ...


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Own, "trainer_backend: a Own is none of SingleProcess, SingleProcessAmp and DDPTrainerBackend, so nothing"),
        (object, "trainer_backend: a object is none of"),
        (lambda: DDPTrainerBackend(Own()), "trainer_backend: a Own is none of"),
        (lambda: "spp", "trainer_backend='spp' must be one of sp, sp-amp, ddp, ddp-amp"),
        (SingleProcessApexAmp, "SingleProcessApexAmp is not here: apex is given up"),
        (SingleProcessDpSgd, "SingleProcessDpSgd is not here: differential privacy needs opacus"),
        (lambda: DDPTrainerBackend(SingleProcess(), 64), "gather_frequency=64 is not here: outputs are gathered whole"),
        (lambda: build_trainer_backend("sp-dp"), "trainer_backend_name='sp-dp' is not here"),
    ],
)
def test_other_backends_are_refused(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        Trainer(TinyModule(), arguments(), make())


def test_a_backend_without_a_trainer_knows_no_steps():
    assert issubclass(SingleProcess, TrainerBackend)
    with pytest.raises(RuntimeError, match="SingleProcess has no trainer yet"):
        SingleProcess().get_batches_completed()


@pytest.mark.parametrize(
    "launcher",
    [
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
    ],
)
def test_one_process_of_several_does_not_train_alone(monkeypatch, launcher):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match="backend='sp-amp' is for one process, and this is process 1 of 2 that .* take"
    ):
        Trainer(TinyModule(), arguments(backend="sp-amp"))
    with pytest.raises(ValueError, match="this is rank 1 of 2, as the launcher says"):
        arguments(backend="ddp", distributed_training_args=DistributedTrainingArguments())
    arguments(backend="ddp", distributed_training_args=DistributedTrainingArguments(global_rank=1, world_size=2))


def test_only_rank_zero_does_it_once_there_is_a_trainer(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    done = []

    @rank_zero_only
    def appends(value):
        """Say what it does."""
        done.append(value)
        return value

    assert appends(1) == 1
    trainer = Trainer(TinyModule(), arguments(backend="ddp"))
    assert appends(2) is None
    assert (done, rank_zero_only.rank, appends.__doc__) == ([1], 1, "Say what it does.")
    given = DistributedTrainingArguments(local_rank=1, global_rank=1, world_size=2)
    assert trainer.args.distributed_training_args == given
    assert (trainer.is_main_process, trainer.is_distributed, trainer.pergpu_global_batch_size) == (False, True, 4)


# Subclasses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("save_checkpoint", "Mine.save_checkpoint: nothing here calls it; give a checkpointer of your own"),
        ("load_checkpoints", "Mine.load_checkpoints: nothing here calls it; give a checkpointer of your own"),
        ("get_state", "Mine.get_state: nothing here calls it; give what a resumed run needs by the module's get_state"),
        ("train_sampler", "performs or wraps get_sampler"),
        ("gradient_accumulation", "give train_batch_size, gpu_batch_size_limit and val_batch_size"),
        ("_init_backend", "write a plugin of hookline"),
    ],
)
def test_what_a_subclass_overrides_in_vain_is_refused(name, words):
    mine = type("Mine", (type("Between", (Trainer,), {name: lambda self: None}),), {})
    with pytest.raises(TypeError, match=words):
        mine(TinyModule(), arguments())


def test_an_epoch_of_a_subclass_must_be_one_of_the_run():
    class Idle(Trainer):
        def train_epoch(self):
            return []

    with pytest.raises(TypeError, match=r"Idle.train_epoch\(\) did not call super\(\).train_epoch\(\), so nothing was"):
        Idle(TinyModule(), arguments()).train()
    with pytest.raises(RuntimeError, match=r"train_epoch\(\) is called by train\(\), once in each epoch"):
        Trainer(TinyModule(), arguments()).train_epoch()


def test_a_subclass_that_only_watches_changes_no_bit():
    class Watches(Trainer):
        def train_epoch(self):
            return super().train_epoch()

        def validate(self):
            return super().validate()

    bits = []
    for kind in (Trainer, Watches):
        torch.manual_seed(0)
        module = TinyModule()
        trainer = kind(module, arguments(epochs=2, gpu_batch_size_limit=4))
        trainer.train()
        bits.append((digest(module.state_dict()), trainer.core.metrics))
    assert bits[0] == bits[1]


def test_a_validation_may_be_left_out():
    class Seldom(Trainer):
        def validate(self):
            return super().validate() if self.last_epoch % 2 else []

    validated = []

    class Hears(TinyModule):
        def on_end_val_epoch(self, global_step):
            validated.append(global_step)

    trainer = Seldom(Hears(samples=16), arguments(epochs=4))
    trainer.train()
    assert validated == [2, 6]  # after the epochs 0 and 2, when the last one completed was -1 and 1
    assert trainer.core.metrics == {}


def test_a_callback_may_validate():
    class Asks(TinyModule):
        def on_end_train_step(self, global_step):
            if global_step == 1 and asks:
                heard.append(len(trainer.validate()[0]))

        def on_end_val_epoch(self, global_step):
            heard.append(("val", global_step, self.training))

    bits = []
    for kind, asks in ((Trainer, False), (Trainer, True), (type("Mine", (Trainer,), {"validate": count}), True)):
        heard = []
        torch.manual_seed(0)
        module = Asks(samples=16)
        trainer = kind(module, arguments())
        trainer.train()
        bits.append(digest(module.state_dict()))
        assert heard == [("val", 1, False), 2, ("val", 2, False)][2 - 2 * asks :]
        rows = read_run("checkpoints/model-" + str(len(bits))).rows
        assert [row["step"] for row in rows if "val_loss" in row] == [1, 2][1 - asks :]
    assert len(set(bits)) == 1
    assert counted == [1, 2]


counted = []


def count(self):
    counted.append(self.global_steps_finished)
    return Trainer.validate(self)


# Checkpoints --------------------------------------------------------------------------


def steps(folder):
    return [int(path.name.removeprefix("step-")) for path in sorted(Path(folder, "checkpoints").iterdir())]


def test_a_period_counts_from_the_first_epoch_and_the_last_is_saved(caplog):
    train(epochs=6, checkpointer_args=checkpoints(save_dir="c", period=2, file_prefix="line"))
    assert steps("c/line-1") == [2, 6, 10, 12]  # two steps an epoch: the indices 0, 2, 4, and 5, which is the last
    assert "checkpoints are folders in c/line-<number>/checkpoints, not files line_<epoch>.pt" in caplog.text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"model_state_save_dir": "models", "file_prefix": "line", "file_ext": "bin"}, ["models/line_model_1.bin"]),
        ({}, ["checkpoints/model_model_1.pt"]),
        ({"model_state_save_dir": None}, []),
        ({"model_state_save_dir": "models", "checkpoint": False}, []),
    ],
)
def test_the_model_is_saved_where_it_is_asked_for(given, expected):
    there = []

    class Looks(TinyModule):
        def on_end_train(self, global_step):
            there.extend(str(path) for path in Path().rglob("*_model_*"))

    module = Looks(samples=16)
    train(module, epochs=2, checkpointer_args=checkpoints(**given))
    assert there == expected
    assert not list(Path().rglob("models/*.safetensors"))
    for path in expected:
        assert digest(torch.load(path, weights_only=True)) == digest(module.get_state())


def test_a_job_that_is_begun_again_needs_no_other_arguments(caplog):
    again = {"save_dir": "c", "load_dir": "c"}
    first = train(epochs=1, checkpointer_args=checkpoints(**again))
    assert "load_dir='c' is save_dir, and has no run with a checkpoint: begin anew" in caplog.text
    Path("c/model-2/checkpoints").mkdir(parents=True)  # an attempt that died before its first checkpoint
    second = train(epochs=3, checkpointer_args=checkpoints(**again))
    assert (first.last_epoch, second.last_epoch) == (0, 2)
    assert read_run("c/model-1").status == "finished"
    assert steps("c/model-1") == [2, 4, 6]


def test_files_of_pymarlin_are_not_taken_for_a_run():
    Path("old").mkdir()
    for epoch in (0, 1):
        torch.save({}, f"old/model_{epoch}.pt")
    words = r"load_dir='old' has files of PyMarlin's own, model_1.pt, and no run. Load the weights yourself, before Tra"
    with pytest.raises(ValueError, match=words):
        Trainer(TinyModule(), arguments(checkpointer_args=checkpoints(load_dir="old")))


def test_schedules_begin_anew_for_the_epochs_that_are_left():
    asked = []

    class Asked(TinyModule):
        def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
            asked.append((estimated_global_steps_per_epoch, epochs))
            return super().get_optimizers_schedulers(estimated_global_steps_per_epoch, epochs)

    train(Asked(samples=16), checkpointer_args=checkpoints(save_dir="c"))
    again = {"checkpointer_args": checkpoints(save_dir="c", load_dir="c"), "reset_optimizers_schedulers": True}
    train(Asked(samples=16), epochs=4, **again)
    train(Asked(samples=16), epochs=4, reset_optimizers_schedulers=True)
    assert asked == [(2, 1), (2, 3), (2, 4)]


class Gives(AbstractCheckpointer):
    """Has what it is made of."""

    def __init__(self, given):
        self.given, self.loads = given, 0

    def save(self, checkpoint_state, index, force=False): ...

    def load(self):
        self.loads += 1
        return self.given


def test_weights_alone_are_loaded():
    weights = {name: value + 1 for name, value in TinyModule().state_dict().items()}
    checkpointer = Gives(Checkpoint(module_interface_state=weights))
    trainer = Trainer(TinyModule(), arguments(epochs=0), checkpointer=checkpointer)
    trainer.validate()
    assert digest(trainer.module.state_dict()) == digest(weights)
    assert checkpointer.loads == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, r"Gives.load\(\) must return a Checkpoint, Checkpoint\(\) where there is none; it is None"),
        (
            Checkpoint({}, {"last_epoch": 3, "optimizers": []}, {}),
            r"Gives.load\(\) returns a trainer_state of PyMarlin's own, with last_epoch, optimizers: such a run cannot "
            r"go on here. Return Checkpoint\(module_interface_state=…\) alone",
        ),
    ],
)
def test_what_a_checkpointer_may_not_load(given, words):
    with pytest.raises((TypeError, ValueError), match=words):
        Trainer(TinyModule(), arguments(), checkpointer=Gives(given)).train()


def test_a_default_checkpointer_finds_its_files():
    args = checkpoints(save_dir="c", model_state_save_dir="c", load_dir="c")
    checkpointer = DefaultCheckpointer(args)
    assert checkpointer.load() == Checkpoint()
    Trainer(TinyModule(samples=16), arguments(epochs=11), checkpointer=checkpointer).train()
    assert DefaultCheckpointer.get_latest_file("c", "model") == "c/model_10.pt"  # neither model_9 nor model_model_10
    assert checkpointer.load().trainer_backend_state == {"global_step_completed": 22, "batches_completed": 22}
    gone = DefaultCheckpointer(checkpoints(save_dir="c", load_dir="gone", load_filename="model_3.pt"))
    with pytest.raises(ValueError, match="load_dir='gone' has no model_3.pt"):
        gone.load()


def test_a_default_checkpointer_goes_on_with_the_same_bits():
    def trained(seed, **given):
        torch.manual_seed(seed)
        module = TinyModule(samples=16)
        checkpointer = DefaultCheckpointer(checkpoints(save_dir="c", **given))
        Trainer(module, arguments(epochs=3), checkpointer=checkpointer).train()
        return digest(module.state_dict())

    whole = trained(0)
    assert trained(1, load_dir="c", load_filename="model_0.pt") == whole
    given = checkpoints(save_dir="d", load_dir="c", load_filename="model_1.pt")
    trainer = Trainer(TinyModule(samples=16), arguments(epochs=3), checkpointer=DefaultCheckpointer(given))
    trainer.validate()  # as PyMarlin's examples do before they train
    trainer.train()
    assert digest(trainer.module.state_dict()) == whole
    assert trainer.global_steps_finished == 6
    assert sorted(os.listdir("d")) == ["model_2.pt"]


# Attributes ---------------------------------------------------------------------------


def test_a_trainer_has_pymarlins_attributes():
    module = TinyModule(samples=16)
    trainer = Trainer(module, arguments(epochs=2, gpu_batch_size_limit=4))
    with pytest.raises(RuntimeError, match="optimizers is known from the beginning of training on"):
        trainer.optimizers  # noqa: B018
    trainer.train()
    numbers = "pergpu_global_batch_size gradient_accumulation train_step_batch_size val_step_batch_size"
    assert [getattr(trainer, name) for name in numbers.split()] == [8, 2, 4, 8]
    counters = "global_steps_finished total_steps_finished last_epoch estimated_global_steps_per_epoch"
    assert [getattr(trainer, name) for name in counters.split()] == [4, 8, 1, 2]
    assert (trainer.is_main_process, trainer.is_distributed) == (True, False)
    assert trainer.args.distributed_training_args == DistributedTrainingArguments()
    assert issubclass(trainer.train_sampler, torch.utils.data.Sampler)
    assert trainer.val_sampler is not trainer.train_sampler
    assert list(trainer.get_state()) == ["last_epoch", "optimizers", "schedulers"]
    assert trainer.get_state()["optimizers"] == [trainer.optimizers[0].state_dict()]
    assert [type(one).__name__ for one in trainer.schedulers] == ["CosineAnnealingLR"]
    assert isinstance(trainer.checkpointer, DefaultCheckpointer)
    assert isinstance(trainer.logger, logging.Logger)
    with pytest.raises(RuntimeError, match="update_state\\(\\) is not here: give load_dir"):
        trainer.update_state({})
    with pytest.raises(RuntimeError, match="save_checkpoint\\(\\) is for callbacks of a run"):
        trainer.save_checkpoint()


def test_a_checkpoint_may_be_asked_for_in_a_callback():
    class Asks(TinyModule):
        def on_end_train_step(self, global_step):
            if global_step == 1:
                trainer.save_checkpoint(force=True)
                trainer.save_model_checkpoint()

    trainer = Trainer(
        Asks(samples=16), arguments(checkpointer_args=checkpoints(save_dir="c", model_state_save_dir="m"))
    )
    trainer.train()
    assert steps("c/model-1") == [1, 2]
    assert sorted(os.listdir("m")) == ["model_model_-1.pt", "model_model_0.pt"]  # the index of the last whole epoch


def test_arguments_that_change_too_late_are_refused():
    args = arguments(checkpointer_args=checkpoints(save_dir="c"))
    trainer = Trainer(TinyModule(samples=16), args)
    args.checkpointer_args.period = 3
    with pytest.raises(
        ValueError, match=r"checkpointer_args.period was 1 in the arguments of Trainer\(…\) and is 3 now"
    ):
        trainer.train()
    args.checkpointer_args.period, args.epochs = 1, 7
    with pytest.raises(
        ValueError, match=r"epochs was 1 in the arguments of Trainer\(…\) and is 7 now, which would have"
    ):
        trainer.validate()


# A whole program ----------------------------------------------------------------------

PROGRAM = """
import os

import torch
from torch.utils.data import DataLoader, TensorDataset

import hookline_pymarlin as data_interface
import hookline_pymarlin as trn
from hookline_pymarlin import CustomArgParser, DefaultCheckpointerArguments, ModuleInterface, global_stats


class Points(data_interface.DataProcessor):
    def process(self, number=48):
        inputs = torch.randn(number, 6)
        self.sets = {"train": TensorDataset(inputs, (inputs.sum(dim=1) > 0).long())}
        self.sets["val"] = self.sets["train"]
        return self.sets

    def analyze(self):
        print("samples", len(self.sets["train"]))


class Squares(data_interface.DataProcessor):
    def __init__(self, started):
        self.started = started

    def process(self, number, name, whole):
        return [(os.getpid() != self.started, number * number, name, whole)]


class Data(data_interface.DataInterface):
    def __init__(self, processor):
        self.sets = processor.process_data()

    def get_train_dataset(self):
        return self.sets["train"]

    def get_val_dataset(self):
        return self.sets["val"]


class Classifier(ModuleInterface):
    def __init__(self, data):
        super().__init__()
        self.data, self.net = data, torch.nn.Linear(6, 2)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.5, momentum=0.9)

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        return [self.optimizer], []

    def get_train_dataloader(self, sampler, batch_size):
        dataset = self.data.get_train_dataset()
        return DataLoader(dataset, batch_size=batch_size, sampler=sampler(dataset))

    def get_val_dataloaders(self, sampler, batch_size):
        dataset = self.data.get_val_dataset()
        return DataLoader(dataset, batch_size=batch_size, sampler=sampler(dataset))

    def train_step(self, global_step, batch, device):
        inputs, labels = batch[0].to(device), batch[1].to(device)
        return torch.nn.functional.cross_entropy(self.net(inputs), labels)

    def val_step(self, global_step, batch, device):
        inputs, labels = batch[0].to(device), batch[1].to(device)
        return torch.max(self.net(inputs).data, 1)[1], labels

    def on_end_train_step(self, global_step, loss):
        if global_step == 1:
            print(f"first loss {loss:.1f}")

    def on_end_val_epoch(self, global_step, *val_step_collated_outputs, key="default"):
        predicted, labels = val_step_collated_outputs
        accuracy = 100 * (predicted == labels).sum().item() / labels.size(0)
        global_stats.update("accuracy", accuracy)
        print(f"accuracy at step {global_step}: {accuracy > 60}")


if __name__ == "__main__":
    torch.manual_seed(1)
    squares = Squares(os.getpid())
    print(squares.multi_process_data([1, 2], "x", [[7, 8]], process_count=2))
    print(data_interface.DataInterface().multi_process_data(squares, [1, 2], "x", [[7, 8]], process_count=2))
    config = CustomArgParser(log_level="DEBUG").parse()
    args = trn.TrainerArguments(**config["tr"], checkpointer_args=DefaultCheckpointerArguments(checkpoint=False))
    trainer = trn.Trainer(module=Classifier(Data(Points())), args=args)
    trainer.validate()
    trainer.train()
"""
CONFIG = "tr:\n  epochs: 2\n  train_batch_size: 4\n  val_batch_size: 16\n  writers: [stdout]\n  disable_tqdm: true\n"


def test_a_whole_program_runs_as_a_script():
    Path("train.py").write_text(PROGRAM)
    Path("config.yaml").write_text(CONFIG)
    done = subprocess.run(
        [sys.executable, "train.py", "--tr.epochs", "3", "--local_rank", "0"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert printed[:2] == ["[(True, 1, 'x', [7, 8]), (True, 4, 'x', [7, 8])]"] * 2  # in processes of their own
    assert printed[2] == "samples 48"
    assert printed[-1] == "accuracy at step 36: True"
    assert any(line.startswith("first loss ") for line in printed)
    assert "step = 36, loss : " in done.stderr
    assert "step = 36, accuracy : " in done.stderr
    assert "--local_rank is in no part of the YAML, and is passed over" in done.stderr
