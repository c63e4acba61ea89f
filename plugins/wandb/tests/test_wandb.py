"""What stands in the SDK's own files after real runs, also after one that was killed and gone on with."""

import io
import json
import logging
import math
import os
import re
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from tests.tracker_readers import of_wandb

from hookline import CallbackInterface, Stage, hookimpl
from hookline.testing import (
    Memory,
    TinyModule,
    Told,
    check_killed_tracker,
    check_plugin,
    check_tracker,
    digest,
    tiny_trainer,
)
from hookline.testing.faults import run
from hookline.tracking import Histogram, Image, Run, Table
from hookline_wandb import RunLog, Wandb

OWN = {"_timestamp", "_runtime", "_step", "_wandb"}


def records(path):
    """Read the SDK's file: a header of 7 bytes, then the log format of LevelDB in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    assert content[:4] == b":W&B"
    at, whole, found = 7, b"", []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        if kind == 0 or at + 7 + size > len(content):
            break
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            found.append(Record.FromString(whole))
            whole = b""
    return found


class Kept:
    """What the file of one part of a run holds."""

    def __init__(self, path):
        self.path, self.folder = path, path.parent
        by_kind = {}
        for record in records(path):
            kind = record.WhichOneof("record_type")
            by_kind.setdefault(kind, []).append(getattr(record, kind))
        self.rows = [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item}
            for row in by_kind.get("history", [])
        ]
        self.run = by_kind["run"][0]
        self.config = {item.key: json.loads(item.value_json) for item in self.run.config.update if item.key[0] != "_"}
        self.artifacts = by_kind.get("artifact", [])
        self.metrics = by_kind.get("metric", [])
        self.preempted = "preempting" in by_kind
        self.exit_code = by_kind["exit"][0].exit_code if "exit" in by_kind else None

    def points(self, name, axis="steps"):
        return [(row[axis], row[name]) for row in self.rows if name in row]


def parts(folder):
    """Return the parts of a run, the oldest first."""
    paths = (folder / "wandb").glob("*run-*/run-*.wandb")
    return [Kept(path) for path in sorted(paths, key=lambda path: path.parent.name)]


def train(folder, *plugins, **options):
    defaults = {"log_every": "1 steps", "evaluate_every": "3 steps", "runs_folder": str(folder)}
    trainer = tiny_trainer([*plugins], **(defaults | options))
    trainer.train()
    return trainer


def quick(**options):
    """Return a tracker that does not watch the machine."""
    return Wandb(init={"settings": {"x_disable_stats": True}}, **options)


@pytest.fixture
def sdk(tmp_path, monkeypatch):
    """Give the SDK an empty home, and none of the user's own settings."""
    home = tmp_path / "home"
    home.mkdir()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))


@pytest.fixture
def begun(sdk, tmp_path):
    tracker = quick()
    tracker.start(Run("run-1", tmp_path / "run-1", {}, Stage.TRAIN, 0, None))
    return tracker


# Without the SDK ----------------------------------------------------------------------


@pytest.mark.slow
def test_contract(tmp_path):
    check_plugin(Wandb, runs_folder=str(tmp_path))


def test_without_the_sdk_a_run_goes_on_and_says_what_to_install(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train(tmp_path, Wandb()).status == "finished"
    assert "wandb is switched off" in caplog.text
    assert "wandb needs the module wandb, which cannot be imported" in caplog.text
    assert "`pip install 'wandb>=0.31'`" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "disabled"}, r"wandb\.mode='disabled' must be one of offline, online; .*write `wandb: null`"),
        ({"axis": "miles"}, r"wandb\.axis='miles' must be one of steps, batches"),
        ({"init": {"project": "p"}}, r"wandb\.init: project is set by the option wandb\.project"),
        ({"init": {"dir": "/tmp"}}, r"wandb\.init: dir is set by the plugin, from the run; leave it out"),
        ({"init": {"settings": [1]}}, r"wandb\.init\.settings must be a mapping of names to values, not \[1\]"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        Wandb(**options)


# What is kept -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init", "words"),
    [
        ({"note": "x"}, r"wandb\.init: wandb\.init has no argument 'note', did you mean 'notes'\?; it has .*job_type"),
        (
            {"settings": {"consol": "off"}},
            r"wandb\.init\.settings: wandb\.Settings has no argument 'consol', did you mean 'console'\?",
        ),
    ],
)
def test_arguments_that_the_sdk_does_not_take(sdk, tmp_path, init, words):
    with pytest.raises(ValueError, match=words):
        Wandb(init=init).start(Run("run-1", tmp_path, {}, Stage.TRAIN, 0, None))


def test_every_flush_is_a_row_and_nothing_is_written_elsewhere(sdk, tmp_path):
    recorder, before = Told(), dict(os.environ)
    config = {"lr": 0.25, "net": {"sizes": [1, 2], "name": "x"}}
    options = {"project": "p", "entity": "e", "name": "n", "group": "g", "tags": ["a", "b"]}
    trainer = train(tmp_path / "runs", quick(**options), recorder, config=config)
    (kept,) = parts(trainer.run_dir)
    assert {name: kept.points(name) for name in {*recorder.points}} == recorder.points
    assert {name for row in kept.rows for name in row} == {*recorder.points, "steps"} | OWN - {"_wandb"}
    assert len(recorder.points["train_loss"]) == 14
    assert [row["_step"] for row in kept.rows] == list(range(len(kept.rows)))
    assert kept.config == config
    run = kept.run
    assert (run.project, run.entity, run.display_name, run.run_group, [*run.tags]) == ("p", "e", "n", "g", ["a", "b"])
    assert [(metric.name, metric.glob_name, metric.step_metric) for metric in kept.metrics] == [
        ("steps", "", ""), ("", "*", "steps"),
    ]  # fmt: skip
    assert kept.exit_code == 0
    assert list((tmp_path / "home").iterdir()) == []
    assert sorted(path.name for path in trainer.run_dir.iterdir()) == ["trackers", "wandb"]
    os.environ.pop("WANDB_SERVICE", None)  # where the SDK's process is, set by the first run of this one
    assert dict(os.environ) == before


def test_values_that_are_no_numbers(begun, tmp_path):
    begun.log_metrics({"a": math.nan, "b": math.inf, "c": -math.inf}, 3)
    begun.finish("finished")
    (kept,) = parts(tmp_path / "run-1")
    assert math.isnan(kept.points("a")[0][1])
    assert (kept.points("b"), kept.points("c")) == ([(3, math.inf)], [(3, -math.inf)])


@dataclass(eq=False)
class Service(CallbackInterface):
    """Has a secret among its options."""

    password: str = "open sesame"
    kept: str = "in plain sight"


def test_no_secret_of_the_configuration_is_written(sdk, tmp_path):
    trainer = train(tmp_path / "runs", quick(), Service())
    written = [path.read_bytes() for path in trainer.run_dir.rglob("*") if path.is_file()]
    assert any(b"in plain sight" in content for content in written)
    assert not any(b"sesame" in content for content in written)


@pytest.mark.plugins
@pytest.mark.slow
def test_no_secret_of_the_command_line_is_written(sdk, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "module: {_target_: hookline.testing.TinyModule}\n"
        "trainer: {epochs: 1, train_batch_size: 8, device: cpu}\n"
        "plugins: {wandb: {}}\n"
        "vars: {password: none, kept: in plain sight}\n"
    )
    command = [sys.executable, "-m", "hookline", "fit", "run.yaml", "vars.password=opensesame"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = [path.read_bytes() for path in (tmp_path / "runs" / "run-1").rglob("*") if path.is_file()]
    assert any(b"in plain sight" in content for content in written)
    assert not any(b"sesame" in content for content in written)
    assert list((tmp_path / "home").iterdir()) == []


class Shows(TinyModule):
    """Logs one of each kind."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def on_end_train_step(self, global_step, *outputs):
        if global_step == 2:
            for name, value in {
                "note": "a <text>",
                "numbers": Histogram(torch.arange(10.0)),
                "nothing": Histogram(torch.full([3], math.nan)),
                "picture": Image(torch.full((3, 4, 5), 200)),
                "rows": Table(["name", "n"], [["a|b", 1], [None, math.pi], [self.file, True]]),
                "a file": self.file,
            }.items():
                self.trainer.log_object(name, value)


def test_texts_images_histograms_tables_and_files(sdk, tmp_path):
    import PIL.Image

    (tmp_path / "notes.txt").write_text("some notes")
    trainer = train(tmp_path, quick(), module=Shows(tmp_path / "notes.txt"))
    (kept,) = parts(trainer.run_dir)
    values = {name: value for row in kept.rows if row["steps"] == 2 for name, value in row.items()}
    media = kept.folder / "files"
    assert "<pre>a &lt;text&gt;</pre>" in (media / values["note/path"]).read_text()
    with PIL.Image.open(media / values["picture/path"]) as picture:
        assert (picture.size, picture.getpixel((0, 0))) == ((5, 4), (200, 200, 200))
    assert (values["numbers/_type"], sum(values["numbers/values"])) == ("histogram", 10)
    assert len(values["numbers/values"]) == 64
    table = json.loads((media / values["rows/path"]).read_text())
    assert table["columns"] == ["name", "n"]
    assert table["data"] == [["a|b", 1], [None, math.pi], [str(tmp_path / "notes.txt"), True]]
    assert not any(name.startswith("nothing") for name in values)
    (artifact,) = [artifact for artifact in kept.artifacts if artifact.type == "model"]
    assert artifact.name == f"a-file-{kept.run.run_id}"
    (entry,) = artifact.manifest.contents
    assert (entry.path, entry.size) == ("notes.txt", 10)


def test_a_figure_is_an_image(sdk, tmp_path):
    from matplotlib.figure import Figure

    class Draws(TinyModule):
        def on_end_train_step(self, global_step, *outputs):
            if global_step == 1:
                figure = Figure(figsize=(2, 1), dpi=50)
                figure.subplots().plot([1, 2, 3])
                self.trainer.log_object("curve", figure)

    (kept,) = parts(train(tmp_path, quick(), module=Draws()).run_dir)
    (row,) = [row for row in kept.rows if "curve/width" in row]
    assert (row["steps"], row["curve/width"], row["curve/height"]) == (1, 100, 50)


def test_a_model_that_was_saved_is_an_artifact_that_outlives_it(begun, tmp_path):
    model = tmp_path / "models" / "best"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights")
    begun.log_file("best", model, 4)
    begun.finish("finished")
    (model / "model.safetensors").unlink()  # a newer one takes its place
    (kept,) = parts(tmp_path / "run-1")
    (artifact,) = kept.artifacts
    (entry,) = artifact.manifest.contents
    assert json.loads(artifact.metadata) == {"steps": 4}
    assert entry.path == "model.safetensors"
    assert Path(entry.local_path).read_bytes() == b"weights"
    assert entry.local_path.startswith(str(tmp_path / "run-1"))


class Fails(TinyModule):
    def train_step(self, global_step, batch, device):
        if global_step == 4:
            raise ZeroDivisionError
        return super().train_step(global_step, batch, device)


class Leaves(CallbackInterface):
    @hookimpl
    def on_boundary(self, trainer, global_step):
        if global_step == 3:
            trainer.stop("the machine is wanted", "preempted")


def test_how_a_run_has_ended(sdk, tmp_path):
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, quick(), module=Fails())
    (failed,) = parts(tmp_path / "run-1")
    assert (failed.exit_code, failed.preempted) == (1, False)
    assert [step for step, _ in failed.points("train_loss")] == [1, 2, 3]
    (preempted,) = parts(train(tmp_path, quick(), Leaves()).run_dir)
    assert (preempted.exit_code, preempted.preempted) == (1, True)


def test_other_axes(sdk, tmp_path):
    epochs, seconds = (parts(train(tmp_path, quick(axis=axis)).run_dir)[0] for axis in ("epochs", "seconds"))
    losses = [loss for _, loss in epochs.points("train_loss", "epochs")]
    assert len(losses) == 14  # none takes the place of another of the same epoch
    assert [loss for _, loss in seconds.points("train_loss", "seconds")] == losses
    places = [place for place, _ in seconds.points("train_loss", "seconds")]
    assert places == sorted(places)


def test_another_run_in_the_middle_has_files_of_its_own(sdk, tmp_path):
    class Beside(CallbackInterface):
        @hookimpl
        def on_boundary(self, global_step):
            if global_step == 3:
                tiny_trainer([quick()], runs_folder=str(tmp_path / "beside")).validate()

    (kept,) = parts(train(tmp_path, quick(), Beside()).run_dir)
    assert [step for step, _ in kept.points("train_loss")] == list(range(1, 15))
    (beside,) = parts(tmp_path / "beside" / "run-1")
    assert len(beside.points("val_loss")) == 1


# Going on -----------------------------------------------------------------------------


def test_values_within_validations_have_an_axis_of_their_own(sdk, tmp_path):
    memory, recorder = Memory(every="1 steps"), Told()
    options = {"epochs": 1, "log_every": "3 steps", "report_loss_after_eval": False}
    trainer = train(tmp_path, quick(), memory, recorder, **options)
    (kept,) = parts(trainer.run_dir)
    assert kept.points("val_loss_batch", "validation_batch") == recorder.points["val_loss_batch"]
    assert [batch for batch, _ in recorder.points["val_loss_batch"]] == [3, 6, 9, 12, 15, 18, 21]
    assert {m.name: m.step_metric for m in kept.metrics}["val_loss_batch"] == "validation_batch"
    train(tmp_path, quick(), Memory(memory.states[4]), resume=str(trainer.run_dir), **{**options, "epochs": 2})
    both = [point for part in parts(trainer.run_dir) for point in part.points("val_loss_batch", "validation_batch")]
    assert [batch for batch, _ in both] == list(range(3, 36, 3))
    steps = [step for part in parts(trainer.run_dir) for step, _ in part.points("train_loss")]
    assert steps == [3, 6, 7, 9, 12, 14]


@pytest.mark.slow
def test_what_every_tracker_does(sdk, tmp_path):
    check_tracker(quick, of_wandb, tmp_path / "runs", sdk="wandb")
    assert list((tmp_path / "home").iterdir()) == []


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_without_a_value_lost_or_doubled(sdk, tmp_path):
    check_killed_tracker(quick, of_wandb, tmp_path)
    first, second = parts(tmp_path / "cut" / "run-1")
    assert first.run.run_id == second.run.run_id
    assert (first.exit_code, second.exit_code) == (None, 0)
    rows = [row["_step"] for part in (first, second) for row in part.rows]
    assert rows == list(range(len(rows)))


def test_a_half_stored_place_is_completed(sdk, tmp_path):
    folder = tmp_path / "run-1"
    first = quick()
    identity = first.start(Run("run-1", folder, {}, Stage.TRAIN, 0, None))
    for place in (1, 2, 3):
        first.log_metrics({"a": place}, place)
    first.finish("failed")
    second = quick()
    assert second.start(Run("run-1", folder, {}, Stage.TRAIN, 2, identity)) == identity
    for place in (2, 3, 4, 3):  # a state of before is put back, at last
        second.log_metrics({"a": place}, place)
        second.log_metrics({"b": place}, place)
    second.finish("finished")
    both = parts(folder)
    assert [both[0].points(name) + both[1].points(name) for name in "ab"] == [
        [(1, 1), (2, 2), (3, 3), (4, 4), (3, 3)], [(3, 3), (4, 4), (3, 3)],
    ]  # fmt: skip


def test_an_evaluation_of_a_run_goes_on_with_its_rows(sdk, tmp_path):
    trainer = train(tmp_path, memory := Memory(), quick())
    tested = tiny_trainer([Memory(memory.state), quick()], runs_folder=str(tmp_path), resume=True)
    metrics = tested.test()
    first, second = parts(trainer.run_dir)
    assert second.run.run_id == first.run.run_id
    assert [loss for _, loss in second.points("test_loss")] == [metrics["test_loss"]]
    assert second.rows[0]["_step"] == len(first.rows)


def test_a_row_larger_than_a_block_is_read_while_it_is_written(sdk, begun, tmp_path):
    for place in range(3):
        begun.log_metrics({f"a metric of a long name {number}": number / 7 for number in range(3000)}, place)
        begun.get_state()
    (path,) = (tmp_path / "run-1" / "wandb").glob("*run-*/run-*.wandb")
    rows = list(RunLog(path).rows())
    assert path.stat().st_size > 100_000
    assert [(row["_step"], len(row)) for row in rows] == [(place, 3001 + 3) for place in range(3)]
    torn = tmp_path / "torn"
    torn.write_bytes(path.read_bytes()[:-50])
    log = RunLog(torn)
    assert log.read().next_row == 2
    torn.write_bytes(path.read_bytes())
    assert (log.read().next_row, log.read().next_row) == (3, 3)
    torn.write_bytes(b"something else")
    with pytest.raises(ValueError, match=rf"{re.escape(str(torn))} is no file of a run of wandb"):
        RunLog(torn).read()
    begun.finish("finished")


class KillsTheService(CallbackInterface):
    """Kills the process of the SDK after step 5, when all up to it is in the file."""

    def __init__(self, tracker):
        self.tracker = tracker

    @hookimpl
    def on_boundary(self, global_step):
        if global_step == 5:
            self.tracker.get_state()
            (service,) = psutil.Process().children()
            service.kill()
            service.wait(30)


def without_its_service(folder):
    torch.set_num_threads(1)
    tracker = quick(close_timeout="20 s")
    said = io.StringIO()
    logging.getLogger("hookline").addHandler(logging.StreamHandler(said))
    trainer = train(folder, tracker, KillsTheService(tracker))
    return trainer.status, digest(trainer.module.state_dict()), said.getvalue()


@pytest.mark.slow
def test_a_process_of_the_sdk_that_is_killed_costs_what_comes_after(sdk, tmp_path):
    ended = run(without_its_service, tmp_path / "cut")  # in a process of its own, since the SDK has one for all runs
    assert ended.code == 0, ended.output
    status, bits, said = ended.value
    assert (status, bits) == ("finished", digest(train(tmp_path / "whole").module.state_dict()))
    assert "wandb is switched off, and training goes on without it: 3 failures in a row" in said
    (kept,) = parts(tmp_path / "cut" / "run-1")
    assert [step for step, _ in kept.points("train_loss")] == [1, 2, 3, 4, 5]


# Online -------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"base_url": "http://127.0.0.1:1"}], ids=["its own server", "another"])
def test_without_a_key_it_says_what_to_do(sdk, tmp_path, caplog, settings):
    assert train(tmp_path, Wandb(mode="online", init={"settings": settings})).status == "finished"
    assert "there is no key for the server: set WANDB_API_KEY, or call `wandb login` once" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("answers", [False, True], ids=["closed", "silent"])
def test_a_server_that_is_gone_costs_training_nothing_but_a_bounded_wait(sdk, tmp_path, caplog, monkeypatch, answers):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with socket.create_server(("127.0.0.1", 0)) if answers else socket.socket() as server:
        if not answers:
            server.bind(("127.0.0.1", 0))  # taken, and refuses all
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        init = {"settings": {"base_url": url, "init_timeout": 1.0, "silent": True}}
        begun = time.monotonic()
        assert train(tmp_path, Wandb(mode="online", init=init)).status == "finished"
        assert time.monotonic() - begun < 20
    assert "wandb is switched off, and training goes on without it: it could not start" in caplog.text
    assert not [*(tmp_path / "home").rglob("settings")]  # this server is that of this run alone
    assert not (tmp_path / "run-1" / "trackers").exists()  # there is no run that could be gone on with


@pytest.mark.slow
def test_a_server_that_is_gone_when_a_run_goes_on_is_asked_for_the_same_run_the_next_time(sdk, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    memory = Memory()
    train(tmp_path, memory)
    note = tmp_path / "run-1" / "trackers" / "wandb.json"
    note.parent.mkdir(parents=True)
    note.write_text('{"id": "abc123"}')
    init = {"settings": {"base_url": "http://127.0.0.1:1", "init_timeout": 1.0, "silent": True}}
    tracker = Wandb(mode="online", init=init)
    trainer = train(tmp_path, tracker, Memory(memory.state), resume=True, epochs=3)
    assert (trainer.status, trainer.global_step) == ("finished", 21)
    assert json.loads(note.read_text()) == {"id": "abc123"}
