"""TorchTNT's AutoUnit."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.peers.work import Work
from torch import nn
from torchtnt.framework.auto_unit import AutoUnit
from torchtnt.framework.callback import Callback
from torchtnt.framework.evaluate import evaluate
from torchtnt.framework.state import State
from torchtnt.framework.train import train as run

WITHOUT = {
    "ranks": "not tried: its loaders are given to it here",
    "features": "its checkpoints need torchsnapshot",
}


class Nothing(Callback):
    def on_train_step_end(self, state: State, unit: Any) -> None: ...


class Unit(AutoUnit):
    def __init__(self, work: Work, model: nn.Module) -> None:
        super().__init__(module=model, device=torch.device("cpu"), gradient_accumulation_steps=work.accumulate)
        self.work, self.total, self.count = work, torch.zeros(()), 0

    def compute_loss(self, state: State, data: Any) -> Any:
        inputs, targets = data
        logits = self.module(inputs)
        return self.work.loss(logits, targets), logits

    def on_eval_step_end(self, state: State, data: Any, step: int, loss: torch.Tensor, outputs: Any) -> None:
        self.total += loss * len(data[1])
        self.count += len(data[1])

    def configure_optimizers_and_lr_scheduler(self, module: nn.Module) -> Any:
        return self.work.optimizer(module.parameters()), None


def train(work: Work) -> nn.Module:
    model = work.model()
    run(Unit(work, model), work.loader(), max_epochs=1, callbacks=[Nothing() for _ in range(work.callbacks)])
    return model


def validate(work: Work) -> float:
    unit = Unit(work, work.model())
    evaluate(unit, work.loader())
    return unit.total.item() / unit.count
