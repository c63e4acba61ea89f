"""pytorch-accelerated's Trainer."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.peers.work import Work
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import TerminateOnNaNCallback, TrainerCallback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

WITHOUT = {
    "ranks": "not tried: its loaders are given to it here",
    "features": "clips by value alone",
}


NO_DATA = TensorDataset(torch.zeros(1))  # it wants one, and asks for loaders by it


class Nothing(TrainerCallback):
    def on_train_step_end(self, trainer: Any, **others: Any) -> None: ...


class Ours(Trainer):
    def __init__(self, work: Work) -> None:
        model = work.model()
        self.work = work
        callbacks = [type(f"Nothing{number}", (Nothing,), {})() for number in range(work.callbacks)]
        optimizer = work.optimizer(model.parameters())
        super().__init__(model, work.loss, optimizer, callbacks=(TerminateOnNaNCallback, *callbacks))

    def create_train_dataloader(self, **options: Any) -> Any:
        loader = self.work.loader()
        if isinstance(loader, DataLoader):
            return loader
        return DataLoader(list(loader), collate_fn=lambda batches: batches[0])  # it takes nothing else

    create_eval_dataloader = create_train_dataloader


def train(work: Work) -> nn.Module:
    trainer = Ours(work)
    trainer.train(NO_DATA, num_epochs=1, gradient_accumulation_steps=work.accumulate)
    return trainer.model


def validate(work: Work) -> float:
    trainer = Ours(work)
    trainer.evaluate(NO_DATA)
    return float(trainer.run_history.get_latest_metric("evaluation_loss"))
