"""Configurations of LightningCLI are translated to ones that hookline runs, with the same weights."""

import importlib
import sys

import pytest
import torch
import yaml

from hookline.commands import UserError
from hookline.config import build_trainer, load_config
from hookline.testing import digest
from hookline_lightning import Trainer
from hookline_lightning.cli.commands import main

pytestmark = pytest.mark.plugins

PROGRAM = """
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader, TensorDataset

from hookline_lightning import Callback, LightningDataModule, LightningModule


class Net(torch.nn.Module):
    def __init__(self, sizes, activation):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, sizes[0]), activation, torch.nn.Linear(sizes[0], 1))

    def forward(self, inputs):
        return self.layers(inputs)


class Line(LightningModule):
    def __init__(self, net, lr=0.1):
        super().__init__()
        self.save_hyperparameters(ignore="net")
        self.net = net

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class Given(Line):
    def __init__(self, net, optimizer):
        super().__init__(net)
        self.optimizer = optimizer

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Small(Line):
    def __init__(self, width=3, lr=0.1):
        super().__init__(Net([width], torch.nn.Tanh()), lr)


class Chosen(Small):
    def __init__(self, act: type[torch.nn.Module] | None = None, loss: Callable | None = None, name: str = "a.b"):
        super().__init__()
        self.chosen = act, loss, name


class Clips(Small):
    def configure_gradient_clipping(self, *_):
        pass


class Data(LightningDataModule):
    def __init__(self, batch_size=4, number=32):
        super().__init__()
        self.save_hyperparameters()

    def loader(self, shuffle):
        inputs = torch.linspace(-1, 1, 4 * self.hparams.number).view(-1, 4).sin()
        data = TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
        return DataLoader(data, self.hparams.batch_size, shuffle=shuffle)

    def train_dataloader(self):
        return self.loader(True)

    def val_dataloader(self):
        return self.loader(False)


class OwnLogger:
    name, version, save_dir, log_dir = "own", "0", None, None

    def log_metrics(self, metrics, step):
        pass

    def log_hyperparams(self, params, *_):
        pass


class Counts(Callback):
    heard = 0

    def __init__(self, by=1):
        self.by = by

    def on_train_batch_end(self, *_):
        Counts.heard += self.by
"""


@pytest.fixture(autouse=True)
def program(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "of_the_user.py").write_text(PROGRAM)
    importlib.invalidate_caches()
    yield importlib.import_module("of_the_user")
    del sys.modules["of_the_user"]


def translated(text, capsys, tmp_path, *words):
    """Return the configuration of hookline for one of LightningCLI, as data, and the trainer that it makes."""
    (tmp_path / "config.yaml").write_text(text)
    assert main([str(tmp_path / "config.yaml"), *words]) == 0
    said = capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(said)
    return yaml.safe_load(said), build_trainer(load_config(tmp_path / "run.yaml"))


def fitted(make, data, **arguments):
    """Return the weights that the trainer of this package gives a module, made under the seed."""
    torch.manual_seed(arguments.get("seed", 0))
    module = make()
    Trainer(enable_progress_bar=False, logger=False, **arguments).fit(module, datamodule=data)
    return digest(module.state_dict())


SAVED = """
seed_everything: 7
trainer:
  max_epochs: 2
  accelerator: cpu
  gradient_clip_val: 5e-1
  accumulate_grad_batches: 2
  val_check_interval: 1.0
  enable_progress_bar: false
  logger: false
  callbacks:
    - class_path: of_the_user.Counts
      init_args: {by: 10}
model:
  class_path: of_the_user.Line
  init_args:
    net:
      class_path: of_the_user.Net
      init_args:
        sizes: [3, 1]
        activation: {class_path: torch.nn.Tanh}
    lr: 5e-2
data:
  class_path: of_the_user.Data
  init_args: {batch_size: 8}
ckpt_path: null
weights_only: null
"""


def test_a_saved_configuration_trains_the_same_weights(program, capsys, tmp_path):
    tree, trainer = translated(SAVED, capsys, tmp_path)
    assert tree["module"] == {
        "_target_": "of_the_user.Line",
        "net": {"_target_": "of_the_user.Net", "sizes": [3, 1], "activation": {"_target_": "torch.nn.Tanh"}},
        "lr": 0.05,
    }
    assert tree["plugins"]["lightning"] == {
        "datamodule": {"_target_": "of_the_user.Data", "batch_size": 8},
        "callbacks": [{"_target_": "of_the_user.Counts", "by": 10}],
    }
    trainer.train()
    assert program.Counts.heard == 2 * 4 * 10
    weights = fitted(
        lambda: program.Line(program.Net([3, 1], torch.nn.Tanh()), 0.05), program.Data(8), seed=7, max_epochs=2,
        gradient_clip_val=0.5, accumulate_grad_batches=2,
    )  # fmt: skip
    assert digest(trainer.module.module.state_dict()) == weights


DUMP = """
seed_everything: true
trainer:
  accelerator: auto
  strategy: auto
  devices: auto
  num_nodes: 1
  precision: null
  logger: null
  callbacks: null
  fast_dev_run: false
  max_epochs: 2
  min_epochs: null
  max_steps: -1
  min_steps: null
  max_time: null
  limit_train_batches: null
  limit_val_batches: null
  limit_test_batches: null
  limit_predict_batches: null
  overfit_batches: 0.0
  val_check_interval: null
  check_val_every_n_epoch: 1
  num_sanity_val_steps: null
  log_every_n_steps: null
  enable_checkpointing: null
  enable_progress_bar: null
  enable_model_summary: null
  accumulate_grad_batches: 1
  gradient_clip_val: null
  gradient_clip_algorithm: null
  deterministic: null
  benchmark: null
  inference_mode: true
  use_distributed_sampler: true
  profiler: null
  detect_anomaly: false
  barebones: false
  plugins: null
  sync_batchnorm: false
  reload_dataloaders_every_n_epochs: 0
  default_root_dir: null
  enable_autolog_hparams: true
  model_registry: null
model: {class_path: of_the_user.Small, init_args: {width: 3, lr: 0.1}}
data: {class_path: of_the_user.Data}
optimizer: null
lr_scheduler: null
ckpt_path: null
weights_only: null
"""  # what LightningCLI of Lightning 2.6.6 saves where nothing but max_epochs is said


def test_a_file_with_every_argument_at_its_default_is_translated(program, capsys, tmp_path):
    _, trainer = translated(DUMP, capsys, tmp_path)
    trainer.train()
    assert digest(trainer.module.module.state_dict()) == fitted(program.Small, program.Data(), max_epochs=2)
    assert (trainer.epoch, trainer.options.seed) == (2, 0)


@pytest.mark.parametrize(
    ("argument", "steps", "validations"),
    [
        ("limit_train_batches: 0.45", 3, 1),  # of 8, which Lightning rounds down
        ("limit_train_batches: 3", 3, 1),
        ("limit_train_batches: 5\n  limit_val_batches: 0.45", 5, 1),
        ("val_check_interval: 0.3", 8, 4),  # after each 2 batches
        ("val_check_interval: 3", 8, 2),
        ("limit_val_batches: 0", 8, 0),
    ],
)
def test_limits_and_intervals_are_those_of_the_trainer(argument, steps, validations, program, capsys, tmp_path):
    head = f"trainer:\n  max_epochs: 1\n  num_sanity_val_steps: 0\n  {argument}\n"
    text = head + "model: {class_path: of_the_user.Small}\ndata: {class_path: of_the_user.Data}\n"
    _, trainer = translated(text, capsys, tmp_path)
    trainer.train()
    assert (trainer.global_step, trainer.counters.evaluations) == (steps, validations)


NAMES = """
trainer:
  max_epochs: 9
  logger: {class_path: CSVLogger, init_args: {save_dir: logs, name: lines}}
  callbacks:
    - {class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val_loss, min_delta: 1e9}}
    - {class_path: LearningRateMonitor}
    - of_the_user.Counts
model: {class_path: of_the_user.Small}
data: {class_path: of_the_user.Data}
"""


def test_callbacks_and_loggers_are_named_shortly_or_by_lightnings_paths(program, capsys, tmp_path):
    tree, trainer = translated(NAMES, capsys, tmp_path)
    named = [node["_target_"].rpartition(".")[2] for node in tree["plugins"]["lightning"]["callbacks"]]
    assert named == ["EarlyStopping", "Counts"]
    assert {"csv", "monitor"} <= tree["plugins"].keys()
    trainer.train()
    assert trainer.epoch == 4  # the first, and three that are no better
    assert program.Counts.heard == 4 * 8
    assert trainer.run_dir.parent.as_posix() == "logs/lines"


ARGUMENTS = """
trainer: {max_epochs: 1, enable_progress_bar: false, logger: false}
model: {width: 5}
data: {batch_size: 16}
"""


def test_arguments_alone_need_their_classes(program, capsys, tmp_path):
    words = ("--model", "of_the_user.Small", "--data", "of_the_user.Data")
    _, trainer = translated(ARGUMENTS, capsys, tmp_path, *words)
    trainer.train()
    assert digest(trainer.module.module.state_dict()) == fitted(
        lambda: program.Small(5), program.Data(16), max_epochs=1
    )
    (tmp_path / "config.yaml").write_text(ARGUMENTS)
    with pytest.raises(
        (ValueError, UserError), match="model: the file has only arguments .width.: say its class, --model package"
    ):
        main(["config.yaml"])


OPTIMIZERS = {
    "short names": "optimizer: {class_path: Adam, init_args: {lr: 0.01}}\n"
    "lr_scheduler: {class_path: StepLR, init_args: {step_size: 1, gamma: 0.5}}\n",
    "whole names": "optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.01}}\n"
    "lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 1, gamma: 0.5}}\n",
    "a value that is looked at": "optimizer: {class_path: Adam, init_args: {lr: 0.01}}\nlr_scheduler:\n"
    "  class_path: lightning.pytorch.cli.ReduceLROnPlateau\n"
    "  init_args: {monitor: val_loss, patience: 0, threshold: 1.0, factor: 0.5}\n",
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_the_configuration_takes_the_place_of_the_modules(name, program, capsys, tmp_path):
    head = "trainer: {max_epochs: 3, enable_progress_bar: false, logger: false}\n"
    model = "model: {class_path: of_the_user.Small}\ndata: {class_path: of_the_user.Data}\n"
    _, trainer = translated(head + model + OPTIMIZERS[name], capsys, tmp_path)
    trainer.train()

    class Adam(program.Small):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1.0, factor=0.5)
            if name.startswith("a value"):
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    assert digest(trainer.module.module.state_dict()) == fitted(Adam, program.Data(), max_epochs=3)
    assert trainer.optimizers[0].param_groups[0]["lr"] < 0.01


def test_an_optimizer_that_the_module_is_given_is_made_of_its_weights(program, capsys, tmp_path):
    text = """
fit:
  seed_everything: true
  trainer: {max_steps: 3, max_epochs: -1, enable_progress_bar: false, logger: false}
  model:
    class_path: of_the_user.Given
    init_args:
      net: {class_path: of_the_user.Net, init_args: {sizes: [2], activation: {class_path: torch.nn.ReLU}}}
      optimizer: {class_path: torch.optim.Adam, init_args: {lr: 1e-2}}
  data: of_the_user.Data
subcommand: fit
"""
    tree, trainer = translated(text, capsys, tmp_path)
    assert tree["trainer"]["seed"] == 0
    trainer.train()
    assert (trainer.global_step, type(trainer.optimizers[0]).__name__) == (3, "Adam")
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.01


def test_a_text_becomes_the_function_that_is_wanted(capsys, tmp_path):
    given = "{act: torch.nn.ReLU, loss: torch.nn.functional.mse_loss, name: c.d}"
    text = f"model: {{class_path: of_the_user.Chosen, init_args: {given}}}\n"
    _, trainer = translated(text, capsys, tmp_path)
    assert trainer.module.module.chosen == (torch.nn.ReLU, torch.nn.functional.mse_loss, "c.d")


@pytest.mark.parametrize(("given", "seed"), [("true", 0), ("false", 0), ("1", 1), ("0", 0), ("null", 0)])
def test_the_seed_is_that_of_the_file(given, seed, capsys, tmp_path):
    tree, _ = translated(f"seed_everything: {given}\n{MODEL}", capsys, tmp_path)
    assert tree["trainer"]["seed"] == seed


def test_a_run_is_gone_on_with(capsys, tmp_path):
    base = ARGUMENTS.replace("max_epochs: 1", "max_epochs: 2") + "ckpt_path: last\n"
    words = ("--model", "of_the_user.Small", "--data", "of_the_user.Data")
    tree, trainer = translated(base, capsys, tmp_path, *words)
    assert tree["trainer"]["resume"] is True
    trainer.train()
    again = build_trainer(load_config(tmp_path / "run.yaml", ["trainer.epochs=3"]))
    again.train()
    assert (trainer.global_step, again.global_step) == (4, 6)
    assert again.run_dir == trainer.run_dir


MODEL = "model: {class_path: of_the_user.Small}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1\n", "is no configuration of LightningCLI: it must be a mapping with seed_everything, trainer"),
        ("model: [\n", "config.yaml cannot be read: "),
        (MODEL + "trainers: {}\n", "trainers: this key is none of LightningCLI's own, did you mean 'trainer'?"),
        (MODEL + "early_stopping: {patience: 3}\n", "Callbacks with a key of their own go into trainer.callbacks"),
        ("trainer: {}\n", "model: there is none; say its class, --model package.module.Name"),
        (MODEL + "trainer: {max_epoch: 3}\n", "Trainer has no argument 'max_epoch', did you mean 'max_epochs'?"),
        (MODEL + "trainer: {min_epochs: 3}\n", "trainer.min_epochs: 3 cannot be said in a configuration; leave it out"),
        (MODEL + "trainer: {limit_train_batches: 0}\n", "trainer.limit_train_batches: 0 cannot be said"),
        (
            MODEL + "trainer: {logger: {class_path: of_the_user.OwnLogger}}\n",
            "trainer.logger: a OwnLogger cannot be said",
        ),
        (MODEL + "ckpt_path: a/b.ckpt\n", "ckpt_path: a/b.ckpt: say last, or the folder of a run"),
        (MODEL + "lr_scheduler: {class_path: StepLR}\n", "lr_scheduler: there is one and no optimizer; say both"),
        (MODEL + "optimizer: {lr: 0.1}\n", "optimizer: the file has only arguments .lr.: say its class, --optimizer"),
        (
            MODEL + "optimizer: {class_path: SGD}\nlr_scheduler: {class_path: ReduceLROnPlateau}\n",
            "lr_scheduler: ReduceLROnPlateau looks at a value: say which, init_args: {monitor",
        ),
        ("model: {class_path: Small}\n", "class_path 'Small' is no whole path of a class, such as package.module.Name"),
        ("model: {class_path: of_the_user.Smal}\n", "class_path 'of_the_user.Smal' cannot be imported"),
        (
            "model: {class_path: of_the_user.Clips}\ntrainer: {gradient_clip_val: 1.0}\n",
            "trainer.gradient_clip_val: of_the_user.Clips has a configure_gradient_clipping of its own",
        ),
    ],
)
def test_what_cannot_be_translated_is_refused_by_name(text, words, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises((ValueError, UserError), match=words):
        main(["config.yaml"])
