"""What MLflow has of real runs, read back by its own client; what happens where it is slow, gone or not there."""

import json
import math
import shutil
import socket
import sqlite3
import sys
import threading
import time
from functools import partial
from pathlib import Path

import PIL.Image
import pytest
import torch
from tests.tracker_readers import of_mlflow

import hookline_mlflow
from hookline import CallbackInterface, hookimpl
from hookline.testing import (
    Memory,
    TinyModule,
    check_killed_tracker,
    check_plugin,
    check_quiet_tracker,
    check_tracker,
    tiny_trainer,
)
from hookline.tracking import Histogram, Image, Table
from hookline_mlflow import Mlflow


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Leave no variable of the plugin behind."""
    for name, value in hookline_mlflow.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def empty(tmp_path_factory):
    """Return an empty store, which takes MLflow seconds to make and a test nothing to copy."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in hookline_mlflow.ENVIRONMENT.items():
            patch.setenv(name, value)  # it is read when MLflow is imported
        from mlflow import MlflowClient

        MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


class Prepared(CallbackInterface):
    """Puts an empty store where there is none."""

    def __init__(self, store):
        self.store = store

    @hookimpl
    def on_setup(self, trainer):
        folder = trainer.run_dir / "mlflow"
        if not folder.exists():
            folder.mkdir()
            shutil.copy(self.store, folder)


def train(empty, folder, *plugins, module=None, method="train", tracker=None, **options):
    options = {"epochs": 1, "log_every": "1 steps"} | options
    tracker = tracker or Mlflow()
    trainer = tiny_trainer([Prepared(empty), *plugins, tracker], module, runs_folder=str(folder), **options)
    getattr(trainer, method)()
    return trainer


class Kept:
    """What MLflow has of the last run that began in a folder."""

    def __init__(self, folder, experiment="hookline"):
        from mlflow import MlflowClient

        self.client = MlflowClient(f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
        self.experiment = self.client.get_experiment_by_name(experiment)
        self.runs = self.client.search_runs([self.experiment.experiment_id], order_by=["attributes.start_time DESC"])
        self.run = self.runs[0]

    @property
    def params(self):
        return self.run.data.params

    def history(self, name):
        return [(kept.step, kept.value) for kept in self.client.get_metric_history(self.run.info.run_id, name)]

    def artifact(self, path):
        return Path(self.client.download_artifacts(self.run.info.run_id, path))


class Paced(CallbackInterface):
    """Has training wait until the tracker has begun all that it was told."""

    def __init__(self, tracker):
        self.tracker = tracker

    @hookimpl
    def on_boundary(self):
        deadline = time.monotonic() + 60
        while self.tracker.waiting and time.monotonic() < deadline:
            time.sleep(0.005)


@pytest.fixture
def told():
    """Return what a plugin has been told: (step, name, value)."""

    class Told(CallbackInterface):
        def __init__(self):
            self.values = []

        @hookimpl
        def on_log(self, metrics, global_step):
            self.values += [(global_step, name, value) for name, value in metrics.items()]

        def of(self, wanted):
            return [(step, value) for step, name, value in self.values if name == wanted]

    return Told()


# What is kept -------------------------------------------------------------------------


@pytest.mark.slow
def test_it_keeps_the_contract_with_a_store_for_several_runs(empty, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)  # MLflow would keep artifacts below the working folder
    uri = f"sqlite:///{shutil.copy(empty, tmp_path)}"
    check_plugin(Mlflow, tracking_uri=uri, experiment="of the kit", runs_folder=tmp_path / "kit")
    for _ in range(2):
        train(empty, tmp_path / "runs", tracker=Mlflow(tracking_uri=uri))
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("hookline").experiment_id])
    assert sorted(run.info.run_name for run in found) == ["run-1", "run-2"]


def test_values_and_configuration_are_those_of_the_run(empty, tmp_path, told):
    trainer = train(empty, tmp_path, told, tracker=Mlflow(experiment="first try", name="mine", tags={"team": 7}))
    kept = Kept(trainer.run_dir, "first try")
    assert kept.history("train_loss") == told.of("train_loss")
    assert len(told.of("train_loss")) == 7
    assert kept.history("val_loss") == told.of("val_loss")
    assert (kept.run.info.run_name, kept.run.info.status) == ("mine", "FINISHED")
    assert kept.run.data.tags.items() >= {"team": "7", "hookline.stage": "train"}.items()
    assert kept.params["trainer.epochs"] == "1"
    assert kept.params["trainer.log_every"] == "1 steps"
    assert kept.params["trainer.max_steps"] == "null"
    assert json.loads(kept.artifact("config.json").read_text())["plugins"]["mlflow"]["tags"] == {"team": 7}


class Shows(TinyModule):
    """Logs one of each kind in the first step."""

    def on_end_train_step(self, global_step, *outputs):
        if global_step > 1:
            return
        self.trainer.log(nothing=math.nan, much=math.inf, **{"val@a//b": 1.5, "../up": 2.5})
        for name, value in {
            "note": "gr\u00fc\u00dfe",
            "../../out/note": "below all the same",
            "square": Image(torch.full((3, 4, 5), 200)),
            "rows": Table(["a", "b"], [[1, "x"], [2, None]]),
            "numbers": Histogram(torch.zeros(3)),
        }.items():
            self.trainer.log_object(name, value)


def test_texts_images_tables_and_awkward_values(empty, tmp_path):
    kept = Kept(train(empty, tmp_path, module=Shows()).run_dir)
    assert kept.artifact("texts/note/000000001.txt").read_text(encoding="utf-8") == "gr\u00fc\u00dfe"
    assert kept.artifact("texts/out/note/000000001.txt").read_text() == "below all the same"
    with PIL.Image.open(kept.artifact("images/square/000000001.png")) as image:
        assert (image.size, image.getpixel((0, 0))) == ((5, 4), (200, 200, 200))
    table = json.loads(kept.artifact("tables/rows/000000001.json").read_text())
    assert table == {"columns": ["a", "b"], "data": [[1, "x"], [2, None]]}
    ((step, value),) = kept.history("nothing")
    assert (step, math.isnan(value)) == (1, True)
    assert kept.history("much") == [(1, sys.float_info.max)]
    assert kept.history("val_a/b") == [(1, 1.5)]
    assert kept.history("up") == [(1, 2.5)]


def test_files_and_models_are_artifacts(empty, tmp_path):
    model = tmp_path / "model.bin"

    class Saves(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, trainer, global_step):
            model.write_bytes(bytes([global_step]))
            if global_step == 3:
                folder = tmp_path / "several"
                folder.mkdir()
                (folder / "a.txt").write_text("a")
                trainer.log_object("several", folder)

        @hookimpl
        def on_end_train(self, trainer):
            trainer.hook.on_checkpoint(trainer=trainer, path=model, kind="model")

    kept = Kept(train(empty, tmp_path, Saves()).run_dir)
    assert kept.artifact("files/model/model.bin").read_bytes() == bytes([7])
    assert kept.artifact("files/several/a.txt").read_text() == "a"


def test_an_evaluation_is_a_run_of_its_own_that_a_training_does_not_go_on_with(empty, tmp_path):
    trainer = train(empty, tmp_path, Checkpoints())
    first = json.loads((trainer.run_dir / "trackers" / "mlflow.json").read_text())
    metrics = trainer.validate()
    kept = Kept(trainer.run_dir)
    assert [found.data.tags["hookline.stage"] for found in kept.runs] == ["val", "train"]
    assert kept.history("val_loss") == [(7, metrics["val_loss"])]
    assert json.loads((trainer.run_dir / "trackers" / "mlflow.json").read_text()) == first
    train(empty, tmp_path, Checkpoints(), method="validate", resume=str(trainer.run_dir))
    assert len(Kept(trainer.run_dir).runs) == 3
    assert json.loads((trainer.run_dir / "trackers" / "mlflow.json").read_text()) == first


@pytest.mark.parametrize(("axis", "places"), [("samples", [8, 16, 24]), ("epochs", [0, 0, 0])])
def test_the_axis(empty, tmp_path, axis, places):
    kept = Kept(train(empty, tmp_path, max_steps=3, tracker=Mlflow(axis=axis)).run_dir)
    assert [place for place, _ in kept.history("train_loss")] == places


def test_what_every_tracker_does(empty, tmp_path):
    check_tracker(Mlflow, of_mlflow, tmp_path, [Prepared(empty)], sdk="mlflow")


# How it ends --------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "status"), [("raise", "FAILED"), ("stop", "FINISHED")])
def test_the_status_says_how_the_run_ended(empty, tmp_path, how, status):
    class Ender(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, trainer, global_step):
            if global_step == 3 and how == "raise":
                raise ZeroDivisionError
            if global_step == 3:
                trainer.stop("enough")

    if how == "raise":
        with pytest.raises(ZeroDivisionError):
            train(empty, tmp_path, Ender())
    else:
        train(empty, tmp_path, Ender())
    kept = Kept(tmp_path / "run-1")
    assert kept.run.info.status == status
    assert [step for step, _ in kept.history("train_loss")][:2] == [1, 2]


def test_values_within_validations_have_the_number_of_their_batch(empty, tmp_path):
    memory, options = Memory(every="1 steps"), {"evaluate_every": "2 steps", "report_loss_after_eval": False}
    trainer = train(empty, tmp_path, memory, log_every="3 steps", **options)
    whole = Kept(trainer.run_dir).history("val_loss_batch")
    assert [batch for batch, _ in whole] == list(range(3, 28, 3))
    resumed = {"log_every": "3 steps", "resume": str(trainer.run_dir), **options}
    train(empty, tmp_path, Memory(memory.states[5]), **resumed)  # behind 14 batches
    assert Kept(trainer.run_dir).history("val_loss_batch") == whole


class Checkpoints(CallbackInterface):
    """Saves at a step, and looks at what the store has then."""

    had = None

    @hookimpl
    def on_boundary(self, trainer, global_step):
        if global_step == 3:
            trainer.save("third")

    @hookimpl
    def save(self, trainer):
        if trainer.global_step == 3:
            torch.save(trainer.hook.get_run_state(trainer=trainer), trainer.run_dir / "state.pt")
            self.had = stored(trainer.run_dir)
        return True

    @hookimpl
    def restore(self, trainer, stage):
        if not trainer.options.resume:
            return False
        state = torch.load(Path(trainer.options.resume) / "state.pt", weights_only=False)
        return trainer.hook.set_run_state(trainer=trainer, state=state, stage=stage)


def stored(folder):
    """Return the steps of the training loss that a store has, read past MLflow."""
    if not (folder / "mlflow").exists():
        return []
    with sqlite3.connect(f"file:{folder / 'mlflow' / 'mlflow.db'}?mode=ro", uri=True) as store:
        return [step for (step,) in store.execute("select step from metrics where key = 'train_loss' order by step")]


def test_a_store_has_all_that_stands_before_a_checkpoint_when_that_is_made(empty, tmp_path):
    checkpoints = Checkpoints()
    train(empty, tmp_path, checkpoints)
    assert checkpoints.had == [1, 2, 3]


def test_a_run_that_failed_goes_on_with_each_value_once(empty, tmp_path, told):
    class Fails(CallbackInterface):
        @hookimpl
        def on_begin_optimizer_step(self, trainer):
            if trainer.global_step == 5:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(empty, tmp_path / "cut", Checkpoints(), Fails())
    folder = tmp_path / "cut" / "run-1"
    assert [step for step, _ in Kept(folder).history("train_loss")] == [1, 2, 3, 4, 5]
    train(empty, tmp_path / "whole", told)
    changed = Mlflow(tags={"later": 1})  # a parameter that is another one now
    train(empty, tmp_path / "cut", Checkpoints(), tracker=changed, resume=str(folder))
    kept = Kept(folder)
    assert (len(kept.runs), kept.run.info.status) == (1, "FINISHED")
    assert kept.history("train_loss") == told.of("train_loss")
    assert kept.params["plugins.mlflow.tags"] == "{}"
    assert json.loads(kept.artifact("config.json").read_text())["plugins"]["mlflow"]["tags"] == {"later": 1}


@pytest.mark.slow
def test_a_run_that_is_killed_is_readable_and_goes_on_with_each_value_once(empty, tmp_path):
    check_killed_tracker(Mlflow, of_mlflow, tmp_path, [Prepared(empty)])
    kept = Kept(tmp_path / "cut" / "run-1")
    assert (len(kept.runs), kept.run.info.status) == (1, "FINISHED")


# Slow, gone, not there ----------------------------------------------------------------


def test_what_waits_for_a_slow_store_is_sent_at_once(empty, tmp_path, told, monkeypatch):
    from mlflow import MlflowClient

    sizes, real, over = [], MlflowClient.log_batch, threading.Event()

    def slow(self, run_id, metrics=(), **more):
        if metrics:
            sizes.append(len(metrics))
            assert over.wait(60)
        return real(self, run_id, metrics=metrics, **more)

    class Ends(CallbackInterface):
        @hookimpl
        def on_end_train(self):
            over.set()

    monkeypatch.setattr(MlflowClient, "log_batch", slow)
    trainer = train(empty, tmp_path, told, Ends(), epochs=10)
    assert len(sizes) <= 5
    assert sum(sizes) == len(told.values) > 70
    assert Kept(trainer.run_dir).history("train_loss") == told.of("train_loss")


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "hookline.tracking"]


def test_without_mlflow_it_says_what_to_install_and_training_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    trainer = tiny_trainer([Mlflow()], runs_folder=str(tmp_path))
    trainer.train()
    assert trainer.status == "finished"
    said, lost = warnings_of(caplog)
    assert lost.startswith("calls of mlflow failed or were dropped, and may be missing in its run: ")
    assert "mlflow is switched off, and training goes on without it" in said
    assert "it could not start: ValueError: mlflow needs the module mlflow, which cannot be imported" in said
    assert "`pip install 'mlflow-skinny>=3.10' sqlalchemy alembic`" in said


def test_a_server_that_is_gone_does_not_hold_training_up(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with socket.socket() as closed:  # bound, and never listens
        closed.bind(("127.0.0.1", 0))
        tracker = Mlflow(tracking_uri=f"http://127.0.0.1:{closed.getsockname()[1]}")
        trainer = tiny_trainer([tracker], runs_folder=str(tmp_path))
        trainer.train()
    assert trainer.status == "finished"
    said, lost = warnings_of(caplog)
    assert lost.startswith("calls of mlflow failed or were dropped, and may be missing in its run: ")
    assert "it could not start: MlflowException" in said


@pytest.mark.slow
def test_a_server_that_never_answers_does_not_hold_training_up(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracker = Mlflow(tracking_uri=f"http://127.0.0.1:{silent.getsockname()[1]}", close_timeout="1 s")
        trainer = tiny_trainer([tracker], runs_folder=str(tmp_path))
        began = time.monotonic()
        trainer.train()
        assert time.monotonic() - began < 5
        assert trainer.status == "finished"
        assert "has not taken all within 1 s" in warnings_of(caplog)[0]
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "hookline-mlflow"]
        thread.join(60)


def test_a_store_that_fails_for_a_while_loses_nothing(empty, tmp_path, told, monkeypatch, caplog):
    from mlflow import MlflowClient

    real, failures = MlflowClient.log_batch, iter([True, False, True, True])

    def failing(self, run_id, metrics=(), **more):
        if metrics and next(failures, False):
            raise ConnectionError("gone for a moment")
        return real(self, run_id, metrics=metrics, **more)

    monkeypatch.setattr(MlflowClient, "log_batch", failing)
    tracker = Mlflow()
    trainer = train(empty, tmp_path, told, Paced(tracker), tracker=tracker, epochs=3)
    assert next(failures, None) is None
    assert Kept(trainer.run_dir).history("train_loss") == told.of("train_loss")
    first, last = warnings_of(caplog)
    assert first.endswith("of mlflow failed, and training goes on: ConnectionError: gone for a moment")
    assert last.startswith("calls of mlflow failed or were dropped, and may be missing in its run: ")


def test_a_store_that_goes_in_the_middle_is_left_alone_after_three_failures(empty, tmp_path, monkeypatch, caplog):
    from mlflow import MlflowClient

    real, calls = MlflowClient.log_batch, []

    def failing(self, run_id, metrics=(), **more):
        if metrics:
            calls.append(len(metrics))
            raise ConnectionError("gone")
        return real(self, run_id, **more)

    monkeypatch.setattr(MlflowClient, "log_batch", failing)
    tracker = Mlflow()
    train(empty, tmp_path, Paced(tracker), tracker=tracker, epochs=3)
    assert len(calls) == 4  # three times, and at the end
    assert "3 failures in a row, the last: ConnectionError: gone" in warnings_of(caplog)[1]


# Where it writes, and what --------------------------------------------------------------


@pytest.mark.slow
def test_it_makes_its_store_and_writes_below_the_run_folder_alone(tmp_path, monkeypatch):
    for name in hookline_mlflow.ENVIRONMENT:
        monkeypatch.delenv(name)
    check_quiet_tracker(partial(Mlflow, close_timeout="2 min"), tmp_path / "100%20#1")
    folder = tmp_path / "100%20#1" / "runs" / "run-1"
    assert sorted(path.name for path in folder.iterdir()) == ["mlflow", "trackers"]
    assert (folder / "mlflow" / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"axis": "seconds"}, r"mlflow.axis='seconds': the service takes whole numbers for places"),
        ({"tracking_uri": "server:5000"}, r"mlflow.tracking_uri='server:5000' is no URI; write one like http://"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        Mlflow(**options)


@pytest.mark.parametrize("uri", ["http://h:1", "sqlite:////a/b.db", "databricks", "databricks://profile", "file:/a"])
def test_uris(uri):
    assert Mlflow(tracking_uri=uri).tracking_uri == uri
