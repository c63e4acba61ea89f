"""What DVCLive's files hold of real runs, read as its own readers do; also of one that was killed and gone on with."""

import json
import math
import os
import subprocess
import sys
import types

import pytest
import torch
from PIL import Image as Pictures
from tests.tracker_readers import of_dvclive

from hookline import Stage
from hookline.testing import (
    TinyModule,
    Told,
    check_killed_tracker,
    check_quiet_tracker,
    check_tracker,
    digest,
    tiny_trainer,
)
from hookline.tracking import Histogram, Image, Run, Table
from hookline_dvclive import Dvclive


class Kept:
    """What the files of a run hold, the curves and the last values by DVCLive's own reader."""

    def __init__(self, folder):
        from dvclive.serialize import load_yaml
        from dvclive.utils import parse_metrics

        self.plots = folder / "plots"
        files = types.SimpleNamespace(plots_dir=str(self.plots), metrics_file=str(folder / "metrics.json"))
        history, self.last = parse_metrics(files)
        self.curves = {
            path.removeprefix(f"{self.plots}/metrics/").removesuffix(".tsv"): history[path] for path in history
        }
        self.params = load_yaml(str(folder / "params.yaml"))

    def points(self, name):
        return [(float(row["step"]), float(row[name.rpartition("/")[2]])) for row in self.curves[name]]

    def plot(self, path):
        return json.loads((self.plots / "custom" / path).read_text())

    def image(self, path):
        with Pictures.open(self.plots / "images" / path) as picture:
            return picture.size, picture.getpixel((0, 0))


def train(folder, *plugins, module=None, method="train", **options):
    options = {"epochs": 1, "log_every": "1 steps"} | options
    trainer = tiny_trainer(plugins, module, runs_folder=str(folder), **options)
    getattr(trainer, method)()
    return trainer


# Options ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"report": "pdf"}, r"dvclive\.report='pdf' must be one of md, html, notebook, or null"),
        ({"init": {"report": "md"}}, r"dvclive\.init: report is set by the option dvclive\.report"),
        (
            {"init": {"monitor_system": True}},
            r"dvclive\.init: monitor_system is set by the plugin: it is off, and",
        ),
        ({"exp_name": "x"}, r"dvclive: exp_name is about a repository of DVC: it needs dvclive\.save_dvc_exp=true"),
        ({"init": {"dvcyaml": "dvc.yaml"}}, r"dvclive: dvcyaml is about a repository of DVC"),
    ],
)
def test_options_that_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Dvclive(**options)


def test_an_argument_that_the_sdk_does_not_take(tmp_path):
    words = r"dvclive\.init: Live has no argument 'cache_image', did you mean 'cache_images'\?; it has cache_im"
    with pytest.raises(ValueError, match=words):
        Dvclive(init={"cache_image": True}).start(Run("run-1", tmp_path, {}, Stage.TRAIN, 0, None))


def test_without_dvclive_it_says_what_to_install(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "dvclive", None)
    assert train(tmp_path, Dvclive()).status == "finished"
    assert "dvclive needs the module dvclive, which cannot be imported" in caplog.text
    assert "`pip install 'dvclive>=3.49.1,<4' hydra-core==1.3.0`" in caplog.text


# What is kept -------------------------------------------------------------------------


class Shows(TinyModule):
    """Logs one of each kind in the second step."""

    def on_end_train_step(self, global_step, *outputs):
        self.trainer.log_object("again", Image(torch.full((3, 4, 5), 10 * global_step)))
        if global_step != 2:
            return
        self.trainer.log(
            **{"nothing": math.nan, "much": -math.inf, "train_loss/b": 1.5, "../up": 2.5, "a/step": 3.5, "step": 4.5}
        )
        for name, value in {
            "note": "a text",
            "numbers": Histogram(torch.arange(10.0)),
            "no number": Histogram(torch.full([3], math.nan)),
            "../curve": drawn(),
            "rows": Table(["name", "n"], [["a|b", 1], [None, math.pi], [self.trainer.run_dir, True]]),
            "one": Table(["n"], [[1]]),
        }.items():
            self.trainer.log_object(name, value)


def drawn():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1), dpi=50)
    FigureCanvasAgg(figure)
    figure.subplots().plot([1, 2, 3])
    return figure


def test_all_that_is_logged_can_be_read_and_no_bit_changes(tmp_path):
    recorder, before = Told(), dict(os.environ)
    config = {"lr": 0.25, "net": {"sizes": [1, 2], "name": "x"}, "none": None}
    trainer = train(tmp_path / "runs", Dvclive(), recorder, module=Shows(), config=config)
    kept = Kept(trainer.run_dir / "dvclive")

    renamed = {"../up": "up", "a/step": "a/step_", "step": "step_"}
    expected = {renamed.get(name, name): points for name, points in recorder.points.items()}
    odd = expected.pop("nothing")
    assert {name: kept.points(name) for name in kept.curves if name != "nothing"} == expected
    assert len(expected["train_loss"]) == 7
    assert [step for step, value in kept.points("nothing") if math.isnan(value)] == [step for step, _ in odd] == [2]
    assert kept.last["train_loss"] == expected["train_loss"][-1][1]
    assert (kept.last["train_loss/b"], kept.last["much"], kept.last["nothing"]) == (1.5, "-inf", "nan")
    assert (kept.last["step"], kept.last["status"]) == (7, "finished")
    assert kept.params == config

    assert [kept.image(f"again/{n}.png") for n in range(1, 8)] == [((5, 4), (10 * n,) * 3) for n in range(1, 8)]
    assert kept.image("curve/2.png")[0] == (100, 50)
    bins = kept.plot("numbers/2.json")
    assert (len(bins), sum(bar["count"] for bar in bins), bins[0]["from"], bins[-1]["to"]) == (64, 10, 0, 9)
    assert kept.plot("rows/2.json") == [
        {"name": "a|b", "n": 1}, {"name": None, "n": math.pi}, {"name": str(trainer.run_dir), "n": True},
    ]  # fmt: skip
    assert kept.plot("one/2.json") == [{"n": 1}]
    assert not (kept.plots / "custom" / "no number").exists()

    assert sorted(path.name for path in trainer.run_dir.iterdir()) == ["dvclive", "trackers"]
    assert dict(os.environ) == before
    without = train(tmp_path / "without", module=Shows())
    assert digest(trainer.module.state_dict()) == digest(without.module.state_dict())


def test_validation_batches_other_axes_and_a_step_back(tmp_path):
    tracker = Dvclive(axis="seconds")
    tracker.start(Run("run-1", tmp_path, {}, Stage.TRAIN, 0, None))
    for place in (0.5, 1.0, 2.5, 1.0):  # a state of before was put back
        tracker.log_metrics({"a": place / 7}, place)
    tracker.log_image("square", torch.zeros(2, 2, 3, dtype=torch.uint8).numpy(), 1.5)
    for batch in (1, 2, 3, 2):
        tracker.log_batch({"val_loss_batch/x": batch / 3}, batch)
    tracker.finish("failed")
    kept = Kept(tmp_path / "dvclive")
    assert kept.points("a") == [(0.5, 0.5 / 7), (1, 1 / 7)]
    assert kept.points("validation_batches/val_loss_batch/x") == [(1, 1 / 3), (2, 2 / 3)]
    assert kept.image("square/1.5.png") == ((2, 2), (0, 0, 0))
    assert (kept.last["step"], kept.last["status"]) == (1, "failed")


def test_it_writes_below_the_run_folder_alone_and_connects_nowhere(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("XDG_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DVC_STUDIO_TOKEN", "opensesame")
    subprocess.run(["git", "init", "-q", str(tmp_path / "place")], check=True)  # of which DVCLive would make one of DVC
    check_quiet_tracker(Dvclive, tmp_path)
    assert len(Kept(tmp_path / "runs" / "run-1" / "dvclive").points("train_loss")) == 7


# How it ends, and goes on -------------------------------------------------------------


def test_a_run_that_failed_and_an_evaluation_beside_it(tmp_path):
    class Fails(TinyModule):
        def train_step(self, global_step, batch, device):
            if global_step == 4:
                raise ZeroDivisionError
            return super().train_step(global_step, batch, device)

    with pytest.raises(ZeroDivisionError):
        train(tmp_path, Dvclive(), module=Fails())
    kept = Kept(tmp_path / "run-1" / "dvclive")
    assert kept.last["status"] == "failed"
    assert [step for step, _ in kept.points("train_loss")] == [1, 2, 3]

    trainer = train(tmp_path, Dvclive(), method="validate")
    evaluation = Kept(trainer.run_dir / "dvclive-val")
    assert evaluation.last["val_loss"] == trainer.metrics["val_loss"]
    assert not (trainer.run_dir / "dvclive").exists()
    assert not (trainer.run_dir / "trackers").exists()


def test_what_every_tracker_does(tmp_path):
    check_tracker(Dvclive, of_dvclive, tmp_path, sdk="dvclive")


def test_a_run_that_was_killed_is_readable_and_goes_on_with_each_place_once(tmp_path):
    check_killed_tracker(Dvclive, of_dvclive, tmp_path)
    kept = Kept(tmp_path / "cut" / "run-1" / "dvclive")
    assert (kept.last["step"], kept.last["status"]) == (14, "finished")


def test_what_a_kill_has_torn_is_made_anew(tmp_path):
    first = Dvclive()
    identity = first.start(Run("run-1", tmp_path, {"lr": 1}, Stage.TRAIN, 0, None))
    for place in (1, 2, 3):
        first.log_metrics({"a": place / 3}, place)
    with (tmp_path / "dvclive" / "plots" / "metrics" / "a.tsv").open("a") as file:
        file.write("10\t0.")
    (tmp_path / "dvclive" / "metrics.json").write_text('{"torn": ')
    (tmp_path / "dvclive" / "params.yaml").write_text("torn: [")
    second = Dvclive()
    second.start(Run("run-1", tmp_path, {"lr": 1}, Stage.TRAIN, 10, identity))
    second.log_metrics({"a": 4.0}, 11)
    second.finish("finished")
    kept = Kept(tmp_path / "dvclive")
    assert kept.points("a") == [(1, 1 / 3), (2, 2 / 3), (3, 1), (11, 4)]
    assert (kept.last, kept.params) == ({"a": 4.0, "step": 11, "status": "finished"}, {"lr": 1})


def test_a_run_that_goes_on_keeps_last_values_and_drops_batches_behind(tmp_path):
    first = Dvclive()
    identity = first.start(Run("run-1", tmp_path, {"lr": 1}, Stage.TRAIN, 0, None))
    first.log_metrics({"once": 1.0}, 1)
    for batch in (1, 2, 3):
        first.log_batch({"b": batch / 3}, batch)
    first.log_metrics({"late": 1.0}, 5)
    first.finish("preempted")
    second = Dvclive()
    second.start(Run("run-1", tmp_path, {"lr": 2}, Stage.TRAIN, 3, identity, batch=2))
    second.log_metrics({"a": 1.0}, 4)
    kept = Kept(tmp_path / "dvclive")
    assert kept.points("validation_batches/b") == [(1, 1 / 3), (2, 2 / 3)]
    assert "late" not in kept.curves
    assert kept.last["once"] == 1.0
    assert "status" not in kept.last
    assert kept.params == {"lr": 2}


# A repository of DVC, and reports -------------------------------------------------------

EXPERIMENT = """
import sys
from pathlib import Path
from hookline.testing import tiny_trainer
from hookline_dvclive import Dvclive
from hookline import CallbackInterface, hookimpl
class Saves(CallbackInterface):
    @hookimpl
    def on_end_train(self, trainer):
        path = trainer.run_dir / "best model"
        path.mkdir()
        (path / "model.bin").write_bytes(b"weights")
        trainer.hook.on_checkpoint(trainer=trainer, path=path, kind="model")
tracker = Dvclive(save_dvc_exp=True, exp_name="first", report="html", close_timeout="2 min")
tiny_trainer([tracker, Saves()], runs_folder="runs", epochs=1, log_every="1 steps").train()
"""


@pytest.mark.slow
def test_in_a_repository_models_are_tracked_and_the_run_is_an_experiment(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "DVC_STUDIO_OFFLINE": "true", "DVC_NO_ANALYTICS": "true"}
    place = tmp_path / "place"
    place.mkdir()

    def do(*command):
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    do("git", "init", "-q")
    do("git", "config", "user.name", "n")
    do("git", "config", "user.email", "n@example.org")
    do(sys.executable, "-m", "dvc", "init", "-q")
    do("git", "commit", "-q", "-m", "begin")
    do(sys.executable, "-W", "ignore", "-c", EXPERIMENT)
    assert do(sys.executable, "-m", "dvc", "exp", "list", "--name-only").split() == ["first"]
    last = json.loads(do(sys.executable, "-m", "dvc", "metrics", "show", "--json"))
    assert last[""]["data"]["runs/run-1/dvclive/metrics.json"]["data"]["status"] == "finished"
    pointer = (place / "runs" / "run-1" / "best model.dvc").read_text()
    assert "path: best model" in pointer
    cached = [path.read_bytes() for path in (place / ".dvc" / "cache").rglob("*") if path.is_file()]
    assert b"weights" in cached
    assert "train_loss" in (place / "runs" / "run-1" / "dvclive" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("report", ["md", "html"])
def test_a_report_is_made_at_the_end(tmp_path, report):
    code = (
        "import sys; from hookline.testing import tiny_trainer; from hookline_dvclive import Dvclive\n"
        "tiny_trainer([Dvclive(report=sys.argv[2])], runs_folder=sys.argv[1], epochs=1, log_every='1 steps').train()"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path), report], check=True)
    assert "train_loss" in (tmp_path / "run-1" / "dvclive" / f"report.{report}").read_text()
