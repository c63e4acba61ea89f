"""Row G of the fault catalogue, where ranks share sequences: one that attention waits for is gone, or says no more.

The others end in bounded time, and what goes on from the last checkpoint ends with the bits of an undisturbed run.
"""

import os
import signal
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hookline import ModuleInterface
from hookline.testing import digest, on_ranks, run_ranks, tiny_trainer
from hookline.testing.faults import PRELOADED, at_hook, kill

pytestmark = [pytest.mark.plugins, pytest.mark.xdist_group("ranks")]
PRELOADED += [__name__, "hookline_context_parallel", "hookline_ddp", "hookline_checkpoint", "hookline_watchdog"]

SOON = 10  # seconds in which all are gone
SILENT = "3 s"
ACTIONS = {
    "is killed": kill,
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),  # its links stay, and nothing comes over them
    "sleeps": lambda: time.sleep(100),
}


class Attentive(ModuleInterface):
    """Attends to a sequence of numbers, to tell the next."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.heads, self.read = nn.Linear(4, 12), nn.Linear(4, 4)
            numbers = torch.randn(24, 17, 4)
        self.data = TensorDataset(numbers[:, :-1].clone(), numbers[:, 1:].clone())

    def train_step(self, global_step, batch, device):
        heads = self.heads(batch[0]).unsqueeze(1).chunk(3, -1)
        return (self.read(F.scaled_dot_product_attention(*heads, is_causal=True).squeeze(1)) - batch[1]).square().mean()

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.data, batch_size, sampler=sampler(self.data))

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), 0.1)], []


def train(folder, action="", hook="", others=None, resume=False):
    """Train on this rank, and let something happen to rank 1 at the third time that it comes to a hook."""
    torch.set_num_threads(1)

    def act():
        (folder / "fault").write_text(str(time.monotonic()))
        ACTIONS[action]()

    fault = {"fault": at_hook(hook or "on_setup", act if action and os.environ["RANK"] == "1" else int, 3)}
    own = {"context_parallel": {"batch": {"0": 1, "1": 1}, "rotate": "alltoall"}, "ddp": {}}
    plugins = {**own, "checkpoint": {"every": "1 steps"}, **fault, **(others or {})}
    trainer = tiny_trainer(plugins, Attentive(), runs_folder=str(folder), epochs=2, evaluate_every=None, resume=resume)
    trainer.train()
    return digest(trainer.module.state_dict()), trainer.global_step


@pytest.mark.parametrize(
    ("hook", "action", "others", "codes"),
    [
        ("call_model", "is killed", {}, [1, -signal.SIGKILL]),
        pytest.param("run_backward", "is killed", {}, [1, -signal.SIGKILL], marks=pytest.mark.slow),
        ("run_backward", "is stopped", {"distributed": {"timeout": SILENT}, "watchdog": {}}, [1, -signal.SIGKILL]),
        pytest.param("call_model", "sleeps", {"watchdog": {"timeout": SILENT}}, [124, 124], marks=pytest.mark.slow),
    ],
)
def test_g30_a_rank_of_a_sequence_that_is_gone_or_silent_ends_all_and_the_bits_are_the_same(
    hook, action, others, codes, tmp_path
):
    (tmp_path / "cut").mkdir()
    outcomes = run_ranks(train, 2, tmp_path / "cut", action, hook, others)
    assert time.monotonic() - float((tmp_path / "cut" / "fault").read_text()) < SOON
    assert [outcome.code for outcome in outcomes] == codes, "\n".join(outcome.output for outcome in outcomes)
    resumed = on_ranks(train, 2, tmp_path / "cut", resume=True)
    assert resumed == on_ranks(train, 2, tmp_path / "whole")
    assert resumed[0][1] > 3
