"""`hookline checkpoints`: what it tells of checkpoints, what it makes of them, and when it says no."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file

from hookline import CallbackInterface, ModuleInterface, Trainer
from hookline.cli import main
from hookline_checkpoint import Checkpoint
from hookline_checkpoint.commands import EXAMPLES


class Line(ModuleInterface):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(3, 3)
        self.b = torch.nn.Linear(3, 3)
        self.b.weight = self.a.weight  # tied
        self.register_buffer("turns", torch.zeros(2, dtype=torch.complex128))

    def train_step(self, global_step, batch, device):
        return self.b(torch.relu(self.a(batch))).pow(2).mean()

    def get_train_dataloader(self, sampler, batch_size):
        data = torch.arange(24.0).reshape(8, 3)
        return torch.utils.data.DataLoader(data, batch_size, sampler=sampler(data))

    def get_optimizers_schedulers(self, steps, epochs):
        return [torch.optim.Adam(self.parameters(), 0.01)], []

    def get_state(self):
        return {name: value for name, value in super().get_state().items() if name != "turns"}

    def update_state(self, state):
        self.load_state_dict(state, strict=False)

    def get_hf_format(self):
        return {"config": {"model_type": "line"}}


class Keeper(CallbackInterface):
    def __init__(self, kept: Any) -> None:
        self.kept = kept

    def get_state(self):
        return {"kept": self.kept}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return the folder of a run with checkpoints of steps 1 to 4; the current folder is the one above `runs`."""
    monkeypatch.chdir(tmp_path)
    return trained().run_dir


def trained(kept: Any = None, module: Any = None, **options: Any) -> Trainer:
    if module is None:
        torch.manual_seed(1)
    plugins = [Checkpoint("1 step", keep_last=None), Keeper(kept or torch.ones(2, dtype=torch.complex128))]
    trainer = Trainer(module or Line(), plugins, **{"epochs": 2, "train_batch_size": 4, "seed": 3} | options)
    trainer.train()
    return trainer


def at(run: Path, step: int) -> Path:
    return run / f"checkpoints/step-{step:012d}"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def command(capsys, *words: Any) -> tuple[int, str]:
    code = main(["checkpoints", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_help_shows_what_can_be_said(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["checkpoints", "--help"])
    said = capsys.readouterr().out
    for name in ("list", "show", "verify", "export", "import", "diff", "hookline checkpoints export digits-1 --to"):
        assert name in said


@pytest.mark.parametrize(
    "text", [(Path(__file__).parent.parent / "README.md").read_text(), EXAMPLES], ids=["README", "help"]
)
def test_the_commands_that_are_shown_run(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed in (3, 4):
        trained(run_name="digits", seed=seed)
    torch.save({"state_dict": torch.nn.Linear(2, 2).state_dict(), "epoch": 3}, "model.ckpt")
    shown = re.findall(r"^ *hookline checkpoints (.*?)(?:#.*| &&.*)?$", text, re.M)
    assert len(shown) >= 7
    for line in shown:
        words = shlex.split(line.replace("437", "004"))
        code, said = command(capsys, *words)
        assert code == (words[0] == "diff"), said  # the two had their samples in other orders


def test_list_and_verify_need_no_torch(run):
    program = (
        "import sys; from hookline_checkpoint.commands import main; "
        f"code = [main([word, {str(run)!r}]) for word in ('list', 'verify', 'show')]; "
        "assert 'torch' not in sys.modules and code == [0, 0, 0]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_list(run, capsys):
    flip(at(run, 3) / "model.safetensors")
    (at(run, 2) / "manifest.json").unlink()
    for named in (run, run.name, run / "checkpoints"):
        code, said = command(capsys, "list", named)
        lines = said.splitlines()
        assert code == 0
        assert [line.split()[:2] for line in lines[1:]] == [["4", "2"], ["3", "1"], ["2", "?"], ["1", "0"]]
        assert lines[1].endswith("good")
        assert lines[2].endswith("bad: model.safetensors has not the SHA-256 that it was written with")
        assert lines[3].endswith("bad: manifest.json cannot be read: No such file or directory")
    assert len(command(capsys, "list", at(run, 4))[1].splitlines()) == 2


def test_verify(run, capsys):
    code, said = command(capsys, "verify", run.name)
    assert (code, said.count(": good")) == (0, 4)
    flip(at(run, 3) / "state.json")
    code, said = command(capsys, "verify", run.name)
    assert (code, said.count(": good"), said.count("bad: state.json has not the SHA-256")) == (1, 3, 1)
    assert command(capsys, "verify", at(run, 4))[0] == 0


def test_show(run, capsys):
    code, said = command(capsys, "show", run.name)
    assert code == 0
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert f"checkpoint: {Path('runs/run-1') / at(run, 4).relative_to(run)}" in lines
    for line in (
        "step: 4",
        "module: 4 tensors, 60 B",
        "a.weight float32 3x3 36 B",
        "b.weight float32 3x3 0 B is a.weight",
        "keeper.kept complex128 2 32 B",
        "plugins: checkpoint, keeper",
    ):
        assert line in lines, said
    assert any(line.startswith("rng of rank 0: ") for line in lines)
    assert any(line.startswith("0.state.a.weight.exp_avg float32 3x3") for line in lines), said


def test_what_is_not_there(run, capsys):
    code, said = command(capsys, "list", "other")
    assert code == 2
    assert said.startswith("hookline: there is no checkpoint in 'other', nor in 'runs/other'; name a run folder")
    for step in (1, 2, 3, 4):
        flip(at(run, step) / "state.json")
    assert "no checkpoint can be used" in command(capsys, "show", run.name)[1]
    assert command(capsys, "export", run.name, "--to", "x")[0] == 2
    assert not Path("x").exists()


def test_export_as_safetensors(run, capsys):
    code, said = command(capsys, "export", run.name, "--to", "out/weights.safetensors")
    assert (code, said.split()[0]) == (0, "out/weights.safetensors")
    assert set(load_file("out/weights.safetensors")) == {"a.weight", "a.bias", "b.bias"}
    with safe_open("out/weights.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "b.weight": "a.weight"}
    module = Line()
    del module.turns
    load_model(module, "out/weights.safetensors")
    assert torch.equal(module.b.weight, load_file(at(run, 4) / "model.safetensors")["a.weight"])
    assert [path.name for path in Path("out").iterdir()] == ["weights.safetensors"]


def test_export_as_torch(run, capsys):
    assert command(capsys, "export", at(run, 2), "--to", "weights.pt", "--format", "torch")[0] == 0
    state = torch.load("weights.pt", weights_only=True)
    assert list(state) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert state["a.weight"].data_ptr() == state["b.weight"].data_ptr()
    assert torch.equal(state["a.weight"], load_file(at(run, 2) / "model.safetensors")["a.weight"])


def test_export_overwrites_nothing_unless_told(run, capsys):
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    assert command(capsys, "export", run.name, "--to", "out")[0] == 0
    before = Path("out/model.safetensors").read_bytes()
    for more in ((), ("--max-shard-size", "40B")):
        code, said = command(capsys, "export", at(run, 1), "--to", "out", *more)
        assert (code, "out/model.safetensors is there already; name another place, or say --force" in said) == (2, True)
    assert Path("out/model.safetensors").read_bytes() == before
    assert command(capsys, "export", at(run, 1), "--to", "out", "--force", "--max-shard-size", "40B")[0] == 0
    # the single file is gone: a loader would take it for the whole
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "notes.txt",
    ]


def test_a_place_that_cannot_be_written_is_one_line(run, capsys):
    Path("file").write_text("")
    code, said = command(capsys, "export", run.name, "--to", "file/model.safetensors")
    assert (code, said.startswith("hookline: [Errno ")) == (2, True), said


def test_shards(run, capsys):
    assert command(capsys, "export", run.name, "--to", "out", "--max-shard-size", "20B")[0] == 0
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 60}
    assert index["weight_map"] == {
        "a.weight": "model-00001-of-00003.safetensors",  # larger than the limit
        "a.bias": "model-00002-of-00003.safetensors",
        "b.bias": "model-00003-of-00003.safetensors",
        "b.weight": "model-00001-of-00003.safetensors",
    }
    loaded = {}
    for file in set(index["weight_map"].values()):
        loaded |= load_file(f"out/{file}")
    whole = load_file(at(run, 4) / "model.safetensors")
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)
    assert command(capsys, "export", run.name, "--to", "out/other.safetensors")[0] == 0
    assert json.loads(Path("out/model.safetensors.index.json").read_text()) == index
    assert command(capsys, "export", run.name, "--to", "one/", "--max-shard-size", "2GB")[0] == 0
    assert [path.name for path in Path("one").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "torch", "--max-shard-size", "1MB"], "--max-shard-size splits safetensors files"),
        (["--to", "file", "--max-shard-size", "1MB"], "--to=file: --max-shard-size may write several files, so name"),
    ],
)
def test_exports_that_cannot_be(words, said, run, capsys):
    Path("file").write_text("")
    code, heard = command(capsys, "export", run.name, "--to", "x", *words)
    assert (code, said in heard) == (2, True), heard


@pytest.mark.parametrize("size", ["0", "2 parrots", "GB", "-1MB", "infMB"])
def test_sizes_that_are_none(size, run, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(capsys, "export", run.name, "--to", "x", f"--max-shard-size={size}")
    assert "2GiB" in capsys.readouterr().err


def test_module_states_that_are_no_tensors_by_name(run, capsys):
    class Odd(Line):
        def get_state(self):
            return {"number": 3}

        def update_state(self, state):
            pass

    class Wide(Line):
        def get_state(self):
            return {"turns": self.turns}

        def update_state(self, state):
            pass

    trained(module=Odd())
    code, said = command(capsys, "export", "run-2", "--to", "x")
    assert (code, "'number' of the module's get_state is a int; only tensors by name" in said) == (2, True)
    trained(module=Wide())
    code, said = command(capsys, "export", "run-3", "--to", "x")
    assert (code, "safetensors has no torch.complex128, which 'turns' is; say --format torch" in said) == (2, True)
    assert command(capsys, "export", "run-3", "--to", "x.pt", "--format", "torch")[0] == 0
    assert torch.load("x.pt", weights_only=True)["turns"].dtype is torch.complex128


def test_diff(run, capsys):
    assert command(capsys, "diff", run.name, at(run, 4)) == (0, "no difference\n")
    code, said = command(capsys, "diff", at(run, 3), at(run, 4), "--section", "module", "--section", "trainer")
    assert code == 1
    assert "trainer.counters.global_step: int 3 and int 4" in said
    a, b = (load_file(at(run, step) / "model.safetensors")["a.weight"].double() for step in (3, 4))
    number, largest = int((a != b).sum()), float((a - b).abs().max())
    assert f"module.a.weight: {number} of 9 elements differ, max abs difference {largest:.3g}" in said
    assert "optimizers" not in said
    code, said = command(capsys, "diff", at(run, 3), at(run, 4), "--section", "modul")
    assert (code, "--section=modul: " in said) == (2, True)


def test_diff_of_what_only_one_has(run, capsys):
    nan = torch.tensor([float("nan"), 1.0])
    torch.manual_seed(1)
    trained({"x": nan, "y": torch.ones(2), "s": {1, 2}, "t": 1.5, "only": [1]})
    torch.manual_seed(1)
    trained({"x": nan, "y": torch.ones(3), "s": {2, 1}, "t": 1.25, "n": torch.tensor([1, 2])})
    code, said = command(capsys, "diff", "run-2", "run-3", "--section", "plugins", "--section", "module")
    assert code == 1
    assert said.splitlines() == [
        "plugins.keeper.kept.y: float32[2] and float32[3]",
        "plugins.keeper.kept.t: 1.5 and 1.25, difference 0.25",
        "plugins.keeper.kept.only.0: only in runs/run-2/checkpoints/step-000000000004",
        "plugins.keeper.kept.n: only in runs/run-3/checkpoints/step-000000000004",
    ]


def test_heads_that_lie(run, capsys):
    """A manifest whose files are right in size is read, and what they say of themselves is not believed."""
    save_file({"z": torch.zeros(1)}, "other.safetensors")
    file = at(run, 4) / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(Path("other.safetensors").read_bytes().ljust(size, b"\0")[:size])
    code, said = command(capsys, "show", at(run, 4))
    assert (code, "it cannot be understood: KeyError" in said) == (2, True)
    file.write_bytes(b"\xff" * size)
    code, said = command(capsys, "show", at(run, 4))
    assert (code, "model.safetensors cannot be understood: it has no head" in said) == (2, True)
