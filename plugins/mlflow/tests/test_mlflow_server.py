"""Runs against a real server of MLflow, read back by its client and looked at in a browser."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from pathlib import Path

import pytest
import torch

import hookline_mlflow
from hookline import CallbackInterface, hookimpl
from hookline.testing import TinyModule, digest, tiny_trainer
from hookline.testing.faults import kill, run
from hookline.tracking import Image
from hookline_mlflow import Mlflow

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("mlflow_server")]


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Leave no variable of the plugin behind; MLflow reads some when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in hookline_mlflow.ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


def command_of_mlflow():
    """Return a command `mlflow` that can serve: with mlflow-skinny alone it cannot."""
    beside = Path(sys.executable).with_name("mlflow")
    for path in (str(beside), *(f"{folder}/mlflow" for folder in os.get_exec_path())):
        if os.access(path, os.X_OK):
            test = "import importlib.util, sys; sys.exit(importlib.util.find_spec('flask') is None)"
            if not subprocess.run([Path(path).with_name("python"), "-c", test], check=False).returncode:
                return path
    pytest.skip("there is no command `mlflow` of the whole mlflow: see nox -s trackers")


class Server:
    """A server of MLflow on this machine alone, with SQLite below a folder."""

    def __init__(self, command, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri, self.store = f"http://127.0.0.1:{self.port}", f"sqlite:///{folder / 'mlflow.db'}"
        where = ["--backend-store-uri", self.store, "--artifacts-destination", str(folder / "artifacts")]
        self.log = folder / "server.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [command, "server", "--host", "127.0.0.1", "--port", str(self.port), *where, "--workers", "1"],
                cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )  # fmt: skip
        deadline = time.monotonic() + 200
        while not self.answers():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def answers(self):
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def stop(self):
        """End the server and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(command_of_mlflow(), tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


class Told(CallbackInterface):
    """Keeps what plugins have been told."""

    def __init__(self):
        self.values = []

    @hookimpl
    def on_log(self, metrics, global_step):
        self.values += [(global_step, name, value) for name, value in metrics.items()]

    def of(self, wanted):
        return [(step, value) for step, name, value in self.values if name == wanted]


def train(folder, uri, *plugins, module=None, **options):
    options = {"epochs": 1, "log_every": "1 steps", "run_name": "digits"} | options
    trainer = tiny_trainer([*plugins, Mlflow(tracking_uri=uri)], module, runs_folder=str(folder), **options)
    trainer.train()
    return trainer


def identity(folder):
    """Return the id of a run, which the plugin has left in its folder."""
    return json.loads((folder / "trackers" / "mlflow.json").read_text())["id"]


def client_of(uri):
    from mlflow import MlflowClient

    return MlflowClient(uri)


def history(client, run_id, name):
    return sorted((kept.step, kept.value) for kept in client.get_metric_history(run_id, name))


class Shows(TinyModule):
    """Logs a text, a picture and a file in the first step."""

    def on_end_train_step(self, global_step, *outputs):
        if global_step == 1:
            path = self.trainer.run_dir / "notes.txt"
            path.write_text("some notes")
            for name, value in {"note": "a text", "square": Image(torch.full((3, 4, 5), 200)), "notes": path}.items():
                self.trainer.log_object(name, value)


def test_all_that_was_logged_is_read_back_from_the_server(server, tmp_path):
    told = Told()
    trainer = train(tmp_path, server.uri, told, module=Shows(), config={"lr": 0.25, "net": {"name": "small"}})
    client, run_id = client_of(server.uri), identity(trainer.run_dir)
    kept = client.get_run(run_id)
    assert (kept.info.status, kept.info.run_name) == ("FINISHED", "digits-1")
    assert kept.data.params == {"lr": "0.25", "net.name": "small"}
    for name in ("train_loss", "val_loss"):
        assert history(client, run_id, name) == told.of(name) != []
    wanted = {"config.json", "texts/note/000000001.txt", "images/square/000000001.png", "files/notes/notes.txt"}
    got = {path: client.download_artifacts(run_id, path, str(tmp_path)) for path in wanted}
    assert Path(got["files/notes/notes.txt"]).read_text() == "some notes"
    assert Path(got["images/square/000000001.png"]).read_bytes()[1:4] == b"PNG"
    assert sorted(path.name for path in trainer.run_dir.iterdir()) == ["notes.txt", "trackers"]
    alone = tiny_trainer(runs_folder=str(tmp_path), epochs=1)
    alone.train()
    assert digest(trainer.module.state_dict()) == digest(alone.module.state_dict())


class Checkpoints(CallbackInterface):
    """Saves at step 3, and kills the process after step 6, when the server has the values of step 5."""

    def __init__(self, uri=None):
        self.uri = uri

    @hookimpl
    def on_boundary(self, trainer, global_step):
        if global_step == 3:
            trainer.save("third")
        if global_step == 6 and self.uri:
            note, deadline = trainer.run_dir / "trackers" / "mlflow.json", time.monotonic() + 60
            client = client_of(self.uri)
            while not note.exists() or len(history(client, identity(trainer.run_dir), "train_loss")) < 5:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            kill()

    @hookimpl
    def save(self, trainer):
        if trainer.global_step == 3:
            torch.save(trainer.hook.get_run_state(trainer=trainer), trainer.run_dir / "state.pt")
        return True

    @hookimpl
    def restore(self, trainer, stage):
        if not trainer.options.resume:
            return False
        state = torch.load(Path(trainer.options.resume) / "state.pt", weights_only=False)
        return trainer.hook.set_run_state(trainer=trainer, state=state, stage=stage)


def until_killed(folder, uri):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    train(folder, uri, Checkpoints(uri))


def test_a_run_that_is_killed_goes_on_in_the_same_run_of_the_server(server, tmp_path):
    outcome = run(until_killed, tmp_path / "cut", server.uri, timeout=120)
    assert outcome.code == -signal.SIGKILL, outcome.output
    folder = tmp_path / "cut" / "digits-1"
    client, run_id = client_of(server.uri), identity(folder)
    assert client.get_run(run_id).info.status == "RUNNING"
    assert [step for step, _ in history(client, run_id, "train_loss")][:5] == [1, 2, 3, 4, 5]

    told = Told()
    whole = train(tmp_path / "whole", server.uri, told)
    resumed = train(tmp_path / "cut", server.uri, Checkpoints(), resume=str(folder))
    assert identity(folder) == run_id
    for name in ("train_loss", "val_loss"):
        assert history(client, run_id, name) == told.of(name)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert digest(resumed.module.state_dict()) == digest(whole.module.state_dict())


def shown(browser, script, good, patience=60):
    """Return what a script answers as soon as it is good; what it answers in the end, where it never is."""
    deadline = time.monotonic() + patience
    while not good(answer := browser.execute_script(script)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return answer


TEXT = "return document.body.innerText"
CURVES = """return Object.fromEntries([...document.querySelectorAll('.js-plotly-plot')].flatMap(plot =>
    plot.data.map(line => [line.metricKey, Array.from(line.x, (x, i) => [x, line.y[i]])])))"""


def test_a_browser_shows_the_run_its_parameters_and_its_curves(server, tmp_path, browser):
    told = Told()
    trainer = train(tmp_path, server.uri, told, config={"lr": 0.125, "net": {"name": "tiny"}}, epochs=2)
    run_id = identity(trainer.run_dir)
    experiment = client_of(server.uri).get_run(run_id).info.experiment_id
    page = f"{server.uri}/#/experiments/{experiment}/runs"

    browser.get(page)
    assert "digits-1" in shown(browser, TEXT, lambda text: "digits-1" in text)
    browser.get(f"{page}/{run_id}")
    wanted = {"Parameters (2)", "lr", "0.125", "net.name", "tiny", "train_loss", "val_loss", "Finished"}
    assert set(shown(browser, TEXT, lambda text: wanted <= set(text.split("\n"))).split("\n")) >= wanted
    browser.get(f"{page}/{run_id}/model-metrics")
    drawn = shown(browser, CURVES, lambda curves: len(curves) == 3)
    for name in ("train_loss", "train_loss_epoch", "val_loss"):
        assert [(step, value) for step, value in drawn[name]] == told.of(name)


def test_a_server_that_stops_in_the_middle_does_not_hold_training_up(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    server = Server(command_of_mlflow(), tmp_path)

    class Stops(CallbackInterface):
        @hookimpl
        def on_boundary(self, trainer, global_step):
            if global_step == 4:
                deadline = time.monotonic() + 60
                while not (trainer.run_dir / "trackers").exists():
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                while len(history(client_of(server.uri), identity(trainer.run_dir), "train_loss")) < 3:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                server.stop()
                self.since = time.monotonic()

    stops = Stops()
    try:
        trainer = train(tmp_path / "runs", server.uri, stops)
    finally:
        server.stop()
    assert time.monotonic() - stops.since < 30
    assert (trainer.status, trainer.global_step) == ("finished", 7)
    assert "mlflow is switched off, and training goes on without it" in caplog.text
    left = client_of(server.store)
    assert [step for step, _ in history(left, identity(trainer.run_dir), "train_loss")][:3] == [1, 2, 3]
    alone = tiny_trainer(runs_folder=str(tmp_path), epochs=1)
    alone.train()
    assert digest(trainer.module.state_dict()) == digest(alone.module.state_dict())
