"""What Aim has of real runs, read back by its own SDK, also after one that was killed and gone on with."""

import contextlib
import importlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.tracker_readers import of_aim

from hookline import CallbackInterface, Stage, hookimpl
from hookline.testing import (
    TinyModule,
    Told,
    check_killed_tracker,
    check_plugin,
    check_quiet_tracker,
    check_tracker,
    digest,
    tiny_trainer,
)
from hookline.testing.faults import kill, run
from hookline.tracking import Histogram, Image, Run, Table
from hookline_aim import Aim

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:aim", "ignore::DeprecationWarning:sqlalchemy")
FREE = {"config": {}, "stage": Stage.TRAIN, "place": 0.0}


@pytest.fixture(scope="session")
def empty(tmp_path_factory):
    """Return a folder with an empty repository, which takes Aim a second to make and a test nothing to copy."""
    folder = tmp_path_factory.mktemp("repo")
    script = "import sys, aim; aim.Repo.from_path(sys.argv[1], init=True)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(folder)], check=True, capture_output=True)
    return folder


class Prepared(CallbackInterface):
    """Puts an empty repository where there is none."""

    def __init__(self, repo):
        self.repo = repo

    @hookimpl
    def on_setup(self, trainer):
        if not (trainer.run_dir / "aim").exists():
            shutil.copytree(self.repo, trainer.run_dir / "aim")


def train(empty, folder, *plugins, module=None, method="train", tracker=None, **options):
    defaults = {"epochs": 1, "log_every": "1 steps", "report_loss_after_eval": False, "runs_folder": str(folder)}
    trainer = tiny_trainer([Prepared(empty), *plugins, tracker or Aim()], module, **(defaults | options))
    getattr(trainer, method)()
    return trainer


def told_again(collection):
    return {sequence.name: dict(sequence.values.items()) for found in collection.iter_runs() for sequence in found}


class Kept:
    """What a repository has of its only run."""

    def __init__(self, repo):
        aim = importlib.import_module("aim")
        self.repo = aim.Repo(str(repo))
        self.repo._recreate_index()  # as `aim storage reindex` does, and `aim up` by and by
        (identity,) = self.repo.list_all_runs()
        self.run = self.repo.get_run(identity)

    @property
    def points(self):
        found = {}
        for metric in self.run.metrics():
            metric.preload()
            steps, (values, *_) = metric.data.items_list()
            found[metric.name] = list(zip(steps, values, strict=True))
        return found

    @property
    def texts(self):
        found = told_again(self.repo.query_texts("texts.name != ''"))
        return {name: {step: text.data for step, text in steps.items()} for name, steps in found.items()}

    def artifact(self, name):
        return Path(self.run.artifacts[name].uri.removeprefix("file://"))


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("hookline")]


# What is kept -------------------------------------------------------------------------


@pytest.mark.slow
def test_contract(tmp_path):
    check_plugin(Aim, runs_folder=str(tmp_path))


class Shows(TinyModule):
    """Logs one of each kind."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def on_end_train_step(self, global_step, *outputs):
        if global_step != 2:
            return
        self.trainer.log(nothing=math.nan, much=math.inf, **{"val@a//b": -math.inf})
        for name, value in {
            "note": "gr\u00fc\u00dfe",
            "numbers": Histogram(torch.arange(10.0)),
            "none": Histogram(torch.full([3], math.nan)),
            "square": Image(torch.full((3, 4, 5), 200)),
            "rows": Table(["name", "n"], [["a|b", 1], [None, 2]]),
            "../up/a file": self.file,
            "folder": self.file.parent,
        }.items():
            self.trainer.log_object(name, value)


@dataclass(eq=False)
class Service(CallbackInterface):
    """Has secrets among its options."""

    password: str = "hunter22"
    url: str = "https://me:hunter22@host/x"


def test_all_kinds_of_things_are_kept(empty, tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(2, 1), dpi=50)
    figure.subplots().plot([1, 2, 3])

    class Draws(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, trainer, global_step):
            if global_step == 3:
                trainer.log_object("curve", figure)

    notes, told = tmp_path / "notes" / "notes.txt", Told()
    notes.parent.mkdir()
    notes.write_text("some notes")
    tracker = Aim(experiment="first", name="n", tags=["a", "b"])
    trainer = train(empty, tmp_path / "runs", told, Service(), Draws(), module=Shows(notes), tracker=tracker)
    kept = Kept(trainer.run_dir / "aim")

    assert (kept.run.name, kept.run.experiment, sorted(kept.run.tags)) == ("n", "first", ["a", "b"])
    assert (kept.run["status"], kept.run["stage"], kept.run.active) == ("finished", "train", False)
    config = kept.run["config"]
    assert (config["trainer"]["epochs"], config["trainer"]["max_steps"]) == (1, None)
    assert config["plugins"]["aim"]["tags"] == ["a", "b"]
    assert config["plugins"]["service"]["password"] == "***"
    written = [path for path in trainer.run_dir.rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not [path for path in written if b"hunter22" in path.read_bytes()]

    points = kept.points
    assert len(points["train_loss"]) == 7
    ((step, value),) = points.pop("nothing")
    assert (step, math.isnan(value)) == (2, True)
    assert (points["much"], points["val@a//b"]) == ([(2, math.inf)], [(2, -math.inf)])
    del told.points["nothing"]
    assert points == told.points

    assert kept.texts == {
        "note": {2: "gr\u00fc\u00dfe"},
        "rows": {2: "| name | n |\n| --- | --- |\n| a\\|b | 1 |\n| None | 2 |"},
    }
    images = told_again(kept.repo.query_images("images.name != ''"))
    square, curve = images["square"][2].to_pil_image(), images["curve"][3].to_pil_image()
    assert (square.size, square.getpixel((0, 0)), curve.size) == ((5, 4), (200, 200, 200), (100, 50))
    (numbers,) = told_again(kept.repo.query_distributions("distributions.name != ''")).items()
    counts, edges = numbers[1][2].to_np_histogram()
    assert (numbers[0], counts.sum(), edges[0], edges[-1]) == ("numbers", 10, 0, 9)
    assert kept.artifact("up/a file/notes.txt").read_text() == "some notes"
    assert kept.artifact("folder/notes.txt").read_text() == "some notes"
    assert kept.artifact("folder/notes.txt").is_relative_to(trainer.run_dir / "aim" / "artifacts")

    alone = tiny_trainer([], Shows(notes), epochs=1, log_every="1 steps", runs_folder=str(tmp_path / "alone"))
    alone.train()
    assert digest(trainer.module.state_dict()) == digest(alone.module.state_dict())


class Ends(CallbackInterface):
    """Ends a run in its third step."""

    def __init__(self, how):
        self.how = how

    @hookimpl
    def on_boundary(self, trainer, global_step):
        if global_step == 3 and self.how == "raise":
            raise ZeroDivisionError
        if global_step == 3:
            trainer.stop("the machine is wanted", "preempted")


@pytest.mark.parametrize(("how", "status"), [("raise", "failed"), ("stop", "preempted")])
def test_how_a_run_has_ended(empty, tmp_path, how, status):
    if how == "raise":
        with pytest.raises(ZeroDivisionError):
            train(empty, tmp_path, Ends(how))
    else:
        train(empty, tmp_path, Ends(how))
    kept = Kept(tmp_path / "run-1" / "aim")
    assert (kept.run["status"], kept.run.active) == (status, False)
    assert [step for step, _ in kept.points["train_loss"]][:2] == [1, 2]


def test_another_run_in_the_middle_has_a_run_of_its_own(empty, tmp_path):
    class Beside(CallbackInterface):
        @hookimpl
        def on_boundary(self, global_step):
            if global_step == 3:
                train(empty, tmp_path / "beside", method="validate")

    trainer = train(empty, tmp_path, Beside())
    assert [step for step, _ in Kept(trainer.run_dir / "aim").points["train_loss"]] == list(range(1, 8))
    assert len(Kept(tmp_path / "beside" / "run-1" / "aim").points["val_loss"]) == 1


@pytest.mark.parametrize(("axis", "places"), [("samples", [8, 16, 24]), ("epochs", [0])])
def test_other_axes(empty, tmp_path, axis, places):
    trainer = train(empty, tmp_path, max_steps=3, tracker=Aim(axis=axis))
    assert [place for place, _ in Kept(trainer.run_dir / "aim").points["train_loss"]] == places


@pytest.mark.slow
def test_a_repository_for_several_runs(empty, tmp_path):
    aim, repo = importlib.import_module("aim"), tmp_path / "repo"
    repo.mkdir()
    for _ in range(2):
        train(empty, tmp_path / "runs", tracker=Aim(repo=str(repo)))
    found = aim.Repo(str(repo))
    found._recreate_index()
    assert sorted(found.get_run(name).name for name in found.list_all_runs()) == ["run-1", "run-2"]


@pytest.mark.slow
def test_it_makes_its_repository_and_writes_nothing_elsewhere(tmp_path):
    check_quiet_tracker(partial(Aim, close_timeout="2 min"), tmp_path)
    folder = tmp_path / "runs" / "run-1"
    assert sorted(path.name for path in folder.iterdir()) == ["aim", "trackers"]
    assert len(Kept(folder / "aim").texts) == 2


# Going on -----------------------------------------------------------------------------


class Notes(CallbackInterface):
    """Logs a text at each step."""

    @hookimpl
    def on_boundary(self, trainer, global_step):
        trainer.log_object("note", f"at {global_step}")


class Checkpoints(CallbackInterface):
    """Saves at a step, and kills the process at a later one, when all that was logged before has been taken."""

    def __init__(self, tracker, kill_at=None):
        self.tracker, self.kill_at = tracker, kill_at

    @hookimpl
    def on_boundary(self, trainer, global_step):
        trainer.log_object("note", f"at {global_step}")
        if global_step == 3:
            trainer.save("third")
        if global_step == self.kill_at:
            self.tracker.catch_up()
            assert self.tracker._run["stage"] == "train"  # to read from a server waits until it has all
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


def until_killed(empty, folder, repo):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tracker = Aim(repo=repo)
    train(empty, folder, Checkpoints(tracker, kill_at=6), tracker=tracker, evaluate_every="2 steps")


def killed_run(empty, folder, repo=None):
    outcome = run(until_killed, empty, folder, repo)
    assert outcome.code == -signal.SIGKILL, outcome.output
    return folder / "run-1"


def resume(empty, folder, repo=None):
    tracker = Aim(repo=repo)
    options = {"tracker": tracker, "resume": str(folder / "run-1"), "evaluate_every": "2 steps"}
    return digest(train(empty, folder, Checkpoints(tracker), **options).module.state_dict())


def test_what_every_tracker_does(empty, tmp_path):
    check_tracker(Aim, of_aim, tmp_path, [Prepared(empty)], sdk="aim")


def test_a_run_that_is_killed_is_readable_and_goes_on_with_each_value_once(empty, tmp_path):
    check_killed_tracker(Aim, of_aim, tmp_path, [Prepared(empty), Notes()])
    kept = Kept(tmp_path / "cut" / "run-1" / "aim")  # which has one run alone
    assert kept.texts["note"] == {step: f"at {step}" for step in range(1, 15)}
    assert (kept.run["status"], kept.run.active) == ("finished", False)


@pytest.mark.slow
def test_an_evaluation_of_a_run_goes_on_with_it(empty, tmp_path):
    trainer = train(empty, tmp_path, Checkpoints(Aim()))
    tested = tiny_trainer([Checkpoints(Aim()), Aim()], resume=str(trainer.run_dir), runs_folder=str(tmp_path))
    metrics = tested.test()
    kept = Kept(trainer.run_dir / "aim")
    assert [value for _, value in kept.points["test_loss"]] == [metrics["test_loss"]]
    assert len(kept.points["train_loss"]) == 7


# Options, and servers -----------------------------------------------------------------


def test_without_the_sdk_a_run_goes_on_and_says_what_to_install(empty, tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "aim", None)
    assert train(empty, tmp_path).status == "finished"
    said, lost = warnings_of(caplog)
    assert lost.startswith("calls of aim failed or were dropped, and may be missing in its run: ")
    assert "aim is switched off" in said
    assert "aim needs the module aim, which cannot be imported" in said
    assert "`pip install 'aim>=3.29'`" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"axis": "seconds"}, r"aim\.axis='seconds': the service takes whole numbers for places"),
        ({"artifacts_uri": "/tmp/a"}, r"aim\.artifacts_uri='/tmp/a' is no URI; write one like file:///folder or s3://"),
        ({"init": {"experiment": "p"}}, r"aim\.init: experiment is set by the option aim\.experiment"),
        ({"init": {"run_hash": "k"}}, r"aim\.init: run_hash is set by the plugin, from the run; leave it out"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        Aim(**options)


def test_arguments_that_the_sdk_does_not_take(tmp_path):
    words = (
        r"aim\.init: aim\.Run has no argument 'system_tracking', did you mean 'system_tracking_interval'\?; it has cap"
    )
    with pytest.raises(ValueError, match=words):
        Aim(init={"system_tracking": 5}).start(Run("run-1", tmp_path, id=None, **FREE))


@pytest.mark.parametrize("answers", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["closed", "silent"])
def test_a_server_that_is_gone_does_not_hold_training_up(empty, tmp_path, caplog, answers):
    with socket.create_server(("127.0.0.1", 0)) if answers else socket.socket() as server:
        if not answers:
            server.bind(("127.0.0.1", 0))  # taken, and refuses all
        repo = f"aim://127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        assert train(empty, tmp_path, tracker=Aim(repo=repo, close_timeout="1 s")).status == "finished"
        assert time.monotonic() - began < 10
        for thread in threading.enumerate():
            if thread.name == "hookline-aim":
                thread.join(100)
    warned = warnings_of(caplog)
    (said,) = [words for words in warned if words.startswith("aim is switched off")]
    assert sum("has not taken all within 1 s" in words for words in warned) == answers
    assert sum(words.startswith("calls of aim failed or were dropped") for words in warned) == 1
    assert "aim is switched off, and training goes on without it: it could not start: R" in said


@pytest.fixture
def server(tmp_path):
    """Return where a server of Aim listens, its repository and its group of processes."""
    repo = tmp_path / "served"
    repo.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "aim"), "server", "--repo", str(repo), "--port", str(port), "-y"]
    with (tmp_path / "server.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/status/", timeout=2):
                    break
            except OSError:
                assert time.monotonic() < deadline, (tmp_path / "server.txt").read_text()
                time.sleep(0.2)
        yield f"aim://127.0.0.1:{port}", repo, process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


SERVED = """
import os, signal, sys
from hookline import CallbackInterface, hookimpl
from hookline.testing import tiny_trainer
from hookline_aim import Aim

class Ends(CallbackInterface):
    @hookimpl
    def on_boundary(self, trainer, global_step):
        if global_step == int(sys.argv[2]):
            tracker.catch_up()
            assert tracker._run["stage"] == "train"  # to read from a server waits until it has all
            os.killpg(int(sys.argv[3]), signal.SIGKILL)

tracker = Aim(repo=sys.argv[1], close_timeout="5 s")
trainer = tiny_trainer([Ends(), tracker], runs_folder="runs", epochs=1, log_every="1 steps")
trainer.train()
print(trainer.status)
"""


@pytest.mark.slow
def test_a_server_that_goes_in_the_middle_does_not_hold_the_process_up(tmp_path, server):
    url, repo, group = server
    began = time.monotonic()
    command = [sys.executable, "-c", SERVED, url, "4", str(group)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert time.monotonic() - began < 60
    assert (done.returncode, done.stdout) == (0, "finished\n"), done.stderr
    assert "aim has not taken all within 5 s" in done.stderr
    assert [step for step, _ in Kept(repo).points["train_loss"]] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_server_keeps_a_run_that_is_killed_and_gone_on_with(empty, tmp_path, server):
    url, repo, _ = server
    killed_run(empty, tmp_path / "cut", url)
    told = Told()
    train(empty, tmp_path / "whole", told, evaluate_every="2 steps")
    outcome = run(resume, empty, tmp_path / "cut", url)
    assert outcome.code == 0, outcome.output
    kept = Kept(shutil.copytree(repo, tmp_path / "copy"))
    assert kept.points == told.points
    assert kept.texts["note"] == {step: f"at {step}" for step in range(1, 8)}
    assert kept.run["status"] == "finished"
    assert json.loads((tmp_path / "cut" / "run-1" / "trackers" / "aim.json").read_text()) == {"id": kept.run.hash}
