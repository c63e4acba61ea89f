"""Tell digits apart, with hookline."""

import torch
from examples.recipes.images.model import augment, load, resnet
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from hookline import ModuleInterface


class Images(ModuleInterface):
    """A residual network on changed images."""

    def __init__(self, width: int = 16, learning_rate: float = 0.2):
        super().__init__()
        self.train_set, self.val_set = load()
        self.net, self.learning_rate = resnet(width), learning_rate

    def train_step(self, global_step, batch, device):
        images, labels = batch
        return cross_entropy(self.net(augment(images)), labels, label_smoothing=0.1)

    def val_step(self, global_step, batch, device):
        images, labels = batch
        logits = self.net(images)
        return cross_entropy(logits, labels), logits, labels

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.train_set, batch_size, sampler=sampler(self.train_set))

    def get_val_dataloaders(self, sampler, batch_size):
        return DataLoader(self.val_set, batch_size, sampler=sampler(self.val_set))

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.9, weight_decay=5e-4)], []
