"""Rows C of the fault catalogue: removing old checkpoints, where saving or removing fails or is killed."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import signal

import pytest
from tests.faults.test_b_writing import (  # noqa: F401 - `base`, `memory` and `threads` are fixtures
    at,
    base,
    copied,
    debris,
    good,
    home,
    memory,
    operations_of,
    refusing,
    steps,
    threads,
    train,
)

from hookline.testing.faults import at_file, flip_bit, kill, run, watching
from hookline_checkpoint import storage

pytestmark = pytest.mark.plugins


def train_and_die(folder, to, point, nth, keep_last):
    with at_file(home(folder), point, kill, nth):
        train(folder, to, keep_last=keep_last)


def killed(folder, to, point, nth=1, keep_last=2):
    """Train on in a process that is killed before an operation."""
    outcome = run(train_and_die, folder, to, point, nth, keep_last)
    assert outcome.code == -signal.SIGKILL, outcome.output


# C1 one is there at every instant -------------------------------------------------------


def train_and_count(folder, to, **options):
    """Train on; return how many good checkpoints there were after each file operation, never none."""
    counts = []

    def count(operation):
        counts.append(sum(map(storage.is_good, storage.listed(home(folder)))))
        assert counts[-1] >= 1, operation

    with watching(folder, lambda operation: None, count):
        train(folder, to, keep_last=1, **options)
    return counts


@pytest.mark.parametrize("asynchronous", [False, True])
def test_c1_one_is_good_after_every_file_operation(asynchronous, base):  # noqa: F811
    counts = train_and_count(base, 4, asynchronous=asynchronous)
    assert len(counts) > 70
    assert {1, 2} <= {*counts}
    assert steps(base) == [4]


def breaking(folder, nth, lasting):
    """Have the disk fail at an operation, or from then on."""
    calls, fail = itertools.count(1), refusing(errno.EIO)

    def act(operation):
        call = next(calls)
        if call == nth or (lasting and call > nth):
            fail()

    return watching(folder, act, lambda operation: None)


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lasting", [False, True])
def test_c1_one_is_good_whatever_fails_and_the_next_save_is_whole(lasting, every, base, memory):  # noqa: F811
    whole, failed = copied(base, memory / "whole"), 0
    done = operations_of(home(whole), lambda: train(whole, 3, keep_last=1))
    for nth in range(2, len(done) + 1, every):
        folder = copied(base, memory / str(nth))
        with breaking(home(folder), nth, lasting):
            try:
                train_and_count(folder, 3)
            except OSError as error:
                failed += 1
                assert error.errno == errno.EIO  # noqa: PT017
        assert good(home(folder))
        train(folder, 4, keep_last=1)
        assert (steps(folder), debris(folder)) == ([4], [])
        shutil.rmtree(folder)
    assert failed > 20 / every


NEWEST = {
    "open model.safetensors": 2,
    "fsync manifest.json": 2,
    "rename step-*": 2,
    "fsync .": 3,
    "rename .trash-*": 3,
    "unlink *": 3,
    "rmdir .trash-*": 3,
}


@pytest.mark.parametrize(("point", "newest"), NEWEST.items())
def test_c1_one_is_good_wherever_it_is_killed(point, newest, base):  # noqa: F811
    killed(base, 3, point, keep_last=1)
    assert max(good(home(base))) == steps(base)[0] == newest
    train_and_count(base, 4)
    assert (steps(base), debris(base)) == ([4], [])


# C2 debris does not count ---------------------------------------------------------------


def test_c2_what_crashed_saves_leave_never_counts(base):  # noqa: F811
    before = good(home(base))
    for _ in range(2):
        killed(base, 3, "fsync manifest.json")
        assert good(home(base)) == before
    assert len([name for name in debris(base) if name.startswith(".tmp-")]) == 1  # the second swept the first's
    train(base, 3)
    assert (steps(base), debris(base)) == ([3, 2], [])


def test_c2_the_last_good_ones_stay_while_newer_ones_are_damaged(base, caplog):  # noqa: F811
    """Of six, the newest three are damaged; two good ones stay, and none of the three is taken for one of them."""
    train(base, 6, keep_last=None)
    for step in (4, 5, 6):
        (at(base, step) / "manifest.json").unlink()
    train(base, 4)
    assert [step for step in steps(base) if step in good(home(base))] == [4, 3]
    train(base, 7)
    assert "going back to" in caplog.text
    assert steps(base) == [7, 6]
    assert len(good(home(base))) == 2


def test_c2_a_damaged_one_does_not_count_and_stays_among_those_that_stay(base):  # noqa: F811
    train(base, 4, keep_last=None)
    (at(base, 3) / "state.json").unlink()
    train(base, 5, keep_last=3)
    assert steps(base) == [5, 4, 3, 2]
    assert [*good(home(base))] == [5, 4, 2]
    train(base, 6, keep_last=2)
    assert steps(base) == [6, 5]


# C4 killed while one is deleted ---------------------------------------------------------


@pytest.mark.parametrize("nth", range(1, 8))
def test_c4_a_half_deleted_one_is_not_listed_and_swept_later(nth, base):  # noqa: F811
    killed(base, 3, "unlink *", nth)
    assert steps(base) == [3, 2]
    (trash,) = home(base).glob(".trash-*")
    assert len([*trash.iterdir()]) == 8 - nth
    assert [*good(home(base))] == [3, 2]
    train(base, 4)
    assert (steps(base), debris(base)) == ([4, 3], [])


# C5 it cannot be deleted ----------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EACCES])
@pytest.mark.parametrize("point", ["rename .trash-*", "unlink state.json", "rmdir .trash-*"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_c5_a_delete_that_fails_is_said_and_tried_again(asynchronous, point, number, base, caplog):  # noqa: F811
    with at_file(home(base), point, refusing(number)):
        train(base, 3, asynchronous=asynchronous)
    (record,) = [record for record in caplog.records if "cannot be removed now" in record.message]
    assert record.levelname == "WARNING"
    assert record.message.startswith(f"checkpoint {at(base, 1)} is not needed any more")
    assert os.strerror(number) in record.message
    assert [*good(home(base))][:2] == [3, 2]
    assert len(debris(base)) + len(steps(base)) == 3  # it is there still, under its name or as trash
    train(base, 4, asynchronous=asynchronous)
    assert (steps(base), debris(base)) == ([4, 3], [])


def test_c5_what_cannot_be_swept_is_said_and_stops_nothing(base, caplog):  # noqa: F811
    killed(base, 3, "unlink *", 2)
    with at_file(home(base), "unlink *", refusing(errno.EBUSY)):
        train(base, 4)
    assert (
        "is left of a writer that was killed, and cannot be removed: [Errno 16] Device or resource busy" in caplog.text
    )
    assert len(debris(base)) == 1
    flip_bit(at(base, 4) / "state.json", random.Random(0))
    train(base, 5)
    assert (steps(base), debris(base)) == ([5, 4], [])
