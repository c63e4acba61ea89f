"""The checks that every tracker is put to: a small whole one passes them, and those that are broken do not."""

import dataclasses
import json
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hookline import Stage, hookimpl
from hookline.testing import check_killed_tracker, check_quiet_tracker, check_tracker
from hookline.tracking import Tracker


def read(folder):
    for line in (folder / "kept.jsonl").read_text().splitlines():
        if not line.startswith("#"):
            yield json.loads(line)


@dataclass(eq=False)
class Keeps(Tracker):
    """Writes a line for each value."""

    local = True

    def start(self, run):
        self.path = run.folder / "kept.jsonl"
        if run.id is not None and run.stage is Stage.TRAIN:
            kept = [
                point for point in read(run.folder) if point[1] <= (run.batch if "batch" in point[0] else run.place)
            ]
            self.path.write_text("".join(json.dumps(point) + "\n" for point in kept))
        with self.path.open("a") as file:
            file.write(f"# {json.dumps(run.config, default=str)}\n")
        return "kept"

    def log_metrics(self, metrics, place):
        with self.path.open("a") as file:
            file.writelines(json.dumps([name, place, value]) + "\n" for name, value in metrics.items())

    log_batch = log_metrics


class LogsTwice(Keeps):
    """Tells the service everything twice."""

    def log_metrics(self, metrics, place):
        super().log_metrics(metrics, place)
        super().log_metrics(metrics, place)


class LogsAtTheNextPlace(Keeps):
    """Places values one step too late."""

    def log_metrics(self, metrics, place):
        super().log_metrics(metrics, place + 1)


class LosesTheLast(Keeps):
    """Sends what it was told before, with the next call."""

    before = None

    def log_metrics(self, metrics, place):
        if self.before is not None:
            super().log_metrics(*self.before)
        self.before = metrics, place


class DropsBatches(Keeps):
    """Keeps nothing of validations under way."""

    def log_batch(self, metrics, batch):
        """Drop it."""


class OverwritesTheTraining(Keeps):
    """Has one file for a training and the evaluation behind it."""

    def start(self, run):
        (run.folder / "kept.jsonl").unlink(missing_ok=True)
        return super().start(run)


class DrawsNumbers(Keeps):
    """Draws a random number at each flush, in the thread of training."""

    @hookimpl(specname="on_log", tryfirst=True)
    def draw(self):
        torch.rand(1)


class TellsSecrets(Keeps):
    """Writes the options of the plugins beside it."""

    @hookimpl(specname="on_end_run")
    def tell(self, trainer):
        passwords = [getattr(plugin, "password", None) for _, plugin in trainer.plugins.listed()]
        (trainer.run_dir / "options.txt").write_text(str(passwords))


class WritesOnEveryRank(Keeps):
    """Does not leave the second rank."""

    @hookimpl
    def on_setup(self):
        """Stay."""

    @hookimpl(specname="on_begin_run", tryfirst=True)
    def make(self, trainer):
        trainer.run_dir.mkdir(parents=True, exist_ok=True)


class EndsTraining(Keeps):
    """Raises in the thread of training where the service cannot begin, and says that it does not only watch."""

    observer = False

    @hookimpl(specname="on_end_run")
    def end(self):
        if not hasattr(self, "path"):
            raise ConnectionError("no network")


class NeedsAnSdk(Keeps):
    """Imports something when it begins, and does not say what to install."""

    def start(self, run):
        import colorsys

        return f"{super().start(run)} {colorsys.__name__}"


def test_a_tracker_that_does_all_of_it(tmp_path):
    check_tracker(Keeps, read, tmp_path)


def test_a_service_that_keeps_less_than_all_bits(tmp_path):
    def rounded(folder):
        return ((name, place, round(value, 3)) for name, place, value in read(folder))

    check_tracker(Keeps, rounded, tmp_path, stored=lambda value: round(value, 3))


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (LogsTwice, "in a whole run, the service must have of train_loss"),
        (LogsAtTheNextPlace, "in a whole run, the service must have of train_loss"),
        (LosesTheLast, "in a whole run, the service must have of val_loss"),
        (DropsBatches, r"in a whole run, the service must have of val_loss_batch .*; it has \[\]"),
        (OverwritesTheTraining, "after an evaluation on its own, the service must have of train_loss"),
        (DrawsNumbers, "DrawsNumbers changes what is trained"),
        (TellsSecrets, r"options\.txt has a secret of the configuration"),
        (WritesOnEveryRank, "rank 1 has written"),
    ],
)
def test_one_that_is_broken_is_found(tmp_path, broken, words):
    with pytest.raises(AssertionError, match=words):
        check_tracker(broken, read, tmp_path)


def test_one_that_ends_training_is_found(tmp_path):
    with pytest.raises(ConnectionError, match="no network"):
        check_tracker(EndsTraining, read, tmp_path)


def test_one_that_does_not_say_what_to_install_is_found(tmp_path):
    with pytest.raises(AssertionError, match="without colorsys it must say what to install"):
        check_tracker(NeedsAnSdk, read, tmp_path, sdk="colorsys")


# Killed and gone on with --------------------------------------------------------------


class BeginsAnew(Keeps):
    """Keeps what training comes to again."""

    def start(self, run):
        return super().start(dataclasses.replace(run, id=None))


class ForgetsAll(Keeps):
    """Begins with nothing where it was cut."""

    def start(self, run):
        (run.folder / "kept.jsonl").write_text("")
        return super().start(run)


class Buffers(Keeps):
    """Writes at the end of the run, whatever is saved before."""

    def start(self, run):
        self.buffer = []
        return super().start(run)

    def log_metrics(self, metrics, place):
        self.buffer.append((metrics, place))

    def finish(self, status):
        for metrics, place in self.buffer:
            super().log_metrics(metrics, place)


def test_a_tracker_that_is_killed_and_goes_on(tmp_path):
    check_killed_tracker(Keeps, read, tmp_path)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (BeginsAnew, "killed and gone on with, the service must have of train_loss"),
        (ForgetsAll, "killed and gone on with, the service must have of train_loss"),
        (Buffers, r"only places up to 0 are on disk of a run that was killed behind 8, after get_state\(\)"),
    ],
)
def test_one_that_does_not_go_on_is_found(tmp_path, broken, words):
    with pytest.raises(AssertionError, match=words):
        check_killed_tracker(broken, read, tmp_path)


# Elsewhere ----------------------------------------------------------------------------


class WritesAtHome(Keeps):
    """Keeps something at home, as SDKs do."""

    def start(self, run):
        (Path.home() / ".keeps").write_text("x")
        return super().start(run)


class Prints(Keeps):
    """Says something."""

    def finish(self, status):
        print("the run is at https://example.org")


class Calls(Keeps):
    """Asks whether there is a newer version."""

    def start(self, run):
        with socket.socket() as caller:
            caller.connect_ex(("127.0.0.1", 1))
        return super().start(run)


def test_a_tracker_that_is_quiet(tmp_path):
    check_quiet_tracker(Keeps, tmp_path)


@pytest.mark.parametrize(
    ("broken", "words"),
    [(WritesAtHome, r"written elsewhere: .*\.keeps"), (Prints, r"example\.org"), (Calls, r"socket\.connect")],
)
def test_one_that_is_not_is_found(tmp_path, broken, words):
    with pytest.raises(AssertionError, match=words):
        check_quiet_tracker(broken, tmp_path)
