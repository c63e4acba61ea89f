"""`hookline doctor`: each line is provoked by a real setting of the machine, the installation or the configuration."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import DataLoader, Dataset

from hookline.cli import machine, main
from hookline.cli.loading import Loading, advice
from hookline.cli.machine import usable_cores
from hookline.testing.tiny import PlainModule

CORES = usable_cores()


class Slowly(Dataset):
    """Takes most of a step for each sample."""

    def __init__(self, inputs, targets, seconds):
        self.inputs, self.targets, self.seconds = inputs, targets, seconds

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        if self.seconds:
            time.sleep(self.seconds)
        return self.inputs[index], self.targets[index], index


class Module(PlainModule):
    """Has a loader that can be slow, and a step that can be."""

    def __init__(self, seconds=0.0, workers=0, works=0.0, fails=False):
        super().__init__(samples=320)
        self.seconds, self.workers, self.works, self.fails = seconds, workers, works, fails

    def train_step(self, global_step, batch, device):
        time.sleep(self.works)
        if self.fails:
            raise RuntimeError("no step can be done")
        return super().train_step(global_step, batch, device)

    def get_train_dataloader(self, sampler, batch_size):
        data = Slowly(self.inputs, self.targets, self.seconds)
        return DataLoader(data, batch_size, sampler=sampler(data), num_workers=self.workers)


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def examined(words=(), plugins=None, code=0, trainer=None, **module):
        node = {"_target_": f"{__name__}.Module", **module}
        options = {"train_batch_size": 8, "device": "cpu", **(trainer or {})}
        Path("run.yaml").write_text(yaml.safe_dump({"module": node, "trainer": options, "plugins": plugins or {}}))
        before = sorted(tmp_path.rglob("*"))
        assert main(["doctor", "run.yaml", "--json", *words]) == code
        assert sorted(tmp_path.rglob("*")) == before
        found = json.loads(capsys.readouterr().out)
        return {line["about"]: (line["level"], line["text"]) for line in found}

    return examined


def test_all_is_well_where_it_is(report):
    found = report(plugins={"checkpoint": {}, "clip": {}, "progress": {}}, works=0.05)
    assert found["torch"] == ("ok", torch.__version__)
    assert found["data loading"][0] == "ok"
    assert found["plugins"][0] == "ok"
    assert "3 can be imported: hookline-checkpoint " in found["plugins"][1]
    assert found["run folder"][0] in ("ok", "warning")
    assert "problem" not in {level for level, _ in found.values()}
    assert "batch size" not in found


def test_a_slow_data_set_without_workers(report):
    level, text = report(seconds=0.005)["data loading"]
    assert level == "warning"
    assert int(text.partition("%")[0]) > 50
    if CORES > 1:
        assert f"DataLoader(num_workers={CORES}) instead of 0" in text or "DataLoader(num_workers=" in text
    else:
        assert "make loading cheaper" in text


def test_workers_that_start_anew_in_each_epoch_and_are_more_than_cores(report):
    found = report(workers=CORES + 1)
    level, text = found["workers"]
    assert level == "warning"
    assert "trainer.keep_loaders=true" in text
    assert f"{CORES + 1} workers share {CORES} usable core(s)" in found["num_workers"][1]
    assert "workers" not in report(workers=1, trainer={"keep_loaders": True})


def test_the_batch_size_that_nobody_chose(report):
    level, text = report(trainer={"train_batch_size": 1, "max_steps": 2}, plugins={"clip": {}})["batch size"]
    assert (level, "its default" in text) == ("warning", True)


def test_a_run_that_is_too_short_to_tell(report):
    assert report(trainer={"max_steps": 2})["data loading"][0] == "warning"


def test_training_that_fails_is_a_problem(report):
    level, text = report(fails=True, code=1)["training"]
    assert level == "problem"
    assert "RuntimeError: no step can be done" in text


def test_a_configuration_that_cannot_be_read_is_a_problem_and_the_rest_is_looked_at(report):
    found = report(["plugins.clip.max_nrm=1"], code=1)
    assert found["configuration"][0] == "problem"
    assert "plugins.clip.max_nrm: unknown key" in found["configuration"][1]
    assert found["torch"][0] == "ok"


def test_a_run_folder_that_cannot_be_made_is_a_problem(report, tmp_path):
    (tmp_path / "taken").write_text("")
    found = report(trainer={"runs_folder": "taken/runs"}, code=1)
    assert found["run folder"] == ("problem", f"taken/runs cannot be made: {tmp_path / 'taken'} is a file")


def test_a_disk_without_room(monkeypatch, tmp_path):
    for level, least in (("problem", "NONE_LEFT"), ("warning", "LITTLE")):
        monkeypatch.setattr(machine, least, 1 << 62)
        monkeypatch.setattr(machine, "NONE_LEFT", machine.NONE_LEFT if least == "NONE_LEFT" else 0)
        (found,) = machine.place("run folder", tmp_path)
        assert found.level == level


def test_more_threads_than_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(CORES + 1)
    try:
        found = next(iter(machine.cores()))
    finally:
        torch.set_num_threads(before)
    assert found.level == "warning"
    assert f"OMP_NUM_THREADS={CORES}" in found.text


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert {found.level for found in machine.devices() if found.about == "torch.compile"} == {"warning"}


@pytest.mark.parametrize(
    ("seen", "about", "said"),
    [
        ({"device": "cuda", "workers": 2, "cores": 8}, "pin_memory", "DataLoader(pin_memory=True)"),
        ({"device": "cuda", "memory": 0.1, "pinned": True}, "batch size", "10% of the device's memory"),
        ({"waits": [0.9] * 5, "workers": 0, "cores": 8}, "data loading", "num_workers=8) instead of 0"),
        ({"waits": [0.75] * 5, "workers": 0, "cores": 8}, "data loading", "num_workers=3) instead of 0"),
        ({"waits": [0.5] * 5, "workers": 2, "cores": 8}, "data loading", "num_workers=4) instead of 2"),
        ({"waits": [0.5] * 5, "workers": 2, "cores": 2}, "data loading", "2 workers and 2 usable core(s)"),
        ({"waits": [0.5] * 5, "workers": None}, "data loading", "not torch's DataLoader"),
    ],
)
def test_advice_for_machines_that_are_not_this_one(seen, about, said):
    given = {"steps": [1.0] * 5, "waits": [0.0] * 5, "batch_size": 8, **seen}
    assert said in {found.about: found.text for found in advice(Loading(**given))}[about]
    well = {"steps": [1.0] * 5, "waits": [0.1] * 5, "batch_size": 8, "workers": 1, "pinned": True, "cores": 8}
    assert [found.level for found in advice(Loading(**well))] == ["ok"]


BROKEN = {
    "a": ("1.0", "twice = nowhere:Twice", ""),
    "b": ("1.0", "twice = nowhere:Twice\nleaves = leaves:Leaves", ""),
    "c": ("1.0", "needs = hookline_clip:Clip", "Requires-Dist: torch>=99"),
}


def broken(folder):
    """Write the metadata of distributions that bring what cannot be used."""
    for name, (version, points, more) in BROKEN.items():
        home = folder / f"broken_{name}-{version}.dist-info"
        home.mkdir()
        (home / "METADATA").write_text(f"Metadata-Version: 2.1\nName: broken-{name}\nVersion: {version}\n{more}\n")
        (home / "entry_points.txt").write_text(f"[hookline.plugins]\n{points}\n")
    (folder / "leaves.py").write_text("import sys\nsys.exit(0)\n")


@pytest.mark.plugins
def test_plugins_that_cannot_be_used_are_problems_and_all_others_are_looked_at(tmp_path):
    broken(tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(tmp_path)])}
    command = [sys.executable, "-m", "hookline", "doctor"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "problem plugins two distributions bring plugins named 'twice': broken-a 1.0 and broken-b 1.0" in lines
    problems = [line for line in lines if line.startswith("problem")]
    assert len([line for line in problems if "plugin leaves" in line]) == 1
    assert len([line for line in problems if "plugin needs" in line and "torch>=99" in line]) == 1
