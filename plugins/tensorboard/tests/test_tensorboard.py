"""What TensorBoard's own reader finds of real runs, also of one that was killed and gone on with."""

import math
import sys

import pytest
import torch
from tests.tracker_readers import of_tensorboard

from hookline import CallbackInterface, Stage, hookimpl
from hookline.testing import Memory, TinyModule, check_killed_tracker, check_plugin, check_tracker, tiny_trainer
from hookline.tracking import Histogram, Image, Run, Table
from hookline_tensorboard import Tensorboard


def read(folder):
    """Read all that is in a folder of events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(
        str(folder), size_guidance=dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
    ).Reload()


def points(reader, name):
    return [(event.step, event.value) for event in reader.Scalars(name)]


def texts(reader, name):
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in reader.Tensors(f"{name}/text_summary")]


def session(reader, kind):
    """Return what the table of parameters is given: of the start or the end of the run."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = reader.SummaryMetadata(f"_hparams_/session_{kind}_info").plugin_data.content
    return getattr(HParamsPluginData.FromString(content), f"session_{kind}_info")


class Recorder(CallbackInterface):
    """Keeps what was logged by name, as float32."""

    def __init__(self):
        self.points = {}

    @hookimpl
    def on_log(self, metrics, global_step):
        for name, value in metrics.items():
            self.points.setdefault(name, []).append((global_step, torch.tensor(value).item()))


def train(folder, *plugins, **options):
    defaults = {"log_every": "1 steps", "evaluate_every": "3 steps", "runs_folder": str(folder)}
    trainer = tiny_trainer([*plugins], **(defaults | options))
    trainer.train()
    return trainer


def run_of(folder, place=0, config=None, stage=Stage.TRAIN):
    return Run("run-1", folder, config or {}, stage, place, None)


@pytest.fixture
def begun(tmp_path):
    tracker = Tensorboard()
    tracker.start(run_of(tmp_path))
    return tracker


# What every plugin does ---------------------------------------------------------------


def test_contract(tmp_path):
    check_plugin(Tensorboard, runs_folder=str(tmp_path))


def as_float32(value):
    return torch.tensor(value).item()


def test_what_every_tracker_does(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    sdk = "torch.utils.tensorboard"
    check_tracker(Tensorboard, of_tensorboard, tmp_path / "runs", sdk=sdk, stored=as_float32)
    assert [*(tmp_path / "home").iterdir()] == []


def test_without_tensorboard_a_run_goes_on_and_says_what_to_install(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train(tmp_path, Tensorboard()).status == "finished"
    assert "tensorboard is switched off" in caplog.text
    assert "tensorboard needs the module torch.utils.tensorboard, which cannot be imported" in caplog.text
    assert "`pip install 'tensorboard>=2.18'`" in caplog.text


def test_a_folder_that_is_not_the_runs(tmp_path):
    with pytest.raises(ValueError, match=r"tensorboard.folder='\.\./elsewhere' must lie below the folder of the run"):
        Tensorboard(folder="../elsewhere")
    trainer = train(tmp_path / "runs", Tensorboard(folder=str(tmp_path / "boards")), report_loss_after_eval=False)
    home = tmp_path / "boards" / trainer.run_dir.name
    assert points(read(home), "train_loss")
    assert points(read(home / "batches"), "val_loss_batch")
    assert not list(trainer.run_dir.glob("**/events*"))


@pytest.mark.parametrize(
    ("init", "words"),
    [
        ({"flush_sec": 1}, "SummaryWriter has no argument 'flush_sec', did you mean 'flush_secs'.*max_queue"),
        ({"x": 1}, "SummaryWriter has no argument 'x'; it has filename_suffix, flush_secs, max_queue"),
        ({"log_dir": "x"}, r"log_dir is set by the option tensorboard\.folder; leave it out"),
    ],
)
def test_arguments_that_the_writer_does_not_take(init, words):
    with pytest.raises(ValueError, match=f"tensorboard.init: {words}"):
        Tensorboard(init=init)


# What is kept -------------------------------------------------------------------------


def test_every_flush_is_a_point(tmp_path):
    recorder = Recorder()
    trainer = train(tmp_path, Tensorboard(init={"filename_suffix": ".mine"}), recorder)
    reader = read(trainer.run_dir / "tensorboard")
    assert {name: points(reader, name) for name in reader.Tags()["scalars"]} == recorder.points
    assert len(recorder.points["train_loss"]) == 14
    (file,) = (trainer.run_dir / "tensorboard").iterdir()
    assert file.name.endswith(".mine")


def test_values_that_are_no_numbers(begun, tmp_path):
    begun.log_metrics({"a": math.nan, "b": math.inf, "c": -math.inf}, 3)
    begun.finish("finished")
    reader = read(tmp_path / "tensorboard")
    assert math.isnan(points(reader, "a")[0][1])
    assert (points(reader, "b"), points(reader, "c")) == ([(3, math.inf)], [(3, -math.inf)])


def test_the_configuration_is_in_the_table_of_parameters(tmp_path):
    config = {"lr": 0.25, "on": True, "name": "x", "sizes": [1, 2], "none": None, "net": {"deep": 3}, "empty": {}}
    trainer = train(tmp_path, Tensorboard(), config=config)
    kept = session(read(trainer.run_dir / "tensorboard"), "start").hparams
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in kept.items()}
    assert values == {"lr": 0.25, "on": 1, "name": "x", "sizes": "[1, 2]", "none": "null", "net.deep": 3, "empty": "{}"}


class Shows(TinyModule):
    """Logs one of each kind."""

    def on_end_train_step(self, global_step, *outputs):
        if global_step == 2:
            for name, value in {
                "note": "a *text*",
                "numbers": Histogram(torch.arange(10.0)),
                "nothing": Histogram(torch.full([3], math.nan)),
                "picture": Image(torch.full((3, 4, 5), 200)),
                "rows": Table(["name", "n"], [["a|b", 1], ["two\nlines", 2.5]]),
            }.items():
                self.trainer.log_object(name, value)


def test_texts_images_histograms_and_tables(tmp_path):
    trainer = train(tmp_path, Tensorboard(), module=Shows())
    reader = read(trainer.run_dir / "tensorboard")
    assert texts(reader, "note") == [(2, "a *text*")]
    assert texts(reader, "rows") == [(2, "| name | n |\n| --- | --- |\n| a\\|b | 1 |\n| two lines | 2.5 |")]
    (picture,) = reader.Images("picture")
    assert (picture.step, picture.width, picture.height) == (2, 5, 4)
    (numbers,) = reader.Histograms("numbers")
    histogram = numbers.histogram_value
    assert (numbers.step, histogram.min, histogram.max, histogram.num, histogram.sum) == (2, 0, 9, 10, 45)
    assert "nothing" not in reader.Tags()["histograms"]


def test_a_figure_is_an_image(tmp_path):
    from matplotlib.figure import Figure

    class Draws(TinyModule):
        def on_end_train_step(self, global_step, *outputs):
            if global_step == 1:
                figure = Figure(figsize=(2, 1), dpi=50)
                figure.subplots().plot([1, 2, 3])
                self.trainer.log_object("curve", figure)

    trainer = train(tmp_path, Tensorboard(), module=Draws())
    (curve,) = read(trainer.run_dir / "tensorboard").Images("curve")
    assert (curve.width, curve.height) == (100, 50)


def test_a_model_that_was_saved_is_named(begun, tmp_path):
    begun.log_file("best", tmp_path / "models" / "best.safetensors", 4)
    begun.log_file("other", tmp_path.parent / "x", 5)
    begun.finish("finished")
    reader = read(tmp_path / "tensorboard")
    assert texts(reader, "files/best") == [(4, "models/best.safetensors")]
    assert texts(reader, "files/other") == [(5, (tmp_path.parent / "x").as_posix())]


def test_how_a_run_has_ended(tmp_path):
    class Fails(TinyModule):
        def train_step(self, global_step, batch, device):
            if global_step == 4:
                raise ZeroDivisionError
            return super().train_step(global_step, batch, device)

    done = read(train(tmp_path, Tensorboard()).run_dir / "tensorboard")
    assert texts(done, "status") == [(14, "finished")]
    assert session(done, "end").status == 1  # success
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, Tensorboard(), module=Fails())
    failed = read(tmp_path / "run-2" / "tensorboard")
    assert texts(failed, "status") == [(3, "failed")]
    assert "_hparams_/session_end_info" not in failed.Tags()["tensors"]  # another process may go on with it


def test_an_evaluation_on_its_own_is_beside_the_training(tmp_path):
    trainer = train(tmp_path, Tensorboard())
    metrics = trainer.test()
    reader = read(trainer.run_dir / "tensorboard" / "test")
    assert points(reader, "test_loss") == [(14, torch.tensor(metrics["test_loss"]).item())]
    assert "test_loss" not in read(trainer.run_dir / "tensorboard").Tags()["scalars"]


# Going back and on --------------------------------------------------------------------


def test_a_place_that_goes_back_drops_what_lies_behind_it(begun, tmp_path):
    for place in (1, 2, 3, 4):
        begun.log_metrics({"a": float(place)}, place)
    for place in (3, 4):
        begun.log_metrics({"a": place + 0.5}, place)
    begun.finish("finished")
    assert points(read(tmp_path / "tensorboard"), "a") == [(1, 1), (2, 2), (3, 3.5), (4, 4.5)]


def test_training_on_goes_on_with_the_curves(tmp_path):
    trainer = train(tmp_path, Tensorboard(), epochs=1)
    trainer.options.epochs = 2
    trainer.train()
    reader = read(trainer.run_dir / "tensorboard")
    assert [step for step, _ in points(reader, "train_loss")] == list(range(1, 15))


def test_validations_under_way_are_beside_the_training(tmp_path):
    memory, recorder = Memory(every="1 steps"), Recorder()
    options = {"log_every": "3 steps", "report_loss_after_eval": False}
    trainer = train(tmp_path, Tensorboard(), memory, recorder, **options)
    folder = trainer.run_dir / "tensorboard"
    whole = points(read(folder / "batches"), "val_loss_batch")
    assert whole == recorder.points["val_loss_batch"]
    assert [batch for batch, _ in whole] == list(range(3, 36, 3))
    train(tmp_path, Tensorboard(), Memory(memory.states[7]), resume=str(trainer.run_dir), **options)
    assert points(read(folder / "batches"), "val_loss_batch") == whole
    assert [step for step, _ in points(read(folder), "train_loss")] == [3, 6, 9, 12, 14]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_without_a_point_lost_or_doubled(tmp_path):
    check_killed_tracker(Tensorboard, of_tensorboard, tmp_path, stored=as_float32)
    run = tmp_path / "cut" / "run-1"
    assert sorted(path.name for path in run.iterdir()) == ["state.pt", "tensorboard"]
    assert texts(read(run / "tensorboard"), "status") == [(14, "finished")]
