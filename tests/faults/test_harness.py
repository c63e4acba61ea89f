"""The harness itself: faults come where they are said to come, and a checker that finds nothing wrong can find it."""

import errno
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from hookline.testing import tiny_trainer
from hookline.testing.faults import (
    PRELOADED,
    Child,
    Recorder,
    at_file,
    at_hook,
    cut_off,
    failing,
    flip_bit,
    kill,
    power_cuts,
    run,
    zero_page,
)


def add(one, other):
    print("adding")
    return one + other


def die_at(hook, nth):
    tiny_trainer([at_hook(hook, kill, nth)]).train()


def raise_something():
    raise ValueError("something")


def imported(names):
    return [name for name in names if name in sys.modules]


def leave_one_behind():
    if os.fork() == 0:
        time.sleep(60)
    kill()


def sleep():
    print("asleep", flush=True)
    time.sleep(60)


def test_a_function_runs_in_a_process_of_its_own():
    assert run(add, 1, 2) == (0, 3, "adding\n")
    failed = run(raise_something)
    assert failed.code == 1
    assert "ValueError: something" in failed.output


@pytest.mark.parametrize(("hook", "nth"), [("on_end_backward", 3), ("update", 14), ("on_setup", 1)])
def test_a_process_dies_at_a_hook(hook, nth):
    assert run(die_at, hook, nth).code == -signal.SIGKILL


def test_a_hook_that_is_not_reached_so_often_does_nothing():
    assert run(die_at, "update", 15).code == 0


def test_a_process_starts_others_as_this_one_does():
    assert run(multiprocessing.get_start_method).value == multiprocessing.get_start_method()


def test_a_process_that_dies_is_not_waited_for_longer_than_it_lives():
    began = time.monotonic()
    assert run(leave_one_behind, timeout=30).code == -signal.SIGKILL
    assert time.monotonic() - began < 20


def test_modules_that_take_long_are_imported_already():
    assert run(imported, PRELOADED).value == PRELOADED


def test_a_process_that_hangs_is_ended_and_shown():
    child = Child(sleep)
    with pytest.raises(TimeoutError, match=r"still running after 1 s; it wrote:\nasleep"):
        child.wait(1)


def test_a_process_that_has_ended_gets_no_signal():
    child, deadline = Child(add, 1, 2), time.monotonic() + 20
    while Path(f"/proc/{child.pid}").exists():
        assert time.monotonic() < deadline
    child.signal(signal.SIGKILL)
    assert child.wait() == (0, 3, "adding\n")


def test_an_unknown_hook_is_refused():
    with pytest.raises(ValueError, match="there is no hook 'on_end_of_time'"):
        at_hook("on_end_of_time", kill)


def put(folder, name, content, flush=True):
    """Replace a file as one should, or without flushing."""
    temporary = folder / f".{name}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, content)
    if flush:
        os.fsync(descriptor)
    os.close(descriptor)
    os.rename(temporary, folder / name)
    if flush:
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def test_a_fault_comes_at_the_operation_that_is_named(tmp_path):
    full = failing(OSError(errno.ENOSPC, "No space left on device"))
    put(tmp_path, "file", b"old")
    for point, nth in (("open .file", 1), ("write *", 1), ("fsync .file", 1), ("rename file", 1), ("* *", 2)):
        with at_file(tmp_path, point, full, nth), pytest.raises(OSError, match="No space left"):
            put(tmp_path, "file", b"new")
        assert (tmp_path / "file").read_bytes() == b"old", point
    with at_file(tmp_path, "rename other", full), at_file(tmp_path.parent / "elsewhere", "* *", full):
        put(tmp_path, "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.rename.__module__ == "posix"


@pytest.mark.parametrize("flush", [True, False])
def test_a_power_cut_leaves_what_was_flushed_and_perhaps_the_rest(tmp_path, flush):
    recorder = Recorder(tmp_path)
    with recorder.recording():
        for word in (b"one", b"two"):
            put(tmp_path, "file", word, flush)
            recorder.promise(word.decode())
    found = {(cut.promises[-1:], cut.files.get("file")) for cut in power_cuts(recorder, random.Random(0), 30)}
    safe = {((), None), ((), b"one"), (("one",), b"one"), (("one",), b"two"), (("two",), b"two")}
    assert (found == safe) is flush
    if not flush:
        assert found > safe
        assert {(("two",), None), (("two",), b"one"), (("one",), b"")} <= found


def test_a_cut_can_be_made_a_folder(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "found").mkdir()
    recorder = Recorder(tmp_path / "disk")
    with recorder.recording():
        os.mkdir(tmp_path / "disk" / "folder")
        put(tmp_path / "disk" / "folder", "file", b"content")
    *_, last = power_cuts(recorder, random.Random(0))
    last.write(tmp_path / "found")
    assert last.files == {"folder": None, "folder/file": b"content"}
    assert (tmp_path / "found" / "folder" / "file").read_bytes() == b"content"


def test_damage(tmp_path):
    path, chance = tmp_path / "file", random.Random(0)
    content = bytes([255] * 10_000)
    path.write_bytes(content)
    assert flip_bit(path, chance).endswith("of file")
    assert sum(one != other for one, other in zip(path.read_bytes(), content, strict=True)) == 1
    path.write_bytes(content)
    zero_page(path, chance)
    assert path.read_bytes().count(0) in (4096, 10_000 - 8192)
    cut_off(path, 0.5)
    assert path.stat().st_size == 5000
    cut_off(path, 7)
    assert path.stat().st_size == 7
