"""Recommend, with hookline: it stops when it gets no better, and ends with the best weights."""

import math

import torch
from examples.recipes.ratings.model import Tastes, load
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from hookline import ModuleInterface, hookimpl


class Ratings(ModuleInterface):
    """Matrix factorization with biases."""

    def __init__(self, width: int = 8, learning_rate: float = 1e-2):
        super().__init__()
        self.train_set, self.val_set = load()
        self.net, self.learning_rate = Tastes(width), learning_rate

    def train_step(self, global_step, batch, device):
        users, items, stars = batch
        return mse_loss(self.net(users, items), stars)

    val_step = train_step

    @hookimpl
    def on_end_validation(self, metrics):
        self.log(val_rmse=math.sqrt(metrics["val_loss"]))

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.train_set, batch_size, sampler=sampler(self.train_set))

    def get_val_dataloaders(self, sampler, batch_size):
        return DataLoader(self.val_set, batch_size, sampler=sampler(self.val_set))

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=0.1)], []
