"""Callbacks under the names of Lightning's, without its package: those that run, and those that are plugins."""

import datetime
import logging
from pathlib import Path

import pytest
import torch
from plugins.lightning.tests.programs import INPUTS, by_hand, loader, program
from torch import nn

import hookline
from hookline.testing import on_ranks
from hookline_lightning import Callback, LightningDataModule, LightningModule, Trainer, callbacks
from hookline_lightning.callbacks import (
    BasePredictionWriter,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    OnExceptionCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
)

pytestmark = pytest.mark.plugins

NAMES = [  # of Lightning 2.6.6; tests/test_package_trainer.py compares them with its own
    "BackboneFinetuning", "BaseFinetuning", "BasePredictionWriter", "BatchSizeFinder", "Callback", "Checkpoint",
    "DeviceStatsMonitor", "EMAWeightAveraging", "EarlyStopping", "GradientAccumulationScheduler", "LambdaCallback",
    "LearningRateFinder", "LearningRateMonitor", "ModelCheckpoint", "ModelPruning", "ModelSummary",
    "OnExceptionCheckpoint", "ProgressBar", "RichModelSummary", "RichProgressBar", "SpikeDetection",
    "StochasticWeightAveraging", "TQDMProgressBar", "ThroughputMonitor", "Timer", "WeightAveraging",
]  # fmt: skip
OF_THE_PACKAGE_ALONE = {"BackboneFinetuning", "BaseFinetuning", "ModelPruning", "SpikeDetection", "WeightAveraging"}
QUIET = {
    "enable_progress_bar": False, "enable_model_summary": False, "logger": False, "num_sanity_val_steps": 0,
    "plugins": {"checkpoint": None},
}  # fmt: skip
Program = program(LightningModule)


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_every_callback_has_its_name_here_or_is_of_the_package_alone():
    assert set(callbacks.__all__) == set(NAMES) - OF_THE_PACKAGE_ALONE


# Checkpoints ------------------------------------------------------------------------------


def files_of(writer, **options):
    """Train two epochs, and return the names of the files, the best, its score, and the last."""
    trainer = Trainer(callbacks=[writer], **QUIET | {"max_epochs": 2} | options)
    trainer.fit(Program(), loader(), loader())
    assert trainer.checkpoint_callback is writer
    names = sorted(path.name for path in Path(writer.dirpath).glob("*.ckpt")) if Path(writer.dirpath).exists() else []
    score = None if writer.best_model_score is None else round(writer.best_model_score.item(), 4)
    return names, Path(writer.best_model_path).name, score, Path(writer.last_model_path).name


FIRST, SECOND = (round(loss, 4) for loss in by_hand()[1])


@pytest.mark.parametrize(
    ("given", "expected"),
    [  # the names were recorded from Lightning 2.6.6, the scores are those of the loop by hand
        ({}, (["epoch=1-step=8.ckpt"], "epoch=1-step=8.ckpt", None, "")),
        ({"monitor": "val_loss"}, (["epoch=1-step=8.ckpt"], "epoch=1-step=8.ckpt", SECOND, "")),
        ({"monitor": "val_loss", "mode": "max"}, (["epoch=0-step=4.ckpt"], "epoch=0-step=4.ckpt", FIRST, "")),
        (
            {"monitor": "val_loss", "save_top_k": 2, "filename": "{epoch:02d}-{val_loss:.2f}", "save_last": True},
            (
                [f"epoch=00-val_loss={FIRST:.2f}.ckpt", f"epoch=01-val_loss={SECOND:.2f}.ckpt", "last.ckpt"],
                f"epoch=01-val_loss={SECOND:.2f}.ckpt", SECOND, "last.ckpt",
            ),
        ),
        (
            {"save_top_k": -1, "filename": "x-{epoch}", "auto_insert_metric_name": False},
            (["x-0.ckpt", "x-1.ckpt"], "x-1.ckpt", None, ""),
        ),
        (
            {"every_n_train_steps": 3, "save_top_k": -1},
            (["epoch=0-step=3.ckpt", "epoch=1-step=6.ckpt"], "epoch=1-step=6.ckpt", None, ""),
        ),
        (  # the value is there from the first validation on
            {"every_n_train_steps": 3, "save_top_k": -1, "monitor": "val_loss"},
            (["epoch=1-step=6.ckpt"], "epoch=1-step=6.ckpt", FIRST, ""),
        ),
        (
            {"every_n_epochs": 2, "save_top_k": -1, "save_last": True},
            (["epoch=1-step=8.ckpt", "last.ckpt"], "epoch=1-step=8.ckpt", None, "last.ckpt"),
        ),
        ({"save_top_k": 0}, ([], "", None, "")),
        (
            {"train_time_interval": datetime.timedelta(0), "save_top_k": 1, "filename": "newest"},
            (["newest.ckpt"], "newest.ckpt", None, ""),
        ),
        (
            {"save_last": "link"},
            (["epoch=1-step=8.ckpt", "last.ckpt"], "epoch=1-step=8.ckpt", None, "last.ckpt"),
        ),
    ],
)  # fmt: skip
def test_which_files_are_written(given, expected):
    assert files_of(ModelCheckpoint("files", **given)) == expected


def test_files_lie_below_the_run_or_the_root_and_a_second_run_replaces_none():
    files_of(one := ModelCheckpoint(), logger=True)
    assert Path(one.dirpath) == Path("runs/lightning-1/checkpoints").resolve()
    files_of(two := ModelCheckpoint(), default_root_dir="root")
    assert Path(two.dirpath) == Path("root/checkpoints").resolve()
    names = files_of(ModelCheckpoint(), default_root_dir="root")[0]
    assert names == ["epoch=1-step=8-v1.ckpt", "epoch=1-step=8.ckpt"]


def test_the_best_is_taken_where_it_is_asked_for_and_where_nothing_is_said(caplog):
    writer = ModelCheckpoint("files", monitor="val_loss", mode="max")
    trainer, module = Trainer(max_epochs=2, callbacks=[writer], **QUIET), Program()
    trainer.fit(module, loader(), loader())
    first, second = by_hand()[1]
    assert trainer.test(module, loader(), verbose=False) == [{"test_loss": pytest.approx(second)}]
    for given in ({"ckpt_path": "best"}, {"ckpt_path": writer.best_model_path}, {}):
        assert trainer.test(dataloaders=loader(), verbose=False, **given) == [{"test_loss": pytest.approx(first)}]
    assert "no model and no ckpt_path: taking the best weights" in caplog.text
    assert torch.equal(module.net.weight, by_hand()[0][0])
    assert (trainer.global_step, trainer.current_epoch) == (8, 2)
    with pytest.raises(ValueError, match='ckpt_path="best": no ModelCheckpoint of this trainer has written a best'):
        Trainer(**QUIET).test(Program(), loader(), ckpt_path="best")


def test_without_a_writer_the_newest_weights_are_a_file_too():
    trainer, module = Trainer(max_epochs=1, **QUIET), Program(lr=0.05)
    trainer.fit(module, loader())
    again = Program.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert (again.hparams, torch.equal(again.net.weight, module.net.weight)) == ({"lr": 0.05, "width": 1}, True)
    assert Trainer(enable_checkpointing=False, **QUIET).checkpoint_callback is None
    with pytest.raises(ValueError, match="enable_checkpointing=False, and callbacks has ModelCheckpoint"):
        Trainer(enable_checkpointing=False, callbacks=[ModelCheckpoint()])


class Drops(Program):
    """Draws random numbers, so that a run that goes on must have the states of all of them."""

    def loss(self, batch):
        return self.net(nn.functional.dropout(batch[0], 0.5, self.training)).square().mean()


@pytest.mark.parametrize("writer", ["step", "validation", "after"])
def test_a_run_goes_on_from_a_file_with_the_same_bits(writer):
    whole = Drops()
    Trainer(max_epochs=4, **QUIET).fit(whole, loader(shuffle=True), loader())
    kinds = {
        "step": {"every_n_train_steps": 3}, "validation": {"save_on_train_epoch_end": False},
        "after": {},
    }  # fmt: skip
    made = ModelCheckpoint("files", save_top_k=-1, **kinds[writer])
    cut = Trainer(max_epochs=2, callbacks=[made], **QUIET)
    cut.fit(Drops(), loader(shuffle=True), loader())
    path = made.best_model_path
    if writer == "after":
        cut.save_checkpoint(path := "after.ckpt")
    module, trainer = Drops(), Trainer(max_epochs=4, callbacks=[ModelCheckpoint("files")], **QUIET)
    trainer.fit(module, loader(shuffle=True), loader(), ckpt_path=path)
    assert (torch.equal(module.net.weight, whole.net.weight), trainer.global_step) == (True, 16)
    assert trainer.ckpt_path == path
    assert Path(path).exists()  # the run began with it


def test_a_file_without_the_state_of_a_run_is_no_place_to_go_on_from():
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(Program(), loader())
    trainer.save_checkpoint("weights.ckpt", weights_only=True)
    with pytest.raises(ValueError, match='has weights and no state that a run goes on with: say "last" for the newest'):
        Trainer(**QUIET).fit(Program(), loader(), ckpt_path="weights.ckpt")
    with pytest.raises(ValueError, match='\'nowhere.ckpt\' is not there: say "last", "best", a file, or the folder'):
        Trainer(**QUIET).fit(Program(), loader(), ckpt_path="nowhere.ckpt")
    with pytest.raises(ValueError, match='ckpt_path="hpc": a run that a cluster has cut goes on by ckpt_path="last"'):
        Trainer(**QUIET).fit(Program(), loader(), ckpt_path="hpc")
    with pytest.raises(ValueError, match=r"save_checkpoint\(storage_options=…\): files are written to folders"):
        trainer.save_checkpoint("weights.ckpt", storage_options={})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mode": "auto"}, r"ModelCheckpoint\(mode='auto'\) must be min or max"),
        ({"save_top_k": 3}, r"save_top_k=3, monitor=None\): say by which value they are the best"),
        ({"save_top_k": -2}, "save_top_k=-2"),
        ({"every_n_epochs": -1}, r"every_n_epochs=-1\) must be at least 0"),
        (
            {"every_n_epochs": 1, "every_n_train_steps": 2},
            "of every_n_train_steps, every_n_epochs and train_time",
        ),
    ],
)
def test_writers_that_cannot_be(given, words):
    with pytest.raises(ValueError, match=words):
        ModelCheckpoint(**given)


def test_a_value_that_nobody_logs_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"ModelCheckpoint\(monitor='val_acc'\): nobody has logged it; .*val_"):
        files_of(ModelCheckpoint(monitor="val_acc"))
    with pytest.raises(RuntimeError, match=r"EarlyStopping\(monitor='val_acc'\): nobody has logged it; .*val_"):
        Trainer(callbacks=[EarlyStopping("val_acc")], **QUIET).fit(Program(), loader(), loader())


def test_a_run_that_fails_leaves_a_file():
    class Fails(Program):
        def training_step(self, batch, batch_idx):
            if self.global_step == 2:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    written = [OnExceptionCheckpoint("failed"), ModelCheckpoint("files", save_on_exception=True)]
    with pytest.raises(ZeroDivisionError):
        Trainer(callbacks=written, **QUIET).fit(Fails(), loader())
    for path in ("failed/on_exception.ckpt", "files/epoch=0-step=2.ckpt"):
        assert torch.load(path, weights_only=True)["global_step"] == 2


def on_ranks_by(strategy):
    """Train on several ranks, write files, and evaluate one; return the files, the best score and the loss."""
    writer = ModelCheckpoint("files", monitor="val_loss", save_top_k=2, save_last=True)
    options = QUIET | {"accelerator": "cpu", "strategy": strategy, "devices": 2}
    trainer = Trainer(max_epochs=2, callbacks=[writer], **options)
    trainer.fit(Program(), loader(), loader())
    trainer.save_checkpoint("files/end.ckpt")
    with pytest.raises(ValueError, match='has weights and no state that a run goes on with: say "last"'):
        Trainer(**options).fit(Program(), loader(), ckpt_path="files/end.ckpt")
    (tested,) = Trainer(**options).test(Program(), loader(), ckpt_path="files/end.ckpt", verbose=False)
    return sorted(path.name for path in Path("files").iterdir()), writer.best_model_score.item(), tested["test_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_write_one_file_and_take_its_weights(strategy):
    first, second = on_ranks(on_ranks_by, 2, strategy)
    assert first == second
    assert first[0] == ["end.ckpt", "epoch=0-step=2.ckpt", "epoch=1-step=4.ckpt", "last.ckpt"]
    assert first[1] == pytest.approx(first[2])
    module = Program.load_from_checkpoint("files/end.ckpt")
    assert nn.functional.mse_loss(module.net(INPUTS), torch.zeros(16, 1)).item() == pytest.approx(first[2])


# Files ------------------------------------------------------------------------------------


class Data(LightningDataModule):
    def __init__(self, size=4):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return loader(self.hparams.size)

    def state_dict(self):
        return {"size": self.hparams.size}

    def load_state_dict(self, state):
        self.seen = state


class Taken(LightningModule):
    """Takes all parameters as one, and adds to its checkpoint."""

    def __init__(self, config):
        super().__init__()
        self.save_hyperparameters(config)
        self.net = nn.Linear(4, self.hparams.width)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["note"] = sorted(checkpoint)

    def on_load_checkpoint(self, checkpoint):
        self.note = checkpoint["note"]


def test_a_module_and_its_data_are_made_again_from_a_file():
    trainer, module = Trainer(max_epochs=1, **QUIET), Taken({"width": 3, "way": Path("x"), "net": nn.ReLU()})
    with pytest.raises(AttributeError):
        _ = module.note
    trainer.fit(module, datamodule=Data(8))
    trainer.save_checkpoint("files/it.ckpt")
    again = Taken.load_from_checkpoint("files/it.ckpt")
    assert again.hparams == {"width": 3, "way": "x"}  # what is no plain data is left out
    assert torch.equal(again.net.weight, module.net.weight)
    assert {"state_dict", "optimizer_states", "callbacks", "Data"} <= set(again.note)
    data = Data.load_from_checkpoint("files/it.ckpt")
    assert (data.hparams, data.seen) == ({"size": 8}, {"size": 8})
    assert Data.load_from_checkpoint("files/it.ckpt", size=2).hparams == {"size": 2}


def test_what_a_file_has_not_is_given_and_what_is_none_is_refused():
    class Needs(Program):
        def __init__(self, scale, lr=0.1):
            LightningModule.__init__(self)
            self.save_hyperparameters(ignore="scale")
            self.net, self.scale = nn.Linear(4, 1), scale

    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(Needs(2.0, lr=0.3), loader())
    trainer.save_checkpoint("it.ckpt")
    again = Needs.load_from_checkpoint("it.ckpt", scale=3.0)
    assert (again.scale, again.hparams.lr) == (3.0, 0.3)
    with pytest.raises(TypeError, match=r"Needs needs scale, which it.ckpt has not: .*load_from_checkpoint"):
        Needs.load_from_checkpoint("it.ckpt")
    with pytest.raises(TypeError, match=r"Needs.__init__ has no argument 'scales'; it has scale, lr"):
        Needs.load_from_checkpoint("it.ckpt", scales=3.0)
    Path("other.yaml").write_text("lr: 0.7\n")
    assert Needs.load_from_checkpoint("it.ckpt", hparams_file="other.yaml", scale=1).hparams.lr == 0.7
    weights = torch.load("it.ckpt", weights_only=True)
    weights["state_dict"].pop("net.bias")
    torch.save(weights, "part.ckpt")
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"net.bias\""):
        Needs.load_from_checkpoint("part.ckpt", scale=1)
    assert Needs.load_from_checkpoint("part.ckpt", scale=1, strict=False).scale == 1


class Runs:
    """Runs code when it is read."""

    def __reduce__(self):
        return Path("was run").touch, ()


def test_no_code_of_a_file_is_run():
    torch.save({"state_dict": {}, "hyper_parameters": {"lr": Runs()}}, "bad.ckpt")
    with pytest.raises(ValueError, match="bad.ckpt holds more than tensors and plain data, and reading it would run"):
        Program.load_from_checkpoint("bad.ckpt")
    with pytest.raises(ValueError, match="reading it would run code"):
        Trainer(**QUIET).test(Program(), loader(), ckpt_path="bad.ckpt")
    assert not Path("was run").exists()
    torch.save([1], "list.ckpt")
    for path, words in (
        ("list.ckpt", "is no checkpoint of Lightning: it has no state_dict"), ("none.ckpt", "is not there"),
        (".", "is a folder: a checkpoint of a run, which fit"), ("https://x/y.ckpt", "is a URL: fetch it first"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            Program.load_from_checkpoint(path)


# Others that run --------------------------------------------------------------------------


def stopped(values, **given):
    """Train with values that a validation has in turn; return the epochs, and the callback."""

    class Says(Program):
        def on_validation_epoch_end(self):
            self.log("seen", values[self.current_epoch])

    watch = EarlyStopping("seen", **given)
    trainer = Trainer(max_epochs=len(values), callbacks=[watch], **QUIET)
    trainer.fit(Says(), loader(8), loader(8))
    assert trainer.early_stopping_callback is watch
    return trainer.current_epoch, watch


@pytest.mark.parametrize(
    ("values", "given", "epochs", "best"),
    [
        ([3.0, 2.0, 2.5, 2.5, 1.0], {"patience": 2}, 4, 2.0),
        ([1.0, 2.0, 1.5, 1.5], {"patience": 2, "mode": "max"}, 4, 2.0),
        ([3.0, 2.95, 2.9, 2.0], {"patience": 2, "min_delta": 0.2}, 3, 3.0),
        ([3.0, float("nan"), 1.0], {}, 2, 3.0),
        ([3.0, 1.0, 0.5], {"stopping_threshold": 2.0}, 2, 3.0),
        ([3.0, 9.0, 0.5], {"divergence_threshold": 5.0}, 2, 3.0),
        ([3.0, 2.0, 1.0], {"patience": 1}, 3, 1.0),
    ],
)
def test_when_training_is_stopped_early(values, given, epochs, best):
    ended, watch = stopped(values, **given)
    assert (ended, watch.best_score.item()) == (epochs, best)
    assert watch.stopped_epoch == (epochs - 1 if watch.stopping_reason_message else 0)


def test_a_timer_measures_and_ends_training(caplog):
    caplog.set_level(logging.INFO, "hookline.lightning")
    for given, steps in (({"duration": {"microseconds": 1}}, 1), ({"duration": "00:00:10:00"}, 8), ({}, 8)):
        timer = Timer(**given)
        trainer = Trainer(max_epochs=2, callbacks=[timer], **QUIET)
        trainer.fit(Program(), loader())
        assert trainer.global_step == steps
        assert timer.time_elapsed("train") > 0
    assert timer.time_remaining() is None
    assert "Timer: 0:00:00 have passed" in caplog.text
    assert Trainer(callbacks=[Timer(datetime.timedelta(minutes=1))], **QUIET).options["epochs"] is None


def test_functions_hear_events():
    heard = []
    one = LambdaCallback(
        on_train_start=lambda trainer, module: heard.append(trainer.max_epochs),
        setup=lambda trainer, module, stage: heard.append(stage),
        on_train_end=None,
    )
    Trainer(max_epochs=1, callbacks=one, **QUIET).fit(Program(), loader())
    assert heard == ["fit", 1]
    with pytest.raises(TypeError, match=r"LambdaCallback\(train_start=…\): 'train_start' is no event"):
        LambdaCallback(train_start=print)


def test_writers_of_predictions_know_of_which_samples_they_are():
    class Writes(BasePredictionWriter):
        def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
            heard.append((tuple(prediction.shape), batch_indices, batch_idx, dataloader_idx))

        def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
            heard.append((len(predictions), batch_indices))

    heard = []
    trainer = Trainer(callbacks=[Writes("batch_and_epoch")], **QUIET)
    assert trainer.predict(Program(), loader(8), return_predictions=False) is None
    first, second = list(range(8)), list(range(8, 16))
    assert heard == [((8, 1), first, 0, 0), ((8, 1), second, 1, 0), (2, [[first, second]])]
    with pytest.raises(ValueError, match="write_interval='step' must be batch, epoch or batch_and_epoch"):
        Writes("step")


# Those that are plugins -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "plugins"),
    [
        ([LearningRateMonitor("step"), callbacks.ThroughputMonitor(len)],
         {"monitor": {"learning_rate": True, "throughput": True}}),
        ([DeviceStatsMonitor(cpu_stats=True)], {"monitor": {"gpu_utilization": False, "cpu_utilization": True}}),
        ([RichProgressBar()], {"progress": {}}),
        ([ModelSummary(max_depth=3)], {"summary": {"depth": 3}}),
        ([callbacks.RichModelSummary(max_depth=-1)], {"summary": {"depth": 1000}}),
        ([GradientAccumulationScheduler({0: 4})], {"accumulate": {"steps": 4}}),
        ([StochasticWeightAveraging(0.05, swa_epoch_start=3)],
         {"swa": {"begin": 0.5, "lr": 0.05, "anneal": 10, "anneal_strategy": "cos"}}),
        ([EMAWeightAveraging(decay=0.9, update_every_n_steps=2, update_starting_at_step=3)],
         {"ema": {"decay": 0.9, "every": 2, "offset": 1, "begin": 3, "buffers": "average"}}),
    ],
)  # fmt: skip
def test_callbacks_that_are_plugins(given, plugins):
    trainer = Trainer(callbacks=given, max_epochs=4, accelerator="cpu")
    assert trainer.plugins | plugins == trainer.plugins
    assert [type(one).__name__ for one in trainer.callbacks] == ["ModelCheckpoint"]
    assert "progress" not in Trainer(callbacks=[TQDMProgressBar(refresh_rate=0)], enable_progress_bar=None).plugins


def test_what_has_no_effect_is_named(caplog):
    Trainer(callbacks=[LearningRateMonitor("epoch"), RichProgressBar(leave=True), callbacks.ThroughputMonitor(len)])
    assert "LearningRateMonitor(logging_interval='epoch') has no effect here: it is a plugin" in caplog.text
    assert "RichProgressBar(leave=True) has no effect here" in caplog.text
    assert "ThroughputMonitor(batch_size_fn=…) has no effect here: the plugin monitor counts samples" in caplog.text
    caplog.clear()
    Trainer(callbacks=[LearningRateMonitor(), RichProgressBar(refresh_rate=5), ModelSummary(max_depth=4)])
    assert caplog.text == ""


class Bars(TQDMProgressBar):
    pass


class Prunes(GradientAccumulationScheduler):
    pass


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"callbacks": callbacks.LearningRateFinder()},
            "LearningRateFinder is not here; write the command `h",
        ),
        (
            {"callbacks": callbacks.BatchSizeFinder()},
            "BatchSizeFinder is not here; write the command `h",
        ),
        ({"callbacks": Bars()}, "Bars draws bars of its own, by what TQDMProgressBar keeps .*prog_bar=True shows"),
        ({"callbacks": Prunes({0: 2})}, "Prunes changes GradientAccumulationScheduler, which is a plugin here: derive"),
        (
            {"callbacks": LearningRateMonitor(log_momentum=True)},
            r"log_momentum=True\) is not here",
        ),
        ({"callbacks": GradientAccumulationScheduler({0: 2, 4: 1})}, "the window is the same all along here"),
        (
            {"callbacks": GradientAccumulationScheduler({0: 2}), "accumulate_grad_batches": 2},
            "both say the window",
        ),
        ({"callbacks": StochasticWeightAveraging([0.1, 0.2])}, r"swa_lrs=\[0.1, 0.2\]\): one rate for all groups"),
        ({"callbacks": StochasticWeightAveraging(0.1, avg_fn=max)}, r"avg_fn=…\): the plugin swa takes the mean"),
        ({"callbacks": StochasticWeightAveraging(0.1, 3)}, r"swa_epoch_start=3\) is an epoch, and needs max_epochs"),
        ({"callbacks": EMAWeightAveraging(update_starting_at_epoch=1)}, "say update_starting_at_step"),
        ({"callbacks": RichProgressBar(), "enable_progress_bar": False}, "enable_progress_bar=False and callbacks="),
        ({"callbacks": [EarlyStopping]}, "EarlyStopping'> is a class; give an object of it"),
    ],
)
def test_callbacks_that_cannot_be_are_refused_at_the_start(given, words):
    with pytest.raises(ValueError, match=words):
        Trainer(**given)


def test_a_plugin_of_hookline_alone_says_what_a_callback_is():
    plugins = {"lightning": {"callbacks": [LearningRateMonitor()]}}
    with pytest.raises(ValueError, match="LearningRateMonitor is not called here: it is the plugin mon"):
        hookline.Trainer(Program(), plugins)


def test_an_average_of_the_weights_is_in_the_module_when_training_has_ended():
    module = Program()
    trainer = Trainer(max_epochs=1, callbacks=[EMAWeightAveraging(decay=0.5)], enable_checkpointing=False, **QUIET)
    trainer.fit(module, loader())
    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    optimizer, average = torch.optim.SGD(net.parameters(), lr=0.1), None
    for (batch,) in loader():
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        optimizer.step()
        weight = net.weight.detach().clone()
        average = weight if average is None else 0.5 * average + 0.5 * weight
    assert torch.allclose(module.net.weight, average)


def test_writers_come_behind_all_other_callbacks():
    class Watches(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            heard.append("own")

    class Writes(ModelCheckpoint):
        def on_train_epoch_end(self, trainer, pl_module):
            heard.append("writer")

    heard = []
    Trainer(max_epochs=1, callbacks=[Writes(), Watches()], **QUIET).fit(Program(), loader())
    assert heard == ["own", "writer"]
