"""Ranks that share a model never hold the whole of it: when they go on with a checkpoint of one process, or begin with
weights from a folder; and one process that reads their shares holds no more than the whole.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hookline import CallbackInterface, ModuleInterface, Trainer, hookimpl
from hookline.cli import main
from hookline.testing import on_ranks
from hookline.testing.faults import PRELOADED, run

pytestmark = [pytest.mark.plugins, pytest.mark.slow, pytest.mark.xdist_group("ranks")]
PRELOADED += [__name__, "hookline_fsdp", "hookline_checkpoint.initial", "torch.distributed.checkpoint"]

NUMBERS, TENSORS = 2**20, 64  # in each of so many
WHOLE = NUMBERS * TENSORS * 4
SOME = 100 * 10**6  # for a few tensors and pieces of files, and what the allocator of each thread keeps


class Wide(ModuleInterface):
    def __init__(self):
        super().__init__()
        self.data = torch.zeros(8, 1)
        self.weights = torch.nn.ParameterList([torch.zeros(NUMBERS) for _ in range(TENSORS)])

    def train_step(self, global_step, batch, device):
        return self.weights[0][0] + self.weights[1][-1]

    def get_train_dataloader(self, sampler, batch_size):
        return torch.utils.data.DataLoader(self.data, batch_size, sampler=sampler(self.data))

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), lr=1.0)], []

    def get_hf_format(self):
        return {"config": {}}


class Growth(CallbackInterface):
    """Measures by how many bytes the process grows at most within two verbs."""

    def __init__(self):
        self.bytes = {}

    @hookimpl(wrapper=True, tryfirst=True)
    def restore(self):
        return (yield from self.measured("restore"))

    @hookimpl(wrapper=True, tryfirst=True)
    def setup_optimizers(self):
        return (yield from self.measured("setup_optimizers"))

    def measured(self, name):
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is now
        answer = yield
        self.bytes[name] = status("VmHWM") - before
        return answer


def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def train(name, resume=False, fsdp=True, steps=1, **checkpoint):
    torch.set_num_threads(1)
    growth = Growth()
    shared = {"fsdp": {}} if fsdp else {}
    plugins = {"growth": growth, **shared, "checkpoint": checkpoint}
    options = {"max_steps": steps, "train_batch_size": 4, "device": "cpu", "evaluate_every": None}
    trainer = Trainer(Wide(), plugins, run_name=name, resume=resume, **options)
    trainer.train()
    first = trainer.module.weights[0]
    part = first.to_local() if hasattr(first, "to_local") else first
    return growth.bytes, float(part.detach().sum())


def test_memory_is_that_of_the_shares(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(train_alone)
    kept = load_file("runs/one-1/checkpoints/step-000000000001/model.safetensors")
    assert float(kept["weights.0"].sum()) == -1
    assert main(["checkpoints", "export", "one-1", "--to", "folder", "--format", "hf"]) == 0
    for grown, first in on_ranks(go_on, 2):
        assert grown["restore"] < WHOLE / 2 + SOME < WHOLE
        assert first in (-2, 0)  # the rank that has the first number
    for grown, first in on_ranks(begin, 2):
        assert grown["setup_optimizers"] < SOME
        assert first in (-2, 0)
    assert Path("runs/one-1/checkpoints/step-000000000002/shards-0001.safetensors").exists()
    grown, first = run(go_on_alone).value
    assert grown["restore"] < WHOLE + SOME
    assert first == -3


def train_alone():
    train("one", fsdp=False)


def go_on():
    return train("two", resume="runs/one-1", steps=2)


def begin():
    return train("begun", initial="folder", every=None)


def go_on_alone():
    return train("alone", resume="runs/one-1", fsdp=False, steps=3)
