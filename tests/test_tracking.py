"""The contract of trackers: what a service is told, in which order, and that it cannot hold up or break training."""

import logging
import threading
from dataclasses import dataclass, field

import numpy
import pytest
import torch

from hookline import tracking
from hookline.testing import TinyModule, check_plugin, digest, tiny_trainer
from hookline.tracking import Histogram, Image, Table, Tracker


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Be where run folders may be made."""
    monkeypatch.chdir(tmp_path)


@dataclass(eq=False)
class Keeper(Tracker):
    """Keeps all that it is told, and fails or waits where it is asked to."""

    fails: list = field(default_factory=list)
    """Names of methods that raise."""

    def __post_init__(self):
        super().__post_init__()
        self.told, self.run = [], None
        self.go = threading.Event()
        self.go.set()

    def keep(self, *what):
        self.go.wait(60)
        self.told.append(what)
        if what[0] in self.fails:
            raise ConnectionError("no network")

    def start(self, run):
        self.run, self.thread = run, threading.current_thread()
        self.keep("start", run.place, run.id)
        return "run 1"

    def log_metrics(self, metrics, place):
        self.keep("metrics", dict(metrics), place)

    def log_text(self, name, text, place):
        self.keep("text", name, text, place)

    def log_image(self, name, pixels, place):
        self.keep("image", name, pixels, place)

    def log_histogram(self, name, values, place):
        self.keep("histogram", name, values, place)

    def log_table(self, name, table, place):
        self.keep("table", name, table, place)

    def log_file(self, name, path, place):
        self.keep("file", name, path, place)

    def finish(self, status):
        self.keep("finish", status)

    def of(self, kind):
        return [what[1:] for what in self.told if what[0] == kind]


def train(*trackers, module=None, **options):
    trainer = tiny_trainer([*trackers], module, log_every="2 steps", **options)
    trainer.train()
    return trainer


def test_it_keeps_the_contract():
    check_plugin(Keeper)


def test_a_service_is_told_of_a_run_in_order_and_by_one_other_thread():
    keeper = Keeper()
    trainer = train(keeper)
    assert [keeper.told[0], keeper.told[-1]] == [("start", 0, None), ("finish", "finished")]
    assert [place for _, place in keeper.of("metrics")] == sorted(place for _, place in keeper.of("metrics"))
    assert {"train_loss", "val_loss"} <= set().union(*(metrics for metrics, _ in keeper.of("metrics")))
    assert all(type(value) is float for metrics, _ in keeper.of("metrics") for value in metrics.values())
    assert keeper.thread is not threading.current_thread()
    assert not keeper.thread.is_alive()
    assert (keeper.run.name, keeper.run.folder) == (trainer.run_dir.name, trainer.run_dir)
    assert keeper.run.config["trainer"]["epochs"] == 2


@pytest.mark.parametrize(
    ("axis", "places"), [("steps", [2, 4, 6]), ("batches", [2, 4, 6]), ("samples", [16, 32, 48]), ("epochs", [0, 0, 0])]
)
def test_the_axis_is_one_of_the_counters(axis, places):
    keeper = Keeper(axis=axis)
    train(keeper, epochs=1, evaluate_every=None, eval_when_finish=False)
    assert [place for metrics, place in keeper.of("metrics") if "train_loss" in metrics][:3] == places


class Shows(TinyModule):
    """Logs one of each kind."""

    def on_end_train_step(self, global_step, *outputs):
        if global_step == 1:
            numbers = torch.tensor([1.0, float("nan"), 2.0])
            for name, value in {
                "note": "a text",
                "numbers": Histogram(numbers),
                "gray": Image(torch.rand(2, 3)),
                "colours": Image(torch.full((3, 4, 5), 200)),
                "rows": Table(["a", "b"], [[1, "x"]]),
                "unknown": object(),
            }.items():
                self.trainer.log_object(name, value)
            numbers.fill_(7)  # behind its back


def test_what_is_no_number_is_handed_over_as_it_was():
    keeper = Keeper()
    train(keeper, module=Shows())
    assert keeper.of("text") == [("note", "a text", 1)]
    ((_, values, _),) = keeper.of("histogram")
    assert values.tolist() == [1.0, 2.0]
    gray, colours = (pixels for _, pixels, _ in keeper.of("image"))
    assert (gray.shape, gray.dtype, colours.shape) == ((2, 3, 3), numpy.uint8, (4, 5, 3))
    ((_, table, _),) = keeper.of("table")
    assert (table.columns, table.rows) == (["a", "b"], [[1, "x"]])


def test_a_picture_of_another_shape(caplog):
    with pytest.raises(ValueError, match=r"an image has the shape \(height, width\).*this one has \(2, 3, 4, 5\)"):
        tracking.values.prepared(Image(torch.zeros(2, 3, 4, 5)))


# What fails ---------------------------------------------------------------------------


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_service_that_cannot_start_is_left_alone(caplog):
    keeper = Keeper(fails=["start"])
    train(keeper)
    assert [kind for kind, *_ in keeper.told] == ["start"]
    (said,) = warnings_of(caplog)
    assert said == (
        "keeper is switched off, and training goes on without it: it could not start: ConnectionError: no network"
    )


def test_three_failures_in_a_row_are_enough(caplog):
    keeper = Keeper(fails=["metrics"])
    train(keeper)
    assert [kind for kind, *_ in keeper.told] == ["start", "metrics", "metrics", "metrics", "finish"]
    (said,) = warnings_of(caplog)
    assert "3 failures in a row, the last: ConnectionError: no network" in said


def test_one_that_cannot_end_its_run_does_not_keep_the_run_from_ending(caplog):
    trainer = train(Keeper(fails=["finish"]))
    assert trainer.status == "finished"
    assert "it could not end its run: ConnectionError: no network" in warnings_of(caplog)[0]


@pytest.mark.parametrize("where", ["start", "later"])
def test_one_that_hangs_is_not_waited_for_for_ever(where, caplog, monkeypatch):
    monkeypatch.setattr(tracking, "WAITING", 3)
    keeper = Keeper(close_timeout="1 s")
    if where == "start":
        keeper.go.clear()
    else:
        keeper.start = lambda run: keeper.go.clear()
    trainer = train(keeper)
    assert trainer.status == "finished"
    assert [said.partition(":")[0] for said in warnings_of(caplog)] == [
        "keeper is slower than training, or hangs",
        "keeper has not taken all within 1 s (close_timeout)",
    ]
    keeper.go.set()


def test_training_is_the_same_with_trackers_whatever_they_do():
    ends = []
    for trackers in ([], [Keeper()], [Keeper(fails=["metrics"])]):
        ends.append(digest(train(*trackers).module.state_dict()))
    assert ends[0] == ends[1] == ends[2]


def test_how_a_run_that_fails_ends():
    class Fails(TinyModule):
        def train_step(self, global_step, batch, device):
            if global_step == 4:
                raise ZeroDivisionError
            return super().train_step(global_step, batch, device)

    keeper = Keeper()
    with pytest.raises(ZeroDivisionError):
        train(keeper, module=Fails())
    assert keeper.told[-1] == ("finish", "failed")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"axis": "tokens"}, "keeper.axis='tokens' must be one of steps, batches, samples, epochs, seconds"),
        ({"close_timeout": "soon"}, "keeper.close_timeout='soon' is not a cadence"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        Keeper(**options)


# Going on -----------------------------------------------------------------------------


@pytest.mark.plugins
def test_a_run_that_goes_on_is_the_same_run_of_the_service(tmp_path):
    def tracked(**options):
        keeper = Keeper()
        tiny_trainer(["checkpoint", keeper], runs_folder=str(tmp_path), log_every="2 steps", **options).train()
        return keeper.of("start")

    assert tracked(max_steps=4) == [(0, None)]
    assert tracked(resume=True) == [(4, "run 1")]
    assert tracked() == [(0, None)]  # another run


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_evaluation_on_its_own_is_told_too(stage):
    keeper = Keeper()
    getattr(tiny_trainer([keeper]), stage)()
    assert [kind for kind, *_ in keeper.told] == ["start", "metrics", "finish"]
    assert keeper.run.stage.value == {"validate": "val", "test": "test"}[stage]
