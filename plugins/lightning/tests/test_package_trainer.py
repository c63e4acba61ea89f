"""With the real package: programs run by its trainer and by ours, which do, write, answer and print the same."""

import contextlib
import inspect
import os
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from plugins.lightning.tests.programs import INPUTS, loader, program
from plugins.lightning.tests.test_callbacks import NAMES
from plugins.lightning.tests.test_trainer_arguments import DEFAULTS
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hookline_lightning

pytestmark = [
    pytest.mark.slow,
    pytest.mark.plugins,
    pytest.mark.filterwarnings("ignore"),  # its own, of many kinds
]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lightning", reason="the real package is in an environment of its own: nox -s lightning")
    import lightning.pytorch as pl
    from lightning.pytorch import callbacks
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.loggers.logger import Logger

Program = program(pl.LightningModule)
QUIET = {
    "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False, "logger": False,
    "max_epochs": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_the_recorded_arguments_and_callbacks_are_those_of_the_package():
    parameters = inspect.signature(pl.Trainer.__init__).parameters
    assert {name: one.default for name, one in parameters.items() if name != "self"} == DEFAULTS
    assert sorted(callbacks.__all__) == sorted(NAMES)


# Programs, each of which is given a function that makes a trainer, and tells what it saw -----------------------------


def fitted(make, *, callback=(), module=Program, train=None, **options):
    trainer = make(callbacks=list(callback), **options)
    trainer.fit(module := module(), train or loader(), loader())
    return trainer, module


def files(**given):
    def run(make, **options):
        writer = callbacks.ModelCheckpoint("files", **given)
        fitted(make, callback=[writer], **options)
        names = sorted(path.name for path in Path("files").glob("*.ckpt"))
        score = None if writer.best_model_score is None else round(float(writer.best_model_score), 4)
        paths = [Path(one).name for one in (writer.best_model_path, writer.last_model_path, writer.kth_best_model_path)]
        return names, paths, score, len(writer.best_k_models)

    return run


def interval(make):
    return files(monitor="val_loss", save_top_k=-1)(make, val_check_interval=0.5)


def at_the_logger(make):
    writer = callbacks.ModelCheckpoint(monitor="val_loss")
    logger = CSVLogger("logs", name="exp")
    trainer, module = fitted(make, callback=[writer], logger=logger)
    assert Path(writer.best_model_path).exists()
    return trainer.logger is logger, module.logger is logger, isinstance(logger, CSVLogger), logger.name


def best(make):
    writer = callbacks.ModelCheckpoint(monitor="val_loss", mode="max")
    trainer, module = fitted(make, callback=[writer])
    tested = trainer.test(dataloaders=loader()), trainer.test(module, loader())
    tested += trainer.test(ckpt_path="best", dataloaders=loader()), trainer.validate(dataloaders=loader())
    return [round_all(one) for one in tested], trainer.global_step, trainer.current_epoch


def round_all(found):
    return [{name: round(value, 5) for name, value in one.items()} for one in found]


class Two(Program):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("seen", float(dataloader_idx))

    def on_validation_epoch_end(self):
        self.log("whole", 5.0)


def of_two_loaders(make):
    return make().validate(Two(), [loader(), loader()])


def off(make):
    trainer = make(limit_train_batches=0, limit_val_batches=0, limit_test_batches=0, limit_predict_batches=0)
    trainer.fit(module := Program(), loader(), loader())
    return trainer.global_step, [getattr(trainer, name)(module, loader()) for name in ("validate", "test", "predict")]


def predictions(make):
    class Writes(callbacks.BasePredictionWriter):
        def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
            heard.append((prediction.shape, batch_indices, batch_idx, dataloader_idx))

        def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
            heard.append((len(predictions), batch_indices))

    heard = []
    found = make(callbacks=[Writes("batch_and_epoch")]).predict(Program(), loader(), return_predictions=False)
    shapes = [one.shape for one in make().predict(Program(), loader())]
    return heard, found, shapes


def answers(make):
    class Looks(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.extend(getattr(trainer, name) for name in within)
            seen.extend([trainer.fit_loop.max_epochs, trainer.state.fn == "fit", str(trainer.strategy.root_device)])

    within = ("estimated_stepping_batches", "num_training_batches", "num_val_batches", "num_sanity_val_batches",
              "checkpoint_callback", "log_every_n_steps", "accumulate_grad_batches", "enable_validation", "device_ids",
              "interrupted", "received_sigterm", "ckpt_path", "limit_train_batches", "overfit_batches")  # fmt: skip
    known = ("max_epochs", "max_steps", "current_epoch", "global_step", "is_global_zero", "world_size",
             "precision", "num_devices", "num_nodes", "fast_dev_run", "logger", "loggers", "should_stop")  # fmt: skip
    seen, options = [], {"accumulate_grad_batches": 2, "limit_train_batches": 3, "enable_checkpointing": False}
    trainer = make(callbacks=[Looks(), callbacks.EarlyStopping("val_loss")], **options)
    before = [getattr(trainer, name) for name in known]
    kind = type(trainer.early_stopping_callback).__name__
    trainer.fit(Program(), loader(), loader())
    after = [getattr(trainer, name) for name in (*known, "num_training_batches")]
    return before, seen, kind, after, len(trainer.optimizers)


def minimum(make):
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, *arguments):
            trainer.should_stop = True

    given = ({"min_epochs": 3}, {"min_steps": 6}, {}, {"min_epochs": 1, "min_steps": 7})
    return [fitted(make, callback=[Stops()], max_epochs=5, **one)[0].global_step for one in given]


class Counts(pl.Callback):
    def __init__(self):
        self.train, self.val = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.train.append(round(batch[0].sum().item(), 5))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.val.append(round(batch[0].sum().item(), 5))


def lengths(make):
    given = (
        {"max_steps": 3, "max_epochs": None}, {"max_epochs": -1, "max_steps": 5}, {"fast_dev_run": True},
        {"fast_dev_run": 3}, {"overfit_batches": 2}, {"overfit_batches": 0.5}, {"num_sanity_val_steps": -1},
        {"limit_train_batches": 0.5, "limit_val_batches": 1}, {"max_time": timedelta(hours=1), "max_epochs": 1},
    )  # fmt: skip
    found = []
    for one in given:
        heard = Counts()
        shuffled = "overfit_batches" in one
        trainer, _ = fitted(make, callback=[heard], train=loader(shuffle=shuffled), **one)
        found.append((trainer.global_step, trainer.max_epochs, trainer.max_steps, heard.train, heard.val))
    return found


def precisions(make):
    class Looks(Program):
        def training_step(self, batch, batch_idx):
            seen.add((batch[0].dtype, torch.zeros(1).dtype, self.net.weight.dtype))
            return super().training_step(batch, batch_idx)

    seen, found = set(), []
    for word in ("64-true", "bf16-true", "16-true", "64", 32, "bf16-mixed"):
        trainer, module = fitted(make, module=Looks, precision=word, max_epochs=1)
        found.append((word, trainer.precision, round(module.net.weight.double().sum().item(), 3)))
    return found, sorted(map(str, seen))


def averages(make):
    given = ({}, {"update_starting_at_step": 2}, {"update_every_n_steps": 2}, {"decay": 0.9})
    found = []
    for one in given:
        options = {"callback": [callbacks.EMAWeightAveraging(**{"decay": 0.5} | one)], "enable_checkpointing": False}
        found.append([round(value, 5) for value in fitted(make, **options)[1].net.weight.flatten().tolist()])
    return found


class Unfreezes(callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.first)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.first, optimizer, lr=0.01)


class Deeper(Program):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)

    def loss(self, batch):
        return self.net(self.first(batch[0])).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([one for one in self.parameters() if one.requires_grad], lr=0.1)


def finetuning(make):
    torch.manual_seed(5)
    trainer, module = fitted(make, callback=[Unfreezes()], module=Deeper, max_epochs=3)
    weights = [round(one.sum().item(), 5) for one in module.parameters()]
    return weights, len(trainer.optimizers[0].param_groups)


def timed(make):
    found = []
    for given in ({"duration": {"seconds": 0}}, {"duration": "00:00:10:00"}):
        timer = callbacks.Timer(**given)
        found.append((fitted(make, callback=[timer])[0].global_step, timer.time_remaining() is not None))
    return found


class Fails(Program):
    def training_step(self, batch, batch_idx):
        if self.global_step == 2:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


def failing(make):
    with contextlib.suppress(ZeroDivisionError):
        fitted(make, callback=[callbacks.OnExceptionCheckpoint("failed")], module=Fails)
    return os.listdir("failed"), torch.load("failed/on_exception.ckpt", weights_only=True)["global_step"]


class Keeps(Logger):
    name, version = "own", 0

    def __init__(self):
        super().__init__()
        self.heard = []

    def log_metrics(self, metrics, step=None):
        self.heard.extend(name for name in metrics if not name.startswith("loss"))  # which the run logs besides

    def log_hyperparams(self, params):
        self.heard.append(dict(params))

    def finalize(self, status):
        self.heard.append(status)


def of_the_user(make):
    logger = Keeps()
    trainer, _ = fitted(make, logger=logger, max_epochs=1)
    return trainer.logger is logger, {str(one) for one in logger.heard}


def dry(make):
    trainer, _ = fitted(make, fast_dev_run=True, logger=True)
    trainer.logger.log_metrics({"x": 1.0})
    trainer.logger.experiment.add_image("x")
    return trainer.checkpoint_callback.best_model_path, trainer.fast_dev_run


def twice(make):
    trainer, module = fitted(make)
    trainer.fit(module, loader(), loader())
    trainer.fit(other := Program(), loader())
    sums = [round(one.net.weight.sum().item(), 5) for one in (module, other)]
    return sums, trainer.global_step, trainer.current_epoch


PROGRAMS = {
    "files": files(), "files of the best": files(monitor="val_loss"), "worst": files(monitor="val_loss", mode="max"),
    "two and the last": files(monitor="val_loss", save_top_k=2, save_last=True, filename="{epoch:02d}-{val_loss:.2f}"),
    "linked": files(save_last="link"), "all of an epoch's values": files(monitor="train_loss", save_top_k=-1),
    "of steps": files(every_n_train_steps=3, save_top_k=-1),
    "of steps by a value": files(every_n_train_steps=3, save_top_k=-1, monitor="val_loss"),
    "of steps at validations": files(every_n_train_steps=4, save_top_k=-1, monitor="val_loss"),
    "of epochs": files(every_n_epochs=2, save_top_k=-1, save_last=True), "weights": files(save_weights_only=True),
    "plain names": files(filename="x-{epoch}", auto_insert_metric_name=False, save_top_k=-1),
    "none": files(save_top_k=0),
    "interval": interval, "logger": at_the_logger, "best": best, "two loaders": of_two_loaders, "off": off,
    "predictions": predictions, "answers": answers, "minimum": minimum, "lengths": lengths, "precisions": precisions,
    "averages": averages, "finetuning": finetuning, "timer": timed, "failing": failing, "own logger": of_the_user,
    "dry run": dry, "second fit": twice,
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_does_the_same_under_both_trainers(name, tmp_path, monkeypatch):
    seen = []
    for kind in (pl.Trainer, hookline_lightning.Trainer):
        (tmp_path / kind.__module__).mkdir()
        monkeypatch.chdir(tmp_path / kind.__module__)
        seen.append(PROGRAMS[name](lambda kind=kind, **options: kind(**QUIET | options)))
    assert seen[1] == seen[0]


# Files of one in the other ------------------------------------------------------------------------------------------


def test_each_reads_the_files_of_the_other():
    for writes, reads in ((pl.Trainer, hookline_lightning.Trainer), (hookline_lightning.Trainer, pl.Trainer)):
        trainer = writes(**QUIET)
        trainer.fit(module := Program(lr=0.3), loader(), loader())
        trainer.save_checkpoint("it.ckpt")
        for load in (Program.load_from_checkpoint, lambda path: ours(Program, path)):
            again = load("it.ckpt")
            assert (dict(again.hparams), torch.equal(again.net.weight, module.net.weight)) == (
                {"lr": 0.3, "width": 1}, True
            )  # fmt: skip
        (tested,) = reads(**QUIET).test(Program(), loader(), ckpt_path="it.ckpt")
        loss = nn.functional.mse_loss(module.net(INPUTS), torch.zeros(16, 1)).item()
        assert tested["test_loss"] == pytest.approx(loss, rel=1e-5)


def ours(kind, path):
    from hookline_lightning.files.reading import load_from_checkpoint

    return load_from_checkpoint(kind, path)


def test_loggers_and_callbacks_of_the_package_become_plugins():
    trainer = hookline_lightning.Trainer(
        logger=CSVLogger("logs", name="exp", version=3), max_epochs=4,
        callbacks=[
            callbacks.LearningRateMonitor(), callbacks.RichModelSummary(max_depth=2), callbacks.TQDMProgressBar(),
            callbacks.GradientAccumulationScheduler({0: 2}), callbacks.StochasticWeightAveraging(0.05, 3),
            callbacks.DeviceStatsMonitor(cpu_stats=True), callbacks.EarlyStopping("val_loss"),
        ],
    )  # fmt: skip
    expected = {
        "csv": {}, "summary": {"depth": 2}, "progress": {}, "accumulate": {"steps": 2},
        "swa": {"begin": 0.5, "lr": 0.05, "anneal": 10, "anneal_strategy": "cos"},
    }  # fmt: skip
    assert trainer.plugins | expected == trainer.plugins
    assert trainer.plugins["monitor"]["learning_rate"] is trainer.plugins["monitor"]["cpu_utilization"] is True
    assert (trainer.options["runs_folder"], trainer.options["run_name"]) == ("logs/exp", "version_3")
    assert [type(one).__name__ for one in trainer.callbacks] == ["EarlyStopping", "ModelCheckpoint"]
    for refused, words in (
        (callbacks.ModelPruning("l1_unstructured"), "write torch.nn.utils.prune, called by a callback of your own"),
        (callbacks.WeightAveraging(), "write the plugin ema"), (callbacks.LearningRateFinder(), "`hookline lr-find"),
        (callbacks.SpikeDetection(), "the plugin finite"), (callbacks.BatchSizeFinder(), "`hookline batch-find"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            hookline_lightning.Trainer(callbacks=refused)


def test_data_of_two_loaders_are_counted_in_each():
    class Looks(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            seen.append((trainer.num_val_batches, trainer.num_sanity_val_batches))

    seen = []
    for kind in (pl.Trainer, hookline_lightning.Trainer):
        loaders = [loader(), DataLoader(TensorDataset(INPUTS), 8)]
        kind(**QUIET, callbacks=[Looks()], limit_val_batches=3).validate(Two(), loaders)
    assert seen[0][0] == seen[1][0] == [3, 2]
