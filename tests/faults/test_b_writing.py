"""Rows B of the fault catalogue: writing checkpoints, and going back to the newest good one.

The whole plugin is driven, by a trainer, in processes that are really killed; the disk after a power cut is simulated
by the rules of POSIX, and every state of it is made a folder and read as a resume would read it.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from hookline import CallbackInterface, ModuleInterface, Trainer, hookimpl
from hookline.testing import digest, tiny_trainer
from hookline.testing.faults import (
    Child,
    Recorder,
    at_file,
    cut_off,
    failing,
    flip_bit,
    kill,
    power_cuts,
    run,
    watching,
    zero_page,
)
from hookline_checkpoint import Checkpoint, CheckpointError, storage
from hookline_checkpoint.layout import unpack
from hookline_checkpoint.lock import Lock, LockedError

pytestmark = pytest.mark.plugins

FILES = (
    "model.safetensors",
    "optim.safetensors",
    "state.safetensors",
    "state.json",
    "rank-0000.safetensors",
    "rank-0000.json",
    "manifest.json",
)


class Witness(CallbackInterface):
    """Knows the digest of each state that was to be saved, and tells what was said to be on the disk."""

    def __init__(self, told=lambda step: None):
        self.digests, self.told = {}, told

    @hookimpl(wrapper=True)
    def save(self, trainer):
        self.digests[trainer.global_step] = digest(trainer.hook.get_run_state(trainer=trainer))
        return (yield)

    @hookimpl
    def on_checkpoint(self, path):
        self.told(storage.step_of(path))


def train(folder, steps, *plugins, resume=True, **options):
    """Train a tiny module to a step, saving each one; go on with what is there."""
    torch.set_num_threads(1)  # a tiny module is ten times as slow where threads of two processes wait for each other
    checkpoint = Checkpoint(**{"every": "1 step", "keep_last": 2, **options})
    trainer = tiny_trainer([checkpoint, *plugins], runs_folder=str(folder), resume=resume, max_steps=steps)
    trainer.train()
    return trainer


def home(folder):
    return folder / "run-1/checkpoints"


def at(folder, step):
    return home(folder) / f"step-{step:012d}"


def steps(folder):
    return [storage.step_of(path) for path in storage.listed(home(folder))]


def good(folder):
    """Return the digest of each checkpoint that can be loaded, by its step."""
    loaded = {}
    for path in storage.listed(folder):
        try:
            loaded[storage.step_of(path)] = digest(unpack(path, 0))
        except CheckpointError:
            continue
    return loaded


def debris(folder):
    """Return what is left of writers: in the run folder, and where its checkpoints are."""
    return sorted(path.name for path in (folder / "run-1").rglob(".*"))


def operations_of(folder, function, *args):
    """Return what a function tries to do to the files below a folder."""
    seen = []
    with watching(folder, seen.append, lambda operation: None):
        function(*args)
    return seen


def weights(trainer):
    return digest(trainer.module.state_dict())


def copied(base, folder):
    shutil.copytree(base, folder)
    return folder


def pairs(items):
    """Take them two at a time: as many processes as the machine has cores."""
    items = list(items)
    return [items[begin : begin + 2] for begin in range(0, len(items), 2)]


@pytest.fixture(autouse=True)
def threads():
    """Put back what `train` sets."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.fixture
def memory(tmp_path):
    """Give a folder in memory where there is one: what fsync costs of a disk that others use is not what is tested."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture
def base(memory):
    """Give a run that was stopped after step 2, with both checkpoints."""
    train(memory / "base", 2)
    return memory / "base"


# B1 killed at each place ----------------------------------------------------------------


def train_and_die(folder, to, nth, options):
    with at_file(folder / "run-1", "* *", kill, nth):
        train(folder, to, **options)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"keep_last": 2}, id="keep_last=2"),
        pytest.param({"keep_last": 1}, id="keep_last=1", marks=pytest.mark.slow),
        pytest.param({"asynchronous": True}, id="asynchronous", marks=pytest.mark.slow),
    ],
)
def test_b1_killed_before_any_file_operation_of_a_save(base, memory, options):
    """The process dies before the first, the second, … operation; each time another one goes on."""
    witness, whole = Witness(), copied(base, memory / "whole")
    done = operations_of(whole / "run-1", lambda: train(whole, 3, witness, **options))
    renamed = next(
        n for n, each in enumerate(done, 1) if each.kind == "rename" and each.path.endswith(at(whole, 3).name)
    )
    assert len(done) > 35
    end = weights(train(whole, 4, **options))
    before = good(home(base))
    began = time.monotonic()
    for numbers in pairs(range(1, len(done) + 1)):
        folders = [copied(base, memory / str(nth)) for nth in numbers]
        children = [Child(train_and_die, folder, 3, nth, options) for folder, nth in zip(folders, numbers, strict=True)]
        for nth, folder, child in zip(numbers, folders, children, strict=True):
            place = f"before {done[nth - 1].kind} {done[nth - 1].path}"
            assert child.wait().code == -signal.SIGKILL, place
            path, state = storage.newest_good(home(folder), lambda path: unpack(path, 0))
            assert path == storage.listed(home(folder))[0], place  # nothing had to be passed over
            if storage.step_of(path) == 2:
                assert digest(state) == before[2], place
            assert storage.step_of(path) == (3 if nth > renamed else 2), place
            assert weights(train(folder, 4, **options)) == end, place
            assert debris(folder) == [], place
            shutil.rmtree(folder)
    print(f"B1: {len(done)} kills, {(time.monotonic() - began) / len(done):.2f} s each")


# B2 killed at random times --------------------------------------------------------------


class Big(ModuleInterface):
    """A module of so many MB whose steps cost next to nothing."""

    def __init__(self, megabytes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(megabytes * 250_000))

    def train_step(self, global_step, batch, device):
        return (self.weight * batch.mean()).sum()

    def get_train_dataloader(self, sampler, batch_size):
        data = torch.ones(4, 1)
        return torch.utils.data.DataLoader(data, 1, sampler=sampler(data))

    def get_optimizers_schedulers(self, steps, epochs):
        return [torch.optim.SGD(self.parameters(), 0.01)], []


def big_trainer(folder, megabytes, *plugins, **options):
    checkpoint = Checkpoint(**{"every": "1 step", "keep_last": 1, **options})
    return Trainer(
        Big(megabytes), [checkpoint, *plugins], epochs=10**9, runs_folder=str(folder), resume=True, device="cpu"
    )


def save_for_ever(folder, megabytes, options):
    big_trainer(folder, megabytes, Witness(lambda step: print(f"saved {step}")), **options).train()


def wait_for(condition, seconds=30.0):
    """Poll until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("kills", "options"),
    [
        pytest.param(3, {}, id="3"),
        pytest.param(40, {}, id="40", marks=pytest.mark.slow),
        pytest.param(40, {"asynchronous": True}, id="40-asynchronous", marks=pytest.mark.slow),
    ],
)
def test_b2_killed_at_random_times_in_a_save_of_30_mb(kills, options, tmp_path):
    seed = secrets.randbits(32)  # not of `random`, which a trainer seeds
    print(f"B2: seed {seed}")
    chance, within, began = random.Random(seed), 0, time.monotonic()
    save_until(tmp_path, 1, 30)
    acknowledged = 1
    for _ in range(kills):
        child = Child(save_for_ever, tmp_path, 30, options)
        dead = {path.name for path in home(tmp_path).glob(".tmp-*")}
        wait_for(lambda: {path.name for path in home(tmp_path).glob(".tmp-*")} - dead)  # noqa: B023
        time.sleep(chance.uniform(0, 0.4))  # a time is the fault here
        child.signal(signal.SIGKILL)
        outcome = child.wait()
        assert outcome.code == -signal.SIGKILL
        within += bool(list(home(tmp_path).glob(".tmp-*")))
        acknowledged = max(
            [acknowledged, *(int(line[6:]) for line in outcome.output.split("\n")[:-1] if line[:6] == "saved ")]
        )
        found = storage.listed(home(tmp_path))
        assert [path for path in found if not storage.is_good(path)] == []
        assert max(map(storage.step_of, found)) >= acknowledged
        assert len(torch.unique(unpack(found[0], 0)["module"]["weight"])) == 1  # of one step
    each = (time.monotonic() - began) / kills
    print(f"B2: {within} of {kills} kills within a save, {each:.2f} s each; step {acknowledged}")


# B3, B4 power cuts ----------------------------------------------------------------------


class Story:
    """What was done to a disk, what was promised meanwhile, and what each checkpoint has to hold."""

    def __init__(self, folder, keep_last, **options):
        folder.mkdir()
        self.keep_last, self.options = keep_last, options
        self.runs = folder / "not/yet/there/runs"
        self.recorder = Recorder(folder)
        self.digests = {}

    def train(self, to, resume=True):
        witness = Witness(lambda step: self.recorder.promise(f"saved {step}"))
        try:
            train(self.runs, to, witness, keep_last=self.keep_last, resume=resume, **self.options)
        finally:
            for step, hashed in witness.digests.items():
                self.digests.setdefault(step, set()).add(hashed)

    def damage(self, step):
        self.recorder.promise(f"damaged {step}")
        descriptor = os.open(at(self.runs, step) / "state.json", os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, b" ")
        os.fsync(descriptor)
        os.close(descriptor)

    def saved(self, cut):
        """Return the steps that were said to be safe, are still to be kept, and were not damaged since."""
        steps = set()
        for word, step in map(str.split, cut.promises):
            steps = steps | {int(step)} if word == "saved" else steps - {int(step)}
            steps = {*sorted(steps)[-self.keep_last :]}
        return steps

    def judge(self, chance, variants, place):
        """Return how many states there are, how many load what was never saved, and how many have lost a promise."""
        count = torn = lost = 0
        for cut in power_cuts(self.recorder, chance, variants):
            disk = place / str(count)
            disk.mkdir()
            cut.write(disk)
            folder = home(disk / "not/yet/there/runs")
            loaded, saved = good(folder), self.saved(cut)
            count += 1
            torn += any(hashed not in self.digests[step] for step, hashed in loaded.items())
            kept = len(loaded) >= len(saved) and max([0, *loaded]) >= max([0, *saved])
            if loaded:
                path, state = storage.newest_good(folder, lambda path: unpack(path, 0))
                assert storage.step_of(path) == max(loaded)
                assert digest(state) == loaded[max(loaded)]
            lost += not kept
            shutil.rmtree(disk)
        return count, torn, lost


def several_saves(story):
    story.train(4)
    story.train(6)


def replacing(story):
    """Damage the newest one, and do it again."""
    story.train(3)
    story.damage(3)
    story.train(4)


def unflushed(story):
    """Fail to flush the rename of a checkpoint, and come to its step again from an earlier one."""
    story.train(2)
    broken = at_file(story.runs, "fsync checkpoints", failing(OSError(errno.EIO, "Input/output error")))
    with broken, pytest.raises(OSError, match="Input/output error"):
        story.train(3)
    assert steps(story.runs)[0] == 3
    story.train(3, resume=str(at(story.runs, 2)))


STORIES = {
    "keep_last=1": (several_saves, 1, {}),
    "keep_last=2": (several_saves, 2, {}),
    "replacing": (replacing, 2, {}),
    "unflushed": (unflushed, 2, {}),
    "asynchronous": (several_saves, 1, {"asynchronous": True}),
}


def told(scene, keep_last, options, folder):
    story = Story(folder / "disk", keep_last, **options)
    with story.recorder.recording():
        scene(story)
    (folder / "found").mkdir()
    return story


@pytest.mark.parametrize(("scene", "keep_last", "options"), STORIES.values(), ids=STORIES)
def test_b3_a_power_cut_loses_no_promise(scene, keep_last, options, memory):
    count, torn, lost = told(scene, keep_last, options, memory).judge(random.Random(0), 0, memory / "found")
    print(f"B3: {count} states, {torn} torn, {lost} lost")
    assert count > 60
    assert (torn, lost) == (0, 0)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("scene", "keep_last", "options"), STORIES.values(), ids=STORIES)
def test_b3_a_power_cut_loses_no_promise_in_thousands_of_states(scene, keep_last, options, memory):
    story = told(scene, keep_last, options, memory)
    count, torn, lost = story.judge(random.Random(1), 12, memory / "found")
    print(f"B3: {count} states, {torn} torn, {lost} lost")
    assert count > 200
    assert (torn, lost) == (0, 0)


@pytest.mark.parametrize("keep_last", [1, 2])
def test_b4_without_fsync_the_checker_finds_what_is_lost(keep_last, memory, monkeypatch):
    story = Story(memory / "disk", keep_last)
    with story.recorder.recording(), monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: None)
        story.train(4)
    (memory / "found").mkdir()
    count, torn, lost = story.judge(random.Random(0), 2, memory / "found")
    print(f"B4: {count} states, {torn} torn, {lost} lost")
    assert torn == 0  # the hashes see to that
    assert lost > 0


# B5, B6 a disk that refuses -------------------------------------------------------------


def refusing(number):
    """Return an action that raises as the system would."""
    return failing(OSError(number, os.strerror(number)))


def parts_of_a_save(folder):
    """Return the operations of the third save that can fail, by their number, and the number of the commit."""
    done = operations_of(home(folder), train, folder, 3)
    renamed = next(nth for nth, each in enumerate(done, 1) if each.kind == "rename")
    assert done[renamed].kind == "fsync"
    return {nth: each for nth, each in enumerate(done, 1) if each.path != "." or each.kind != "mkdir"}, renamed


@pytest.mark.parametrize(
    ("asynchronous", "every"),
    [
        pytest.param(False, 3, id="every third"),
        pytest.param(False, 1, id="every", marks=pytest.mark.slow),
        pytest.param(True, 1, id="asynchronous", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("on_error", ["stop", "go_on"])
def test_b5_a_disk_that_is_full_at_any_operation_of_a_save(on_error, asynchronous, every, base, memory, caplog):
    options = {"on_error": on_error, "asynchronous": asynchronous}
    operations, renamed = parts_of_a_save(copied(base, memory / "whole"))
    end, before = weights(train(memory / "whole", 4)), good(home(base))
    chosen = {*list(operations)[::every], renamed - 1, renamed, renamed + 1, renamed + 2}
    for nth in sorted(chosen):
        operation = operations[nth]
        place = f"{operation.kind} {operation.path}"
        caplog.clear()
        folder = copied(base, memory / str(nth))
        written = nth <= renamed + 1  # what comes after that is retention
        with at_file(home(folder), "* *", refusing(errno.ENOSPC), nth):
            if on_error == "stop" and written:
                with pytest.raises(OSError, match="No space left on device") as raised:
                    train(folder, 4, **options)
                said = [note for note in raised.value.__notes__ if str(at(folder, 3)) in note]
            else:
                assert weights(train(folder, 4, **options)) == end, place
                said = [each.message for each in caplog.records if "No space left on device" in each.message]
        assert len(said) == 1, (place, said)
        assert str(at(folder, 3)) in said[0] or not written, place
        assert debris(folder) == [], place
        found = good(home(folder))
        if nth <= renamed and on_error == "stop":
            assert found == before, place
        assert len(found) == len(steps(folder)) >= 2, place
        assert weights(train(folder, 4, **options)) == end, place
        assert steps(folder) == ([4, 2] if on_error == "go_on" and nth <= renamed else [4, 3]), place
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["EIO", "EDQUOT", "EROFS", "EACCES", "ENOSPC"])
@pytest.mark.parametrize(
    "point", ["mkdir .tmp-*", "open model.safetensors", "write state.json", "fsync manifest.json", "rename step-*"]
)
def test_b6_whatever_the_system_says_is_said(name, point, base, memory, caplog):
    number, folder = getattr(errno, name), copied(base, memory / "runs")
    broken = at_file(home(folder), point, refusing(number))
    with broken, pytest.raises(OSError, match=os.strerror(number)) as raised:
        train(folder, 4)
    assert raised.value.errno == number
    assert f"while saving {at(folder, 3)}; the checkpoints before it are as they were" in raised.value.__notes__
    assert good(home(folder)) == good(home(base))
    assert debris(folder) == []
    with at_file(home(folder), point, refusing(number)):
        train(folder, 4, on_error="go_on")
    assert f"{os.strerror(number)}; while saving {at(folder, 3)}" in caplog.text
    assert steps(folder) == [4, 2]
    assert debris(folder) == []


@pytest.mark.parametrize("on_error", ["stop", "go_on"])
def test_b6_a_folder_that_cannot_be_made(on_error, memory, caplog):
    with at_file(memory, "mkdir checkpoints", failing(OSError(errno.ENOSPC, "No space left", "checkpoints"))):
        if on_error == "stop":
            with pytest.raises(OSError, match="No space left: 'checkpoints'"):
                train(memory, 2)
            assert not home(memory).exists()
            train(memory, 2)
            assert steps(memory) == [2, 1]
        else:
            train(memory, 2, on_error="go_on")
            assert steps(memory) == [2]
    assert debris(memory) == []


def save_small_files_only(folder, limit):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    return try_to_train(folder)


def try_to_train(folder):
    """Train on; return what was raised, with what was added to it."""
    try:
        train(folder, 4)
    except OSError as error:
        return errno.errorcode[error.errno], " ".join([str(error), *error.__notes__])


def test_b6_a_file_that_may_not_grow(base):
    limit = 2000
    assert any((at(base, 2) / name).stat().st_size > limit for name in FILES)
    code, (name, said), output = run(save_small_files_only, base, limit)
    assert (code, name) == (0, "EFBIG"), output
    assert f"while saving {at(base, 3)}" in said
    assert (steps(base), debris(base)) == ([2, 1], [])
    assert len(good(home(base))) == 2


def train_as_nobody(folder):
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    return try_to_train(folder)


def test_b6_a_folder_that_may_not_be_written(base, memory):
    if memory.parent != Path("/dev/shm"):
        pytest.skip("the folder of this test must be one that everybody may enter")
    for path in (memory, *base.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (base / "run-1").chmod(0o777)  # for the lock
    home(base).chmod(0o555)
    code, (name, said), output = run(train_as_nobody, base)
    home(base).chmod(0o755)
    assert (code, name) == (0, "EACCES"), output
    assert f"while saving {at(base, 3)}" in said
    assert (steps(base), debris(base)) == ([2, 1], [])


SMALL = """
mount -t tmpfs -o size=400k none "$0" && mount -t tmpfs -o size=4k none "$1" && export TMPDIR="$1" && shift && exec "$@"
"""


@pytest.mark.slow
def test_b5_b6_b7_on_small_disks(tmp_path):
    """A disk of 400 kB, and one for TMPDIR that is full from the beginning."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "tmp").mkdir()
    mounted = [
        "unshare",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        SMALL,
        str(tmp_path / "disk"),
        str(tmp_path / "tmp"),
    ]
    if shutil.which("unshare") is None or subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("this system does not let the test mount small disks of its own")
    done = subprocess.run(
        [*mounted, sys.executable, __file__, str(tmp_path / "disk")], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all of it" in done.stdout


def on_small_disks(disk):
    """Do what is to be tried there, in a process of its own."""
    temporary = Path(os.environ["TMPDIR"])
    with pytest.raises(OSError, match="No space left"):
        (temporary / "ballast").write_bytes(bytes(8192))
    folder = disk / "runs"
    train(folder, 2)
    before = good(home(folder))
    for left in range(0, 32768, 4096):  # the disk fills up in this file or that
        (disk / "ballast").write_bytes(b"")
        with open(disk / "ballast", "ab", buffering=0) as file:
            while os.statvfs(disk).f_bfree * 4096 > left:
                file.write(bytes(4096))
        with pytest.raises(OSError, match="No space left") as raised:
            train(folder, 3)
        print(left, raised.value, raised.value.__notes__)
        assert left == 0 or any(str(at(folder, 3)) in note for note in raised.value.__notes__)
        assert (good(home(folder)), debris(folder)) == (before, [])
    (disk / "ballast").unlink()
    train(folder, 4)
    assert (steps(folder), debris(folder)) == ([4, 3], [])
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(OSError, match="Read-only file system"):
        train(folder, 5)
    assert steps(folder) == [4, 3]
    print("all of it")


# B7 TMPDIR ------------------------------------------------------------------------------


def train_with(temporary, folder):
    os.environ["TMPDIR"], tempfile.tempdir = str(temporary), None
    with watching(temporary, print, print):
        train(folder, 3)
        train(folder, 4)


@pytest.mark.parametrize("kind", ["on another file system", "missing", "a file", "unwritable"])
def test_b7_nothing_is_written_to_tmpdir(kind, base, tmp_path):
    temporary, before = tmp_path / "tmp", None
    if kind == "a file":
        temporary.write_text("not a folder")
    elif kind != "missing":
        temporary.mkdir(mode=0o555 if kind == "unwritable" else 0o755)
        before = temporary.stat().st_mtime_ns  # changes with every name that comes or goes
    code, _, output = run(train_with, temporary, base)
    assert code == 0, output
    assert "Operation" not in output
    assert steps(base) == [4, 3]
    assert (temporary.stat().st_mtime_ns if before else None) == before
    assert list(temporary.glob("*")) == []


# B8, B9, B11 damaged ones ---------------------------------------------------------------


def emptied(path):
    cut_off(path, 0)


def halved(path):
    cut_off(path, 0.5)


def shortened(path):
    cut_off(path, path.stat().st_size - 1)


def removed(path):
    path.unlink()


@pytest.mark.parametrize("damage", [emptied, halved, shortened, removed])
def test_b8_of_a_damaged_one_file_and_reason_are_named(damage, base, memory, caplog):
    before = good(home(base))
    for name in FILES:
        folder = copied(base, memory / name)
        caplog.clear()
        damage(at(folder, 2) / name)
        path, state = storage.newest_good(home(folder), lambda path: unpack(path, 0))
        assert (path, digest(state)) == (at(folder, 1), before[1])
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        reason = "cannot be read: No such file" if damage is removed else ""
        assert f"{at(folder, 2)}: {name} {reason}" in record.message
        if name != "manifest.json" and damage is not removed:
            assert f"{name} has {(at(folder, 2) / name).stat().st_size} bytes, and was written with" in record.message


@pytest.mark.parametrize("damage", [emptied, removed])
def test_b8_training_goes_on_from_the_older_one_and_ends_the_same(damage, base, memory, caplog):
    end = weights(train(copied(base, memory / "whole"), 4))
    damage(at(base, 2) / "optim.safetensors")
    assert weights(train(base, 4)) == end
    assert f"going back to {at(base, 1)}, because newer checkpoints are damaged" in caplog.text
    assert steps(base) == [4, 3]


def test_b8_what_is_there_besides_is_ignored(base, caplog):
    (at(base, 2) / "notes.txt").write_text("mine")
    (at(base, 2) / "more").mkdir()
    (home(base) / "step-9").mkdir()
    path, _ = storage.newest_good(home(base), lambda path: unpack(path, 0))
    assert path == at(base, 2)
    train(base, 4)
    assert steps(base) == [4, 3]
    assert [record for record in caplog.records if "damaged" in record.message or "removed" in record.message] == []


@pytest.mark.parametrize("flips", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_b9_every_flipped_bit_is_found(flips, base):
    chance, before, path = random.Random(flips), good(home(base)), at(base, 2)
    sizes = [(path / name).stat().st_size for name in FILES]
    found, pages = 0, 0
    for count in range(flips + flips // 5):
        (name,) = chance.choices(FILES, sizes) if count % 2 else [FILES[count // 2 % len(FILES)]]
        whole = (path / name).read_bytes()
        where = flip_bit(path / name, chance) if count < flips else zero_page(path / name, chance)
        if (path / name).read_bytes() == whole:  # a page of zeros
            continue
        pages += count >= flips
        taken, state = storage.newest_good(home(base), lambda path: unpack(path, 0))
        assert (taken, digest(state)) == (at(base, 1), before[1]), where
        found += 1
        (path / name).write_bytes(whole)
    assert found == flips + pages
    assert pages > 0
    assert good(home(base)) == before
    print(f"B9: {flips} bits and {pages} pages, all found")


@pytest.mark.parametrize("stage", ["train", "validate"])
def test_b11_where_none_is_good_nothing_starts(stage, base):
    (at(base, 1) / "manifest.json").unlink()
    flip_bit(at(base, 2) / "model.safetensors", random.Random(0))
    before = sorted(path for path in base.rglob("*"))
    trainer = tiny_trainer([Checkpoint()], runs_folder=str(base), resume=True)
    reasons = rf"(?s)no checkpoint can be used.*{at(base, 2)}: model.*SHA-256.*{at(base, 1)}: manifest.*No such file"
    with pytest.raises(CheckpointError, match=reasons):
        getattr(trainer, stage)()
    assert trainer.module.seen == []
    assert sorted(path for path in base.rglob("*")) == before


def test_b11_what_a_run_under_way_removes_meanwhile_is_not_taken_for_damaged(base, caplog):
    """While the newest is read, another job saves two more and removes it."""

    def use(path):
        if steps(base) == [2, 1]:
            train(base, 4)
        return unpack(path, 0)

    caplog.clear()
    assert storage.newest_good(home(base), use)[0] == at(base, 4)
    assert "damaged" not in caplog.text


# B12 folders that cannot be read --------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_b12_a_folder_that_cannot_be_listed_is_not_an_empty_one(number, base, monkeypatch):
    def listdir(path):
        if os.fspath(path) == str(home(base)):
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    real = os.listdir
    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", listdir)
        trainer = tiny_trainer([Checkpoint()], runs_folder=str(base), resume=True)
        with pytest.raises(OSError, match=rf"{os.strerror(number)}: '{home(base)}'"):
            trainer.train()
    assert trainer.module.seen == []
    assert steps(base) == [2, 1]


@pytest.mark.parametrize(
    "closed",
    [
        "checkpoints",
        "run-1",
        "runs",
    ],
)
def test_b12_a_folder_that_may_not_be_read(closed, base, memory):
    if memory.parent != Path("/dev/shm"):
        pytest.skip("the folder of this test must be one that everybody may enter")
    memory.chmod(0o755)
    folder = {"checkpoints": home(base), "run-1": base / "run-1", "runs": base}[closed]
    for path in (base, *base.rglob("*")):
        path.chmod(0o777)
    folder.chmod(0o333 if closed == "runs" else 0o000)
    code, value, output = run(train_as_nobody, base)
    folder.chmod(0o755)
    assert (code, value) != (0, None), output
    assert "Permission denied" in (value[1] if value else output)
    assert str(folder) in (value[1] if value else output)
    assert [path.name for path in base.iterdir()] == ["run-1"]
    assert steps(base) == [2, 1]


@pytest.mark.parametrize("named", ["", "run-1", "run-1/checkpoints", "run-1/checkpoints/step-000000000002"])
def test_b12_a_mount_that_is_missing(named, base, memory):
    shutil.move(base, memory / "elsewhere")
    with pytest.raises(ValueError, match=r"is no folder of a run"):
        train(base, 4, resume=str(base / named))
    assert not base.exists()


# B13 one step twice ---------------------------------------------------------------------


def contents(path):
    return {name: ((path / name).stat().st_ino, (path / name).read_bytes()) for name in FILES}


def test_b13_a_good_one_stays_when_its_step_is_saved_again(base):
    before = contents(at(base, 2))
    train(base, 2, resume=str(at(base, 1)))
    assert contents(at(base, 2)) == before


def train_again_and_die(folder, nth):
    with at_file(home(folder), "* *", kill, nth):
        train(folder, 2)


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_b13_a_bad_one_is_replaced_and_never_by_a_mix(every, base, memory):
    """Killed at any place of the replacement: what has that name is the bad one, nothing, or whole."""
    flip_bit(at(base, 2) / "optim.safetensors", random.Random(0))
    bad, witness = contents(at(base, 2)), Witness()
    whole = copied(base, memory / "whole")
    done = operations_of(home(whole), train, whole, 2, witness)
    assert good(home(whole))[2] == witness.digests[2]
    end, seen = digest(unpack(at(whole, 2), 0)["module"]), set()
    for numbers in pairs(range(2, len(done) + 1, every)):
        folders = [copied(base, memory / str(nth)) for nth in numbers]
        children = [Child(train_again_and_die, *each) for each in zip(folders, numbers, strict=True)]
        for folder, child in zip(folders, children, strict=True):
            assert child.wait().code == -signal.SIGKILL
            path = at(folder, 2)
            if not path.exists():
                seen.add("nothing")
            elif storage.is_good(path):
                seen.add("whole")
                assert digest(unpack(path, 0)["module"]) == end
            else:
                seen.add("bad")
                assert {name: content for name, (_, content) in contents(path).items()} == {
                    name: content for name, (_, content) in bad.items()
                }
            train(folder, 3)
            assert digest(unpack(path, 0)["module"]) == end
            assert (steps(folder), debris(folder)) == ([3, 2], [])
    assert seen >= {"bad", "nothing"}


# B15 two jobs ---------------------------------------------------------------------------


def save_until(folder, step, megabytes=1):
    trainer = big_trainer(folder, megabytes)
    trainer.options.max_steps = step
    trainer.train()


def test_b15_a_second_job_is_refused_and_a_killed_one_stops_nobody(memory):
    first = Child(save_for_ever, memory, 1, {})
    wait_for(lambda: "saved 2\n" in first.output)
    refused = run(save_until, memory, 10**6)
    assert refused.code == 1
    assert f"LockedError: {memory / 'run-1'} belongs to another job: process {first.pid} on" in refused.output
    told = len(first.output)
    wait_for(lambda: len(first.output) > told)  # it was not disturbed
    first.signal(signal.SIGKILL)
    first.wait()
    assert (memory / "run-1/.lock").exists()
    last = steps(memory)[0]
    third = run(save_until, memory, last + 2)
    assert third.code == 0, third.output
    assert steps(memory) == [last + 2]
    assert debris(memory) == []


def test_b15_of_two_at_once_one_is_refused(memory):
    save_until(memory, 1)
    children = [Child(save_for_ever, memory, 1, {}) for _ in range(2)]
    try:
        wait_for(lambda: sum("belongs to another job" in child.output for child in children) == 1)
        wait_for(lambda: sum(bool(re.search(r"(?m)^saved", child.output)) for child in children) == 1)
    finally:
        for child in children:
            child.signal(signal.SIGKILL)
        outcomes = [child.wait() for child in children]
    assert sum("LockedError" in outcome.output for outcome in outcomes) == 1
    assert storage.is_good(storage.listed(home(memory))[0])


def test_b15_a_run_that_is_locked_is_not_even_read(base):
    """Whoever has the lock removes what is read, and nobody shall be told to remove what only seems to be damaged."""
    lock = Lock(base / "run-1")
    for step in (1, 2):
        (at(base, step) / "manifest.json").unlink()
    with pytest.raises(LockedError, match="belongs to another job"):
        train(base, 4)
    lock.release()
    with pytest.raises(CheckpointError, match="no checkpoint can be used"):
        train(base, 4)


def test_b15_the_lock_of_another_host_holds(base):
    lock = base / "run-1/.lock"
    lock.mkdir()
    (lock / "owner.json").write_text(
        json.dumps({"pid": 1, "host": "elsewhere", "boot": "b", "started": "1", "since": "t"})
    )
    refused = run(train, base, 4)
    assert refused.code == 1
    assert "belongs to another job: process 1 on elsewhere (boot b), since t" in refused.output
    assert f"If it is surely gone, remove {lock}" in refused.output
    assert socket.gethostname() != "elsewhere"
    assert steps(base) == [2, 1]
    shutil.rmtree(lock)
    train(base, 4)
    assert (steps(base), debris(base)) == ([4, 3], [])


# B17 what cannot be stored --------------------------------------------------------------


class Keeper(CallbackInterface):
    def __init__(self, kept):
        self.kept = kept

    def get_state(self):
        return {"deep": [self.kept]}

    def update_state(self, state):
        pass


UNSTORABLE = {
    "function": lambda: 0,
    "module": torch.nn.Linear(1, 1),
    "class": Keeper,
    "generator": (_ for _ in ()),
    "sparse tensor": torch.eye(2).to_sparse(),
    "object": object(),
    "torch generator": torch.Generator(),
}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("kept", UNSTORABLE.values(), ids=UNSTORABLE)
def test_b17_what_cannot_be_stored_is_refused_before_the_first_step(kept, asynchronous, memory):
    plugins = {"checkpoint": Checkpoint("epoch", asynchronous=asynchronous), "ema": Keeper(kept)}
    trainer = tiny_trainer(plugins, runs_folder=str(memory))
    with pytest.raises(TypeError, match=r"^plugins\.ema\.deep\.0 is "):
        trainer.train()
    assert trainer.module.seen == []
    assert list(memory.iterdir()) == []


if __name__ == "__main__":
    on_small_disks(Path(sys.argv[1]))
