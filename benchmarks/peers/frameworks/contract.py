"""The loop by hand around the module that hookline is given: what the contract of modules costs by itself."""

from __future__ import annotations

from benchmarks.peers.frameworks.hookline import Module
from benchmarks.peers.work import Work
from torch import nn

from hookline import Stage

WITHOUT = dict.fromkeys(("features", "accumulate", "validate", "callbacks", "ranks"), "the rows of a plain step alone")


def train(work: Work) -> nn.Module:
    module = Module(work)
    optimizer = work.optimizer(module.parameters())
    for number, batch in enumerate(work.loader(), 1):
        module(stage=Stage.TRAIN, global_step=number, batch=batch, device="cpu").backward()
        optimizer.step()
        optimizer.zero_grad()
    return module.model
