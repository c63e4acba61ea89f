"""Lightning Fabric around a loop of one's own."""

from __future__ import annotations

import torch
from benchmarks.peers.work import Work
from lightning.fabric import Fabric
from torch import nn

WITHOUT = {
    "features": "its features would be lines of one's own loop, as by hand",
    "callbacks": "calls none in a loop of one's own",
}


def train(work: Work) -> nn.Module:
    fabric = Fabric(accelerator="cpu", devices=work.ranks, strategy="ddp" if work.ranks > 1 else "auto")
    fabric.launch()
    model = work.model()
    wrapped, optimizer = fabric.setup(model, work.optimizer(model.parameters()))
    loader = fabric.setup_dataloaders(work.loader()) if work.ranks > 1 else work.loader()
    for number, batch in enumerate(loader, 1):
        inputs, targets = fabric.to_device(batch)
        loss = work.loss(wrapped(inputs), targets)
        fabric.backward(loss / work.accumulate if work.accumulate > 1 else loss)
        if number % work.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model


def validate(work: Work) -> float:
    fabric = Fabric(accelerator="cpu", devices=1)
    wrapped, total, count = fabric.setup(work.model()).eval(), torch.zeros(()), 0
    with torch.no_grad():
        for batch in work.loader():
            inputs, targets = fabric.to_device(batch)
            total += work.loss(wrapped(inputs), targets) * len(targets)
            count += len(targets)
    return total.item() / count
