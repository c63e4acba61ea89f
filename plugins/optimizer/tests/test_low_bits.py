"""Optimizers whose states have 8 or 4 bits (torchao): the bits of a loop by hand, kept by every kind of state."""

import copy
import logging

import pytest
import torch
from torch import nn

from hookline import copy_state
from hookline.testing import (
    Memory,
    PlainModule,
    assert_one_model,
    digest,
    hand_written_loop,
    on_ranks,
    tiny_trainer,
    train_tiny,
)
from hookline_optimizer import Optimizer

for noisy in ("torchao", "torch.utils._pytree"):  # which kernels of other devices are not there
    logging.getLogger(noisy).setLevel(logging.ERROR)
optim = pytest.importorskip("torchao.optim")

NAMES = ("AdamW8bit", "AdamW4bit", "AdamWFp8")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Be where files may be made; and let steps run as they are written, since compiling them takes seconds."""
    monkeypatch.chdir(tmp_path)
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


class Wide(PlainModule):
    """Has one weight that is large enough to have its states in few bits."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


class Own(Wide):
    def get_optimizers_schedulers(self, steps, epochs):
        return [optim.AdamW8bit(self.parameters(), 1e-2)], []


class ByHand(Wide):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def get_optimizers_schedulers(self, steps, epochs):
        return [getattr(optim, self.name)(self.parameters(), 1e-2)], []


def plugin(name):
    return Optimizer(f"torchao.optim.{name}", lr=1e-2, replace=True)


def train(plugins, module=None, **options):
    trainer = tiny_trainer(plugins, module or Wide(), **options)
    trainer.train()
    return trainer


def parts(value):
    """Return a state with each tensor that is made of others as these."""
    if isinstance(value, dict):
        return {key: parts(kept) for key, kept in value.items()}
    if isinstance(value, (list, tuple)):
        return [parts(kept) for kept in value]
    if hasattr(value, "__tensor_flatten__"):
        return {name: getattr(value, name) for name in value.__tensor_flatten__()[0]}
    return value


def bits_of(trainer):
    return digest(trainer.module.state_dict()), digest([parts(one.state_dict()) for one in trainer.optimizers])


@pytest.mark.parametrize("name", NAMES)
def test_it_has_the_bits_of_a_loop_by_hand(name):
    hand_written_loop(by_hand := ByHand(name))
    trainer = train([plugin(name)])
    assert digest(trainer.module.state_dict()) == digest(by_hand.state_dict())
    states = trainer.optimizers[0].state[trainer.module.net[2].weight]
    assert type(states["exp_avg"]).__name__ == f"OptimState{name.removeprefix('AdamW')}"
    assert not torch.equal(states["exp_avg"].dequantize(), states["exp_avg_sq"].dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_its_state_is_a_copy_of_each_part(name):
    (optimizer,) = train([plugin(name)]).optimizers
    state = optimizer.state_dict()
    kept = copy_state(state)
    assert digest(parts(kept)) == digest(parts(state))
    before = digest(parts(kept))
    for states in optimizer.state.values():
        if hasattr(states["exp_avg_sq"], "codes"):  # what it has beside is a table, which torchao keeps for all
            states["exp_avg_sq"].codes.zero_()
    assert digest(parts(kept)) == before != digest(parts(state))


@pytest.mark.parametrize("name", NAMES)
def test_a_resume_is_exact_at_every_step(name):
    memory = Memory(every="1 steps")
    whole = train([plugin(name), memory], epochs=1)
    for step, state in memory.states.items():
        assert bits_of(train([plugin(name), Memory(state)], epochs=1)) == bits_of(whole), step


def test_a_checkpoint_on_disk_keeps_every_bit():
    whole = train(
        {"optimizer": plugin("AdamW8bit"), "checkpoint": {"every": "3 steps", "keep_every": "3 steps"}}, epochs=1
    )
    resumed = train(
        {"optimizer": plugin("AdamW8bit"), "checkpoint": {}},
        epochs=1,
        resume=str(whole.run_dir / "checkpoints/step-000000000003"),
    )
    assert bits_of(resumed) == bits_of(whole)


def test_it_goes_with_schedules_groups_and_clipping():
    plugins = {
        "optimizer": plugin("AdamW8bit"),
        "param_groups": {"groups": {"*.bias": {"weight_decay": 0.0}}},
        "lr_schedule": {"schedule": "cosine", "warmup": "3 steps"},
        "clip": {"max_norm": 0.1},
    }
    memory = Memory(every="1 steps")
    whole = train({**plugins, "memory": memory})
    assert [group["lr"].item() for group in whole.optimizers[0].param_groups] == pytest.approx([0, 0], abs=1e-6)
    resumed = train({**copy.deepcopy(plugins), "memory": Memory(memory.states[5])})
    assert bits_of(resumed) == bits_of(whole)


class Wider(PlainModule):
    """Has one weight of which each of two ranks has a share that is large enough."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 1))


def on_each(name):
    """Train by ranks that all have the whole model, and by ranks that have shares, which are resumed."""
    torch.compiler.set_stance("force_eager")
    with_ddp = train_tiny({"ddp": {}, "optimizer": plugin(name)}, Wider)
    with_fsdp = train_tiny({"fsdp": {}, "optimizer": plugin(name)}, Wider)
    memory = Memory(every="1 steps")
    train({"fsdp": {}, "optimizer": plugin(name), "memory": memory}, Wider(), train_batch_size=12)
    kind = memory.states[4]["optimizers"][0]["state"]["net.2.weight"]["exp_avg"].to_local()
    again = train(
        {"fsdp": {}, "optimizer": plugin(name), "memory": Memory(memory.states[4])}, Wider(), train_batch_size=12
    )
    return with_ddp, with_fsdp, type(kind).__name__, digest(copy_state(again.export_model()))


@pytest.mark.xdist_group("ranks")
@pytest.mark.plugins
def test_ranks_have_states_of_few_bits_of_their_shares():
    ranks = on_ranks(on_each, 2, "AdamW8bit")
    alone = train_tiny({"optimizer": plugin("AdamW8bit")}, Wider)
    assert_one_model([rank[0] for rank in ranks], alone)
    assert_one_model([rank[1] for rank in ranks], alone)  # blocks of 256 numbers do not cross the border of a share
    assert {(kind, again) for _, _, kind, again in ranks} == {("OptimState8bit", digest(ranks[0][1].weights))}
