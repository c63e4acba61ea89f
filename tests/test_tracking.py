"""The contract of trackers: what a service is told, in which order, and that it cannot hold up or break training."""

import json
import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import pytest
import torch

from hookline import CallbackInterface, Stage, hookimpl, tracking
from hookline.testing import Memory, TinyModule, check_plugin, digest, tiny_trainer
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

    def log_batch(self, metrics, batch):
        self.keep("batch", dict(metrics), batch)

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


class Counts(TinyModule):
    """Logs a running total every step; keeps it, as it would be in a state."""

    def __init__(self, name="tokens"):
        super().__init__()
        self.name, self.total = name, 0

    def on_end_train_step(self, global_step, *outputs):
        self.log(reduce="last", **{self.name: 100.0 * global_step})


def test_the_axis_may_be_a_value_that_is_logged():
    keeper = Keeper(axis="tokens")
    train(keeper, module=Counts(), epochs=1, evaluate_every="3 steps")
    places = [(place, sorted(metrics)) for metrics, place in keeper.of("metrics")]
    assert places == [
        (200, ["tokens", "train_loss"]),
        (200, ["val_loss"]),  # of step 3: at the last that is known
        (400, ["tokens", "train_loss"]),
        (400, ["val_loss"]),
        (600, ["tokens", "train_loss"]),
        (600, ["train_loss_epoch"]),
        (600, ["val_loss"]),
        (700, ["tokens", "train_loss"]),
    ]


def test_what_is_no_number_cannot_be_a_place():
    class Breaks(Counts):
        def on_end_train_step(self, global_step, *outputs):
            self.log(reduce="last", tokens=float("nan") if global_step == 4 else 100.0 * global_step)

    keeper = Keeper(axis="tokens")
    train(keeper, module=Breaks(), epochs=1, evaluate_every=None, eval_when_finish=False)
    assert [place for metrics, place in keeper.of("metrics") if "tokens" in metrics] == [200, 200, 600, 700]


def test_an_axis_that_never_came_is_said_once(caplog):
    keeper = Keeper(axis="tokens")
    trainer = train(keeper)
    assert {place for _, place in keeper.of("metrics")} == {0}
    (said,) = warnings_of(caplog)
    assert said == (
        "keeper.axis='tokens': no value of this name was logged, so all values lie at 0; without one there are steps, "
        "batches, samples, epochs, seconds"
    )
    caplog.clear()
    trainer.validate()  # in which nobody trains, so nothing is missed
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("step", [1, 2, 5, 8])
def test_a_place_on_such_an_axis_goes_on_after_a_resume(step):
    memory, whole, rest = Memory(every="1 steps"), Keeper(axis="tokens"), Keeper(axis="tokens")
    train(whole, memory, module=Counts())
    train(rest, Memory(memory.states[step]), module=Counts())
    assert rest.run.place == 200 * (step // 2)
    logged = [(metrics, place) for metrics, place in whole.of("metrics") if place > rest.run.place]
    assert rest.of("metrics")[-len(logged) :] == logged
    other = Keeper(axis="samples")
    train(other, Memory(memory.states[step]), module=Counts())
    assert other.run.place == memory.states[step]["trainer"]["counters"]["samples"]


def test_values_within_validations_are_told_by_their_batch():
    memory, keeper = Memory(every="7 steps"), Keeper()
    train(keeper, memory, report_loss_after_eval=False)
    assert [(list(metrics), batch) for metrics, batch in keeper.of("batch")] == [
        (["val_loss_batch"], batch) for batch in (2, 4, 6, 8, 10, 12, 14)
    ]
    assert keeper.run.batch == 0
    assert not any("val_loss_batch" in metrics for metrics, _ in keeper.of("metrics"))
    rest = Keeper()
    train(rest, Memory(memory.states[7]), report_loss_after_eval=False)
    assert rest.run.batch == 7
    assert rest.of("batch") == keeper.of("batch")[3:]


class Shows(TinyModule):
    """Logs one of each kind."""

    def on_end_train_step(self, global_step, *outputs):
        if global_step == 1:
            numbers = torch.tensor([1.0, float("nan"), 2.0])
            for name, value in {
                "note": "a text",
                "numbers": Histogram(numbers),
                "no number": Histogram(numbers[1:2]),
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


def test_figures_and_pictures_are_handed_over_as_they_look():
    figures = pytest.importorskip("matplotlib.figure", reason="no requirement of the tests: who logs figures has it")
    pictures = pytest.importorskip("PIL.Image", reason="comes with matplotlib")
    figure = figures.Figure(figsize=(2, 1), dpi=10, facecolor="red")
    shown = figure.canvas

    class Draws(TinyModule):
        def on_end_train_step(self, global_step, *outputs):
            if global_step == 3:
                self.trainer.log_object("figure", figure)
                self.trainer.log_object("picture", pictures.new("L", (3, 2), 7))

    keeper = Keeper()
    train(keeper, module=Draws())
    (name, red, place), (_, gray, _) = keeper.of("image")
    assert (name, red.shape, place) == ("figure", (10, 20, 3), 3)
    assert red.reshape(-1, 3).tolist() == [[255, 0, 0]] * 200
    assert (gray.shape, gray.dtype, set(gray.ravel().tolist())) == ((2, 3, 3), numpy.uint8, {7})
    assert figure.canvas is shown


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
    assert warnings_of(caplog) == [
        "keeper is switched off, and training goes on without it: it could not start: ConnectionError: no network",
        "calls of keeper failed or were dropped, and may be missing in its run: 11 of log_metrics",
    ]


def test_three_failures_in_a_row_are_enough(caplog):
    keeper = Keeper(fails=["metrics"])
    train(keeper)
    assert [kind for kind, *_ in keeper.told] == ["start", "metrics", "metrics", "metrics", "finish"]
    assert warnings_of(caplog) == [
        "log_metrics of keeper failed, and training goes on: ConnectionError: no network",
        "log_metrics of keeper is switched off, and training goes on without it: 3 failures in a row, the last: "
        "ConnectionError: no network",
        "calls of keeper failed or were dropped, and may be missing in its run: 11 of log_metrics",
    ]


def test_a_method_that_always_fails_between_others_that_do_not_is_said_and_costs_the_others_nothing(caplog):
    class Texts(TinyModule):
        def on_end_train_step(self, global_step, *outputs):
            self.trainer.log_object("text", str(global_step))

    keeper, whole = Keeper(fails=["text"]), Keeper()
    train(keeper, module=Texts())
    train(whole, module=Texts())
    assert keeper.of("metrics") == whole.of("metrics")
    assert (len(keeper.of("text")), len(whole.of("text"))) == (3, 14)
    assert warnings_of(caplog) == [
        "log_text of keeper failed, and training goes on: ConnectionError: no network",
        "log_text of keeper is switched off, and training goes on without it: 3 failures in a row, the last: "
        "ConnectionError: no network",
        "calls of keeper failed or were dropped, and may be missing in its run: 14 of log_text",
    ]


def test_a_method_that_fails_now_and_then_goes_on_and_what_it_lost_is_said(caplog):
    class Shaky(Keeper):
        def log_metrics(self, metrics, place):
            super().log_metrics(metrics, place)
            if len(self.of("metrics")) % 3 != 0:  # twice in a row, not three times
                raise ConnectionError("no network")

    keeper = Shaky()
    train(keeper)
    assert len(keeper.of("metrics")) == 11
    assert warnings_of(caplog) == [
        "log_metrics of shaky failed, and training goes on: ConnectionError: no network",
        "calls of shaky failed or were dropped, and may be missing in its run: 8 of log_metrics",
    ]


def test_one_that_cannot_end_its_run_does_not_keep_the_run_from_ending(caplog):
    trainer = train(Keeper(fails=["finish"]))
    assert trainer.status == "finished"
    assert "it could not end its run: ConnectionError: no network" in warnings_of(caplog)[0]


@pytest.mark.parametrize("where", ["start", "later"])
def test_one_that_hangs_is_not_waited_for_for_ever(where, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(tracking.clerk, "WAITING", 3)
    keeper = Keeper(close_timeout="1 s")
    if where == "start":
        keeper.go.clear()
    else:
        keeper.start = lambda run: keeper.go.clear()
    trainer = train(keeper, runs_folder=str(tmp_path / "runs"))  # whole: its thread goes on behind this test
    assert trainer.status == "finished"
    assert [said.partition(":")[0] for said in warnings_of(caplog)] == [
        "keeper is slower than training, or hangs",
        "keeper has not taken all within 1 s (close_timeout)",
        "calls of keeper failed or were dropped, and may be missing in its run",
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
        (
            {"axis": "step"},
            "keeper.axis='step' must be one of steps, batches, samples, epochs, seconds, or the name of a logged "
            "value, did you mean 'steps'",
        ),
        ({"axis": ""}, "keeper.axis='' must be one of"),
        ({"close_timeout": "soon"}, "keeper.close_timeout='soon' is not a cadence"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        Keeper(**options)


# What is said to an SDK ---------------------------------------------------------------


@dataclass(eq=False)
class Whole(Keeper):
    """Speaks to a service whose places are whole numbers."""

    whole_places = True


def test_a_service_of_whole_places_is_given_these():
    with pytest.raises(ValueError, match=r"whole\.axis='seconds': the service takes whole numbers for places"):
        Whole(axis="seconds")
    whole = Whole(axis="tokens")
    train(whole, module=Counts(), epochs=1)
    places = [place for _, place in whole.of("metrics")]
    assert (places[0], {type(place) for place in places}) == (200, {int})


def test_arguments_that_something_else_sets_or_that_nobody_knows():
    keeper = Keeper()
    keeper.refuse_set({"notes": "x"}, {"dir": "the plugin, from the run"})
    with pytest.raises(ValueError, match=r"keeper\.init: dir is set by the plugin, from the run; leave it out"):
        keeper.refuse_set({"dir": "x"}, {"dir": "the plugin, from the run"})
    keeper.refuse_unknown("init", ["notes"], "open", ["notes", "mode"])
    few = r"keeper\.init: open has no argument 'note', did you mean 'notes'\?; it has mode, notes$"
    with pytest.raises(ValueError, match=few):
        keeper.refuse_unknown("init", ["note"], "open", ["notes", "mode"])
    with pytest.raises(ValueError, match=r"keeper\.init: open has no argument 'x'$"):  # more are no help
        keeper.refuse_unknown("init", ["x"], "open", map("name {}".format, range(100)))


def test_an_sdk_that_is_not_there():
    assert Keeper().import_sdk("json", "json") is json
    words = r"keeper needs the module no\.such, which cannot be imported \(No module .*\): `pip install such>=2`"
    with pytest.raises(ValueError, match=words):
        Keeper().import_sdk("no.such", "such>=2")


def test_what_others_do_is_waited_for_but_not_for_ever():
    answers = iter([False, False, True])
    assert Keeper().wait_until(lambda: next(answers))
    assert not Keeper(close_timeout="1 s").wait_until(lambda: False)


def test_a_configuration_in_the_forms_that_services_take():
    config = {"lr": 0.5, "net": {"sizes": (1, 2), "at": Path("x")}, "none": {}}
    assert [*tracking.flat(config)] == [("lr", 0.5), ("net.sizes", (1, 2)), ("net.at", Path("x")), ("none", {})]
    run = tracking.Run("run-1", Path(), config, Stage.TRAIN, 0, None)
    assert run.plain_config == {"lr": 0.5, "net": {"sizes": [1, 2], "at": "x"}, "none": {}}


def test_names_and_tables_in_the_forms_that_services_take():
    names = ("a/b", "../../a", "/a//./b", "..", "")
    assert [tracking.below(name) for name in names] == ["a/b", "a", "a/b", "_", "_"]
    table = Table(["name", "n"], [["a|b", 1], [Path("two\nlines"), None]])
    assert table.plain_rows == [["a|b", 1], ["two\nlines", None]]
    assert table.markdown == "| name | n |\n| --- | --- |\n| a\\|b | 1 |\n| two lines | None |"


# Going on -----------------------------------------------------------------------------


class Counter(CallbackInterface):
    """Counts what is logged, before any tracker is told."""

    def __init__(self):
        self.count = 0

    @hookimpl
    def on_log(self):
        self.count += 1


def test_a_slow_tracker_has_all_that_was_logged_before_a_save_returns():
    counter, saves = Counter(), []

    class Slow(Keeper):
        def keep(self, *what):
            super().keep(*what)
            threading.Event().wait(0.02)  # its service takes its time

        local = True

        def get_state(self):
            before = len(self.of("metrics"))
            self.go.set()
            state = super().get_state()
            saves.append((before, len(self.of("metrics")), counter.count))
            self.go.clear()
            return state

        def finish(self, status): ...

    slow = Slow()
    slow.go.clear()

    class Ends(CallbackInterface):
        @hookimpl
        def on_end_train(self):
            slow.go.set()

    tiny_trainer([counter, slow, Ends(), Memory(every="7 steps")], log_every="1 steps").train()
    assert [(kept, logged) for _, kept, logged in saves] == [(9, 9), (18, 18)]
    assert all(before < kept for before, kept, _ in saves)  # else it was not slow


def test_a_save_does_not_wait_for_ever():
    class Hangs(Keeper):
        local = True

    keeper = Hangs(close_timeout="1 s")
    keeper.go.clear()
    began = time.monotonic()
    tiny_trainer([keeper, Memory()], epochs=1).train()
    assert 2 <= time.monotonic() - began < 60  # at the save, and at the end
    keeper.go.set()


def test_the_last_flush_of_a_run_with_nothing_left_to_train_is_not_lost():
    """It was killed behind its last save, and before it told what was left of the interval."""
    memory, whole, rest = Memory(), Keeper(), Keeper()
    train(whole, memory, max_steps=5, epochs=None, evaluate_every=None, eval_when_finish=False)
    trainer = train(rest, Memory(memory.state), max_steps=5, epochs=None)
    assert trainer.global_step == 5
    assert [kind for kind, *_ in rest.told] == ["start", "metrics", "finish"]
    assert rest.of("start") == [(5, None)]
    assert rest.of("metrics") == whole.of("metrics")[-1:] == [({"train_loss": pytest.approx(0, abs=1e3)}, 5)]
    assert rest.told[-1] == ("finish", "finished")


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
