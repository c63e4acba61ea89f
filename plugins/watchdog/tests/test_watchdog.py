"""Runs that hang, in processes of their own: they end, and say where they were."""

import faulthandler
import gc
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from hookline.testing import TinyModule, check_plugin, digest, tiny_trainer
from hookline.testing.faults import PRELOADED, Child, at_hook, failing, run
from hookline_watchdog import EXIT_CODE, Watchdog

PRELOADED += [__name__]


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def threads():
    """Return how many threads this process has, those that Python does not know of as well.

    The system may know of one for a moment after its end.
    """
    return len(os.listdir("/proc/self/task"))


def stacks(folder):
    return [path.read_text() for path in folder.glob("run-*/watchdog-*/rank-0000.txt")]


# Nothing hangs ------------------------------------------------------------------------


def test_it_keeps_the_contract():
    check_plugin(Watchdog)


@pytest.mark.parametrize("option", ["timeout", "start_timeout", "save_timeout"])
@pytest.mark.parametrize(("text", "said"), [("50 steps", "is not a duration; write one like"), ("soon", "cadence")])
def test_what_is_no_duration_is_refused(option, text, said):
    with pytest.raises(ValueError, match=f"watchdog.{option}='{text}'.*{said}"):
        Watchdog(**{option: text})


def count_threads(doors):
    tiny_trainer().train()  # torch may start some of its own
    before, counts = threads(), []
    within = at_hook("on_boundary", lambda: (until(lambda: threads() == before + 2), counts.append(True)), 2)
    trainer = tiny_trainer([Watchdog(), within])
    for door in doors:
        getattr(trainer, door)()
        until(lambda: threads() <= before)
        counts.append(threads() - before)
    return counts


def test_thread_and_timer_are_there_in_a_run_and_gone_after_it():
    outcome = run(count_threads, ["train", "validate", "train"])
    assert outcome.value == [True, 0, 0, 0], outcome.output


def count_threads_after_an_error():
    tiny_trainer().train()
    before = threads()
    trainer = tiny_trainer([Watchdog(), at_hook("update", failing(KeyError("on purpose")))])
    with pytest.raises(KeyError):
        trainer.train()
    until(lambda: threads() <= before)
    return threads() - before


def test_they_are_gone_after_an_error():
    outcome = run(count_threads_after_an_error)
    assert outcome.value == 0, outcome.output


def test_a_run_whose_end_is_never_told_is_not_watched_for_ever():
    watchdog = Watchdog(timeout="1 s")  # it looks every 50 ms
    trainer = tiny_trainer([watchdog])
    watchdog.on_begin_run(trainer)
    name = "hookline-watchdog"
    assert name in [thread.name for thread in threading.enumerate()]
    del trainer
    gc.collect()
    until(lambda: name not in [thread.name for thread in threading.enumerate()])


def test_it_changes_no_bit():
    ends = []
    for plugins in ([], [Watchdog()]):
        trainer = tiny_trainer(plugins)
        trainer.train()
        ends.append(digest(trainer.module.state_dict()))
    assert ends[0] == ends[1]


def test_who_predicts_for_nobody_is_warned_all_the_same():
    with pytest.warns(UserWarning, match="nobody hears on_end_predict_step"):
        tiny_trainer([Watchdog()]).predict()


# Something hangs ----------------------------------------------------------------------

PLACES = [  # door, hook, the how manieth time it is reached; which option counts, the phase that is named
    ("train", "on_begin_run", 1, "start_timeout", "the start, after step 0"),
    ("train", "restore", 1, "start_timeout", "restore, after step 0"),
    ("train", "take_window", 1, "start_timeout", "the start, after step 0"),
    ("train", "call_model", 3, "timeout", "training, after step 2"),
    ("train", "on_end_train_epoch", 1, "timeout", "the end of an epoch, after step 7"),
    ("train", "evaluate", 1, "start_timeout", "the start of an evaluation (val), after step 7"),
    ("train", "on_end_val_epoch", 1, "timeout", "evaluation (val), after step 7"),
    ("train", "save", 1, "save_timeout", "save, after step 14"),
    ("train", "on_end_train", 1, "save_timeout", "the end of training, after step 14"),
    ("train", "on_exception", 1, "save_timeout", "what follows an error, after step 3"),
    ("train", "on_end_run", 1, "save_timeout", "teardown, after step 14"),
    ("validate", "on_end_val_step", 3, "timeout", "evaluation (val), after step 0"),
    ("test", "on_end_test_step", 3, "timeout", "evaluation (test), after step 0"),
    ("predict", "on_end_predict_step", 3, "timeout", "prediction, after step 0"),
]


def hang_here():
    time.sleep(100)


def hang(folder, door, hook, nth):
    torch.set_num_threads(1)
    plugins = {"watchdog": Watchdog(timeout="4 s", start_timeout="4 s", save_timeout="4 s")}
    plugins["fault"] = at_hook(hook, hang_here, nth)
    if hook == "on_exception":
        plugins["error"] = at_hook("update", failing(KeyError("on purpose")), 4)
    getattr(tiny_trainer(plugins, runs_folder=str(folder)), door)()


def test_a_run_that_hangs_ends_and_names_the_phase(tmp_path):
    folders = [tmp_path / str(number) for number in range(len(PLACES))]
    children = [Child(hang, folder, *place[:3]) for folder, place in zip(folders, PLACES, strict=True)]
    for child, folder, place in zip(children, folders, PLACES, strict=True):
        outcome = child.wait()
        case = f"{place}\n{outcome.output}"
        assert outcome.code == EXIT_CODE == 124, case
        (left,) = stacks(folder)
        first, *_ = left.splitlines()
        assert "rank 0 of 1" in first, case
        assert f"no sign of life for 4 s (watchdog.{place[3]}); phase: {place[4]}; the stacks" in first, case
        assert "in hang_here" in left, case
        assert first in outcome.output, case
        assert "in hang_here" in outcome.output, case
        assert "no sign of life for half of 4 s" in outcome.output, case


def hang_without_a_folder(folder):
    torch.set_num_threads(1)
    (folder / "runs").write_text("a file where the folder of runs should be")
    watchdog = Watchdog(timeout="1 s", start_timeout="1 s")
    tiny_trainer([watchdog, at_hook("on_begin_run", hang_here)], runs_folder=str(folder / "runs")).train()


def test_it_ends_where_nothing_can_be_written(tmp_path):
    outcome = run(hang_without_a_folder, tmp_path)
    assert outcome.code == EXIT_CODE, outcome.output
    assert "in hang_here" in outcome.output


# Neither too late nor too soon --------------------------------------------------------


class Paced(TinyModule):
    """Takes its time in two steps."""

    def train_step(self, global_step, batch, device):
        if global_step in (3, 5):
            time.sleep(1.8)
        return super().train_step(global_step, batch, device)


def train_slowly(folder):
    torch.set_num_threads(1)
    tiny_trainer([Watchdog(timeout="3 s")], Paced(), runs_folder=str(folder)).train()


def test_half_of_the_time_is_said_once_a_phase(tmp_path):
    outcome = run(train_slowly, tmp_path)
    assert outcome.code == 0, outcome.output
    (said,) = [line for line in outcome.output.splitlines() if line.startswith("watchdog: ")]
    assert said.endswith("no sign of life for half of 3 s (watchdog.timeout); phase: training, after step 2")


def train_and_wait(folder):
    torch.set_num_threads(1)
    wait = at_hook("on_boundary", lambda: ((folder / "here").touch(), until((folder / "go on").exists)), 3)
    tiny_trainer([Watchdog(timeout="4 s"), wait], runs_folder=str(folder)).train()


@pytest.mark.slow
def test_a_process_that_was_stopped_is_given_the_time_back(tmp_path):
    child = Child(train_and_wait, tmp_path)
    until((tmp_path / "here").exists)
    time.sleep(1)
    child.signal(signal.SIGSTOP)
    time.sleep(2.5)
    child.signal(signal.SIGCONT)
    time.sleep(1.5)  # five seconds in all
    (tmp_path / "go on").touch()
    outcome = child.wait()
    assert outcome.code == 0, outcome.output


# Processes that are forked ------------------------------------------------------------


class Items(Dataset):
    """Sets a timer of its own in each worker."""

    def __len__(self):
        return 48

    def __getitem__(self, index):
        faulthandler.dump_traceback_later(60)
        faulthandler.cancel_dump_traceback_later()
        return torch.full((8,), float(index)), torch.ones(1), index


class Loaded(TinyModule):
    def get_train_dataloader(self, sampler, batch_size):
        data = Items()
        return DataLoader(data, batch_size, sampler=sampler(data), num_workers=2, multiprocessing_context="fork")


def train_with_workers():
    torch.set_num_threads(1)
    armed = at_hook("on_begin_train_epoch", lambda: until(lambda: threads() >= 3), 1)  # main, watchdog and timer
    trainer = tiny_trainer([Watchdog(), armed], Loaded(), loader_timeout="20 s")
    trainer.train()
    return trainer.global_step


def test_forked_workers_may_set_a_timer_of_their_own():
    outcome = run(train_with_workers)
    assert outcome.code == 0, outcome.output
    assert outcome.value == 12


class Stuck(Loaded):
    """Hangs in the main process, beside workers."""

    def train_step(self, global_step, batch, device):
        if global_step == 2:
            Path("workers").write_text(Path(f"/proc/self/task/{os.getpid()}/children").read_text())
            hang_here()
        return super().train_step(global_step, batch, device)


def hang_with_workers(folder):
    torch.set_num_threads(1)
    os.chdir(folder)
    tiny_trainer([Watchdog(timeout="1 s")], Stuck()).train()


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_no_worker_outlives_a_run_that_was_ended(tmp_path):
    child = Child(hang_with_workers, tmp_path)
    until((tmp_path / "workers").exists)
    workers = (tmp_path / "workers").read_text().split()
    assert len(workers) == 2
    until(lambda: not any(map(is_running, workers)))
    assert child.wait().code == EXIT_CODE
