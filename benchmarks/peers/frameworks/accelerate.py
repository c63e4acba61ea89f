"""Hugging Face Accelerate around a loop of one's own."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from benchmarks.peers.work import Work
from torch import nn

WITHOUT = {
    "features": "its features would be lines of one's own loop, as by hand",
    "callbacks": "calls none in a loop of one's own",
}


def train(work: Work) -> nn.Module:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=work.accumulate)
    model, optimizer = accelerator.prepare(model := work.model(), work.optimizer(model.parameters()))
    for batch in accelerator.prepare(work.loader()):
        with accelerator.accumulate(model):
            inputs, targets = send_to_device(batch, accelerator.device)
            accelerator.backward(work.loss(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(model)


def validate(work: Work) -> float:
    accelerator = Accelerator(cpu=True)
    model, total, count = accelerator.prepare(work.model()).eval(), torch.zeros(()), 0
    with torch.no_grad():
        for batch in work.loader():
            inputs, targets = send_to_device(batch, accelerator.device)
            total += work.loss(model(inputs), targets) * len(targets)
            count += len(targets)
    return total.item() / count
