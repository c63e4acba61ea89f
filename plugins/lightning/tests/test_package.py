"""With the real package: its demo modules and callbacks run here, with the losses of its own trainer."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hookline_lightning
from hookline.testing import digest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.plugins,
    pytest.mark.filterwarnings("ignore"),  # its own, of many kinds
]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lightning", reason="the real package is in an environment of its own: nox -s lightning")
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback
    from lightning.pytorch.demos.boring_classes import (
        BoringDataModule,
        BoringModel,
        DemoModel,
        ManualOptimBoringModel,
        RandomDataset,
    )
    from lightning.pytorch.demos.transformer import LightningTransformer

QUIET = {"enable_progress_bar": False, "logger": False, "num_sanity_val_steps": 0, "enable_checkpointing": False}
REAL = {**QUIET, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


class Losses(pl.Callback):
    def __init__(self):
        self.losses, self.rates, self.heard = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if outputs:
            self.losses.append(outputs["loss"].item())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_end(self, trainer, pl_module):
        self.heard.append({name: value.item() for name, value in sorted(trainer.callback_metrics.items())})


def random_data(*shape):
    torch.manual_seed(7)
    return RandomDataset(*shape)


def both(make, data, **options):
    """Train the same module by Lightning's trainer and by this one; return what both did."""
    done = []
    for kind, more in ((pl.Trainer, REAL), (hookline_lightning.Trainer, {**QUIET, "seed": 5})):
        torch.manual_seed(3)
        module, losses = make(), Losses()
        trainer = kind(**{"max_epochs": 2, "callbacks": [losses], "log_every_n_steps": 1, **more, **options})
        torch.manual_seed(11)
        if isinstance(data, dict):
            trainer.fit(module, **{name: given() for name, given in data.items()})
        else:
            trainer.fit(module, DataLoader(data), None)
        done.append((losses.losses, losses.rates, digest(module.state_dict()), losses.heard))
    return done


@pytest.mark.parametrize("make", [BoringModel, DemoModel, ManualOptimBoringModel])
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5}, {"accumulate_grad_batches": 2}, {"max_steps": 5}])
def test_the_demo_modules_have_the_losses_that_lightnings_own_trainer_gives_them(make, options):
    if make is ManualOptimBoringModel and ("gradient_clip_val" in options or "accumulate_grad_batches" in options):
        pytest.skip("Lightning refuses these for manual optimisation")
    theirs, ours = both(make, random_data(32, 16), **options)
    assert ours[:3] == theirs[:3]
    assert len(ours[1]) == (5 if "max_steps" in options else 32)


class Words(LightningTransformer):
    """The demo transformer on words that need no network, without dropout, for which both draw otherwise."""

    def __init__(self):
        super().__init__(vocab_size=16)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0

    def prepare_data(self):
        pass

    def train_dataloader(self):
        words = torch.randint(16, (8, 6), generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(words[:, :-1], words[:, 1:]), batch_size=2)


def test_the_demo_transformer_has_them_too():
    theirs, ours = both(Words, {})
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    assert len(ours[0]) == 8


class Logged(BoringModel):
    """Logs in all ways, with schedulers of all kinds."""

    scheduler = "plateau"

    def training_step(self, batch, batch_idx):
        loss = self.step(batch)
        self.log("train", loss, on_step=True, on_epoch=True)
        self.log("most", loss, on_step=False, on_epoch=True, reduce_fx="max")
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = self.step(batch)
        self.log("val", loss)
        self.log("all", loss, reduce_fx=torch.sum)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        kinds, looks = torch.optim.lr_scheduler, {"patience": 0, "threshold": 10.0}
        steps = self.trainer.estimated_stepping_batches
        made = {
            "plateau": {"scheduler": kinds.ReduceLROnPlateau(optimizer, **looks), "monitor": "all/dataloader_idx_1"},
            "steps": {"scheduler": kinds.StepLR(optimizer, 1, gamma=0.9), "interval": "step", "frequency": 3},
            "epochs": {"scheduler": kinds.ExponentialLR(optimizer, 0.5), "frequency": 2},
            "train": {"scheduler": kinds.ReduceLROnPlateau(optimizer, **looks), "monitor": "train"},
            "cycle": {"scheduler": kinds.OneCycleLR(optimizer, 0.1, total_steps=steps), "interval": "step"},
        }  # fmt: skip
        return {"optimizer": optimizer, "lr_scheduler": made[self.scheduler]}


@pytest.mark.parametrize("scheduler", ["plateau", "steps", "epochs", "train", "cycle"])
def test_values_and_learning_rates_are_those_of_lightnings_own_trainer(scheduler, monkeypatch):
    monkeypatch.setattr(Logged, "scheduler", scheduler)
    train, val = random_data(32, 8), random_data(32, 6)
    data = {
        "train_dataloaders": lambda: DataLoader(train, 2),
        "val_dataloaders": lambda: [DataLoader(val, 2), DataLoader(train, 2)],
    }
    monkeypatch.setattr(Logged, "val_dataloader", None)
    theirs, ours = both(Logged, data, max_epochs=4)
    assert ours[:3] == theirs[:3]
    for seen, expected in zip(ours[3], theirs[3], strict=True):
        assert seen == pytest.approx(expected)


class Gan(pl.LightningModule):
    """Two networks in turn; its noise depends on the batch alone, as both trainers seed otherwise."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(4, 32), nn.Linear(32, 1)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        noise = torch.randn(len(batch), 4, generator=torch.Generator().manual_seed(batch_idx))
        for optimizer, sign, real in ((first, -1.0, 0.0), (second, 1.0, 1.0)):
            self.toggle_optimizer(optimizer)
            loss = (sign * self.discriminator(self.generator(noise)) - real * self.discriminator(batch)).tanh().mean()
            optimizer.zero_grad()
            self.manual_backward(loss, retain_graph=False)
            self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        if self.trainer.is_last_batch:
            for scheduler in self.lr_schedulers():
                scheduler.step()
        return {"loss": loss}

    def configure_optimizers(self):
        made = [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.generator, self.discriminator)]
        return made, [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in made]


def test_networks_in_turn_have_the_weights_that_lightnings_own_trainer_gives_them():
    theirs, ours = both(Gan, random_data(32, 16))
    assert ours[:3] == theirs[:3]
    assert len(set(ours[1])) == 2


def test_a_run_of_its_module_goes_on_with_the_same_bits():
    class Fresh(BoringModel):
        def __init__(self):
            torch.manual_seed(2)
            super().__init__()

    def fit(folder, epochs, ckpt_path=None):
        module = Fresh()
        trainer = hookline_lightning.Trainer(
            max_epochs=epochs, default_root_dir=folder, **QUIET | {"enable_checkpointing": True}
        )
        trainer.fit(module, ckpt_path=ckpt_path)
        return digest(module.state_dict())

    whole = fit("whole", 3)
    fit("cut", 1)
    assert fit("cut", 3, "last") == whole


def test_its_data_module_and_its_early_stopping_work_here():
    def make():
        class Stops(BoringModel):
            def validation_step(self, batch, batch_idx):
                self.log("val_loss", float(self.current_epoch))

        return Stops()

    stopping = [EarlyStopping("val_loss", patience=1) for _ in range(2)]
    epochs = []
    for kind, more, callback in zip((pl.Trainer, hookline_lightning.Trainer), (REAL, QUIET), stopping, strict=True):
        trainer = kind(max_epochs=9, callbacks=[callback], **more)
        module = make()
        trainer.fit(module, datamodule=BoringDataModule())
        epochs.append((module.current_epoch, callback.stopped_epoch, callback.best_score.item()))
        assert trainer.test(module, datamodule=BoringDataModule()) == [{}]
    assert epochs[0][1:] == epochs[1][1:] == (1, 0.0)


def test_its_module_knows_its_run_and_a_copy_of_it_does_not():
    module = BoringModel()
    trainer = hookline_lightning.Trainer(max_epochs=1, callbacks=[LambdaCallback(on_train_start=print)], **QUIET)
    trainer.fit(module)
    assert (module.current_epoch, module.global_step, module.global_rank, module.device.type) == (1, 64, 0, "cpu")
    assert module.trainer.core is trainer.core
    assert digest(pickle.loads(pickle.dumps(module)).state_dict()) == digest(module.state_dict())
    with pytest.raises(RuntimeError, match="BoringModel is with no trainer yet"):
        copy.deepcopy(module).log("x", 1.0)


def test_weights_of_its_checkpoint_are_read_without_running_code():
    from hookline_checkpoint import load_foreign

    trainer = pl.Trainer(max_epochs=1, **{**REAL, "enable_checkpointing": True})
    module = BoringModel()
    trainer.fit(module)
    trainer.save_checkpoint("its.ckpt")
    ours = BoringModel()
    ours.load_state_dict(load_foreign("its.ckpt")["state_dict"])
    assert digest(ours.state_dict()) == digest(module.state_dict())
    with pytest.raises(ValueError, match='has weights and no state that a run goes on with: say "last"'):
        hookline_lightning.Trainer(**QUIET).fit(ours, ckpt_path="its.ckpt")


class Means(BoringModel):
    """Logs what its batches are, 0 to 9 in batches of 4, 4 and 2, and has a frozen norm."""

    def __init__(self, batch_size):
        super().__init__()
        self.size, self.norm, self.modes = batch_size, torch.nn.BatchNorm1d(32).requires_grad_(False).eval(), []

    def values(self, batch, batch_idx, name):
        given = {} if self.size is None else {"batch_size": self.size[batch_idx]}
        self.log(name, batch[1].mean(), on_step=False, on_epoch=True, **given)

    def training_step(self, batch, batch_idx):
        self.modes.append((self.training, self.norm.training))
        self.values(batch, batch_idx, "in_step")
        return self.layer(self.norm(batch[0])).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.values(batch, batch_idx, "behind_step")

    def validation_step(self, batch, batch_idx):
        self.values(batch, batch_idx, "val")


@pytest.mark.parametrize("batch_size", [None, [1, 1, 1], [1, 2, 7]], ids=["samples", "alike", "given"])
def test_means_and_modes_are_those_of_the_package(batch_size):
    numbers = TensorDataset(torch.zeros(10, 32), torch.arange(10.0))
    seen = []
    for kind, options in ((pl.Trainer, REAL), (hookline_lightning.Trainer, QUIET)):
        module, trainer = Means(batch_size), kind(max_epochs=2, **options)
        trainer.fit(module, DataLoader(numbers, 4), DataLoader(numbers, 4))
        values = {name: trainer.callback_metrics[name].item() for name in ("in_step", "behind_step", "val")}
        seen.append(({name: round(value, 5) for name, value in values.items()}, module.modes))
    assert seen[0] == seen[1]
