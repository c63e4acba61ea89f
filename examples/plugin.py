"""A module and a plugin, whole."""

import time
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, TensorDataset

from hookline import CallbackInterface, ModuleInterface, Trainer, hookimpl


class Line(ModuleInterface):
    def __init__(self):
        super().__init__()
        x = torch.randn(10_000, 8)
        self.data = TensorDataset(x, x.sum(dim=1, keepdim=True))
        self.net = torch.nn.Linear(8, 1)

    def train_step(self, global_step, batch, device):
        x, y = batch
        return (self.net(x) - y).square().mean()

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.data, batch_size, sampler=sampler(self.data))

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), lr=0.1)], []


@dataclass(eq=False)
class DataTime(CallbackInterface):
    """Print what part of an epoch is spent waiting for data, if it is above a limit."""

    above: float = 0.0

    def on_begin_train_epoch(self, global_step, epoch):
        self.began, self.waited = time.perf_counter(), 0.0

    @hookimpl(wrapper=True)
    def take_window(self):
        began = time.perf_counter()
        window = yield
        self.waited += time.perf_counter() - began
        return window

    def on_end_train_epoch(self, global_step):
        part = self.waited / (time.perf_counter() - self.began)
        if part > self.above:
            print(f"step {global_step}: {part:.0%} of the epoch was waiting for data")


if __name__ == "__main__":
    Trainer(Line(), plugins=[DataTime(above=0.1)], epochs=3, train_batch_size=32).train()
