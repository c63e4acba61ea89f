"""Faults of weights that go to and from Hugging Face's format."""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hookline.cli import main
from hookline.testing import digest, run_ranks, tiny_trainer
from hookline.testing.faults import PRELOADED, at_file, kill, run
from hookline.testing.tiny import PlainModule

pytestmark = pytest.mark.plugins
PRELOADED += [__name__, "hookline_ddp", "hookline_checkpoint.initial", "hookline_checkpoint.export"]


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Module(PlainModule):
    def get_hf_format(self):
        return {"config": {}}


def begin_where_one_sees_nothing():
    if os.environ["RANK"] == "1":
        Path("elsewhere").mkdir()
        os.chdir("elsewhere")
    tiny_trainer({"ddp": {}, "checkpoint": {"every": None, "initial": "in.safetensors"}}, Module()).train()


@pytest.mark.xdist_group("ranks")
def test_g60_a_rank_that_cannot_read_the_weights_to_begin_with_ends_all():
    save_file(Module().state_dict(), "in.safetensors")
    for rank in run_ranks(begin_where_one_sees_nothing, 2):
        assert rank.code == 1
        assert "checkpoint.initial='in.safetensors': there is no folder or file in.safetensors" in rank.output


EXPORT = ["checkpoints", "export", "it-1", "--to", "out", "--format", "hf", "--max-shard-size", "300B"]


def export_until_killed():
    with at_file(Path.cwd(), "write *model-00002*", kill):
        main(EXPORT)


def test_g61_an_export_that_is_killed_leaves_no_folder_that_could_be_loaded():
    trainer = tiny_trainer({"checkpoint": {}}, Module(), run_name="it", epochs=1)
    trainer.train()
    assert run(export_until_killed).code == -signal.SIGKILL
    assert not Path("out").exists()
    assert main(EXPORT) == 0
    loaded: dict[str, torch.Tensor] = {}
    for file in Path("out").glob("*.safetensors"):
        loaded |= load_file(file)
    assert digest(loaded) == digest(trainer.module.state_dict())
