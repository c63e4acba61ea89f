"""What stands in Comet's own archives after real runs, also after one that was killed and gone on with."""

import importlib
import json
import math
import os
import re
import shutil
import socket
import sys
import threading
import time
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.tracker_readers import of_comet

import hookline_comet
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
from hookline_comet import Comet, is_whole, pack

FREE = {"config": {}, "stage": Stage.TRAIN, "place": 0.0}


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Leave no variable of the plugin behind, and have no settings of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("COMET_")]:
        monkeypatch.delenv(name)
    for name, value in hookline_comet.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COMET_CONFIG", str(tmp_path / "none"))


class Part:
    """What the messages of one part of an experiment say."""

    def __init__(self, lines, content=None):
        self.messages = [json.loads(line) for line in lines]
        self.content = content

    def of(self, kind):
        return [message["payload"] for message in self.messages if message["type"] == kind]

    @property
    def points(self):
        found = {}
        for metric in [payload["metric"] for payload in self.of("metric_msg")]:
            if metric["metricName"] != "process duration":  # the SDK's own
                found.setdefault(metric["metricName"], []).append((metric["step"], float(metric["metricValue"])))
        return found

    @property
    def parameters(self):
        pairs = [payload.get("param") or payload["params"] for payload in self.of("parameter_msg")]
        return {pair["paramName"]: pair["paramValue"] for pair in pairs}

    @property
    def others(self):
        return {payload["key"]: payload["value"] for payload in self.of("log_other")}

    def files(self, kind):
        """Give the name, the step and the bytes of each."""
        return [
            (payload["metadata"]["name"], payload["additional_params"]["step"], self.content[payload["file_path"]])
            for payload in self.of("file_upload")
            if payload["upload_type"] == kind
        ]


class Archive(Part):
    """A part of an experiment that was packed."""

    def __init__(self, path):
        with zipfile.ZipFile(path) as file:
            content = {name: file.read(name) for name in file.namelist()}
        super().__init__(content["messages.json"].splitlines(), content)
        self.about = json.loads(content["experiment.json"])


def parts(folder):
    """Return the parts of an experiment, the oldest first."""
    assert [path for path in (folder / "comet").iterdir() if path.suffix != ".zip"] == []
    return [Archive(path) for path in sorted((folder / "comet").glob("*.zip"), key=lambda path: path.stat().st_mtime)]


def under_way(folder):
    """Return what is on disk of the part that is written."""
    (path,) = (folder / "comet").glob("*/messages.json")
    return Part([line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")])


def on_disk(folder):
    """Return the steps of the training loss that are anywhere on disk, while a part is written."""
    found = [under_way(folder), *(Archive(path) for path in (folder / "comet").glob("*.zip") if is_whole(path))]
    return sorted(step for part in found for step, _ in part.points.get("train_loss", []))


def train(folder, *plugins, **options):
    options = {
        "log_every": "1 steps",
        "epochs": 1,
        "runs_folder": str(folder),
        "report_loss_after_eval": False,
    } | options
    trainer = tiny_trainer([*plugins], **options)
    trainer.train()
    return trainer


@pytest.fixture
def begun(tmp_path):
    """Return a tracker that has begun."""
    tracker = Comet()
    tracker.start(Run("run-1", tmp_path / "run-1", id=None, **FREE))
    return tracker


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("hookline")]


# What is kept -------------------------------------------------------------------------


@pytest.mark.slow
def test_contract(tmp_path):
    check_plugin(Comet, runs_folder=str(tmp_path))


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
            "black": Image(torch.zeros(3, 4, 5)),
            "rows": Table(["name", "n"], [["a,b", 1], [None, math.pi]]),
            "a file": self.file,
        }.items():
            self.trainer.log_object(name, value)


@dataclass(eq=False)
class Service(CallbackInterface):
    """Has secrets among its options."""

    password: str = "hunter22"
    url: str = "https://me:hunter22@host/x"


def test_all_kinds_of_things_are_kept(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(2, 1), dpi=50)
    figure.subplots().plot([1, 2, 3])

    class Draws(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, trainer, global_step):
            if global_step == 3:
                trainer.log_object("curve", figure)

    notes, told = tmp_path / "notes.txt", Told()
    notes.write_text("some notes")
    tracker = Comet(project="p", workspace="w", name="n", tags=["a", "b"])
    trainer = train(tmp_path / "runs", tracker, told, Service(), Draws(), module=Shows(notes))
    (kept,) = parts(trainer.run_dir)

    assert (kept.about["project_name"], kept.about["workspace"]) == ("p", "w")
    assert sorted(kept.about["tags"]) == ["a", "b"]
    assert (kept.others["Name"], kept.others["status"]) == ("n", "finished")
    assert kept.parameters["trainer|epochs"] == 1
    assert kept.parameters["trainer|log_every"] == "1 steps"
    assert kept.parameters["trainer|max_steps"] is None
    assert kept.parameters["plugins|service|password"] == "***"
    written = [path for path in trainer.run_dir.rglob("*") if path.is_file()]
    assert not [path for path in written if b"hunter22" in path.read_bytes()]
    assert not [name for name, content in kept.content.items() if b"hunter22" in content]

    assert len(kept.points["train_loss"]) == 7
    ((step, value),) = kept.points["nothing"]
    assert (step, math.isnan(value)) == (2, True)
    points = {name: values for name, values in kept.points.items() if name != "nothing"}
    del told.points["nothing"]
    assert points == told.points
    assert kept.points["much"] == [(2, math.inf)]
    assert kept.points["val@a//b"] == [(2, -math.inf)]

    assert [(name, step, text.decode()) for name, step, text in kept.files("text-sample")] == [
        ("note", 2, "gr\u00fc\u00dfe")
    ]
    assert [(name, step) for name, step, _ in kept.files("visualization")] == [("black", 2), ("curve", 3)]
    opened = importlib.import_module("PIL.Image").open
    images = [opened(importlib.import_module("io").BytesIO(content)) for *_, content in kept.files("visualization")]
    assert [image.size for image in images] == [(5, 4), (100, 50)]
    assert images[0].getpixel((0, 0)) == (0, 0, 0)
    ((name, step, histogram),) = kept.files("histogram3d")
    assert (name, step) == ("numbers", 2)
    assert sum(count for _, count in json.loads(histogram)["index_values"]) == 10
    assert kept.files("asset") == [("rows", 2, f'name,n\n"a,b",1\n,{math.pi}\n'.encode())]
    assert kept.files("model-element") == [("a file", 2, b"some notes")]

    alone = tiny_trainer([], Shows(notes), log_every="1 steps", epochs=1, runs_folder=str(tmp_path / "alone"))
    alone.train()
    assert digest(trainer.module.state_dict()) == digest(alone.module.state_dict())


@pytest.mark.slow
def test_a_model_that_was_saved_outlives_it(begun, tmp_path):
    model = tmp_path / "models" / "best"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "model.json").write_bytes(b"{}")
    begun.log_file("best", model, 4)
    shutil.rmtree(model)  # a newer one takes its place
    begun.finish("finished")
    (kept,) = parts(tmp_path / "run-1")
    assert sorted(kept.files("model-element")) == [("best", 4, b"weights"), ("best", 4, b"{}")]
    files = [upload["additional_params"] for upload in kept.of("file_upload")]
    assert sorted(file["fileName"] for file in files) == ["best/model.json", "best/model.safetensors"]


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


@pytest.mark.parametrize(
    ("how", "status"),
    [pytest.param("raise", "failed"), pytest.param("stop", "preempted", marks=pytest.mark.slow)],
)
def test_how_a_run_has_ended(tmp_path, how, status):
    if how == "raise":
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, Comet(), Ends(how))
    else:
        train(tmp_path, Comet(), Ends(how))
    (kept,) = parts(tmp_path / "run-1")
    assert kept.others["status"] == status
    assert [step for step, _ in kept.points["train_loss"]][:2] == [1, 2]


@pytest.mark.slow
def test_another_run_in_the_middle_has_an_experiment_of_its_own(tmp_path):
    class Beside(CallbackInterface):
        @hookimpl
        def on_boundary(self, global_step):
            if global_step == 3:
                tiny_trainer([Comet()], runs_folder=str(tmp_path / "beside")).validate()

    (kept,) = parts(train(tmp_path, Comet(), Beside()).run_dir)
    assert [step for step, _ in kept.points["train_loss"]] == list(range(1, 8))
    (beside,) = parts(tmp_path / "beside" / "run-1")
    assert len(beside.points["val_loss"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "places"), [("samples", [8, 16, 24]), ("epochs", [0, 0, 0])])
def test_other_axes(tmp_path, axis, places):
    (kept,) = parts(train(tmp_path, Comet(axis=axis), max_steps=3).run_dir)
    assert [place for place, _ in kept.points["train_loss"]] == places


@pytest.mark.slow
def test_nothing_is_written_elsewhere_and_nobody_is_called(tmp_path, monkeypatch):
    for name in hookline_comet.ENVIRONMENT:
        monkeypatch.delenv(name)
    check_quiet_tracker(Comet, tmp_path)
    folder = tmp_path / "runs" / "run-1"
    assert sorted(path.name for path in folder.iterdir()) == ["comet", "trackers"]
    (kept,) = parts(folder)
    assert len(kept.of("file_upload")) == 4


# Going on -----------------------------------------------------------------------------


class Checkpoints(CallbackInterface):
    """Saves at a step, and kills the process at a later one, when the values of the one before are on disk."""

    def __init__(self, kill_at=None, parts=1):
        self.kill_at, self.parts = kill_at, parts

    @hookimpl
    def on_boundary(self, trainer, global_step):
        if global_step <= 5:
            trainer.log_object("note", f"at {global_step}")
        if global_step == 3:
            trainer.save("third")
        if global_step == self.kill_at:
            deadline = time.monotonic() + 50
            while not self.may_end(trainer.run_dir, list(range(1, global_step))):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            kill()

    def may_end(self, folder, steps):
        begun = len([*(folder / "comet").glob("*.zip")])  # the SDK makes an empty one for each
        return begun == self.parts and on_disk(folder)[: len(steps)] == steps

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


def until_killed(folder, resume=None):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kill = Checkpoints(7, 2) if resume else Checkpoints(5, 1)  # the second has step 6 on disk, which the first has not
    train(folder, kill, Comet(), resume=resume, evaluate_every="2 steps")


def killed_run(folder, resume=None):
    outcome = run(until_killed, folder, resume)
    assert outcome.code == -9, outcome.output
    return folder / "run-1"


class Notes(CallbackInterface):
    """Logs a text at each step."""

    @hookimpl
    def on_boundary(self, trainer, global_step):
        trainer.log_object("note", f"at {global_step}")


@pytest.mark.slow
def test_what_every_tracker_does(tmp_path):
    check_tracker(Comet, of_comet, tmp_path, sdk="comet_ml")


def test_a_run_that_is_killed_is_readable_and_goes_on_with_each_value_once(tmp_path):
    check_killed_tracker(Comet, of_comet, tmp_path, [Notes()])
    first, second = parts(tmp_path / "cut" / "run-1")
    assert first.about["offline_id"] == second.about["offline_id"]
    assert (first.about["resume_strategy"], second.about["resume_strategy"]) == ("create", "get")
    assert first.parameters["trainer|epochs"] == 2
    notes = [(step, text) for part in (first, second) for _, step, text in part.files("text-sample")]
    assert sorted(notes) == [(step, b"at %d" % step) for step in range(1, 15)]
    assert second.others["status"] == "finished"


@pytest.mark.slow
def test_a_run_that_is_killed_twice_goes_on(tmp_path):
    folder = killed_run(tmp_path)
    killed_run(tmp_path, resume=str(folder))
    train(tmp_path, Checkpoints(), Comet(), resume=str(folder), evaluate_every="2 steps")
    assert len(parts(folder)) == 3
    steps = [step for part in parts(folder) for step, _ in part.points.get("train_loss", [])]
    assert steps == list(range(1, 8))


@pytest.mark.slow
def test_an_evaluation_of_a_run_goes_on_with_its_experiment(tmp_path):
    trainer = train(tmp_path, Checkpoints(), Comet())
    tested = tiny_trainer([Checkpoints(), Comet()], resume=str(trainer.run_dir), runs_folder=str(tmp_path))
    metrics = tested.test()
    first, second = parts(trainer.run_dir)
    assert second.about["offline_id"] == first.about["offline_id"]
    assert [value for _, value in second.points["test_loss"]] == [metrics["test_loss"]]


LINES = b'{"type":"log_other","payload":{"key":"a","value":1}}\n'


def left(folder, name, archive=None):
    """Make what a process has left that was killed: a folder, and the beginning of an archive."""
    part = folder / name
    part.mkdir(parents=True)
    (part / "messages.json").write_bytes(LINES + b'{"type":"metr')
    (part / "experiment.json").write_text("{}")
    if archive is not None:
        (folder / f"{name}.zip").write_bytes(archive)


@pytest.mark.parametrize("archive", [None, b"PK\x05\x06" + bytes(18), b"PK\x03\x04torn"], ids=["none", "empty", "torn"])
def test_what_is_left_of_a_kill_at_any_time_is_packed_once(tmp_path, archive):
    left(tmp_path, "abc", archive)
    pack(tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name == "abc.zip"
    with zipfile.ZipFile(path) as file:
        assert file.read("messages.json") == LINES
    before = path.read_bytes()
    (tmp_path / "abc").mkdir()  # killed while the SDK removed it
    pack(tmp_path)
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == before


def test_what_was_killed_before_it_began_leaves_nothing(tmp_path):
    (tmp_path / "abc").mkdir()
    (tmp_path / "abc.zip").write_bytes(b"PK\x05\x06" + bytes(18))
    pack(tmp_path)
    assert [*tmp_path.iterdir()] == []


# Options, and servers -----------------------------------------------------------------


def test_without_the_sdk_a_run_goes_on_and_says_what_to_install(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "comet_ml", None)
    assert train(tmp_path, Comet()).status == "finished"
    said, lost = warnings_of(caplog)
    assert lost.startswith("calls of comet failed or were dropped, and may be missing in its run: ")
    assert "comet is switched off" in said
    assert "comet needs the module comet_ml, which cannot be imported" in said
    assert "`pip install 'comet-ml>=3.58'`" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "disabled"}, r"comet\.mode='disabled' must be one of offline, online; .*write `comet: null`"),
        ({"axis": "seconds"}, r"comet\.axis='seconds': the service takes whole numbers for places"),
        ({"init": {"project_name": "p"}}, r"comet\.init: project_name is set by the option comet\.project; leave"),
        ({"init": {"experiment_key": "k"}}, r"comet\.init: experiment_key is set by the plugin, from the run"),
        (
            {"init": {"api_key": "k"}},
            r"comet\.init: api_key is set by the variable COMET_API_KEY",
        ),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        Comet(**options)


def test_arguments_that_the_sdk_does_not_take(tmp_path):
    words = (
        r"comet\.init: an experiment has no argument 'log_codes', did you mean 'log_code'\?; it has .*log_env_details"
    )
    with pytest.raises(ValueError, match=words):
        Comet(init={"log_codes": True}).start(Run("run-1", tmp_path, id=None, **FREE))


def test_without_a_key_it_says_what_to_do(tmp_path, caplog):
    assert train(tmp_path, Comet(mode="online")).status == "finished"
    said, lost = warnings_of(caplog)
    assert lost.startswith("calls of comet failed or were dropped, and may be missing in its run: ")
    assert re.search(r"it could not start: .* API key\..*COMET_API_KEY", said)


@pytest.mark.slow
@pytest.mark.parametrize("answers", [False, True], ids=["closed", "silent"])
def test_a_server_that_is_gone_does_not_hold_training_up(tmp_path, caplog, monkeypatch, answers):
    with socket.create_server(("127.0.0.1", 0)) if answers else socket.socket() as server:
        if not answers:
            server.bind(("127.0.0.1", 0))  # taken, and refuses all
        monkeypatch.setenv("COMET_URL_OVERRIDE", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("COMET_API_KEY", "0" * 25)
        monkeypatch.setenv("COMET_TIMEOUT_HTTP", "1")
        began = time.monotonic()
        assert train(tmp_path, Comet(mode="online", close_timeout="1 s")).status == "finished"
        assert time.monotonic() - began < 10
        for thread in threading.enumerate():
            if thread.name == "hookline-comet":
                thread.join(100)
    warned = warnings_of(caplog)
    (said,) = [words for words in warned if words.startswith("comet is switched off")]
    assert sum("has not taken all within 1 s" in words for words in warned) == answers
    assert sum(words.startswith("calls of comet failed or were dropped") for words in warned) == 1
    assert "comet is switched off, and training goes on without it: it could not start" in said
    assert "the server of Comet did not take the experiment: see whether it can be reached" in said
    assert not (tmp_path / "run-1" / "comet").exists()
