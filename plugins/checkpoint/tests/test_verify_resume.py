"""`hookline verify-resume` on runs that keep the promise and on one that breaks it."""

import pytest

from hookline_checkpoint import verify_resume

CONFIG = """
module: {{_target_: {target}, dropout: 0.3}}
trainer: {{epochs: 2, train_batch_size: 8, val_batch_size: 8, device: cpu}}
plugins: {{checkpoint: {{every: 3 steps}}}}
"""
FORGETFUL = """
import torch
from hookline.testing import TinyModule


class Forgetful(TinyModule):
    '''Trains on something that no state holds.'''

    calls = 0

    def train_step(self, global_step, batch, device):
        self.calls += 1
        loss, predictions = super().train_step(global_step, batch, device)
        return loss * (1 + 0.01 * self.calls), predictions
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "forgetful.py").write_text(FORGETFUL)
    return tmp_path


def test_a_run_that_keeps_the_promise(folder, capsys):
    (folder / "run.yaml").write_text(CONFIG.format(target="hookline.testing.TinyModule"))
    assert verify_resume.main(["run.yaml", "--kills", "2", "trainer.seed=5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "undisturbed: 14 steps, runs/run-whole-1"
    assert [line.split(" in ")[0] for line in lines[1:3]] == ["killed", "killed"]
    assert lines[3:] == [
        "resumed: 14 steps, runs/run-killed-1",
        "the same bits: every batch, every parameter, every state (seed 0)",
    ]
    assert {path.name for path in folder.iterdir()} == {"forgetful.py", "run.yaml", "runs"}


def test_a_run_that_does_not_is_told_what_differs_first(folder, capsys):
    (folder / "run.yaml").write_text(CONFIG.format(target="forgetful.Forgetful"))
    assert verify_resume.main(["run.yaml", "--kills", "1"]) == 1
    out = capsys.readouterr().out
    assert "not the same; first differs module.net.0.weight: " in out
    assert "elements differ, max abs difference" in out
    assert "more: hookline checkpoints diff runs/run-whole-1 runs/run-killed-1" in out


def test_a_run_that_fails_by_itself(folder):
    (folder / "run.yaml").write_text(CONFIG.format(target="hookline.testing.TinyModule"))
    with pytest.raises(
        ValueError, match=r"ended with exit code 2 instead of 0:\n  hookline: trainer\.epoch: unknown key"
    ):
        verify_resume.main(["run.yaml", "trainer.epoch=3"])


def test_a_run_that_saves_nothing(folder):
    (folder / "run.yaml").write_text(CONFIG.format(target="hookline.testing.TinyModule"))
    with pytest.raises(ValueError, match="holds no checkpoint to compare; plugins.checkpoint.every must not be null"):
        verify_resume.main(["run.yaml", "plugins.checkpoint.every=null"])
