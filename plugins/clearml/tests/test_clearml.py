"""What ClearML's own files hold of real runs, also of one that was killed and gone on with; servers that are gone."""

import fcntl
import io
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image as Pictures
from tests.tracker_readers import of_clearml

import hookline_clearml
from hookline import CallbackInterface, Stage, hookimpl
from hookline.testing import TinyModule, Told, check_killed_tracker, check_tracker, digest, tiny_trainer
from hookline.tracking import Histogram, Image, Run, Table
from hookline_clearml import Clearml


class Kept:
    """What the SDK's offline session of a task holds."""

    def __init__(self, folder):
        self.folder = folder
        lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
        self.events = [event for line in lines for event in json.loads(line)]
        self.task = json.loads((folder / "task.json").read_text())
        log = (folder / "log.jsonl").read_text().splitlines()
        self.log = "\n".join(line["msg"] for lines in log for line in json.loads(lines))
        self.parameters = {
            f"{section}/{name}": entry["value"]
            for section, entries in self.task["hyperparams"].items()
            for name, entry in entries.items()
        }

    def of(self, title, series=None):
        return [event for event in self.events if (event["metric"], event["variant"]) == (title, series or title)]

    def points(self, title, series=None):
        return [(event["iter"], event["value"]) for event in self.of(title, series)]

    def content(self, event):
        path = Path(event["url"])
        assert path.is_relative_to(self.folder)
        return path.read_bytes()

    def artifact(self, name):
        (found,) = [artifact for artifact in self.task["execution"]["artifacts"] if artifact["key"] == name]
        assert Path(found["uri"]).is_relative_to(self.folder)
        return Path(found["uri"])


def tasks(folder):
    """Return what is kept of the tasks of a run, the oldest first."""
    found = (folder / "clearml" / "offline").glob("*/")
    return [Kept(path) for path in sorted(found, key=lambda path: (path / "task.json").stat().st_mtime_ns)]


def train(folder, *plugins, module=None, method="train", **options):
    options = {"epochs": 1, "log_every": "1 steps"} | options
    trainer = tiny_trainer(plugins, module, runs_folder=str(folder), **options)
    getattr(trainer, method)()
    return trainer


PROGRAM = str(Path(hookline_clearml.__file__).with_name("service.py"))
AUDIT = """
import sys
def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.fork") and PROGRAM in sys.orig_argv:
        with open(PATH, "a") as file:
            file.write(event + repr(arguments))
sys.addaudithook(note)
"""


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """Have nothing at home, nor where the run is started; return the file of what the SDK's process does outside."""
    for name in ("home", "place", "audit"):
        (tmp_path / name).mkdir()
    noted = tmp_path / "noted"
    (tmp_path / "audit" / "sitecustomize.py").write_text(
        AUDIT.replace("PATH", repr(str(noted))).replace("PROGRAM", repr(PROGRAM))
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "audit"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "place"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))  # of the test itself
    monkeypatch.chdir(tmp_path / "place")
    return noted


def test_the_audit_of_this_test_hears_connections(alone):
    code = "import socket; socket.socket().connect_ex(('127.0.0.1', 1))"
    subprocess.run([sys.executable, "-P", "-c", code, PROGRAM], check=True)
    assert "socket.connect" in alone.read_text()


# Options ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"axis": "seconds"}, r"clearml\.axis='seconds': the service takes whole numbers for places"),
        ({"init": {"tags": ["a"]}}, r"clearml\.init: tags is set by the option clearml\.tags"),
        ({"init": {"continue_last_task": True}}, r"clearml\.init: continue_last_task is set by the plugin; leave it"),
        ({"start_timeout": "soon"}, r"clearml\.start_timeout='soon'"),
    ],
)
def test_options_that_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Clearml(**options)


def test_an_argument_that_the_sdk_does_not_take(alone, tmp_path):
    words = r"clearml\.init: Task\.init has no argument 'output_url', did you mean 'output_uri'\?"
    with pytest.raises(RuntimeError, match=words):
        Clearml(init={"output_url": "x"}).start(Run("run-1", tmp_path, {}, Stage.TRAIN, 0, None))


def test_without_clearml_it_says_what_to_install(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "clearml", None)
    assert train(tmp_path, Clearml()).status == "finished"
    assert "ClearML cannot be imported; `pip install 'clearml>=2.1.12,<3'`" in caplog.text


# What is kept -------------------------------------------------------------------------


class Shows(TinyModule):
    """Logs one of each kind, most in the second step."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def on_end_train_step(self, global_step, *outputs):
        self.trainer.log_object("again", Image(torch.full((3, 4, 5), 10 * global_step)))
        if global_step != 2:
            return
        self.trainer.log(**{"nothing": math.nan, "much": -math.inf, "val/loss": 1.5, "../up": 2.5})
        for name, value in {
            "note": "grüße",
            "../../out": "below all the same",
            "numbers": Histogram(torch.arange(10.0)),
            "no number": Histogram(torch.full([3], math.nan)),
            "curves/first": drawn(),
            "rows": Table(["name", "n"], [["a|b", 1], [None, math.pi], [self.file, True]]),
            "../a file": self.file,
            "a folder": self.file.parent,
        }.items():
            self.trainer.log_object(name, value)


def drawn():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1), dpi=50)
    FigureCanvasAgg(figure)
    figure.subplots().plot([1, 2, 3])
    return figure


def test_all_that_is_logged_is_below_the_folder_of_the_run_and_no_bit_changes(alone, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "notes.txt").write_text("some notes")
    recorder, before = Told(), dict(os.environ)
    config = {"lr": 0.25, "net": {"sizes": [1, 2], "name": "x"}, "none": None}
    tracker = Clearml(project_name="digits", task_name="first try", tags=["a", "b"], init={"task_type": "qc"})
    module = Shows(tmp_path / "files" / "notes.txt")
    trainer = train(tmp_path / "runs", tracker, recorder, module=module, config=config)
    (kept,) = tasks(trainer.run_dir)

    odd = {"nothing", "much", "val/loss", "../up"}
    assert {name: kept.points(name) for name in {*recorder.points} - odd} == {
        name: points for name, points in recorder.points.items() if name not in odd
    }
    assert len(kept.points("train_loss")) == 7
    assert (kept.points("val", "loss"), kept.points("..", "up")) == ([(2, 1.5)], [(2, 2.5)])
    assert (kept.of("nothing"), kept.of("much")) == ([], [])  # else they would be 0
    assert "nothing is nan, much is -inf at steps 2" in kept.log
    named = kept.task["project_name"], kept.task["name"], sorted(kept.task["tags"]), kept.task["type"]
    assert named == ("digits", "first try", ["a", "b"], "qc")
    assert kept.parameters == {
        "config/lr": "0.25", "config/net/sizes": "[1, 2]", "config/net/name": "x", "config/none": "",
        "hookline/stage": "train", "hookline/status": "finished",
    }  # fmt: skip

    (note,), (outside,) = kept.of("note"), kept.of("..", "../out")
    assert (note["iter"], kept.content(note).decode()) == (2, "grüße")
    assert kept.content(outside) == b"below all the same"
    pictures = [Pictures.open(io.BytesIO(kept.content(event))) for event in kept.of("again")]
    assert [(one.size, one.getpixel((0, 0))) for one in pictures] == [((5, 4), (10 * n,) * 3) for n in range(1, 8)]
    (curve,) = kept.of("curves", "first")
    assert Pictures.open(io.BytesIO(kept.content(curve))).size == (100, 50)
    (numbers,), (rows,) = kept.of("numbers"), kept.of("rows")
    (bars,) = json.loads(numbers["plot_str"])["data"]
    assert (len(bars["y"]), sum(bars["y"])) == (64, 10)
    (table,) = json.loads(rows["plot_str"])["data"]
    assert table["header"]["values"] == ["name", "n"]
    assert table["cells"]["values"] == [["a|b", None, str(tmp_path / "files" / "notes.txt")], [1, math.pi, True]]
    assert kept.of("no number") == []
    assert kept.artifact("../a file").read_text() == "some notes"
    with zipfile.ZipFile(kept.artifact("a folder")) as folder:
        assert folder.read("notes.txt") == b"some notes"
    with zipfile.ZipFile(f"{kept.folder}.zip") as session:  # what a server imports
        assert {"metrics.jsonl", "task.json", "log.jsonl"} <= {*session.namelist()}

    assert [*(tmp_path / "home").iterdir(), *(tmp_path / "place").iterdir()] == []
    assert sorted(path.name for path in trainer.run_dir.iterdir()) == ["clearml", "trackers"]
    assert not alone.exists(), alone.read_text()  # no connection, no other program
    assert before.items() <= os.environ.items()
    assert not [name for name in {*os.environ} - {*before} if name.startswith("CLEARML")]
    without = train(tmp_path / "without", module=Shows(tmp_path / "files" / "notes.txt"))
    assert digest(trainer.module.state_dict()) == digest(without.module.state_dict())


def test_a_model_and_batches_of_validations_and_a_step_back_in_a_run_that_failed(alone, tmp_path):
    tracker = Clearml(axis="samples")
    identity = tracker.start(Run("run-1", tmp_path, {}, Stage.TRAIN, 0, None))
    model = tmp_path / "best"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    tracker.log_file("best", model, 8)
    for place in (8, 16, 24, 16):  # a state of before was put back
        tracker.log_metrics({"a": place / 7}, place)
    for batch in (1, 2, 3, 2):
        tracker.log_batch({"val_loss_batch/x": batch / 3, "b": math.nan if batch == 1 else 1.0}, batch)
    tracker.finish("failed")
    (kept,) = tasks(tmp_path)
    assert kept.task["id"] == identity
    assert kept.parameters["hookline/status"] == "failed"
    assert "RunFailed: the run has failed" in (tmp_path / "clearml" / "service.log").read_text()
    assert kept.points("a") == [(8, 8 / 7), (16, 16 / 7)]
    assert kept.points("validation batches", "val_loss_batch/x") == [(1, 1 / 3), (2, 2 / 3)]
    assert "b is nan at validation batch 1" in kept.log
    (model / "model.safetensors").unlink()
    with zipfile.ZipFile(kept.artifact("best")) as folder:
        assert folder.read("model.safetensors") == b"weights"


@pytest.mark.slow
@pytest.mark.plugins
def test_no_secret_of_the_configuration_is_written(alone, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "module: {_target_: hookline.testing.TinyModule}\n"
        "trainer: {epochs: 1, train_batch_size: 8, device: cpu}\n"
        "plugins: {clearml: {}}\n"
        "vars: {password: none, kept: in plain sight}\n"
    )
    command = [sys.executable, "-m", "hookline", "fit", "run.yaml", "vars.password=opensesame"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = [path.read_bytes() for path in (tmp_path / "runs" / "run-1").rglob("*") if path.is_file()]
    assert any(b"in plain sight" in content for content in written)
    assert not any(b"sesame" in content for content in written)


# How it ends --------------------------------------------------------------------------


class Ends(CallbackInterface):
    """Ends the run at step 3, in one way or another."""

    def __init__(self, how):
        self.how = how

    @hookimpl
    def on_end_train_step(self, trainer, global_step):
        if global_step == 3 and self.how == "raise":
            raise ZeroDivisionError
        if global_step == 3:
            trainer.stop("the machine is wanted", self.how)


@pytest.mark.slow
def test_a_run_that_failed(alone, tmp_path):
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, Clearml(), Ends("raise"))
    (kept,) = tasks(tmp_path / "run-1")
    assert kept.parameters["hookline/status"] == "failed"
    assert [step for step, _ in kept.points("train_loss")][:2] == [1, 2]


@pytest.mark.slow
def test_a_run_that_was_preempted_and_an_evaluation_are_told_apart(alone, tmp_path):
    trainer = train(tmp_path, Clearml(), Ends("preempted"))
    note = trainer.run_dir / "trackers" / "clearml.json"
    before = note.read_text()
    metrics = trainer.validate()
    first, second = tasks(trainer.run_dir)
    assert first.parameters["hookline/status"] == "preempted"
    assert "KeyboardInterrupt" in (trainer.run_dir / "clearml" / "service.log").read_text()
    assert (second.parameters["hookline/stage"], second.task["type"]) == ("val", "testing")
    assert [value for _, value in second.points("val_loss")] == [metrics["val_loss"]]
    assert note.read_text() == before  # nobody goes on with an evaluation


class Draws(CallbackInterface):
    """Logs an image at each step."""

    @hookimpl
    def on_boundary(self, trainer, global_step):
        trainer.log_object("square", Image(torch.full((3, 4, 5), 10 * global_step)))


@pytest.mark.slow
def test_what_every_tracker_does(alone, tmp_path):
    check_tracker(Clearml, of_clearml, tmp_path / "runs", sdk="clearml")


def test_a_run_that_was_killed_is_readable_and_goes_on_with_each_place_once(alone, tmp_path):
    check_killed_tracker(Clearml, of_clearml, tmp_path / "runs", [Draws()])
    folder = tmp_path / "runs" / "cut" / "run-1"
    (kept,) = tasks(folder)
    assert [event["iter"] for event in kept.of("square")] == [*range(1, 15)]
    pictures = [Pictures.open(io.BytesIO(kept.content(event))) for event in kept.of("square")]
    assert [one.getpixel((0, 0))[0] for one in pictures] == [10 * n for n in range(1, 15)]
    assert kept.parameters["hookline/status"] == "finished"
    assert kept.task["id"] == json.loads((folder / "trackers" / "clearml.json").read_text())["id"]
    assert not alone.exists(), alone.read_text()


def settle(folder):
    """Wait until the SDK's process has stored what it was told, and ended."""
    with (folder / "clearml" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


# Slow, gone ---------------------------------------------------------------------------


@pytest.mark.slow
def test_one_task_at_a_time_writes_below_a_run(alone, tmp_path):
    first = Clearml()
    first.start(Run("run-1", tmp_path, {}, Stage.TRAIN, 0, None))
    with pytest.raises(TimeoutError, match=r"ClearML has not answered within 2 s; .*service\.log may say why"):
        Clearml(start_timeout="2 s").start(Run("run-1", tmp_path, {}, Stage.TRAIN, 0, None))
    first.log_metrics({"a": 1.0}, 1)
    first.finish("finished")
    assert tasks(tmp_path)[0].points("a") == [(1, 1.0)]


@pytest.fixture
def sdk_processes():
    """Return a function that finds the processes of the SDK that the test has started; others have left some."""

    def found():
        return [child for child in psutil.Process().children() if PROGRAM in child.cmdline() and child not in before]

    before = []
    before = found()
    return found


@pytest.mark.slow
def test_when_the_process_of_the_sdk_is_killed_training_goes_on(alone, sdk_processes, tmp_path, caplog):
    class Kills(CallbackInterface):
        @hookimpl
        def on_boundary(self, trainer, global_step):
            deadline = time.monotonic() + 60
            while global_step == 3 and not [*trainer.run_dir.glob("trackers/*")] and time.monotonic() < deadline:
                time.sleep(0.01)
            if global_step == 3:
                (process,) = sdk_processes()
                process.kill()

    assert train(tmp_path, Clearml(), Kills()).status == "finished"
    assert "clearml is switched off, and training goes on without it: 3 failures in a row" in caplog.text
    assert "RuntimeError: the process of ClearML has ended" in caplog.text
    assert sdk_processes() == []


@pytest.fixture
def server(alone, tmp_path, monkeypatch):
    """Have the user's own settings name a server that listens and never answers."""
    for name in [name for name in os.environ if name.startswith("CLEARML_")]:
        monkeypatch.delenv(name)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        hosts = "".join(f"{name}_server: {url}\n" for name in ("api", "web", "files"))
        settings = f"api {{\n{hosts}credentials {{ access_key: opensesame, secret_key: secret }}\n}}\n"
        (tmp_path / "home" / "clearml.conf").write_text(settings)
        yield silent


def test_a_server_that_never_answers_is_given_up(server, sdk_processes, tmp_path, caplog):
    assert train(tmp_path, Clearml(offline=False, start_timeout="1 s")).status == "finished"
    assert "it could not start: TimeoutError: ClearML has not answered within 1 s" in caplog.text
    assert sdk_processes() == []
    (settings,) = (tmp_path / "run-1").glob("clearml/*.conf")
    assert "opensesame" not in settings.read_text()


@pytest.mark.slow
def test_the_server_of_the_users_own_settings_is_asked(server, tmp_path):
    asked = []

    def listen():
        connection, _ = server.accept()
        with connection:
            asked.append(connection.recv(4096))
            connection.recv(4096)  # until it is given up

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    train(tmp_path, Clearml(offline=False, start_timeout="15 s"))
    listener.join(60)
    assert b"auth.login" in asked[0]
    assert b"Authorization: Basic" in asked[0]


SCRIPT = """
import sys, time
from hookline.testing import tiny_trainer
from hookline_clearml import Clearml
tracker = Clearml(offline=False, start_timeout=sys.argv[2], close_timeout="2 s")
print(tiny_trainer([tracker], runs_folder=sys.argv[1]).train())
"""


@pytest.mark.slow
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "silent"])
@pytest.mark.parametrize("patience", ["1 s", "5 min"])
def test_a_process_whose_server_is_gone_ends_and_leaves_no_other_behind(server, tmp_path, closed, patience):
    if closed:
        server.close()
    began = time.monotonic()
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "runs"), patience]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 30
    assert "clearml" in done.stderr  # one warning or the other
    settle(tmp_path / "runs" / "run-1")  # else the time of the test is over
