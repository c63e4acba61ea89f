"""Learn from images without labels, with hookline: the plugin ema makes the teacher."""

import copy

import torch
from examples.recipes.byol.model import KNOWN, distance, head, network, right, view
from examples.recipes.images.model import load
from torch.utils.data import DataLoader

from hookline import ModuleInterface, hookimpl


class Byol(ModuleInterface):
    """A student predicts what its teacher, the average of its past, sees in another view of an image."""

    def __init__(self, width: int = 16, learning_rate: float = 4e-3):
        super().__init__()
        self.train_set, self.val_set = load()
        self.student, self.predictor = network(width), head()
        self.teacher = copy.deepcopy(self.student)
        self.learning_rate = learning_rate

    def train_step(self, global_step, batch, device):
        one, other = view(batch[0]), view(batch[0])
        with torch.no_grad():
            of_one, of_other = self.teacher(one), self.teacher(other)
        return distance(self.predictor(self.student(one)), of_other) + distance(
            self.predictor(self.student(other)), of_one
        )

    @hookimpl
    def on_begin_val_epoch(self, trainer):
        images, self.known_labels = (tensor.to(trainer.device) for tensor in self.train_set[:KNOWN])
        self.known = self.student[0](images)

    def val_step(self, global_step, batch, device):
        images, labels = batch
        accuracy = right(self.student[0](images), labels, self.known, self.known_labels)
        self.log(val_accuracy=accuracy)
        return 1 - accuracy

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.train_set, batch_size, sampler=sampler(self.train_set))

    def get_val_dataloaders(self, sampler, batch_size):
        return DataLoader(self.val_set, batch_size, sampler=sampler(self.val_set))

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        trained = [*self.student.parameters(), *self.predictor.parameters()]
        return [torch.optim.AdamW(trained, self.learning_rate, weight_decay=1e-3)], []
