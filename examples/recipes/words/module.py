"""Predict words, with hookline: the state of the network goes on from batch to batch."""

import math

import torch
from examples.recipes.words.model import Reader, load
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from hookline import ModuleInterface, hookimpl


class Words(ModuleInterface):
    """A recurrent language model, trained by truncated backpropagation through time."""

    def __init__(self, words: int = 2000, width: int = 64, rows: int = 20, reach: int = 20, learning_rate=5e-3):
        super().__init__()
        self.train_set, self.val_set = load(words, rows, reach)
        self.net, self.learning_rate = Reader(words, width), learning_rate
        self.register_buffer("state", torch.zeros(2, 1, rows, width))  # a buffer, so that checkpoints have it
        self.register_buffer("val_state", torch.zeros(2, 1, rows, width), persistent=False)

    @hookimpl
    def on_begin_train_epoch(self, trainer):
        if trainer.position == 0:  # not where a resumed run goes on within an epoch
            self.state.zero_()

    @hookimpl
    def on_begin_val_epoch(self):
        self.val_state.zero_()

    def read(self, batch, state):
        logits, after = self.net(batch[:, :-1], tuple(state))
        return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), torch.stack(after).detach()

    def train_step(self, global_step, batch, device):
        loss, self.state = self.read(batch, self.state)
        return loss

    def val_step(self, global_step, batch, device):
        loss, self.val_state = self.read(batch, self.val_state)
        return loss

    @hookimpl
    def on_end_validation(self, metrics):
        self.log(val_perplexity=math.exp(metrics["val_loss"]))

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.train_set, batch_size=None)  # in order; each item is a batch

    def get_val_dataloaders(self, sampler, batch_size):
        return DataLoader(self.val_set, batch_size=None)

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.Adam(self.parameters(), self.learning_rate)], []
