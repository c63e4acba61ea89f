"""Programs for today's Lightning run here without its package: as hand-ported, cut and gone on with, on two ranks."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split

import hookline
from hookline import CallbackInterface, ModuleInterface, hookimpl
from hookline.data import sharded
from hookline.testing import calls_per_step, check_plugin, digest, hand_written_loop, run_ranks
from hookline.testing.faults import PRELOADED, at_hook, kill, run
from hookline_lightning import Callback, Lightning, LightningDataModule, LightningModule, Trainer
from hookline_runs import read_run

PRELOADED += ["hookline_lightning", "torchmetrics"]
pytestmark = pytest.mark.plugins  # its trainer names those of the house


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


# Programs -----------------------------------------------------------------------------


def points(number=48, seed=1):
    inputs = torch.randn(number, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, (inputs.sum(dim=1) > 0).long())


class Autoencoder(LightningModule):
    """An encoder and a decoder, in the style of Lightning's README, on random pictures in the place of MNIST."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.encoder = nn.Sequential(nn.Linear(28 * 28, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 28 * 28))

    def forward(self, x):
        return self.encoder(x)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        x = x.view(x.size(0), -1)
        loss = functional.mse_loss(self.decoder(self.encoder(x)), x)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def pictures(number=32):
    return TensorDataset(torch.rand(number, 1, 28, 28, generator=torch.Generator().manual_seed(2)), torch.zeros(number))


class Data(LightningDataModule):
    """Data that are split at random in `setup`."""

    def __init__(self, batch_size=8):
        super().__init__()
        self.save_hyperparameters()
        self.heard = []

    def prepare_data(self):
        self.heard.append("prepare")

    def setup(self, stage):
        self.heard.append(stage)
        self.train, self.val = random_split(points(64), [48, 16])

    def teardown(self, stage):
        self.heard.append(f"no {stage}")

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return [DataLoader(self.val, batch_size=8), DataLoader(points(20, 5), batch_size=8)]

    def test_dataloader(self):
        return DataLoader(points(20, 5), batch_size=8)

    def predict_dataloader(self):
        return DataLoader(points(20, 5), batch_size=8)

    def state_dict(self):
        return {"heard": len(self.heard)}

    def load_state_dict(self, state):
        self.heard.append(state)


class Classifier(LightningModule):
    """A classifier with hparams, metric objects, values of all kinds, and a scheduler that looks at one."""

    def __init__(self, lr=0.05, width=16):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 2))
        self.train_acc = torchmetrics.classification.MulticlassAccuracy(2, average="micro")
        self.val_acc = torchmetrics.classification.MulticlassAccuracy(2, average="micro")

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        logits = self(inputs)
        loss = functional.cross_entropy(logits, labels)
        self.train_acc(logits, labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
        self.log("both", loss, sync_dist=True, logger=False)
        self.log("most", batch_idx, on_step=False, on_epoch=True, reduce_fx="max")
        return {"loss": loss, "logits": logits.detach()}

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        inputs, labels = batch
        logits = self(inputs)
        self.val_acc(logits, labels)
        self.log_dict({"val_loss": functional.cross_entropy(logits, labels), "val_acc": self.val_acc})
        self.log("val_all", functional.cross_entropy(logits, labels), add_dataloader_idx=False)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch):
        return self(batch[0]).argmax(dim=1)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_all"}}


class Gan(LightningModule):
    """Two networks that are trained in turn, each by its own optimizer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        real, _ = batch
        generator, discriminator = self.optimizers()
        for name, optimizer in (("d", discriminator), ("g", generator)):
            self.toggle_optimizer(optimizer)
            loss = gan_loss(self, name, real)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            self.log(f"{name}_loss", loss, prog_bar=True)
        if self.trainer.is_last_batch:
            self.lr_schedulers().step()

    def configure_optimizers(self):
        generator = torch.optim.Adam(self.generator.parameters(), lr=0.01, betas=(0.5, 0.999))
        discriminator = torch.optim.Adam(self.discriminator.parameters(), lr=0.02)
        return [generator, discriminator], [torch.optim.lr_scheduler.StepLR(generator, 1, gamma=0.9)]


def gan_loss(module, name, real):
    fake = module.generator(torch.randn(len(real), 4))
    if name == "g":
        return functional.softplus(-module.discriminator(fake)).mean()
    return (
        functional.softplus(module.discriminator(fake.detach())) + functional.softplus(-module.discriminator(real))
    ).mean()


QUIET = {"enable_progress_bar": False, "logger": False, "num_sanity_val_steps": 0}


def test_contract():
    check_plugin(Lightning)


def test_an_autoencoder_trains_from_a_loader():
    module = Autoencoder()
    trainer = Trainer(max_epochs=2, log_every_n_steps=1, **QUIET)
    trainer.fit(model=module, train_dataloaders=DataLoader(pictures(), batch_size=8))
    assert (trainer.core.status, trainer.core.global_step, module.current_epoch) == ("finished", 8, 2)
    rows = read_run("runs/lightning-1").rows
    assert [row["train_loss"] == row["loss"] for row in rows] == [True] * 8
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert module(torch.rand(2, 784)).shape == (2, 3)


class Watching(Callback):
    """Hears everything, and has a state."""

    def __init__(self):
        self.heard, self.best, self.given = [], None, None

    def on_sanity_check_end(self, trainer, pl_module):
        self.heard.append("sane")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.heard.append((trainer.current_epoch, batch_idx, trainer.global_step, len(outputs["logits"]), len(batch)))

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.best = min(self.best or 9.0, trainer.callback_metrics["val_all"].item())
            assert not pl_module.training

    def state_dict(self):
        return {"best": self.best}

    def load_state_dict(self, state):
        self.given = state


def test_a_classifier_with_a_data_module_and_callbacks():
    watching, data, module = Watching(), Data(), Classifier(width=8)
    assert module.hparams == {"lr": 0.05, "width": 8}
    trainer = Trainer(max_epochs=2, callbacks=[watching], log_every_n_steps=3, **QUIET | {"num_sanity_val_steps": 1})
    trainer.fit(module, datamodule=data)
    assert data.heard == ["prepare", "fit", "no fit"]
    batches = [(epoch, index, 6 * epoch + index, 8, 2) for epoch in (0, 1) for index in range(6)]
    batches = [(epoch, index, step + 1, *rest) for epoch, index, step, *rest in batches]
    assert watching.heard == ["sane", *batches]
    values = trainer.callback_metrics
    assert values["train_loss"] == values["train_loss_epoch"]
    assert values["most"] == 5.0
    two = [values[f"val_loss/dataloader_idx_{number}"].item() for number in (0, 1)]
    assert values["val_all"].item() == pytest.approx((16 * two[0] + 20 * two[1]) / 36)
    accuracies = [values[f"val_acc/dataloader_idx_{number}"].item() for number in (0, 1)]
    first, second = accuracy(module, data.val), accuracy(module, points(20, 5))
    assert accuracies == pytest.approx([first, (16 * first + 20 * second) / 36])  # one object for both, as there
    assert 0.5 < values["train_acc"] <= 1.0
    record = read_run("runs/lightning-1")
    assert {"train_loss_step", "train_loss_epoch", "train_acc", "val_all"} <= set(record.rows[-1])
    assert [one["step"] for one in record.checkpoints] == [6, 12]

    (tested,) = trainer.test(datamodule=data)
    assert tested == {"test_loss": pytest.approx(loss_of(module, points(20, 5)))}
    assert torch.cat(trainer.predict(module, DataLoader(points(20, 5), 8))).tolist() == (
        module(points(20, 5).tensors[0]).argmax(dim=1).tolist()
    )
    (validated, _) = trainer.validate(module, datamodule=data)
    assert validated["val_all"] == pytest.approx(values["val_all"].item())
    assert data.heard[-6:] == ["prepare", "test", "no test", "prepare", "validate", "no validate"]


@torch.no_grad()
def accuracy(module, data):
    inputs, labels = map(torch.stack, zip(*data, strict=True))
    return (module.eval()(inputs).argmax(dim=1) == labels).float().mean().item()


@torch.no_grad()
def loss_of(module, data):
    return functional.cross_entropy(module.eval()(data.tensors[0]), data.tensors[1]).item()


def test_another_trainer_validates_what_a_run_has_saved():
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(Classifier(), datamodule=Data())
    (validated, _) = Trainer(**QUIET).validate(Classifier(), datamodule=Data(), ckpt_path="runs/lightning-1")
    assert validated["val_all"] == pytest.approx(trainer.callback_metrics["val_all"].item())


def test_networks_in_turn_by_manual_optimisation():
    trainer = Trainer(max_epochs=2, log_every_n_steps=2, **QUIET)
    module = Gan()
    trainer.fit(module, DataLoader(points(), 8, shuffle=True))
    assert trainer.core.global_step == 12  # a batch is a step
    assert {"d_loss", "g_loss"} <= set(trainer.logged_metrics)
    assert all(parameter.requires_grad for parameter in module.parameters())


# The same bits ------------------------------------------------------------------------


class ByHand(ModuleInterface):
    """The programs above, ported to the core's contract."""

    def __init__(self, module, data, batch_size=8):
        super().__init__()
        self.module, self.data = module, data

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.data, batch_size, sampler=sampler(self.data))


class AutoencoderByHand(ByHand):
    def train_step(self, global_step, batch, device):
        x = batch[0].flatten(1)
        return functional.mse_loss(self.module.decoder(self.module.encoder(x)), x)

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.Adam(self.module.parameters(), lr=1e-2)], []


class ClassifierByHand(ByHand):
    def train_step(self, global_step, batch, device):
        return functional.cross_entropy(self.module.net(batch[0]), batch[1])

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.AdamW(self.module.parameters(), lr=0.05)], []


class GanByHand(ByHand):
    def train_step(self, global_step, batch, device):
        raise AssertionError

    @hookimpl
    def update(self, trainer, window):
        outputs = []
        for name, optimizer in zip("dg", trainer.optimizers[::-1], strict=True):
            trainer.zero_grad()
            loss = gan_loss(self.module, name, window[0][0])
            loss.backward()
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.5)
            trainer.step([optimizer])
            outputs.append(loss)
        return [tuple(outputs)]

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        (generator, discriminator), (scheduler,) = self.module.configure_optimizers()
        return [generator, discriminator], [(scheduler, "epoch")]


class Losses(CallbackInterface):
    def __init__(self):
        self.losses = []

    def on_end_train_step(self, global_step, loss):
        self.losses += loss.reshape(-1).tolist()


@pytest.mark.parametrize(
    ("module", "by_hand", "data"),
    [(Autoencoder, AutoencoderByHand, pictures()), (Classifier, ClassifierByHand, points())],
)
def test_the_losses_are_those_of_the_module_ported_by_hand(module, by_hand, data, monkeypatch):
    monkeypatch.setattr(Classifier, "configure_optimizers", lambda self: torch.optim.AdamW(self.parameters(), lr=0.05))
    losses, ours, theirs = Losses(), module(), by_hand(module(), data)
    trainer = Trainer(max_epochs=2, plugins={"losses": losses}, **QUIET)
    trainer.fit(ours, DataLoader(data, 8, shuffle=True))
    assert losses.losses == hand_written_loop(theirs, epochs=2)
    assert digest(ours.state_dict()) == digest(theirs.module.state_dict())


def test_networks_in_turn_have_the_weights_of_those_ported_by_hand():
    ours, theirs = Gan(), GanByHand(Gan(), points())
    Trainer(max_epochs=2, **QUIET).fit(ours, DataLoader(points(), 8, shuffle=True))
    hookline.Trainer(theirs, epochs=2, train_batch_size=8).train()
    assert digest(ours.state_dict()) == digest(theirs.module.state_dict())


PROGRAMS = {
    "autoencoder": (Autoencoder, {"train_dataloaders": lambda: DataLoader(pictures(48), 8, shuffle=True)}),
    "classifier": (Classifier, {"datamodule": Data}),
    "gan": (Gan, {"train_dataloaders": lambda: DataLoader(points(), 8, shuffle=True)}),
}


def fit(name, folder, *faults, ckpt_path=None, **options):
    kind, data = PROGRAMS[name]
    module, watching = kind(), Watching()
    plugins = {f"fault{number}": fault for number, fault in enumerate(faults)}
    plugins["checkpoint"] = {"every": "4 steps"}
    callbacks = [watching] if name == "classifier" else []
    options = QUIET | {"max_epochs": 2, "log_every_n_steps": 4} | options
    trainer = Trainer(callbacks=callbacks, default_root_dir=folder, plugins=plugins, **options)
    trainer.fit(module, ckpt_path=ckpt_path, **{key: make() for key, make in data.items()})
    values = {key: value.item() for key, value in (trainer.logged_metrics | trainer.callback_metrics).items()}
    rates = [group["lr"] for optimizer in trainer.core.optimizers for group in optimizer.param_groups]
    return digest(module.state_dict()), values, rates, watching.best


def cut_short(name, step=10):
    steps = 2 * step if name == "gan" else step
    fit(name, "cut", at_hook("on_begin_optimizer_step", kill, nth=steps))


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_a_run_that_is_killed_goes_on_with_the_same_bits_and_values(name):
    assert run(cut_short, name).code == -signal.SIGKILL
    assert fit(name, "cut", ckpt_path="last") == fit(name, "whole")


def two_ranks(name, folder, ckpt_path=None):
    torch.set_num_threads(1)
    return fit(name, folder, ckpt_path=ckpt_path)


def two_ranks_until_killed(name):
    torch.set_num_threads(1)
    cut_short(name, 5)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", [pytest.param("autoencoder", marks=pytest.mark.slow), "classifier", "gan"])
def test_two_ranks_train_one_model_and_go_on_after_a_kill(name, monkeypatch):
    if name == "classifier":
        monkeypatch.setattr(Data, "val_dataloader", lambda self: DataLoader(points(20, 5), batch_size=8))
    whole = run_ranks(two_ranks, 2, name, "whole")
    assert [outcome.code for outcome in whole] == [0, 0], whole[0].output
    assert whole[0].value[0] == whole[1].value[0]
    if name == "classifier":
        (first, second) = (outcome.value[1] for outcome in whole)
        assert (
            first["both"] == second["both"] == pytest.approx((first["train_loss_step"] + second["train_loss_step"]) / 2)
        )
        assert first["train_loss_step"] != second["train_loss_step"]  # without sync_dist each has its own
    assert all(outcome.code != 0 for outcome in run_ranks(two_ranks_until_killed, 2, name))
    cut = run_ranks(two_ranks, 2, name, "cut", "last")
    assert [outcome.code for outcome in cut] == [0, 0], cut[0].output
    assert [outcome.value for outcome in cut] == [outcome.value for outcome in whole]


# Optimizers and schedulers ----------------------------------------------------------------


class Line(LightningModule):
    """The smallest module; what it answers to `configure_optimizers` is given."""

    def __init__(self, answer=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(8, 1)
        self.answer = answer or (lambda optimizer: optimizer)

    def training_step(self, batch):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return self.answer(torch.optim.SGD(self.parameters(), lr=1.0))

    def train_dataloader(self):
        return DataLoader(points(), batch_size=8)


class Rates(Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def halved(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


EPOCHS = [1.0] * 6 + [0.5] * 6
STEPS = [0.5**step for step in range(12)]


@pytest.mark.parametrize(
    ("answer", "rates"),
    [
        (lambda optimizer: optimizer, [1.0] * 12),
        (lambda optimizer: [optimizer], [1.0] * 12),
        (lambda optimizer: (optimizer,), [1.0] * 12),
        (lambda optimizer: ([optimizer], []), [1.0] * 12),
        (lambda optimizer: ([optimizer], [halved(optimizer)]), EPOCHS),
        (lambda optimizer: ([optimizer], [{"scheduler": halved(optimizer), "interval": "step"}]), STEPS),
        (lambda optimizer: {"optimizer": optimizer}, [1.0] * 12),
        (lambda optimizer: {"optimizer": optimizer, "lr_scheduler": halved(optimizer)}, EPOCHS),
        (lambda optimizer: [{"optimizer": optimizer, "lr_scheduler": halved(optimizer)}], EPOCHS),
        (
            lambda optimizer: {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": halved(optimizer), "interval": "step", "frequency": 4, "name": "x"},
            },
            [1.0] * 4 + [0.5] * 6 + [0.25] * 2,  # counted within the epoch
        ),
        (
            lambda optimizer: {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": halved(optimizer), "frequency": 2},
            },
            [1.0] * 12,
        ),
    ],
)
def test_all_answers_of_configure_optimizers(answer, rates):
    watching = Rates()
    Trainer(max_epochs=2, callbacks=watching, **QUIET).fit(Line(answer))
    assert watching.rates == rates


def test_no_optimizer_moves_no_weight(caplog):
    module = Line(lambda optimizer: None)
    before = digest(module.state_dict())
    Trainer(max_epochs=1, **QUIET).fit(module)
    assert digest(module.state_dict()) == before
    assert "Line.configure_optimizers() returned none: no weight will move" in caplog.text


def plateau(**more):
    def answer(optimizer):
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **more}}

    return answer


def test_a_scheduler_that_looks_at_a_value_does_so_every_so_often(caplog):
    class Logs(Line):
        def training_step(self, batch):
            loss = super().training_step(batch)
            self.log("loss", loss)
            return loss

    watching = Rates()
    Trainer(max_epochs=2, callbacks=watching, **QUIET).fit(Logs(plateau(monitor="loss", interval="step", frequency=2)))
    assert watching.rates[:6] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    Trainer(max_epochs=1, **QUIET).fit(Line(plateau(monitor="nothing", strict=False)))
    with pytest.raises(
        ValueError, match="ReduceLROnPlateau looks at 'nothing', which nobody has logged; there is nothing"
    ):
        Trainer(max_epochs=1, **QUIET).fit(Line(plateau(monitor="nothing")))


def test_a_scheduler_looks_at_a_value_of_before_the_run_was_cut():
    class Validates(Line):
        def validation_step(self, batch, batch_idx):
            self.log("val", 1.0)

        def val_dataloader(self):
            return DataLoader(points(4), batch_size=4)

    def rate(folder, epochs, ckpt_path=None):
        trainer = Trainer(max_epochs=epochs, check_val_every_n_epoch=2, default_root_dir=folder, **QUIET)
        trainer.fit(Validates(plateau(monitor="val", strict=False)), ckpt_path=ckpt_path)
        return trainer.core.optimizers[0].param_groups[0]["lr"]

    assert rate("whole", 3) == 0.25  # nothing to look at in the first epoch
    assert rate("cut", 2) == 0.5
    assert rate("cut", 3, "last") == 0.25


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (lambda optimizer: 3, TypeError, "configure_optimizers must answer an optimizer, .* in its answer is a int"),
        (lambda optimizer: [optimizer, 3], TypeError, "in its answer is a int"),
        (
            lambda optimizer: [optimizer, optimizer],
            ValueError,
            "returned 2 optimizers, .*automatic_optimization = False",
        ),
        (lambda optimizer: {"optimiser": optimizer}, ValueError, r"with 'optimiser', did you mean 'optimizer'"),
        (lambda optimizer: {"lr_scheduler": None}, ValueError, "a mapping without optimizer; it has lr_scheduler"),
        (
            plateau(intervall="step", monitor="x"),
            ValueError,
            r"lr_scheduler has 'intervall', did you mean 'interval'",
        ),
        (plateau(interval="batch", monitor="x"), ValueError, "interval='batch' must be epoch or step"),
        (plateau(frequency=0, monitor="x"), ValueError, "frequency=0 must be at least 1"),
        (plateau(), ValueError, "ReduceLROnPlateau looks at a value: say which"),
        (
            lambda optimizer: ([optimizer], [{"interval": "step"}]),
            ValueError,
            "mapping without scheduler; it has interval",
        ),
        (lambda optimizer: ([optimizer], [3]), ValueError, "scheduler=3 is a int, no one"),
    ],
)
def test_answers_that_cannot_be(answer, error, words):
    with pytest.raises(error, match=words):
        Trainer(max_epochs=1, **QUIET).fit(Line(answer))


# Hooks --------------------------------------------------------------------------------------

SEQUENCE = """
setup fit / on_fit_start / on_train_start / on_train_epoch_start
on_train_batch_start 0 / on_before_zero_grad / on_before_backward / on_after_backward / on_before_optimizer_step
on_train_batch_end 0
on_train_batch_start 1 / on_before_zero_grad / on_before_backward / on_after_backward / on_before_optimizer_step
on_train_batch_end 1
on_validation_start / on_validation_epoch_start / on_validation_batch_start 0 / on_validation_batch_end 0
on_validation_epoch_end / on_validation_end / on_train_epoch_end / on_train_end / on_fit_end / teardown fit
"""
HOOKS = sorted({step.split()[0] for step in SEQUENCE.replace("\n", " / ").split(" / ") if step.strip()})


def hears(heard, of_callback):
    """Return methods that note each hook, with the batch's index where it has one."""

    def method(name):
        def hear(self, *arguments):
            arguments = arguments[2 * of_callback :]
            numbers = [one for one in arguments if isinstance(one, (int, str))][:1]
            heard.append(" ".join([name, *map(str, numbers)]))

        return hear

    return {name: method(name) for name in HOOKS}


def test_hooks_of_module_and_callback_come_in_lightnings_order():
    module_heard, callback_heard = [], []

    class Steps(Line):
        def validation_step(self, batch, batch_idx):
            pass

        def val_dataloader(self):
            return DataLoader(points(4), batch_size=4)

    Hearing = type("Hearing", (Steps,), hears(module_heard, False))
    callback = type("Noting", (Callback,), hears(callback_heard, True))()
    Trainer(max_epochs=1, limit_train_batches=2, callbacks=[callback], **QUIET).fit(Hearing())
    expected = [step.strip() for step in SEQUENCE.replace("\n", " / ").split(" / ") if step.strip()]
    assert module_heard == expected
    assert callback_heard == expected


class Own(Line):
    """Does in the run's place what a module may."""

    def __init__(self):
        super().__init__(lambda optimizer: ([optimizer], [halved(optimizer)]))
        self.done = []

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.done.append("before")
        return batch

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        self.done.append(f"to {device}")
        return batch

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.done.append("after")
        return [batch[0] * 0 + 1, batch[1]]

    def backward(self, loss):
        self.done.append("backward")
        loss.backward()

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.done.append(f"clip {gradient_clip_val}")
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        self.done.append(f"step {batch_idx}")
        optimizer.step(closure=optimizer_closure)

    def lr_scheduler_step(self, scheduler, metric):
        self.done.append("schedule")
        scheduler.step()

    def configure_model(self):
        self.done.append("model")

    def configure_callbacks(self):
        return Rates()


def test_a_module_may_do_things_itself():
    module = Own()
    before = digest(module.state_dict())
    Trainer(max_epochs=1, limit_train_batches=2, gradient_clip_val=0.25, **QUIET).fit(module)
    fetched, done = ["before", "to cpu", "after"], ["backward", "clip 0.25"]
    assert module.done == ["model", *fetched, "step 0", *done, *fetched, "step 1", *done, "schedule"]
    assert digest(module.state_dict()) != before
    assert module.trainer.callbacks[0].rates == [1.0, 1.0]


class Saves(Line):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["word"] = f"at {checkpoint['global_step']}"

    def on_load_checkpoint(self, checkpoint):
        self.loaded = (checkpoint["word"], checkpoint["epoch"])


def test_a_data_module_may_bring_its_batches_itself():
    class Brings(Data):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            self.heard.append(f"to {device}")
            return batch

    data = Brings()
    Trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=0, **QUIET).fit(Line(), datamodule=data)
    assert data.heard == ["prepare", "fit", "to cpu", "to cpu", "no fit"]


def test_what_module_and_data_add_to_a_checkpoint_comes_back():
    Trainer(max_epochs=1, **QUIET).fit(Saves(), datamodule=Data())
    module, data = Saves(), Data()
    trainer = Trainer(max_epochs=2, **QUIET)
    trainer.fit(module, datamodule=data, ckpt_path="last")
    assert module.loaded == ("at 6", 1)
    assert {"heard": 2} in data.heard
    assert trainer.core.global_step == 12
    assert sorted(trainer.core.export_model()) == ["net.bias", "net.weight"]  # as the module names them


class Plain(nn.Module):
    """No base class at all; gradients wait several batches for a step."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).square().mean()
        self.manual_backward(loss, retain_graph=False)
        if batch_idx % 3 == 2:
            self.optimizers().step()
            self.optimizers().zero_grad()
        self.log("mine", loss, logger=False)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


PROGRAMS["plain"] = (Plain, {"train_dataloaders": lambda: DataLoader(points(), 8, shuffle=True)})


def plain_cut():
    fit("plain", "cut", at_hook("on_end_backward", kill, nth=6))  # the checkpoint of step 4 has a gradient that waits


def test_gradients_that_wait_for_a_step_are_in_a_checkpoint():
    assert run(plain_cut).code == -signal.SIGKILL
    whole = fit("plain", "whole")
    assert fit("plain", "cut", ckpt_path="last") == whole
    assert "mine" in whole[1]
    assert all("mine" not in row for row in read_run("whole/lightning-1").rows)


class Both(Plain):
    """Two optimizers that step after one backward."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)

    def training_step(self, batch):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.net(self.first(batch[0])).square().mean())
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=0.1) for part in (self.net, self.first)]


class BothByHand(ByHand):
    def train_step(self, global_step, batch, device):
        return self.module.net(self.module.first(batch[0])).square().mean()

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return self.module.configure_optimizers(), []


def test_optimizers_may_step_one_after_the_other_behind_one_backward():
    ours, theirs = Both(), BothByHand(Both(), points())
    Trainer(max_epochs=1, **QUIET).fit(ours, DataLoader(points(), 8, shuffle=True))
    hand_written_loop(theirs, epochs=1)
    assert digest(ours.state_dict()) == digest(theirs.module.state_dict())


class Closes(Plain):
    """Hands its optimizer a closure, and says which parameters it is of."""

    def training_step(self, batch):
        optimizer = self.optimizers()
        assert isinstance(optimizer, torch.optim.Optimizer)

        def closure():
            optimizer.zero_grad()
            loss = self.net(batch[0]).square().mean()
            self.manual_backward(loss)
            return loss

        with optimizer.toggle_model():
            optimizer.step(closure)


def test_a_closure_in_manual_optimisation_is_as_good_as_automatic():
    manual, automatic = Closes(), Line(lambda optimizer: torch.optim.SGD(optimizer.param_groups[0]["params"], lr=0.1))
    for module in (manual, automatic):
        Trainer(max_epochs=1, gradient_clip_val=0.1, **QUIET).fit(module, DataLoader(points(), 8))
    assert digest(manual.state_dict()) == digest(automatic.state_dict())


def test_a_callback_hears_what_is_raised_and_data_are_torn_down():
    heard, data = [], Data()
    hears = type("Hears", (Callback,), {"on_exception": lambda self, trainer, module, error: heard.append(str(error))})
    with pytest.raises(ZeroDivisionError):
        Trainer(max_epochs=1, callbacks=[hears()], **QUIET).fit(
            broken(training_step=lambda self, batch: 1 / 0), datamodule=data
        )
    assert heard == ["division by zero"]
    assert data.heard == ["prepare", "fit", "no fit"]


def test_a_batch_may_be_skipped():
    class Skips(Line):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch)

    module = Skips()
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(module)
    assert (trainer.core.global_step, trainer.core.counters.skipped_steps) == (6, 3)


def test_a_callback_may_end_training():
    class Stops(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.should_stop or trainer.global_step == 2

    trainer = Trainer(max_epochs=9, callbacks=[Stops()], **QUIET)
    trainer.fit(Line())
    assert (trainer.core.status, trainer.core.global_step) == ("stopped", 2)


def test_the_view_of_the_trainer():
    seen = {}

    class Looks(Line):
        def configure_optimizers(self):
            seen["steps"] = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

        def on_train_start(self):
            view = self.trainer
            names = (
                "max_epochs", "max_steps", "num_training_batches", "accumulate_grad_batches", "is_global_zero",
                "world_size", "sanity_checking", "training", "validating", "testing", "predicting",
                "default_root_dir", "fast_dev_run", "log_every_n_steps",
            )  # fmt: skip
            seen.update({name: getattr(view, name) for name in names})
            seen["same"] = view.lightning_module is self and view.datamodule is not None
            seen["state"] = view.state.fn
            seen["folder"] = view.log_dir
            assert (view.train_dataloader.batch_size, view.val_dataloaders) == (8, None)
            seen["gathered"] = self.all_gather({"x": torch.tensor([1.0])})["x"].shape
            view.strategy.barrier()
            assert view.strategy.broadcast(3) == 3
            self.logger.log_metrics({"by_logger": 2.0})
            self.print("only once")

    trainer = Trainer(max_epochs=3, accumulate_grad_batches=2, **QUIET | {"logger": True})
    trainer.fit(module := Looks(), DataLoader(points(), batch_size=8))
    assert seen == {
        "steps": 9, "max_epochs": 3, "max_steps": -1, "num_training_batches": 6, "accumulate_grad_batches": 2,
        "is_global_zero": True, "world_size": 1, "sanity_checking": False, "training": True, "validating": False,
        "testing": False, "predicting": False, "default_root_dir": "runs", "fast_dev_run": False,
        "log_every_n_steps": 50, "same": True, "state": "fit", "folder": "runs/lightning-1",
        "gathered": torch.Size([1, 1]),
    }  # fmt: skip
    assert trainer.logged_metrics["by_logger"] == 2.0
    with pytest.raises(
        AttributeError, match=r"hookline gives to .* has no 'current_epochs', did you mean 'current_epo"
    ):
        _ = module.trainer.current_epochs
    with pytest.raises(AttributeError, match="the logger that hookline gives to .* has no 'upload'; texts, images"):
        module.logger.upload()


def test_a_module_that_is_with_no_trainer_says_so():
    with pytest.raises(RuntimeError, match="Line is with no trainer yet: `self.log`"):
        Line().log("x", 1.0)
    with pytest.raises(RuntimeError, match="Line is with no trainer yet"):
        _ = Line().trainer
    assert (Line().current_epoch, Line().global_step, Line().logger) == (0, 0, None)


# The trainer's arguments --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "options", "plugins"),
    [
        ({}, {"epochs": 1000, "max_steps": None, "evaluate_every": "1 epochs", "sanity_val_steps": 2}, {"csv": {}}),
        ({"max_epochs": 3, "max_steps": 7}, {"epochs": 3, "max_steps": 7}, {}),
        ({"max_steps": 7}, {"epochs": None, "max_steps": 7}, {}),
        ({"max_time": "00:01:30:05"}, {"epochs": None, "max_time": "5405 s"}, {}),
        ({"max_time": "10 min"}, {"max_time": "10 min"}, {}),
        ({"accumulate_grad_batches": 4}, {}, {"accumulate": {"steps": 4}}),
        ({"precision": "bf16-mixed"}, {}, {"amp": {"precision": "bf16"}}),
        ({"precision": 16}, {}, {"amp": {"precision": "fp16"}}),
        ({"val_check_interval": 50}, {"evaluate_every": "50 batches"}, {}),
        ({"check_val_every_n_epoch": 2}, {"evaluate_every": "2 epochs"}, {}),
        ({"limit_val_batches": 0}, {"evaluate_every": None, "sanity_val_steps": 0}, {}),
        (
            {"limit_train_batches": 0.5, "limit_val_batches": 3},
            {},
            {"limits": {"train_batches": 0.5, "val_batches": 3}},
        ),
        ({"overfit_batches": 2}, {}, {"limits": {"train_batches": 2, "val_batches": 2}}),
        ({"fast_dev_run": True}, {}, {"limits": {"fast_dev_run": True}}),
        ({"logger": ["wandb", "csv"]}, {}, {"wandb": {}, "csv": {}}),
        ({"logger": {"csv": {"every": 2}}}, {}, {"csv": {"every": 2}}),
        ({"default_root_dir": "there"}, {"runs_folder": "there"}, {}),
        ({"log_every_n_steps": 5, "num_sanity_val_steps": 0}, {"log_every": "5 steps", "sanity_val_steps": 0}, {}),
        ({"enable_checkpointing": True, "enable_progress_bar": True}, {}, {"checkpoint": {}, "progress": {}}),
        ({"accelerator": "gpu", "devices": 1}, {"device": "cuda"}, {}),
        ({"strategy": "ddp_find_unused_parameters_true"}, {}, {"ddp": {"find_unused_parameters": True}}),
        ({"plugins": {"monitor": {}}, "seed": 4}, {"seed": 4}, {"monitor": {}}),
    ],
)
def test_arguments_become_options_and_plugins(given, options, plugins):
    trainer = Trainer(**given)
    assert trainer.options | options == trainer.options
    assert trainer.plugins | plugins == trainer.plugins


def test_arguments_that_turn_things_off():
    assert set(Trainer(**QUIET, enable_checkpointing=False, enable_model_summary=False).plugins) == {"jsonl"}


def test_clipping_and_the_fraction_of_an_epoch():
    norm, value = Trainer(gradient_clip_val=0.5, **QUIET), Trainer(
        gradient_clip_val=0.5, gradient_clip_algorithm="value", **QUIET
    )  # fmt: skip
    for trainer, limits in ((norm, (0.5, None)), (value, (None, 0.5))):
        assert any("clip" in str(row) for row in trainer.plan(Line()))
        trainer.options["max_steps"] = 1
        trainer.fit(Line())
        clip = trainer.core.plugins.get_plugin("clip")
        assert (clip.max_norm, clip.max_value) == limits

    class Validates(Line):
        def validation_step(self, batch, batch_idx):
            self.log("seen", float(self.trainer.global_step), prog_bar=True)

        def val_dataloader(self):
            return DataLoader(points(4), batch_size=4)

    heard = []
    hears = type(
        "Hears", (Callback,), {"on_validation_end": lambda self, trainer, _: heard.append(trainer.global_step)}
    )
    Trainer(max_epochs=2, val_check_interval=0.5, callbacks=[hears()], **QUIET).fit(Validates())
    assert heard == [3, 6, 9, 12]


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (
            {"max_epoch": 3},
            TypeError,
            r"Trainer has no argument 'max_epoch', did you mean 'max_epochs'\?; it has accelerator",
        ),
        ({"max_time": "soon"}, ValueError, "max_time='soon' is not a "),
        ({"precision": "8-true"}, ValueError, "precision='8-true' must be one of 32-true, 32, bf16-mixed"),
        ({"gradient_clip_algorithm": "sum"}, ValueError, "gradient_clip_algorithm='sum' must be norm or value"),
        ({"accelerator": "tpu"}, ValueError, "accelerator='tpu' must be one of auto, cpu, gpu"),
        ({"devices": 2}, ValueError, r"devices=2: this is one process; .* `torchrun --nproc-per-node 2 script.py`"),
        (
            {"strategy": "deepspeed"},
            ValueError,
            "strategy='deepspeed' must be auto or one of ddp, .*; others are plugins",
        ),
        (
            {"val_check_interval": 0.5, "check_val_every_n_epoch": None},
            ValueError,
            "is a part of an epoch, and check_val",
        ),
        (
            {"logger": object()},
            ValueError,
            r"logger=object\(…\) is no logger: it has no log_metrics; name a tracker, such as logger='csv'",
        ),
    ],
)
def test_arguments_that_cannot_be(given, error, words):
    with pytest.raises(error, match=words):
        Trainer(**given)


def broken(**methods):
    return type("Broken", (Line,), methods)()


@pytest.mark.parametrize(
    ("module", "callbacks", "words"),
    [
        (
            broken(training_epoch_end=print),
            [],
            r"Broken.training_epoch_end\(\) is not called here: it is gone .* on_trai",
        ),
        (
            broken(on_validation_model_eval=print),
            [],
            r"on_validation_model_eval\(\) is not called here: the run sets modes",
        ),
        (
            broken(on_train_epoch_begin=print),
            [],
            r"Broken.on_train_epoch_begin\(\) is no event .*did you mean 'on_train_ep",
        ),
        (
            Line(),
            [type("Old", (Callback,), {"on_batch_end": print})()],
            r"Old.on_batch_end\(\) is no event that is told",
        ),
        (broken(training_step=lambda self, batch: {"los": 1}), [], "a mapping without 'loss'; it has los"),
        (broken(train_dataloader=lambda self: None), [], r"Broken has no train_dataloader\(\), and no data module"),
        (
            broken(on_train_batch_start=lambda self, *_: -1),
            [],
            "on_train_batch_start returned -1, .*limit_train_batches",
        ),
        (
            broken(on_train_start=lambda self: self.log("x", 1, reduce_fx="median")),
            [],
            "reduce_fx='median'.: must be mean",
        ),
        (
            broken(on_train_start=lambda self: self.log("sync", 1)),
            [],
            r"self.log\('sync'\): this name is a word of the",
        ),
        (broken(on_train_start=lambda self: self.all_gather(1, sync_grads=True)), [], "gradients do not go through"),
        (broken(on_train_start=lambda self: self.clip_gradients(None, 1.0, "sum")), [], "='sum' must be norm or value"),
    ],
)
def test_what_nobody_would_hear_is_refused(module, callbacks, words):
    with pytest.raises(ValueError, match=words):
        Trainer(max_epochs=1, callbacks=callbacks, **QUIET).fit(module)


def test_calls_that_cannot_be():
    with pytest.raises(ValueError, match="there is no module yet: give one"):
        Trainer(**QUIET).validate()
    with pytest.raises(ValueError, match=r"plan\(\) of a trainer that has not run needs the module: plan\(model\)"):
        Trainer(**QUIET).plan()
    with pytest.raises(ValueError, match="loaders and a datamodule are given; give one of them"):
        Trainer(**QUIET).fit(Line(), DataLoader(points()), datamodule=Data())
    with pytest.raises(ValueError, match="ckpt_path='nowhere' is not there: say \"last\""):
        Trainer(**QUIET).fit(Line(), ckpt_path="nowhere")
    with pytest.raises(ValueError, match="lightning.val_check_interval=1.5 must be above 0 and at most 1"):
        Lightning(val_check_interval=1.5)
    with pytest.raises(ValueError, match=r"save_hyperparameters\('depth'\): __init__ has only lr"):
        type("Wrong", (Line,), {"__init__": lambda self, lr=1: self.save_hyperparameters("depth")})()
    with pytest.raises(ValueError, match="a window of 2 micro-batches and automatic_optimization = False"):
        Trainer(max_epochs=1, accumulate_grad_batches=2, **QUIET).fit(Gan(), DataLoader(points(), 8))
    with pytest.raises(RuntimeError, match="manual_backward needs self.automatic_optimization = False"):
        Trainer(max_epochs=1, **QUIET).fit(
            broken(training_step=lambda self, batch: self.manual_backward(None)), DataLoader(points(), 8)
        )
    with pytest.raises(TypeError, match="First is of Lightning's first year, for which there is no trainer of its own"):
        Trainer(**QUIET).fit(type("First", (Line,), {"tng_dataloader": None})())
    with pytest.raises(TypeError, match=r"step\(\) takes a closure alone, not scale"):
        Trainer(max_epochs=1, **QUIET).fit(ManualStep(), DataLoader(points(), 8))


class ManualStep(Plain):
    def training_step(self, batch):
        self.optimizers().step(scale=2)


def test_hparams_of_all_kinds():
    class Many(LightningModule):
        def __init__(self, lr, size=3, **more):
            super().__init__()
            self.save_hyperparameters(ignore="size")

    assert Many(0.1, depth=2).hparams == {"lr": 0.1, "depth": 2}
    module = LightningModule()
    module.save_hyperparameters({"lr": 0.1})
    module.hparams.depth = 3
    assert (module.hparams.lr, module.hparams["depth"]) == (0.1, 3)
    with pytest.raises(AttributeError, match="hparams have no 'rate'; they have lr, depth"):
        _ = module.hparams.rate


def test_weights_of_a_checkpoint_of_lightnings_are_read_without_running_code():
    from hookline_checkpoint import load_foreign

    kept = {"epoch": 3, "pytorch-lightning_version": "2.6.6", "state_dict": Line().state_dict(), "hyper_parameters": {}}
    torch.save(kept, "its.ckpt")
    module = Line()
    nn.init.zeros_(module.net.weight)
    module.load_state_dict(load_foreign("its.ckpt")["state_dict"])
    assert digest(module.state_dict()) == digest(Line().state_dict())
    assert Path("its.ckpt").exists()


def test_a_configuration_names_the_module(tmp_path, monkeypatch):
    from hookline.config import build_trainer, load_config

    (tmp_path / "todays.py").write_text(
        "import torch\nfrom hookline_lightning import LightningModule\n\n\n"
        "class Small(LightningModule):\n"
        "    def __init__(self, lr):\n        super().__init__()\n        self.save_hyperparameters()\n"
        "        self.net = torch.nn.Linear(2, 1)\n"
        "    def training_step(self, batch):\n        return self.net(batch).square().mean()\n"
        "    def train_dataloader(self):\n        return torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=4)\n"
        "    def configure_optimizers(self):\n        return torch.optim.SGD(self.parameters(), self.hparams.lr)\n\n\n"
        "class Data:\n    def __init__(self, size):\n        self.size = size\n"
        "    def train_dataloader(self):\n"
        "        return torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=self.size)\n\n\n"
        "class Counts:\n    epochs = 0\n    def on_train_epoch_end(self, trainer, module):\n        self.epochs += 1\n"
    )
    (tmp_path / "run.yaml").write_text(
        "module: {_target_: todays.Small, lr: 0.1}\ntrainer: {epochs: 2}\nplugins: {lightning: {}}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    trainer = build_trainer(load_config(tmp_path / "run.yaml"))
    trainer.train()
    assert (trainer.global_step, trainer.options.train_batch_size) == (4, 4)
    (tmp_path / "more.yaml").write_text(
        "module: {_target_: todays.Small, lr: 0.1}\ntrainer: {epochs: 2}\n"
        "plugins: {lightning: {datamodule: {_target_: todays.Data, size: 2}, callbacks: [{_target_: todays.Counts}]}}\n"
    )
    trainer = build_trainer(load_config(tmp_path / "more.yaml"))
    trainer.train()
    assert (trainer.global_step, trainer.options.train_batch_size) == (8, 2)
    assert trainer.module.view.callbacks[0].epochs == 2


def test_a_module_of_no_framework_is_left_alone():
    with pytest.raises(TypeError, match="Trainer got a Linear, which is no object of a ModuleInterface"):
        hookline.Trainer(nn.Linear(2, 1), {"lightning": {}})


# What it costs ------------------------------------------------------------------------------


class Costs(Line):
    """Logs in all ways that cost something."""

    def __init__(self, number):
        super().__init__()
        self.data = points(8 * number)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch)
        self.log("x", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"y": loss, "z": 2 * loss}, on_epoch=True, reduce_fx="max")
        return loss

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=8)


def test_a_step_that_logs_waits_for_nothing():
    def steps(number):
        hookline.Trainer(Costs(number), {"lightning": {}}, epochs=1, log_every="9999 steps").train()

    assert calls_per_step(steps).syncs == 0


# Several ranks, the long way ----------------------------------------------------------------


def shared(name):
    torch.set_num_threads(1)
    kind, data = PROGRAMS[name]
    trainer = Trainer(max_epochs=1, strategy="fsdp", default_root_dir=name, **QUIET)
    trainer.fit(kind(), **{key: make() for key, make in data.items()})
    return trainer.logged_metrics["loss_epoch"].item(), sorted(trainer.core.export_model())


def copied(name):
    torch.set_num_threads(1)
    kind, data = PROGRAMS[name]
    trainer = Trainer(max_epochs=1, default_root_dir=name, **QUIET)
    trainer.fit(kind(), **{key: make() for key, make in data.items()})
    return trainer.logged_metrics["loss_epoch"].item(), sorted(trainer.core.export_model())


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_a_model_that_ranks_share_has_the_losses_of_one_that_each_has_whole():
    whole, parts = run_ranks(copied, 2, "autoencoder"), run_ranks(shared, 2, "autoencoder")
    assert parts[0].value == whole[0].value, parts[0].output
    manual = run_ranks(shared, 2, "plain")
    assert "automatic_optimization = False and a model that ranks share (fsdp)" in manual[0].output


class Unprepared(Data):
    def prepare_data(self):
        raise OSError("no disk")


def unprepared():
    Trainer(max_epochs=1, **QUIET).fit(Classifier(), datamodule=Unprepared())


def skips():
    Trainer(max_epochs=1, **QUIET).fit(broken(training_step=lambda self, batch: None))


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_what_one_rank_cannot_do_ends_all_of_them():
    first, second = run_ranks(unprepared, 2)
    assert "OSError: no disk" in first.output
    assert "prepare_data failed on rank 0: OSError('no disk')" in second.output
    assert "with several processes one would skip and others not" in run_ranks(skips, 2)[0].output


# Modes, means and loaders -------------------------------------------------------------------


class Modes(Line):
    """A frozen norm beside dropout: says in which modes its steps find them."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.seen = nn.BatchNorm1d(8), nn.Dropout(0.5), []
        self.norm.requires_grad_(False).eval()

    def training_step(self, batch):
        self.seen.append((self.training, self.norm.training, self.drop.training))
        return self.net(self.drop(self.norm(batch[0]))).square().mean()

    def validation_step(self, batch, batch_idx):
        assert not any(one.training for one in self.modules())


def test_modes_are_the_users_as_in_todays_lightning(caplog):
    module = Modes()
    trainer = Trainer(max_epochs=2, val_check_interval=2, enable_progress_bar=False, logger=False)
    trainer.fit(module, DataLoader(points(), 8), DataLoader(points(), 8))
    assert module.seen == [(True, False, True)] * 12
    assert module.norm.running_mean.eq(0).all()
    assert module.norm.running_var.eq(1).all()
    assert "eval mode" not in caplog.text  # nothing that trains is in it


class Means(Line):
    """Logs what its batches are: 0 to 9 in batches of 4, 4 and 2."""

    def __init__(self, batch_size=None, manual=False):
        super().__init__()
        self.size, self.automatic_optimization = batch_size, not manual

    def values(self, batch, batch_idx, name):
        given = {} if self.size is None else {"batch_size": self.size[batch_idx]}
        self.log(name, batch[1].mean(), on_step=False, on_epoch=True, **given)

    def training_step(self, batch, batch_idx):
        self.values(batch, batch_idx, "in_step")
        loss = self.net(batch[0]).square().mean()
        return loss if self.automatic_optimization else None

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.values(batch, batch_idx, "behind_step")

    def on_train_batch_start(self, batch, batch_idx):
        self.values(batch, batch_idx, "before_step")

    def validation_step(self, batch, batch_idx):
        self.values(batch, batch_idx, "val")

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        self.values(batch, batch_idx, "behind_val")


@pytest.mark.parametrize(("manual", "window"), [(False, 1), (False, 2), (True, 1)])
@pytest.mark.parametrize(
    ("batch_size", "mean"),
    [(None, 4.5), ([1, 1, 1], 15.5 / 3), ([1, 2, 7], (1.5 + 2 * 5.5 + 7 * 8.5) / 10)],
    ids=["samples", "alike", "given"],
)
def test_means_over_an_epoch_weigh_as_in_lightning(manual, window, batch_size, mean):
    numbers = TensorDataset(torch.zeros(10, 8), torch.arange(10.0))
    trainer = Trainer(max_epochs=1, accumulate_grad_batches=window, **QUIET)
    trainer.fit(Means(batch_size, manual), DataLoader(numbers, 4), DataLoader(numbers, 4))
    values = trainer.callback_metrics
    for name in ("before_step", "in_step", "behind_step", "val", "behind_val"):
        assert values[name].item() == pytest.approx(mean), name


@pytest.mark.parametrize(
    ("on_epoch", "expected"),
    [(False, {"loss": 8.5}), (True, {"loss_step": 8.5, "loss_epoch": 4.5, "loss": 4.5})],
)
def test_a_value_under_the_name_of_the_loss_takes_its_place(on_epoch, expected):
    class Named(Line):
        def training_step(self, batch, batch_idx):
            self.log("loss", batch[1].mean(), on_step=True, on_epoch=on_epoch)
            return self.net(batch[0]).square().mean()

    numbers = TensorDataset(torch.zeros(10, 8), torch.arange(10.0))
    trainer = Trainer(max_epochs=1, log_every_n_steps=1, **QUIET)
    trainer.fit(Named(), DataLoader(numbers, 4))
    assert {name: trainer.callback_metrics[name].item() for name in expected} == expected
    assert trainer.core.best.train_loss < 1  # of the loss itself


def test_values_of_the_ends_are_known_and_those_that_would_be_lost_are_refused():
    class Ends(Line):
        def validation_step(self, batch, batch_idx):
            pass

        def on_validation_epoch_end(self):
            self.log("of_validation", float(self.current_epoch))

        def on_train_epoch_end(self):
            self.log("of_epoch", float(self.current_epoch))

        def on_train_end(self):
            self.log("of_training", 7.0)

    trainer = Trainer(max_epochs=2, **QUIET)
    trainer.fit(Ends(), DataLoader(points(), 8), DataLoader(points(), 8))
    ends = {"of_validation": 1.0, "of_epoch": 1.0, "of_training": 7.0}
    assert {name: value.item() for name, value in trainer.callback_metrics.items() if name in ends} == ends
    assert trainer.core.metrics == {"of_validation": 1.0}

    Ends.on_validation_end = lambda self: self.log("late", 1.0)
    with pytest.raises(
        ValueError, match=r"self.log\('late'\) in on_validation_end: .* log it in on_validation_epoch_end"
    ):
        Trainer(max_epochs=1, **QUIET).fit(Ends(), DataLoader(points(), 8), DataLoader(points(), 8))


def test_a_scheduler_may_look_at_what_shall_grow_and_what_is_not_of_a_validation(caplog):
    class Grows(Line):
        def training_step(self, batch):
            self.log("grown", float(self.current_epoch // 2), on_step=False, on_epoch=True)
            return super().training_step(batch)

    def answer(optimizer):
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "grown"}}

    watching = Rates()
    Trainer(max_epochs=4, callbacks=watching, **QUIET).fit(Grows(answer))
    assert watching.rates[::6] == [1.0, 1.0, 0.5, 0.5]  # 0, 0, 1, 1: the second and the fourth are no better
    assert "has never moved" not in caplog.text


@pytest.mark.parametrize(("given", "steps"), [({"max_epochs": 2}, 12), ({"max_steps": 8}, 8)])
def test_a_schedule_over_the_whole_run_ends_where_training_does(given, steps, caplog):
    class Scheduled(Line):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            steps = self.trainer.estimated_stepping_batches
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    trainer = Trainer(**given, **QUIET)
    trainer.fit(Scheduled(), DataLoader(points(), 8))
    assert trainer.core.global_step == steps
    assert trainer.core.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
    assert "LinearLR" not in caplog.text


class Sees(Line):
    """Keeps which samples it is given; the second of a pair is the sample's number."""

    def __init__(self):
        super().__init__()
        self.seen = {"train": [], "val": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"] += batch[1].tolist()
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen["val"] += (10 * dataloader_idx + batch[1]).tolist()


def numbered(number=10):
    return TensorDataset(torch.zeros(number, 8), torch.arange(number))


def test_a_sampler_with_a_generator_of_its_own_draws_as_in_a_loop_by_hand():
    def loader():
        return DataLoader(numbered(), 2, shuffle=True, generator=torch.Generator().manual_seed(4))

    module, by_hand = Sees(), loader()
    expected = [sample for _ in range(3) for _, samples in by_hand for sample in samples.tolist()]
    with pytest.warns(UserWarning, match="draws its order from a sampler of its own"):
        Trainer(max_epochs=3, **QUIET).fit(module, loader())
    assert module.seen["train"] == expected
    assert expected[:10] != expected[10:20]


class Combined:
    """Gives the batches of several loaders in turn, as `CombinedLoader` does."""

    def __init__(self, *loaders):
        self.loaders = loaders

    def __iter__(self):
        for loader in self.loaders:
            yield from loader


def fit_numbers(name):
    torch.set_num_threads(1)
    whole = DataLoader(numbered(), 2)
    mine = DataLoader(numbered(), 2, sampler=range(int(os.environ["RANK"]), 10, 2))
    train, val = {
        "lists": (DataLoader(numbered(), 2, shuffle=True), [whole, DataLoader(numbered(6), 2)]),
        "combined": (Combined(whole, whole), None),
        "validation": (whole, [whole, Combined(whole)]),
        "said": (sharded(Combined(mine)), None),
    }[name]
    module = Sees()
    Trainer(max_epochs=1, enable_checkpointing=False, strategy="ddp", **QUIET).fit(module, train, val)
    return module.seen


@pytest.mark.xdist_group("ranks")
def test_loaders_of_any_kind_are_shared_between_ranks_or_refused():
    whole = run_ranks(fit_numbers, 2, "lists")
    assert [outcome.code for outcome in whole] == [0, 0], whole[0].output
    first, second = (outcome.value for outcome in whole)
    assert sorted(first["train"] + second["train"]) == [*range(10)]
    assert sorted(first["val"] + second["val"]) == [*range(10), *range(10, 16)]
    for name in ("combined", "validation"):
        for outcome in run_ranks(fit_numbers, 2, name):
            assert "ranks would all be given the same batches: this loader (Combined) is a stream" in outcome.output
    first, second = (outcome.value for outcome in run_ranks(fit_numbers, 2, "said"))
    assert (first["train"], second["train"]) == ([0, 2, 4, 6, 8], [1, 3, 5, 7, 9])
