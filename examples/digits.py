"""Handwritten digits, 1,797 images of 8 x 8 pixels: a small network, 99 % right after five seconds.

hookline fit examples/digits.yaml
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hookline import ModuleInterface


def load_split():
    """Return (train, validation), 1,437 and 360 images; every fifth of each class is held out.

    Images are float32 of shape (1, 8, 8) in [0, 1], labels int64.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    by_class = labels.argsort(stable=True)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[by_class[::5]] = True
    return TensorDataset(images[~held_out], labels[~held_out]), TensorDataset(images[held_out], labels[held_out])


class Digits(ModuleInterface):
    """Tell the ten digits apart."""

    def __init__(self, width: int = 32, dropout: float = 0.2, learning_rate: float = 3e-3):
        super().__init__()
        self.learning_rate = learning_rate
        self.train_set, self.val_set = load_split()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(dropout), nn.Linear(8 * width, 10),
        )  # fmt: skip

    def train_step(self, global_step, batch, device):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels, label_smoothing=0.1)

    def val_step(self, global_step, batch, device):
        images, labels = batch
        logits = self.net(images)
        return F.cross_entropy(logits, labels), logits, labels

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.train_set, batch_size, sampler=sampler(self.train_set))

    def get_val_dataloaders(self, sampler, batch_size):
        return DataLoader(self.val_set, batch_size, sampler=sampler(self.val_set))

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        steps = self.trainer.totals.steps  # None where nobody can know, as with max_time alone
        schedulers = [torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, steps)] if steps else []
        return [optimizer], schedulers
