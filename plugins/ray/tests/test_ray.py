"""`hookline ray fit` on a cluster of this machine, against `hookline fit --nproc`; and what is said without one."""

import importlib.util
import os
import signal
import subprocess
import sys
import time

import pytest

from hookline.testing import check_plugin, tiny_trainer
from hookline_ray import STORE, Ray
from hookline_ray.commands import main

HERE = importlib.util.find_spec("ray") is not None
needed = pytest.mark.skipif(not HERE, reason="ray is not installed: `nox -s ray` brings it")
RUN = """
module: {_target_: hookline.testing.TinyModule, samples: 48}
trainer: {epochs: 2, train_batch_size: 8, val_batch_size: 8, device: cpu, run_name: run}
plugins: {ddp: {}, checkpoint: {every: 4 steps}}
"""
FAULT = '''
import os, signal
from dataclasses import dataclass
from pathlib import Path
from hookline import CallbackInterface, hookimpl

@dataclass(eq=False)
class Fault(CallbackInterface):
    """Do something at a step."""

    does: str = ""
    at: int = 0

    @hookimpl
    def on_end_train_step(self, trainer, global_step):
        if global_step != self.at:
            return
        if self.does == "stop":
            trainer.stop("told to", status="preempted", exit_code=143)
        elif trainer.rank == 1 and self.does == "raise":
            raise ZeroDivisionError("of rank 1")
        elif trainer.rank == 1 and self.does == "kill" and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
'''


@pytest.fixture(name="start")
def start_(tmp_path):
    """Give what starts the command in a folder of its own, where a home is as well: Ray writes there."""
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "fault.py").write_text(FAULT)
    (tmp_path / "home").mkdir()
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    started = []

    def start(*words):
        command = [sys.executable, "-m", "hookline", *words]
        output = subprocess.PIPE
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with process:  # waits, and closes what it said
            process.kill()


def fault(does, at):
    return f"plugins.fault={{_plugin_: fault.Fault, does: {does}, at: {at}}}"


def weights(folder):
    return [(folder / "runs" / run / "checkpoints" / "step-000000000012" / "model.safetensors").read_bytes()
            for run in ("run-1", "run-2")]  # fmt: skip


ON_RAY = ("ray", "fit", "run.yaml", "--workers", "2")


@needed
@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
@pytest.mark.timeout(600)
def test_the_bits_are_those_of_processes_of_this_machine_also_after_a_kill(start, tmp_path):
    alone = start("fit", "run.yaml", "--nproc", "2")
    said, _ = alone.communicate(timeout=500)
    assert alone.returncode == 0, said
    on_ray = start(*ON_RAY, "--max-failures", "1", fault("kill", 6))
    said, _ = on_ray.communicate(timeout=500)
    assert on_ray.returncode == 0, said
    assert (tmp_path / "killed").exists()
    assert f"started anew (attempt 2): going on with {tmp_path}/runs/run-2" in said
    assert f"resumed from {tmp_path}/runs/run-2/checkpoints/step-000000000004" in said
    one, other = weights(tmp_path)
    assert one == other
    reported = [line for line in said.splitlines() if "TrainingReport" in line]
    assert any("'val_loss'" in line and "'step': 12" in line for line in reported)


@needed
@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
@pytest.mark.timeout(600)
def test_what_a_worker_raises_is_told(start):
    process = start(*ON_RAY, fault("raise", 3))
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 1
    assert 'raise ZeroDivisionError("of rank 1")' in said
    assert "raised in on_end_train_step by plugin 'fault' (fault)" in said


@needed
@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
@pytest.mark.timeout(600)
def test_a_preempted_run_ends_with_its_code_and_ctrl_c_with_its_own(start, tmp_path):
    process = start(*ON_RAY, fault("stop", 2))
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 143, said
    assert len(list((tmp_path / "runs" / "run-1" / "checkpoints").glob("step-*"))) == 2

    endless = start(*ON_RAY, "trainer.epochs=1000000")
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("runs/run-2/checkpoints/step-*")):
        assert time.monotonic() < deadline
        assert endless.poll() is None
        time.sleep(0.1)
    endless.send_signal(signal.SIGINT)
    said, _ = endless.communicate(timeout=120)
    assert endless.returncode == 130
    assert said.strip().endswith("hookline: interrupted")


@needed
@pytest.mark.plugins
def test_a_wrong_configuration_is_said_before_anything_starts(start):
    process = start(*ON_RAY, "trainer.epoch=3")
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 2
    assert "unknown key" in said
    assert "Ray instance" not in said


# Without a cluster --------------------------------------------------------------------


def test_contract():
    check_plugin(Ray)


def test_elsewhere_it_hears_nothing(monkeypatch):
    assert not tiny_trainer([Ray()]).plugins.heard["on_end_validation"]
    monkeypatch.setenv(STORE, "localhost:1")
    assert tiny_trainer([Ray()]).plugins.heard["on_end_validation"]


def test_what_to_install_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"cannot be imported \(.*\): `pip install 'ray\[train\]>=2.60'`"):
        main(["fit", "run.yaml", "--workers", "2"])


@pytest.mark.parametrize(("words", "message"), [
    (["--workers", "0"], r"--workers=0 must be at least 1"),
    (["--workers", "1", "--max-failures", "-1"], r"--max-failures=-1 at least 0"),
])  # fmt: skip
def test_bad_numbers(words, message):
    with pytest.raises(ValueError, match=message):
        main(["fit", "run.yaml", *words])


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--help"])
    assert end.value.code == 0
    assert "hookline ray fit run.yaml -p ddp --workers 2" in capsys.readouterr().out
