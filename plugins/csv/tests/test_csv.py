"""What stands in the table of a run, also of one that was killed and gone on with."""

import csv
import math
import resource
import signal
import time

import pytest
from tests.tracker_readers import of_csv

from hookline import CallbackInterface, Stage, hookimpl
from hookline.testing import Memory, TinyModule, check_killed_tracker, check_plugin, check_tracker, tiny_trainer
from hookline.testing.faults import run
from hookline.tracking import Run
from hookline_csv import Csv


def table(path):
    """Read a table as anybody would."""
    with open(path, newline="") as file:
        return [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(file)]


class Recorder(CallbackInterface):
    """Keeps what was logged, merged by step."""

    def __init__(self):
        self.rows = {}

    @hookimpl
    def on_log(self, metrics, global_step):
        self.rows.setdefault(global_step, {"steps": float(global_step)}).update(metrics)


def train(folder, *plugins, **options):
    defaults = {"log_every": "1 steps", "evaluate_every": "3 steps", "runs_folder": str(folder)}
    trainer = tiny_trainer([*plugins], **(defaults | options))
    trainer.train()
    return trainer


def run_of(folder, place=0, stage=Stage.TRAIN):
    return Run("run-1", folder, {}, stage, place, None)


def within(folder):
    return [(row["batch_of_validation"], row["val_loss_batch"]) for row in table(folder / "metrics-batches.csv")]


def test_validations_under_way_have_a_table_of_their_own(tmp_path):
    memory, recorder = Memory(every="1 steps"), Recorder()
    options = {"log_every": "3 steps", "report_loss_after_eval": False}
    trainer = train(tmp_path, Csv(), memory, recorder, **options)
    whole = within(trainer.run_dir)
    assert [batch for batch, _ in whole] == list(range(3, 36, 3))
    assert all(recorder.rows[batch]["val_loss_batch"] == loss for batch, loss in whole)
    assert "val_loss_batch" not in set().union(*table(trainer.run_dir / "metrics.csv"))
    train(tmp_path, Csv(), Memory(memory.states[7]), resume=str(trainer.run_dir), **options)  # behind 14 batches
    assert within(trainer.run_dir) == whole


def test_contract(tmp_path):
    check_plugin(Csv, runs_folder=str(tmp_path))


def test_what_every_tracker_does(tmp_path):
    check_tracker(Csv, of_csv, tmp_path)


def test_a_run_that_was_killed_goes_on_without_a_row_lost_or_doubled(tmp_path):
    check_killed_tracker(Csv, of_csv, tmp_path)


def test_every_value_is_there_with_all_its_bits(tmp_path):
    recorder = Recorder()
    trainer = train(tmp_path, Csv(), recorder)
    rows = table(trainer.run_dir / "metrics.csv")
    assert rows == list(recorder.rows.values())
    assert [row["steps"] for row in rows] == list(range(1, 15))
    assert {"train_loss", "val_loss"} <= rows[2].keys()
    assert sorted(path.name for path in trainer.run_dir.iterdir()) == ["metrics.csv"]


@pytest.mark.parametrize("axis", ["batches", "samples", "epochs", "seconds"])
def test_the_axis_names_the_first_column(axis, tmp_path):
    trainer = train(tmp_path, Csv(axis=axis))
    rows = table(trainer.run_dir / "metrics.csv")
    places = [row[axis] for row in rows]
    assert places == sorted(set(places))
    assert next(iter(rows[0])) == axis
    assert len(rows) == {"epochs": 3, "seconds": 15}.get(axis, 14)  # one more for the evaluation at the end


# One table, told by hand --------------------------------------------------------------


@pytest.fixture
def begun(tmp_path):
    tracker = Csv()
    tracker.start(run_of(tmp_path))
    yield tracker
    tracker.finish("finished")


def test_columns_join_and_rows_are_merged(begun, tmp_path):
    begun.log_metrics({"a": 1.0}, 1)
    begun.log_metrics({"a": 0.1 + 0.2}, 2)
    begun.log_metrics({'odd, "name"\nof two lines': 5.0}, 2)
    begun.log_metrics({"b": 6.0}, 3)
    begun.log_metrics({"b": 7.0, "a": 8.0}, 3)
    assert table(tmp_path / "metrics.csv") == [
        {"steps": 1, "a": 1},
        {"steps": 2, "a": 0.1 + 0.2, 'odd, "name"\nof two lines': 5},
        {"steps": 3, "a": 8, "b": 7},
    ]


def test_values_that_are_no_numbers_are_pythons(begun, tmp_path):
    begun.log_metrics({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 5e-324}, 1)
    assert (tmp_path / "metrics.csv").read_text() == "steps,a,b,c,d\n1,nan,inf,-inf,5e-324\n"


def test_a_shorter_value_leaves_nothing_of_the_longer(begun, tmp_path):
    begun.log_metrics({"a": 0.123456789}, 1)
    begun.log_metrics({"a": 1.5}, 1)
    begun.log_metrics({"a": 2.5}, 2)
    assert (tmp_path / "metrics.csv").read_text() == "steps,a\n1,1.5\n2,2.5\n"


def test_a_value_named_like_the_axis_does_not_stand_for_the_place(begun, tmp_path):
    begun.log_metrics({"steps": 77.0, "a": 1.0}, 1)
    assert table(tmp_path / "metrics.csv") == [{"steps": 1, "a": 1}]


def test_a_place_that_goes_back_drops_what_lies_behind_it(begun, tmp_path):
    for place in (1, 2, 3, 4):
        begun.log_metrics({"a": float(place)}, place)
    begun.log_metrics({"a": 9.0}, 3)
    begun.log_metrics({"a": 10.0}, 4)
    assert [row["a"] for row in table(tmp_path / "metrics.csv")] == [1, 2, 9, 10]


def test_going_on_keeps_the_rows_up_to_the_place_and_joins_the_last(begun, tmp_path):
    for place in (2, 4, 6):
        begun.log_metrics({"a": float(place)}, place)
    begun.finish("failed")
    again = Csv()
    again.start(run_of(tmp_path, 4))
    again.log_metrics({"b": 1.0}, 4)
    again.log_metrics({"a": 6.5}, 6)
    again.finish("finished")
    assert table(tmp_path / "metrics.csv") == [
        {"steps": 2, "a": 2}, {"steps": 4, "a": 4, "b": 1}, {"steps": 6, "a": 6.5},
    ]  # fmt: skip


@pytest.mark.parametrize("cut", range(1, 12, 3))
def test_a_last_line_that_is_torn_is_dropped(begun, tmp_path, cut):
    begun.log_metrics({"a": 1.0}, 1)
    begun.log_metrics({"a": 0.123456789}, 2)
    begun.finish("failed")
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-cut])
    again = Csv()
    again.start(run_of(tmp_path, 2))
    again.log_metrics({"a": 3.0}, 3)
    again.finish("finished")
    assert path.read_text() == "steps,a\n1,1.0\n3,3.0\n"


def test_another_axis_than_the_tables(begun, tmp_path, caplog):
    begun.log_metrics({"a": 1.0}, 1)
    with pytest.raises(ValueError, match=r"metrics.csv is placed by steps, and csv.axis='epochs': go on with .*steps"):
        Csv(axis="epochs").start(run_of(tmp_path))
    assert table(tmp_path / "metrics.csv") == [{"steps": 1, "a": 1}]


# Whole runs ---------------------------------------------------------------------------


def test_training_on_goes_on_in_the_table(tmp_path):
    trainer = train(tmp_path, Csv(), epochs=1)
    trainer.options.epochs = 2
    trainer.train()
    assert [row["steps"] for row in table(trainer.run_dir / "metrics.csv")] == list(range(1, 15))


def test_an_evaluation_on_its_own_has_a_table_of_its_own(tmp_path):
    trainer = train(tmp_path, Csv())
    before = (trainer.run_dir / "metrics.csv").read_bytes()
    metrics = trainer.test()
    assert table(trainer.run_dir / "metrics-test.csv") == [{"steps": 14, **metrics}]
    assert (trainer.run_dir / "metrics.csv").read_bytes() == before


def test_a_run_that_fails_keeps_its_rows(tmp_path):
    class Fails(TinyModule):
        def train_step(self, global_step, batch, device):
            if global_step == 5:
                raise ZeroDivisionError
            return super().train_step(global_step, batch, device)

    with pytest.raises(ZeroDivisionError):
        train(tmp_path, Csv(), module=Fails())
    assert [row["steps"] for row in table(tmp_path / "run-1" / "metrics.csv")] == [1, 2, 3, 4]


def test_rows_are_there_when_a_state_is_stored(tmp_path):
    class Stored(CallbackInterface):
        def __init__(self):
            self.last = []

        @hookimpl
        def save(self, trainer):
            trainer.hook.get_run_state(trainer=trainer)
            self.last.append((trainer.global_step, table(trainer.run_dir / "metrics.csv")[-1]["steps"]))
            return True

        @hookimpl
        def on_boundary(self, trainer):
            trainer.save("each")

    class Slow(Csv):
        def log_metrics(self, metrics, place):
            time.sleep(0.02)
            super().log_metrics(metrics, place)

    stored = Stored()
    train(tmp_path, Slow(), stored, epochs=1)
    assert stored.last == [(step, step) for step in range(1, 8)]


# A full disk --------------------------------------------------------------------------


def train_on_a_disk_that_is_full_for_a_while(folder):
    tracker, said = Csv(), []
    tracker.start(run_of(folder))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for place in range(1, 9):
        if place == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / "metrics.csv").stat().st_size + 3, hard))
        if place == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        try:
            tracker.log_metrics({"a": place / 8}, place)
        except OSError as error:
            said.append((str(error), (folder / "metrics.csv").read_text()[-1:]))  # no part of a row stays
    tracker.finish("finished")
    return said


def test_a_full_disk_costs_the_rows_that_found_no_room_and_no_others(tmp_path):
    done = run(train_on_a_disk_that_is_full_for_a_while, tmp_path)
    assert done.code == 0, done.output
    assert [row["steps"] for row in table(tmp_path / "metrics.csv")] == [1, 2, 5, 6, 7, 8]
    (first, _), lasts = zip(*done.value, strict=True)
    assert "only 3 of 8 bytes went into" in first
    assert lasts == ("\n", "\n")
