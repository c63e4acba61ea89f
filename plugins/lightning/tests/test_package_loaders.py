"""Loaders, bases, parameters and configurations compared with the real package, by its own trainer."""

import warnings

import pytest
import torch
from plugins.lightning.tests.test_bases import OF_MODULES, calling_super, hparams_cases, points
from plugins.lightning.tests.test_loaders import EVALUATED, TRAINING, loader, plain
from torch import nn

import hookline_lightning
from hookline.config import build_trainer, load_config
from hookline.testing import digest
from hookline_lightning.cli.commands import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.plugins,
    pytest.mark.filterwarnings("ignore"),  # its own, of many kinds
]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lightning", reason="the real package is in an environment of its own: nox -s lightning")
    import lightning.pytorch as pl
    from lightning.pytorch.utilities import CombinedLoader

QUIET = {"enable_progress_bar": False, "logger": False, "num_sanity_val_steps": 0, "enable_checkpointing": False}
REAL = {**QUIET, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
TRAINERS = ((pl.Trainer, REAL), (hookline_lightning.Trainer, QUIET))


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def its(given):
    """Return loaders with the package's `CombinedLoader` in the place of ours."""
    if isinstance(given, hookline_lightning.CombinedLoader):
        return CombinedLoader(given.iterables, given.mode)
    return given


class Seen(pl.LightningModule):
    """Keeps the batches that it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((plain(batch), batch_idx))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen.append((plain(batch), batch_idx, dataloader_idx))
        self.log("index", float(dataloader_idx))

    test_step = validation_step

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return plain(batch), batch_idx, dataloader_idx

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 2}], ids=["all", "two"])
@pytest.mark.parametrize("name", TRAINING)
def test_training_batches_are_those_of_its_own_trainer(name, options):
    done = []
    for kind, more in TRAINERS:
        module = Seen()
        kind(max_epochs=2, **options, **more).fit(module, its(TRAINING[name][0]()))
        done.append(module.seen)
    assert done[0] == done[1]
    assert done[0]


@pytest.mark.parametrize("name", EVALUATED)
def test_batches_and_names_of_evaluations_are_those_of_its_own_trainer(name):
    make, done = EVALUATED[name][0], []
    for kind, more in TRAINERS:
        module, trainer = Seen(), kind(max_epochs=1, **more)
        trainer.fit(module, loader(2, 2), its(make()))
        named = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("index")}
        trainer.test(module, its(make()))
        predicted = None if name == "together" else trainer.predict(module, its(make()))
        done.append((module.seen, named, predicted))
    assert done[0] == done[1]


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size", "sequential"])
def test_a_combined_loader_gives_what_the_packages_gives(mode):
    def given(kind):
        combined = kind({"a": loader(6, 2), "b": [loader(10, 2), loader(2, 1)]}, mode)
        return [(plain(batch), index, number) for batch, index, number in combined], len(combined)

    assert given(hookline_lightning.CombinedLoader) == given(CombinedLoader)


@pytest.mark.parametrize("name", hparams_cases(pl.LightningModule))
def test_parameters_are_those_that_it_keeps(name):
    make, expected = hparams_cases(pl.LightningModule)[name]
    assert dict(make().hparams) == dict(make().hparams_initial) == expected


def line(base):
    class Line(base):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.net = nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return (self.net(batch[0]) - batch[1]).square().mean()

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

        def train_dataloader(self):
            return torch.utils.data.DataLoader(points(), 8)

        val_dataloader = train_dataloader

    return Line


def test_super_of_every_hook_is_called_and_does_what_it_does_there():
    done = []
    for (kind, more), base in zip(
        TRAINERS, (pl.LightningModule, hookline_lightning.LightningModule), strict=True
    ):  # fmt: skip
        module = calling_super(line(base), OF_MODULES)()
        kind(max_epochs=2, gradient_clip_val=0.5, **more).fit(module)
        done.append((digest(module.state_dict()), {*module.called}))
    assert done[0][0] == done[1][0]
    refused = {name for name in done[0][1] if "_model_" in name}  # events that are refused here if they are written
    assert done[0][1] - refused == done[1][1]


def test_a_configuration_with_its_callbacks_is_translated(capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "stops.py").write_text(
        "from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel\n\n\n"
        "class Stops(BoringModel):\n    def validation_step(self, batch, batch_idx):\n"
        "        self.log('val_loss', float(self.current_epoch))\n"
    )
    (tmp_path / "config.yaml").write_text(
        "trainer:\n  max_epochs: 9\n  logger: false\n  enable_progress_bar: false\n  callbacks:\n"
        "    - {class_path: EarlyStopping, init_args: {monitor: val_loss, patience: 1}}\n"
        "model: {class_path: stops.Stops}\n"
        "data: {class_path: lightning.pytorch.demos.boring_classes.BoringDataModule}\n"
    )
    assert main(["config.yaml"]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    trainer = build_trainer(load_config(tmp_path / "run.yaml"))
    trainer.train()
    assert (trainer.epoch, trainer.status) == (2, "stopped")
