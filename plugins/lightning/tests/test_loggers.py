"""Loggers under the names of Lightning's: each leads to a tracker of hookline, and those of users run as they are."""

import csv
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from plugins.lightning.tests.programs import loader, program
from tests.tracker_readers import of_tensorboard

import hookline
from hookline import CallbackInterface, hookimpl
from hookline.tracking import Histogram, Image, Table
from hookline_lightning import LightningModule, Trainer, loggers
from hookline_lightning.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from hookline_runs import read_run

pytestmark = pytest.mark.plugins

QUIET = {
    "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "max_epochs": 1,
    "num_sanity_val_steps": 0, "log_every_n_steps": 1,
}  # fmt: skip
Program = program(LightningModule)


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


def rows_of(path):
    """Return the rows of a file of values."""
    return list(csv.DictReader(Path(path).read_text().splitlines()))


class Sees(CallbackInterface):
    """Keeps what trackers get besides numbers."""

    def __init__(self):
        self.objects = {}

    @hookimpl
    def on_log_object(self, name, value):
        self.objects[name] = value


def test_the_default_is_csv_in_the_folder_of_the_run_and_false_is_none():
    class Looks(Program):
        def on_train_start(self):
            seen.append((self.logger, self.trainer.logger, self.trainer.loggers))
            if self.logger is not None:  # what is written for TensorBoard, Lightning's default where it is installed
                self.logger.experiment.add_scalar("written", 2.0, self.global_step)
                self.logger.experiment.add_text("words", "x")

    seen = []
    trainer = Trainer(logger=False, **QUIET)
    trainer.fit(Looks(), loader())
    assert seen == [(None, None, [])]
    trainer = Trainer(**QUIET)
    assert "csv" in trainer.plugins
    trainer.fit(Looks(), loader())
    logger = trainer.logger
    assert seen[1] == (logger, logger, [logger])
    assert (logger.name, logger.version, logger.save_dir, logger.log_dir) == (
        "lightning",
        2,
        "runs",
        "runs/lightning-2",
    )
    assert trainer.log_dir == logger.log_dir
    rows = rows_of("runs/lightning-2/metrics.csv")
    assert {"train_loss", "written"} <= set(rows[-1])


@pytest.mark.parametrize(
    ("given", "plugin", "options", "place"),
    [
        (lambda: CSVLogger("logs"), "csv", {}, ("logs/lightning_logs", "version")),
        (lambda: CSVLogger("logs", name="exp", version=3), "csv", {}, ("logs/exp", "version_3")),
        (lambda: CSVLogger("logs", name=None, version="mine"), "csv", {}, ("logs/", "mine")),
        (lambda: TensorBoardLogger("logs", sub_dir="tb", flush_secs=5), "tensorboard",
         {"folder": "tb", "init": {"flush_secs": 5}}, ("logs/lightning_logs", "version")),
        (lambda: WandbLogger(project="p", name="n", offline=True, tags=["a"], notes="x"), "wandb",
         {"mode": "offline", "name": "n", "project": "p", "tags": ["a"], "init": {"notes": "x"}},
         ("runs", "lightning")),
        (lambda: WandbLogger(), "wandb", {"mode": "online", "project": "lightning_logs"}, ("runs", "lightning")),
        (lambda: MLFlowLogger("exp", run_name="r", tracking_uri="sqlite:///x.db", tags={"a": 1}), "mlflow",
         {"experiment": "exp", "tracking_uri": "sqlite:///x.db", "tags": {"a": "1"}}, ("runs", "r")),
        (lambda: CometLogger(workspace="w", project="p", online=False, name="n", log_code=False), "comet",
         {"mode": "offline", "workspace": "w", "project": "p", "name": "n", "init": {"log_code": False}},
         ("runs", "lightning")),
        (lambda: {"csv": {"axis": "epochs"}}, "csv", {"axis": "epochs"}, ("runs", "lightning")),
        (lambda: ["csv", "tensorboard"], "tensorboard", {}, ("runs", "lightning")),
    ],
)  # fmt: skip
def test_what_loggers_stand_for(given, plugin, options, place):
    trainer = Trainer(logger=given())
    assert trainer.plugins[plugin] == options
    assert (trainer.options["runs_folder"], trainer.options["run_name"]) == place
    assert "csv" in trainer.plugins if plugin == "csv" else True


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda: CSVLogger(".", prefix="a"), r"CSVLogger\(prefix='a'\) is not honoured here: write it before"),
        (lambda: CSVLogger(".", version="a/b"), r"CSVLogger\(version='a/b'\) must be a plain name"),
        (lambda: TensorBoardLogger(".", log_graph=True), r"TensorBoardLogger\(log_graph=True\) is not honoured here"),
        (lambda: WandbLogger(log_model="all"), r"WandbLogger\(log_model='all'\) is not honoured here: name plugin"),
        (lambda: WandbLogger(id="x"), r"WandbLogger\(id='x'\) is not honoured here: a resumed run of hookline goes on"),
        (lambda: MLFlowLogger(run_id="x"), r"MLFlowLogger\(run_id='x'\) is not honoured here"),
        (lambda: MLFlowLogger(artifact_location="x"), "the server or the run's folder says where"),
        (lambda: CometLogger(api_key="x"), "put it into the environment, COMET_API_KEY: keys do not belong into"),
        (lambda: CometLogger(mode="get"), r"CometLogger\(mode='get'\) is not honoured here: each run is"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name_at_the_start(given, words):
    with pytest.raises(ValueError, match=words):
        given()


def test_what_has_no_effect_is_named(caplog):
    for logger, words in (
        (
            lambda: CSVLogger(".", flush_logs_every_n_steps=1),
            "CSVLogger(flush_logs_every_n_steps=1) has no effect",
        ),
        (lambda: WandbLogger(save_dir="x", resume="allow"), "WandbLogger(save_dir='x', resume='allow') has no effect"),
        (
            lambda: MLFlowLogger(save_dir="x"),
            "MLFlowLogger(save_dir='x') has no effect here: trackers write below",
        ),
    ):
        logger()
        assert words in caplog.text


def test_what_is_logged_reaches_the_tracker_and_its_configuration():
    class Logs(Program):
        def training_step(self, batch, batch_idx):
            writer = self.logger.experiment
            if batch_idx == 1:
                self.logger.log_metrics({"mine": 3.0})
                writer.add_scalar("scalar", torch.tensor(4.0), self.global_step)
                writer.add_scalars("both", {"a": 1.0, "b": 2.0})
                writer.add_text("words", "as they are")
                writer.add_image("picture", torch.rand(1, 5, 6))
                writer.add_image("rows", torch.rand(5, 6, 3), dataformats="HWC")
                writer.add_images("pictures", torch.rand(3, 3, 5, 6))
                writer.add_histogram("weights", self.net.weight)
                writer.add_figure("figure", pyplot.figure())
                writer.add_hparams({"late": 1}, {"found": 2.0})
                writer.flush()
            return super().training_step(batch, batch_idx)

    logger, seen = TensorBoardLogger("logs", name="exp"), Sees()
    logger.log_hyperparams(types.SimpleNamespace(depth=2))
    trainer = Trainer(logger=[logger, "csv"], plugins={"sees": seen}, **QUIET)
    trainer.logger.log_metrics({"early": 5.0})
    assert trainer.loggers[0] is logger
    trainer.fit(Logs(lr=0.05), loader(), loader())
    assert (logger.log_dir, logger.version, logger.name) == ("logs/exp/version-1", 1, "exp")
    assert (logger.save_dir, logger.root_dir) == ("logs", "logs/exp")
    points = str(list(of_tensorboard(Path("logs/exp/version-1"))))
    found = {"mine": 3.0, "scalar": 4.0, "both/b": 2.0, "found": 2.0, "early": 5.0}
    rows = rows_of("logs/exp/version-1/metrics.csv")
    for name, value in found.items():
        assert value in [float(row[name]) for row in rows if row.get(name)]
        assert name in points
    assert {name: type(value) for name, value in seen.objects.items()} == {
        "words": str, "picture": Image, "rows": Image, "pictures": Image, "weights": Histogram,
        "figure": pyplot.Figure, "hparams": str,
    }  # fmt: skip
    assert seen.objects["pictures"].pixels.shape == (3, 5, 18)
    assert seen.objects["hparams"] == "late: 1"
    hparams = read_run("logs/exp/version-1").config["plugins"]["lightning"]["hparams"]
    assert hparams == {"lr": 0.05, "width": 1, "depth": 2}


def test_what_a_program_logs_by_each_services_own_words():
    class Logs(Program):
        def on_train_start(self):
            wandb, mlflow, comet, rows = (one.experiment for one in self.trainer.loggers)
            wandb.log({"of_wandb": 1.0, "pictures": [np.zeros((4, 5)), np.zeros((4, 5, 3))], "text": "x"}, step=0)
            wandb.config.update({"a": 1})
            wandb.config["b"] = 2
            assert wandb.config == {"a": 1, "b": 2}
            mlflow.log_metric(self.trainer.loggers[1].run_id, "of_mlflow", 2.0)
            mlflow.log_artifact("id", Path("file.txt"))
            mlflow.log_figure("id", pyplot.figure(), "drawn.png")
            comet.log_metrics({"of_comet": 3.0})
            comet.log_parameters({"c": 3})
            comet.log_image(torch.zeros(3, 4, 5), "by_comet")
            rows.log_metrics({"of_csv": 4.0})
            self.logger.log_image("images", [np.zeros((4, 5, 4))])
            self.logger.log_table("table", columns=["a"], data=[[1]])
            self.logger.watch(self)
            self.logger.log_graph(self)
            with pytest.raises(AttributeError, match="experiment.use_artifact of a run of wandb is not here"):
                wandb.use_artifact("x")
            with pytest.raises(TypeError, match="a list is nothing that trackers take|a dict is nothing that trackers"):
                wandb.log({"odd": {}})

    Path("file.txt").write_text("x")
    own, seen = [], Sees()
    for kind in (WandbLogger, MLFlowLogger, CometLogger):
        logger = kind(offline=True) if kind is WandbLogger else kind()
        logger.plugin = ""  # what the services themselves take is tested with their trackers
        own.append(logger)
    trainer = Trainer(logger=[*own, CSVLogger("logs")], plugins={"sees": seen}, **QUIET)
    trainer.fit(Logs(), loader())
    assert {"of_wandb": 1.0, "of_mlflow": 2.0, "of_comet": 3.0, "of_csv": 4.0}.items() <= {
        name: value.item() for name, value in trainer.logged_metrics.items()
    }.items()
    kinds = {name: type(value) for name, value in seen.objects.items()}
    assert kinds == {
        "pictures/0": Image, "pictures/1": Image, "text": str, "file.txt": type(Path()), "drawn.png": pyplot.Figure,
        "by_comet": Image, "images": Image, "table": Table, "hparams": str,
    }  # fmt: skip


def test_a_logger_of_the_users_runs_as_it_is():
    class Keeps(Logger):
        def __init__(self):
            self.heard = []

        def log_metrics(self, metrics, step=None):
            self.heard.append((sorted(metrics), step))

        def log_hyperparams(self, params):
            self.heard.append(params)

        def save(self):
            self.saved = True

        def finalize(self, status):
            self.heard.append(status)

    class Fails(Program):
        def validation_step(self, batch, batch_idx):
            raise ZeroDivisionError

    logger = Keeps()
    trainer = Trainer(logger=logger, **QUIET | {"log_every_n_steps": 4})
    trainer.fit(Program(), loader(), loader())
    assert trainer.logger is logger
    assert [one for one in logger.heard if one] == [
        {"lr": 0.1, "width": 1}, (["epoch", "loss"], 4), (["epoch", "val_loss"], 4),
        (["epoch", "loss_epoch", "train_loss"], 4), "success",
    ]  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        Trainer(logger=logger, **QUIET).fit(Fails(), loader(), loader())
    assert logger.heard[-1] == "failed"
    with pytest.raises(ValueError, match=r"logger=dict_keys\(…\) is no logger: it has no log_metrics"):
        Trainer(logger={}.keys())


def test_a_dry_run_logs_nothing_and_takes_everything():
    class Logs(Program):
        def on_train_start(self):
            self.logger.log_metrics({"x": 1.0})
            self.logger.experiment.anything("at all", of=1)

    seen = Sees()
    trainer = Trainer(fast_dev_run=True, plugins={"sees": seen}, enable_progress_bar=False)
    trainer.fit(Logs(), loader(), loader())
    assert "x" not in trainer.callback_metrics
    assert not {"csv", "checkpoint"} & trainer.plugins.keys()
    assert trainer.checkpoint_callback.best_model_path == ""


def test_the_place_of_a_value_is_that_of_the_run_and_what_comes_after_is_told(caplog):
    class Logs(Program):
        def on_train_start(self):
            self.logger.log_metrics({"x": 1.0}, step=500)

    trainer = Trainer(**QUIET)
    with pytest.raises(RuntimeError, match="the folder of a logger is known when its run has begun"):
        _ = trainer.logger.log_dir
    trainer.fit(Logs(), loader())
    trainer.logger.log_metrics({"late": 1.0})
    assert "logger.log_metrics(step=500): values lie at the step of the run, which is 0" in caplog.text
    assert "was logged after the run had ended, and no tracker takes it" in caplog.text
    assert "late" not in trainer.callback_metrics


def test_hparams_are_kept_from_trackers_where_that_is_asked_for():
    class Keeps(Program):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters(logger=False)

    for number, (options, kind) in enumerate((({"enable_autolog_hparams": False}, Program), ({}, Keeps)), 1):
        Trainer(**options, **QUIET).fit(kind(), loader())
        assert read_run(f"runs/lightning-{number}").config["plugins"]["lightning"]["hparams"] == {}


def test_a_module_in_a_run_of_hooklines_own_has_a_logger_of_all_trackers():
    class Logs(Program):
        def on_train_start(self):
            self.logger.experiment.add_text("words", "x")
            self.logger.experiment.log({"number": 1.0})

        def train_dataloader(self):
            return loader()

    seen = Sees()
    trainer = hookline.Trainer(Logs(), {"lightning": {}, "sees": seen}, epochs=1)
    trainer.train()
    assert seen.objects == {"words": "x"}
    assert loggers.__all__ == ["CSVLogger", "CometLogger", "Logger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"]
