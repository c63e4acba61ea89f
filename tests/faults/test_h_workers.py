"""Row H of the fault catalogue: loading workers that die, raise or hang, and what a resume loads.

The scenarios that need a process of their own run this file as a program.
"""

import faulthandler
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import uuid
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from hookline import CallbackInterface, Stage, hookimpl
from hookline.testing import TinyModule, tiny_trainer

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and /dev/shm")


class Samples(Dataset):
    """48 samples, and something that happens when the 18th is loaded."""

    def __init__(self, happens=lambda: None, ballast=0):
        self.happens, self.ballast = happens, ballast
        self.loaded = torch.zeros(48, dtype=torch.int64).share_memory_()

    def __len__(self):
        return 48

    def __getitem__(self, index):
        self.loaded[index] += 1
        inputs = torch.full((8,), float(index))
        if index == 17:
            inputs = self.happens() or inputs
        return inputs, torch.ones(1), torch.tensor(index), torch.empty(self.ballast)


class Module(TinyModule):
    def __init__(self, dataset, workers=2, **loader):
        super().__init__()
        self.dataset, self.loader = dataset, {"num_workers": workers, **loader}

    def train_step(self, global_step, batch, device):
        return super().train_step(global_step, batch[:3], device)

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.dataset, batch_size, sampler=sampler(self.dataset), **self.loader)

    def get_val_dataloaders(self, sampler, batch_size):
        return None


def trainer_of(dataset, plugins=(), workers=2, loader=(), **options):
    return tiny_trainer(plugins, Module(dataset, workers, **dict(loader)), **{"epochs": 1, **options})


def raised(trainer, errors, match):
    """Train, which must raise; return the error and the text that a user sees."""
    with pytest.raises(errors, match=match) as caught:
        trainer.train()
    text = "".join(traceback.format_exception(caught.value))
    # torch's loader takes 5 s a worker to end if it is found by the garbage collector instead of freed at once.
    traceback.clear_frames(caught.tb)
    return caught.value, text


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.02)


def start(scenario, *arguments, **environment):
    """Run a scenario of this file as a process of its own."""
    command = [sys.executable, __file__, scenario, *arguments]
    return subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)


def ended(process, seconds):
    """Return what a process wrote to stderr; it must end by itself."""
    try:
        return process.communicate(timeout=seconds)[1]
    finally:
        process.kill()


# H1 a worker that dies, raises, or returns what cannot be collated --------------------------


class Dies:
    """Leaves its process id in a file, and is killed."""

    def __init__(self, path):
        self.path = Path(path)

    def __call__(self):
        self.path.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise KeyError("no such image")


class NotATensor(Samples):
    def __getitem__(self, index):
        inputs, *others = super().__getitem__(index)
        return None if index == 17 else inputs, *others


@pytest.mark.slow
def test_h1_a_worker_that_is_killed_ends_the_run_at_once(tmp_path):
    process = start("die", str(tmp_path / "pid"))
    written = ended(process, 30)
    assert time.time() - (tmp_path / "pid").stat().st_mtime < 5
    assert process.returncode == 1, written
    assert re.search(rf"RuntimeError: DataLoader worker \(pid.* {(tmp_path / 'pid').read_text()}\)", written), written


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [8, 12])
def test_h1_an_error_while_loading_says_for_which_samples(workers, size):
    trainer = trainer_of(Samples(fail), workers=workers, train_batch_size=size)
    _, text = raised(trainer, KeyError, "no such image")
    place = r" \(loading worker [01]\)" if workers else "\n"
    more = " and 4 more" if size == 12 else ""
    named = re.search(rf"while loading samples \[([\d, ]+){more}\]{place}", text)
    assert named, text
    indices = [int(index) for index in named[1].split(", ")]
    assert len(indices) == 8
    assert 17 in indices or more
    assert not {*indices} & {index for batch in trainer.module.seen for index in batch}


@pytest.mark.parametrize("workers", [0, 2])
def test_h1_a_sample_of_a_bad_type_is_named_with_its_batch(workers):
    trainer = trainer_of(NotATensor(), workers=workers)
    _, text = raised(trainer, (TypeError, AttributeError), "NoneType")
    assert re.search(r"while loading samples \[.*\b17\b.*\]", text)


def test_h1_a_loader_without_batches_names_its_sample():
    module = Module(Samples(fail), workers=0)
    module.get_train_dataloader = lambda sampler, batch_size: DataLoader(module.dataset, None, sampler=range(48))
    loader = tiny_trainer((), module).loaders.get(Stage.TRAIN)["default"]
    with pytest.raises(KeyError) as caught:
        list(loader)
    assert caught.value.__notes__ == ["while loading samples [17]"]


# H2 a worker that hangs ---------------------------------------------------------------------


class Hangs:
    """Waits for a file."""

    def __init__(self, path):
        self.path = Path(path)

    def __call__(self):
        wait_until(self.path.exists, 60)


def test_h2_a_worker_that_hangs_writes_its_stack_and_ends_the_run(tmp_path, monkeypatch):
    trainer = trainer_of(Samples(Hangs(tmp_path / "released")), loader_timeout="1 s")
    with open(tmp_path / "stderr", "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        with pytest.raises(RuntimeError, match="DataLoader timed out after 1 seconds") as caught:
            trainer.train()
    wait_until(lambda: "in wait_until" in (tmp_path / "stderr").read_text(), 5)
    (tmp_path / "released").touch()
    traceback.clear_frames(caught.tb)  # as above
    written = (tmp_path / "stderr").read_text()
    assert re.search(r"still loading samples \[.*\b17\b.*\] \(loading worker [01]\); trainer.loader_timeout", written)
    assert re.search(r"File .*test_h_workers.py\", line \d+ in __getitem__", written)


def test_h2_where_stderr_is_no_file_there_is_the_error_alone(tmp_path, monkeypatch):
    trainer = trainer_of(Samples(Hangs(tmp_path / "released")), loader_timeout="1 s")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", io.StringIO())
        with pytest.raises(RuntimeError, match="DataLoader timed out after 1 seconds") as caught:
            trainer.train()
    (tmp_path / "released").touch()
    traceback.clear_frames(caught.tb)  # as above


@pytest.mark.slow
def test_h2_a_process_with_a_worker_that_hangs_ends_with_an_error(tmp_path):
    began = time.monotonic()
    process = start("hang", str(tmp_path / "never"))
    written = ended(process, 30)
    assert time.monotonic() - began < 15
    assert process.returncode == 1, written
    assert "RuntimeError: DataLoader timed out after 2 seconds" in written
    assert 0 < written.index("in wait_until") < written.index("RuntimeError: DataLoader timed out")


def test_h2_workers_of_a_process_where_faulthandler_is_armed_do_not_hang(tmp_path):
    with open(tmp_path / "dump", "w") as dump:
        faulthandler.dump_traceback_later(60, file=dump)
        try:
            trainer = trainer_of(Samples(), loader_timeout="10 s")
            trainer.train()
        finally:
            faulthandler.cancel_dump_traceback_later()
    assert trainer.global_step == 6


@pytest.mark.parametrize(
    ("workers", "own", "option", "timeout"),
    [(2, 0, "10 min", 600), (2, 0, "5 s", 5), (2, 30, "5 s", 30), (2, 0, None, 0), (0, 0, "10 min", 0)],
)
def test_h2_every_loader_with_workers_has_a_timeout(workers, own, option, timeout):
    module = Module(Samples(), workers, timeout=own)
    module.get_val_dataloaders = module.get_train_dataloader
    trainer = tiny_trainer((), module, loader_timeout=option)
    for stage in (Stage.TRAIN, Stage.VAL):
        assert trainer.loaders.get(stage)["default"].timeout == timeout


def test_h2_the_default_is_not_for_ever():
    assert trainer_of(Samples()).loaders.get(Stage.TRAIN)["default"].timeout == 600


@pytest.mark.parametrize("timeout", ["10 steps", "soon", "0 s"])
def test_h2_a_timeout_that_is_no_duration(timeout):
    with pytest.raises(ValueError, match=f"{timeout!r} is (not a duration|not a cadence); write one like"):
        trainer_of(Samples(), loader_timeout=timeout)


# H3 the main process is killed --------------------------------------------------------------


class Tells(CallbackInterface):
    """Writes where training stands."""

    def __init__(self, path):
        self.path = Path(path)

    @hookimpl
    def on_boundary(self, trainer):
        if trainer.epoch and trainer.position == 3:
            self.path.write_text(str(trainer.global_step))


def alive(marker):
    """Return the processes that have a mark in their environment."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker.encode() in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


@linux
@pytest.mark.slow
def test_h3_when_main_is_sigkilled_no_worker_and_no_shared_memory_is_left(tmp_path):
    marker, before = uuid.uuid4().hex, {*os.listdir("/dev/shm")}
    process = start("train", str(tmp_path / "told"), HOOKLINE_TEST=marker)
    try:
        wait_until((tmp_path / "told").exists)
        pids = alive(marker)
        assert len(pids) >= 3
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()  # returns when the last of them has closed its stderr
    wait_until(lambda: not alive(marker), 10)
    left = {*os.listdir("/dev/shm")} - before
    assert not [name for name in left if {*re.findall(r"\d+", name)} & {*map(str, pids)}]


# H4 no shared memory ------------------------------------------------------------------------


def allow_small_files_only():
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@linux
def test_h4_a_worker_that_gets_no_shared_memory_raises():
    trainer = trainer_of(Samples(allow_small_files_only, ballast=100_000))
    began = time.monotonic()
    _, text = raised(trainer, RuntimeError, "unable to .*/torch_.*File too large")
    Path("/dev/shm", re.search(r"/(torch_\w+)", text)[1]).unlink()  # torch leaves it there, empty
    assert time.monotonic() - began < 5
    assert "(loading worker" in text


@linux
@pytest.mark.slow
def test_h4_a_full_dev_shm_is_an_error_that_says_so():
    mount = 'mount -t tmpfs -o size=1M none /dev/shm && exec "$@"'
    small = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "-"]
    if shutil.which("unshare") is None or subprocess.run([*small, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system does not let the test mount a small /dev/shm of its own")
    began = time.monotonic()
    done = subprocess.run(
        [*small, sys.executable, __file__, "fill"], capture_output=True, text=True, timeout=60, check=False
    )
    assert time.monotonic() - began < 20
    assert done.returncode == 1, done.stderr
    assert "shared memory" in done.stderr
    assert "No space left on device" in done.stderr or "Bus error" in done.stderr, done.stderr


# H5 a resume late in an epoch ---------------------------------------------------------------


@pytest.mark.plugins
@pytest.mark.parametrize("workers", [0, 2])
def test_h5_a_resume_at_ninety_percent_loads_nothing_that_it_skips(workers, tmp_path):
    class Breaks(CallbackInterface):
        @hookimpl
        def on_begin_optimizer_step(self, trainer):
            if trainer.global_step == 22:
                raise KeyboardInterrupt("here")

    options = {"workers": workers, "train_batch_size": 2, "runs_folder": str(tmp_path)}
    checkpoint = {"checkpoint": {"every": "1 steps"}}
    whole = trainer_of(Samples(), **options)
    whole.train()
    broken = trainer_of(Samples(), {**checkpoint, "breaks": Breaks()}, **options)
    raised(broken, KeyboardInterrupt, "here")
    dataset = Samples()
    resumed = trainer_of(dataset, checkpoint, resume=True, **options)
    resumed.train()
    assert resumed.module.seen == whole.module.seen[22:]
    assert dataset.loaded.nonzero().flatten().tolist() == sorted(
        index for batch in resumed.module.seen for index in batch
    )
    assert dataset.loaded.sum() == 4


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "hang":
        trainer_of(Samples(Hangs(sys.argv[2])), loader_timeout="2 s").train()
    elif sys.argv[1] == "die":
        # One batch: were another of this worker's on its way, torch could also raise ConnectionResetError.
        trainer_of(Samples(Dies(sys.argv[2])), train_batch_size=48).train()
    elif sys.argv[1] == "train":
        kept = {"persistent_workers": True}
        trainer_of(Samples(), [Tells(sys.argv[2])], loader=kept, keep_loaders=True, epochs=10**9).train()
    else:
        trainer_of(Samples(ballast=1_000_000)).train()
