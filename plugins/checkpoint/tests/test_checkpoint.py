"""What stands on the disk, what is taken of it, what is refused, and what is removed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from hookline import CallbackInterface, ModuleInterface, Trainer, hookimpl
from hookline_checkpoint import Checkpoint, CheckpointError, storage, writing
from hookline_checkpoint.layout import unpack

FILES = {
    "model.safetensors",
    "optim.safetensors",
    "state.safetensors",
    "state.json",
    "rank-0000.safetensors",
    "rank-0000.json",
    "manifest.json",
}


class Line(ModuleInterface):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a = torch.nn.Linear(3, 3)
            self.b = torch.nn.Linear(3, 3)
        self.b.weight = self.a.weight  # tied

    def train_step(self, global_step, batch, device):
        return self.b(torch.relu(self.a(batch))).pow(2).mean()

    val_step = train_step

    def get_train_dataloader(self, sampler, batch_size):
        data = torch.arange(24.0).reshape(8, 3)
        return torch.utils.data.DataLoader(data, batch_size, sampler=sampler(data))

    get_val_dataloaders = get_train_dataloader

    def get_optimizers_schedulers(self, steps, epochs):
        return [torch.optim.Adam(self.parameters(), 0.01)], []


class Keeper(CallbackInterface):
    """Keeps something of its own."""

    def __init__(self, kept: Any = None) -> None:
        self.kept = kept

    def get_state(self):
        return {"kept": self.kept}

    def update_state(self, state):
        self.kept = state["kept"]


class Hearer(CallbackInterface):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    @hookimpl
    def on_checkpoint(self, path, kind):
        self.heard.append((path, kind, storage.is_good(path)))


def make(folder: Path, *plugins: Any, module: Any = None, **options: Any) -> Trainer:
    """Return a trainer of 4 steps in 2 epochs, saving each of them unless a `Checkpoint` is among the plugins."""
    if not any(isinstance(plugin, Checkpoint) for plugin in plugins):
        plugins = (Checkpoint("1 step", keep_last=None), *plugins)
    given = {"epochs": 2, "train_batch_size": 4, "val_batch_size": 4, "runs_folder": str(folder / "runs")} | options
    return Trainer(module or Line(), list(plugins), **given)


def trained(folder: Path, *plugins: Any, **options: Any) -> Trainer:
    trainer = make(folder, *plugins, **options)
    trainer.train()
    return trainer


def steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints of run 1, the newest first."""
    return [int(path.name.removeprefix("step-")) for path in storage.listed(folder / "runs/run-1/checkpoints")]


def at(folder: Path, step: int) -> Path:
    return folder / f"runs/run-1/checkpoints/step-{step:012d}"


def flip(path: Path, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


# What is written ----------------------------------------------------------------------


def test_files_and_manifest(tmp_path):
    hearer = Hearer()
    trainer = trained(tmp_path, hearer, Keeper({"é": 1}))
    assert steps(tmp_path) == [4, 3, 2, 1]
    assert {path.name for path in at(tmp_path, 4).iterdir()} == FILES
    assert [(path.name, kind, good) for path, kind, good in hearer.heard] == [
        (f"step-{step:012d}", "checkpoint", True) for step in (1, 2, 3, 4)
    ]
    about = storage.verify(at(tmp_path, 4))
    assert about["format"] == "hookline-checkpoint/1"
    assert (about["step"], about["epoch"], about["world_size"]) == (4, 2, 1)
    assert about["reason"] == "every 1 step, end of training"
    assert about["plugins"] == ["checkpoint", "hearer", "keeper"]
    assert about["versions"]["torch"] == torch.__version__
    assert set(about["files"]) == FILES - {"manifest.json"}
    assert set(json.loads((at(tmp_path, 4) / "manifest.json").read_bytes())) == {"sha256", "body"}
    weights = load_file(at(tmp_path, 4) / "model.safetensors")
    assert set(weights) == {"a.weight", "a.bias", "b.bias"}
    assert torch.equal(weights["a.weight"], trainer.module.a.weight)


def test_nothing_but_safetensors_and_json_and_all_of_it_in_the_run_folder(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "no such folder"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    trained(tmp_path, Keeper({"tensor": torch.ones(2), "bytes": b"\x80\x04."}))
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "runs"}
    assert list(elsewhere.iterdir()) == []
    for path in (tmp_path / "runs").rglob("*"):
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            load_file(path)
        else:
            assert path.is_dir(), path
            assert not path.name.startswith(".")


def test_tied_weights_come_back_tied(tmp_path):
    trained(tmp_path)
    state = unpack(at(tmp_path, 4), 0)
    assert state["module"]["a.weight"] is state["module"]["b.weight"]
    again = make(tmp_path, resume=True)
    again.train()
    assert again.module.a.weight is again.module.b.weight
    assert torch.equal(again.module.a.weight, state["module"]["a.weight"])


def test_cadences(tmp_path):
    trained(tmp_path, Checkpoint(["epoch", "3 steps"]))
    assert steps(tmp_path) == [4, 3, 2]


def test_null_saves_nothing_but_resumes(tmp_path):
    trained(tmp_path, max_steps=1)
    trained(tmp_path, Checkpoint(None), resume=True)
    assert steps(tmp_path) == [1]
    trained(tmp_path / "other", Checkpoint(None))
    assert not (tmp_path / "other").exists()


def test_the_end_of_training_and_whoever_asks_are_served(tmp_path):
    class Asker(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, trainer, global_step):
            if global_step == 1:
                trainer.save("I say so")

    trained(tmp_path, Checkpoint("100 steps"), Asker())
    assert steps(tmp_path) == [4, 1]
    assert storage.verify(at(tmp_path, 1))["reason"] == "I say so"


def test_each_rank_has_its_own_random_states(tmp_path):
    class Two(CallbackInterface):
        """Plays two ranks: what a process group would gather, and where this one stands."""

        def __init__(self, rank: int) -> None:
            self.rank = rank

        @hookimpl
        def get_ranks(self):
            return self.rank, self.rank, 2

        @hookimpl
        def all_gather(self, value):
            other = (
                {"rng": {**value["rng"], "torch": torch.Generator().manual_seed(5).get_state()}}
                if "rng" in value
                else value
            )
            return [value, other]

    trained(tmp_path, Two(0), max_steps=1)
    assert {path.name for path in at(tmp_path, 1).iterdir()} == FILES | {"rank-0001.safetensors", "rank-0001.json"}
    assert torch.equal(unpack(at(tmp_path, 1), 1)["rng"]["torch"], torch.Generator().manual_seed(5).get_state())
    assert "rng" not in unpack(at(tmp_path, 1), 2)  # of a rank that was not there
    trained(tmp_path, Two(1), resume=True, max_steps=2)  # rank 1 reads its own, and leaves the writing to rank 0
    assert steps(tmp_path) == [1]


def test_a_failed_write_changes_nothing(tmp_path):
    def contents():
        yield "model.safetensors", [b"1"]
        raise OSError(28, "No space left on device")

    writing.write(tmp_path, 1, [("a.json", [b"{}"])], {})
    with pytest.raises(OSError, match="No space left"):
        writing.write(tmp_path, 2, contents(), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000001"]


# What is taken ------------------------------------------------------------------------


def test_state_of_plugins_and_module_travels(tmp_path):
    kept = {"tensor": torch.arange(3), "tuple": (1, 2), 3: {4}}
    first = trained(tmp_path, Keeper(kept))
    keeper = Keeper()
    again = make(tmp_path, keeper, resume=True)
    assert again.validate() == first.metrics
    assert keeper.kept["tensor"].tolist() == [0, 1, 2]
    assert (keeper.kept["tuple"], keeper.kept[3]) == ((1, 2), {4})
    assert again.global_step == 4  # of the checkpoint, so that what is logged stands at its step


@pytest.mark.parametrize("named", ["runs/run-1", "runs/run-1/checkpoints"])
def test_a_run_by_its_path(tmp_path, named, caplog):
    caplog.set_level(logging.INFO, "hookline")
    trained(tmp_path, max_steps=2)
    again = trained(tmp_path, resume=str(tmp_path / named))
    assert again.global_step == 4
    assert steps(tmp_path) == [4, 3, 2, 1]
    assert f"resumed from {at(tmp_path, 2)}" in caplog.text


def test_an_earlier_checkpoint_by_its_path_leaves_the_newer_alone(tmp_path, caplog):
    trained(tmp_path)
    before = (at(tmp_path, 3) / "manifest.json").read_bytes()
    again = trained(tmp_path, Checkpoint("1 step", keep_last=1), resume=str(at(tmp_path, 2)))
    assert again.global_step == 4
    assert steps(tmp_path) == [4]
    trained(tmp_path / "other")
    trained(tmp_path / "other", Checkpoint("1 step", keep_last=1), resume=str(at(tmp_path / "other", 2)), max_steps=3)
    assert steps(tmp_path / "other") == [4, 3]
    assert "newer checkpoints stay: step-000000000004, step-000000000003" in caplog.text
    assert len(before) == (at(tmp_path / "other", 3) / "manifest.json").stat().st_size


def test_saving_a_step_again_keeps_a_good_one_and_replaces_a_bad_one(tmp_path):
    path = writing.write(tmp_path, 7, [("a.json", [b"{}"])], {})
    before = (path / "manifest.json").stat().st_ino
    assert writing.write(tmp_path, 7, [("a.json", [b"[]"])], {}) == path
    assert (path / "manifest.json").stat().st_ino == before
    flip(path / "a.json")
    writing.write(tmp_path, 7, [("a.json", [b"[]"])], {})
    assert storage.read(path, {"a.json": storage.read_tree})[1] == {"a.json": []}
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000007"]


def test_no_checkpoint_yet(tmp_path, caplog):
    trainer = trained(tmp_path, resume=True)
    assert trainer.global_step == 4
    assert f"no checkpoint yet in {tmp_path}/runs/run-1/checkpoints: starting from scratch" in caplog.text
    with pytest.raises(ValueError, match=r"there is no run 'run' in .*none/runs to resume"):
        make(tmp_path / "none", resume=True).validate()
    (tmp_path / "empty" / "runs" / "run-1").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"resume=True: there is no checkpoint in .*run-1/checkpoints to val with"):
        make(tmp_path / "empty", resume=True).validate()


def test_the_newest_run_that_has_a_checkpoint_is_gone_on_with(tmp_path, caplog):
    trained(tmp_path, max_steps=2)
    died = tmp_path / "runs" / "run-2" / "checkpoints" / ".tmp-step-000000000001"  # of a writer that was killed
    died.mkdir(parents=True)
    again = trained(tmp_path, resume=True)
    assert (again.run_dir.name, again.global_step, steps(tmp_path)) == ("run-1", 4, [4, 3, 2, 1])
    runs = tmp_path / "runs"
    assert f"{runs}/run-2 has no checkpoint: going on with {runs}/run-1" in caplog.text
    trainer = make(tmp_path, resume=True)
    trainer.validate()
    assert trainer.run_dir.name == "run-1"


def test_without_resume_a_new_run_begins(tmp_path):
    trained(tmp_path)
    assert trained(tmp_path).run_dir.name == "run-2"


DAMAGES = {
    "flipped": (lambda path: flip(path / "model.safetensors", 2001), r"model\.safetensors has not the SHA-256"),
    "truncated": (
        lambda path: os.truncate(path / "optim.safetensors", 100),
        r"optim\.safetensors has 100 bytes, and was",
    ),
    "empty": (lambda path: os.truncate(path / "rank-0000.json", 0), r"rank-0000\.json has 0 bytes"),
    "missing": (lambda path: (path / "state.json").unlink(), r"state\.json cannot be read: No such file"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), r"manifest\.json cannot be read: No such file"),
    "half a manifest": (
        lambda path: os.truncate(path / "manifest.json", 90),
        r"manifest\.json is damaged: JSONDecodeError",
    ),
    "other manifest": (
        lambda path: (path / "manifest.json").write_bytes(
            (path.parent / "step-000000000003/manifest.json").read_bytes()
        ),
        r"manifest\.json is of step-000000000003",
    ),
    "link": (
        lambda path: (
            (path / "state.json").unlink(),
            (path / "state.json").symlink_to("../step-000000000003/state.json"),
        ),
        r"state\.json is no regular file",
    ),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_one_is_passed_over(damage, said, tmp_path, caplog):
    whole = trained(tmp_path)
    damage(at(tmp_path, 4))
    again = trained(tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.module.parameters(), again.module.parameters(), strict=True))
    assert storage.is_good(at(tmp_path, 4))  # it came to this step again, and replaced it
    (record,) = [record for record in caplog.records if "going back to" in record.message]
    assert record.levelname == "WARNING"
    assert record.message.startswith(f"going back to {at(tmp_path, 3)}, because newer checkpoints are damaged:")
    assert re.search(said, record.message)


@pytest.mark.parametrize("resume", [True, "runs/run-1/checkpoints/step-000000000004"])
def test_none_is_good(resume, tmp_path):
    trained(tmp_path)
    for step in (1, 2, 3, 4):
        flip(at(tmp_path, step) / "model.safetensors", 2001)
    said = r"cannot be used: model\.safetensors has not the SHA-256"
    if resume is True:
        said = "no checkpoint can be used.*" + ".*".join(
            rf"{step:012d}: model\.safetensors has not" for step in (4, 3, 2, 1)
        )
    with pytest.raises(CheckpointError, match=f"(?s){said}"):
        trained(tmp_path, resume=str(tmp_path / resume) if isinstance(resume, str) else resume)


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(tmp_path):
    trained(tmp_path, Checkpoint(None), resume=True)
    (tmp_path / "runs/run-1/checkpoints").write_text("a file")
    with pytest.raises(NotADirectoryError):
        trained(tmp_path, resume=True)


def test_any_flipped_bit_is_found(tmp_path):
    trained(tmp_path, Keeper({"é": torch.arange(9)}), max_steps=1)
    path, draw = at(tmp_path, 1), random.Random(0)
    for name in sorted(FILES):
        whole = (path / name).read_bytes()
        for bit in draw.sample(range(8 * len(whole)), 40):
            flip(path / name, bit)
            with pytest.raises(CheckpointError, match=name):
                unpack(path, 0)
            (path / name).write_bytes(whole)
    unpack(path, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "hookline-checkpoint/9"}, "its format is 'hookline-checkpoint/9', and this version reads"),
        (
            {"files": {"../../secret": {"size": 1, "sha256": ""}}},
            r"lists '\.\./\.\./secret', which is no plain file name",
        ),
        ({"files": {"/etc/passwd": {"size": 1, "sha256": ""}}}, "which is no plain file name"),
        ({"files": {".hidden": {"size": 1, "sha256": ""}}}, "which is no plain file name"),
        ({"files": {"a": {"size": "1", "sha256": ""}}}, "no plain file name with size and SHA-256"),
        ({"files": {"a": 3}}, r"manifest\.json is damaged: TypeError"),
        ({"files": []}, r"manifest\.json is damaged: AttributeError"),
        ({"step": None}, r"manifest\.json is damaged: TypeError"),
        ({"files": {}}, r"lists no state\.json"),
    ],
)
def test_a_manifest_that_lies(change, said, tmp_path):
    path = writing.write(tmp_path, 1, [], {"x": 1})
    body = json.dumps({**json.loads(json.loads((path / "manifest.json").read_bytes())["body"]), **change})
    digest = hashlib.sha256(body.encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({"sha256": digest, "body": body}))
    with pytest.raises(CheckpointError, match=said):
        unpack(path, 0)


def whole(file):
    return bytes(file.take(file.left))


def test_state_that_is_no_tree(tmp_path):
    trained(tmp_path, max_steps=1)
    about, contents = storage.read(at(tmp_path, 1), dict.fromkeys(FILES - {"manifest.json"}, whole))
    contents["state.json"] = b'{"module": {"$unknown": 1}, "optimizers": [], "others": {}}'
    path = writing.write(
        tmp_path, 5, ((name, [content]) for name, content in contents.items()), {"world_size": about["world_size"]}
    )
    with pytest.raises(CheckpointError, match=r"it cannot be understood: not a tree that this version reads"):
        unpack(path, 0)


# What is removed ----------------------------------------------------------------------


@pytest.mark.parametrize(("keep_last", "left"), [(1, [4]), (2, [4, 3]), (3, [4, 3, 2]), (None, [4, 3, 2, 1])])
def test_keep_last(keep_last, left, tmp_path):
    trained(tmp_path, Checkpoint("1 step", keep_last=keep_last))
    assert steps(tmp_path) == left
    assert not [path for path in (tmp_path / "runs/run-1/checkpoints").iterdir() if path.name.startswith(".")]


def test_a_damaged_one_does_not_count(tmp_path):
    trained(tmp_path, max_steps=3)
    flip(at(tmp_path, 2) / "state.json")
    trained(tmp_path, Checkpoint("1 step", keep_last=3), resume=True)
    assert steps(tmp_path) == [4, 3, 2, 1]
    flip(at(tmp_path, 3) / "state.json")
    trained(tmp_path, Checkpoint("1 step", keep_last=1), resume=True, epochs=3)
    assert steps(tmp_path) == [6]


def test_leftovers_of_dead_writers_are_swept_at_the_first_save(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    folder = tmp_path / "runs/run-1/checkpoints"
    kept = [f".tmp-{os.getppid()}-00", ".tmp-mine", "notes.txt"]
    for name in [f".tmp-{int(gone.stdout)}-00", f".tmp-{os.getpid()}-0a", *kept]:
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_text("half")
    (folder / f".trash-{int(gone.stdout)}-00").mkdir()
    trained(tmp_path, resume=True, max_steps=1)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*kept, "step-000000000001"])


# What is refused ----------------------------------------------------------------------


def test_what_cannot_be_stored_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(TypeError, match=r"^plugins\.keeper\.kept\.fn is a function") as raised:
        trained(tmp_path, Keeper({"fn": lambda: 0}))
    (note,) = raised.value.__notes__
    assert note.startswith("raised in on_begin_train by plugin 'checkpoint' (hookline-checkpoint 0.1.0), ")
    assert not (tmp_path / "runs").exists()
    trained(tmp_path, Checkpoint(None), Keeper({"fn": lambda: 0}))


def test_what_appears_later_is_refused_and_leaves_nothing(tmp_path):
    class Later(Keeper):
        @hookimpl
        def on_end_train_step(self, global_step):
            self.kept = (_ for _ in ()) if global_step == 2 else 1

    with pytest.raises(TypeError, match=r"^plugins\.later\.kept is an object of generator"):
        trained(tmp_path, Later())
    assert steps(tmp_path) == [1]
    assert [path.name for path in (tmp_path / "runs/run-1/checkpoints").iterdir()] == ["step-000000000001"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"every": "sometimes"},
            r"checkpoint\.every='sometimes': 'sometimes' is not a cadence; write one like \"epoch\"",
        ),
        ({"every": ["epoch", "0 steps"]}, r"checkpoint\.every=\['epoch', '0 steps'\]: '0 steps' is not a cadence"),
        ({"every": 50}, r'checkpoint\.every=50: a cadence is a text such as "epoch", "500 steps"'),
        ({"every": {"a": 1}}, r"checkpoint\.every=\{'a': 1\}: a cadence is a text"),
        ({"every": []}, r"checkpoint\.every=\[\] names no cadence; write null"),
        ({"keep_last": 0}, r"checkpoint\.keep_last=0 must be at least 1, or null to keep all"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        Checkpoint(**options)


class Blind(Line):
    get_val_dataloaders = ModuleInterface.get_val_dataloaders


@pytest.mark.parametrize(
    ("module", "options", "why"),
    [
        (Blind(), {}, "Blind has no get_val_dataloaders"),
        (Line(), {"evaluate_every": None}, "trainer.evaluate_every is null"),
    ],
)
def test_a_cadence_of_evaluations_where_there_are_none_is_refused_before_any_step(tmp_path, module, options, why):
    said = f"checkpoint.every='2 evals' saves after evaluations, and {why}, so nothing would be saved before the end"
    trainer = make(tmp_path, Checkpoint("2 evals"), module=module, **options)
    with pytest.raises(ValueError, match=re.escape(said)):
        trainer.train()
    assert trainer.global_step == 0
    trained(tmp_path, Checkpoint(["2 evals", "epoch"]), module=module, **options)  # which saves at epochs


def test_options_from_a_configuration(tmp_path):
    schema = OmegaConf.structured(Checkpoint)
    merged = OmegaConf.merge(schema, OmegaConf.create({"every": ["3 steps", "10 min"], "keep_last": None}))
    trained(tmp_path, OmegaConf.to_object(merged))
    assert steps(tmp_path) == [4, 3]
