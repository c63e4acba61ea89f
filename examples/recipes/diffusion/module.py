"""Draw digits by diffusion, with hookline: the plugin ema evaluates the average of the weights too, and draws by it."""

import torch
from examples.recipes.diffusion.model import Denoiser, draw, load, loss_of, random
from torch.utils.data import DataLoader

from hookline import ModuleInterface
from hookline.tracking import Image


class Diffusion(ModuleInterface):
    """A network that takes noise out of images, until they are images."""

    def __init__(self, width: int = 32, learning_rate: float = 2e-3):
        super().__init__()
        self.train_set, self.val_set = load()
        self.net, self.learning_rate = Denoiser(width), learning_rate

    def train_step(self, global_step, batch, device):
        return loss_of(self.net, batch, *random(batch))

    def val_step(self, global_step, batch, device):
        return loss_of(self.net, batch, *random(batch, torch.Generator(device).manual_seed(0)))

    def predict_step(self, global_step, batch, device):
        return draw(self.net, len(batch), device)

    def sample(self):
        return Image((draw(self.net, 16, self.trainer.device)[:, 0].permute(1, 0, 2).flatten(1)[None] + 1) / 2)

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.train_set, batch_size, sampler=sampler(self.train_set))

    def get_val_dataloaders(self, sampler, batch_size):
        return DataLoader(self.val_set, batch_size, sampler=sampler(self.val_set))

    def get_predict_dataloaders(self, sampler, batch_size):
        return DataLoader(range(64), batch_size, sampler=sampler(range(64)))  # so many are drawn

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.Adam(self.parameters(), self.learning_rate)], []
