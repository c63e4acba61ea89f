"""The recipe of a language model: every command of its page trains what one process trains."""

import itertools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hookline import CallbackInterface, hookimpl
from hookline.config import build_trainer, load_config
from hookline.testing import on_ranks

pytestmark = [pytest.mark.plugins, pytest.mark.xdist_group("ranks")]

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "language-model.md").read_text(encoding="utf-8")
ALONE, *LINES = re.findall(r"^hookline fit examples/llm/run\.yaml *(.*)$", PAGE, re.M)
LAYOUTS = {name: line for line, _, name in (line.partition("# ") for line in LINES) if name}
(ENDS, GOES_ON) = (line for line in LINES if "#" not in line)
SMALL = ("module.blocks=2", "module.context=16", "trainer.val_batch_size=512")


@dataclass(eq=False)
class Losses(CallbackInterface):
    """Keep the loss of each step over all ranks, as it is logged."""

    def __post_init__(self):
        self.of_steps = {}

    @hookimpl
    def on_log(self, global_step, metrics):
        if "train_loss" in metrics:
            self.of_steps[global_step] = metrics["train_loss"]


def train(line, folder, steps, *more):
    """Train as `hookline fit examples/llm/run.yaml` does with these words, on this rank.

    Returns: the losses by step, and the metrics at the end.
    """
    torch.set_num_threads(1)
    words = shlex.split(line, comments=True)
    after = {
        option: [word for before, word in itertools.pairwise(words) if before == option]
        for option in ("-p", "--resume")
    }
    overrides = [word for word in words if "=" in word]
    overrides += [f"trainer.resume={folder}/{path.removeprefix('runs/')}" for path in after["--resume"]]
    overrides += [f"trainer.runs_folder={folder}", f"trainer.max_steps={steps}", "trainer.log_every=1 steps"]
    trainer = build_trainer(
        load_config(ROOT / "examples" / "llm" / "run.yaml", [*overrides, *more], [*after["-p"], "no:progress"])
    )
    losses = Losses()
    trainer.plugins.register(losses)
    trainer.train()
    return losses.of_steps, trainer.metrics["val_loss"]


def assert_alike(ranks, alone, steps):
    losses, val_loss = ranks[0]
    assert ranks == [ranks[0]] * len(ranks)
    assert list(losses) == list(steps)
    assert losses == pytest.approx({step: alone[0][step] for step in steps}, rel=0, abs=1e-5)
    assert val_loss == pytest.approx(alone[1], rel=0, abs=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return what one process trains in 50 steps."""
    return train(ALONE, tmp_path_factory.mktemp("alone"), 50)


def test_a_mesh_trains_what_one_process_trains(tmp_path):
    ranks = on_ranks(train, 4, LAYOUTS["fsdp2 x tp2"], tmp_path / "mesh", 4, *SMALL)
    assert_alike(ranks, train(ALONE, tmp_path / "alone", 4, *SMALL), range(1, 5))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fifty_steps_of_every_layout(layout, tmp_path, alone):
    assert_alike(on_ranks(train, 4, LAYOUTS[layout], tmp_path, 50), alone, range(1, 51))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_goes_on_with_another_layout(tmp_path, alone):
    on_ranks(train, 4, ENDS, tmp_path, 50)
    assert_alike(on_ranks(train, 4, GOES_ON, tmp_path, 50), alone, range(26, 51))


@pytest.mark.slow
def test_it_learns(tmp_path):
    losses, val_loss = train(ALONE, tmp_path, 400)
    assert losses[1] == pytest.approx(5.7, abs=0.1)
    assert val_loss == pytest.approx(1.81, abs=0.05)
