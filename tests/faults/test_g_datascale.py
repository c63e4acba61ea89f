"""Row G of the fault catalogue, for a corpus in shards: one that a rank cannot read ends all ranks, in bounded time.

Each rank has a copy of the corpus of its own, as machines have on their disks.
"""

import json
import os
import time

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from hookline import ModuleInterface
from hookline.testing import digest, run_ranks, tiny_trainer
from hookline.testing.faults import PRELOADED, at_hook
from hookline_checkpoint import storage
from hookline_corpus import Corpus, Tokens

pytestmark = [pytest.mark.plugins, pytest.mark.xdist_group("ranks")]
PRELOADED += [__name__, "hookline_ddp", "hookline_guard"]

SOON = 10  # seconds in which all are gone
SHARDS = 6
SAVING = {"checkpoint": {"every": "1 steps"}, "guard": {"errors": ["any"]}}


class Model(ModuleInterface):
    """Guesses the next byte."""

    def __init__(self, data):
        super().__init__()
        self.data = data
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Embedding(256, 8), torch.nn.Linear(8, 256))

    def train_step(self, global_step, batch, device):
        return cross_entropy(self.net(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.data, batch_size, sampler=sampler(self.data), num_workers=1)

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.Adam(self.parameters(), lr=0.01)], []


def write(folder):
    """Write a corpus for each of two ranks."""
    for rank in range(2):
        (folder / f"disk-{rank}").mkdir()
        for shard in range(SHARDS):
            rows = [json.dumps({"text": f"{shard} {row} " * (1 + row % 9)}) for row in range(40)]
            (folder / f"disk-{rank}" / f"{shard}.jsonl").write_text("\n".join(rows))


def lose(folder, action):
    """Take shards from the disk of rank 1: there is nothing, or what is there gives EIO."""
    (folder / "kept").mkdir(exist_ok=True)
    for path in [*(folder / "disk-1").iterdir()]:
        path.rename(folder / "kept" / path.name)
        if action == "gives EIO":
            path.symlink_to("/proc/self/mem")  # whose first bytes cannot be read


def put_back(folder):
    for path in (folder / "kept").iterdir():
        path.replace(folder / "disk-1" / path.name)


def train(folder, action, resume=False):
    torch.set_num_threads(1)
    rank = os.environ["RANK"]

    def act():
        if action and rank == "1":
            lose(folder, action)
            (folder / "fault").write_text(str(time.monotonic()))

    data = Tokens(str(folder / f"disk-{rank}" / "*.jsonl"), 32, lanes=1, index=str(folder / f"index-{rank}"))
    plugins = {**SAVING, "ddp": {}, "corpus": Corpus(), "fault": at_hook("on_boundary", act, 2)}
    options = {"epochs": 1, "runs_folder": str(folder), "resume": resume, "evaluate_every": None}
    trainer = tiny_trainer(plugins, Model(data), **options)
    trainer.train()
    return digest(trainer.module.state_dict()), trainer.global_step


def outputs(outcomes):
    return "\n".join(f"--- rank {rank}\n{outcome.output}" for rank, outcome in enumerate(outcomes))


@pytest.mark.parametrize("action", ["is missing", pytest.param("gives EIO", marks=pytest.mark.slow)])
def test_g40_a_shard_that_one_rank_cannot_read_ends_all_and_the_resume_ends_with_the_same_bits(action, tmp_path):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    whole = run_ranks(train, 2, tmp_path / "whole", "")
    assert [outcome.code for outcome in whole] == [0, 0], outputs(whole)
    cut = run_ranks(train, 2, tmp_path / "cut", action)
    assert time.monotonic() - float((tmp_path / "cut" / "fault").read_text()) < SOON
    assert 0 not in [outcome.code for outcome in cut]
    assert "jsonl' of the source 'documents' cannot be read: " in cut[1].output
    assert ("Input/output error" if action == "gives EIO" else "FileNotFoundError") in cut[1].output
    assert 1 < storage.step_of(storage.listed(tmp_path / "cut" / "run-1" / "checkpoints")[0]) < whole[0].value[1]
    put_back(tmp_path / "cut")
    resumed = run_ranks(train, 2, tmp_path / "cut", "", True)
    assert [outcome.code for outcome in resumed] == [0, 0], outputs(resumed)
    assert [outcome.value for outcome in resumed] == [outcome.value for outcome in whole]


def test_g41_a_shard_that_one_rank_cannot_count_is_refused_on_all_before_training(tmp_path):
    write(tmp_path)
    (tmp_path / "disk-1" / "3.jsonl").unlink()
    (tmp_path / "disk-1" / "3.jsonl").symlink_to("/proc/self/mem")  # whose first bytes cannot be read
    outcomes = run_ranks(train, 2, tmp_path, "")
    for outcome in outcomes:
        assert outcome.code != 0
        for word in ("rank 1: corpus: the shard ", "disk-1/3.jsonl", "Input/output error"):
            assert word in outcome.output
    assert not list(tmp_path.glob("run-*/checkpoints/*"))
