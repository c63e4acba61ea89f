"""Draw digits, with hookline."""

import torch
from examples.recipes.gan.model import discriminator, generator, load
from torch.nn.functional import softplus
from torch.utils.data import DataLoader

from hookline import ModuleInterface, hookimpl
from hookline.tracking import Image


class Gan(ModuleInterface):
    """Two networks that train each other, each with an optimizer of its own."""

    def __init__(self, noise: int = 16, width: int = 32, learning_rate: float = 1e-3):
        super().__init__()
        self.noise, self.learning_rate = noise, learning_rate
        self.data = load()
        self.generator, self.discriminator = generator(noise, width), discriminator(width)

    @hookimpl
    def update(self, trainer, window):
        """Take the window through the networks once for each of them, and step its optimizer."""
        for self.turn, optimizer in zip(("discriminator", "generator"), trainer.optimizers, strict=True):
            outputs = trainer.hook.run_window(trainer=trainer, window=window)
            trainer.step([optimizer])  # and clear the gradients of both
        return outputs

    def train_step(self, global_step, batch, device):
        fakes = self.draw(len(batch), device)
        if self.turn == "generator":
            return softplus(-self.discriminator(fakes)).mean()
        loss = softplus(-self.discriminator(batch)).mean() + softplus(self.discriminator(fakes.detach())).mean()
        self.log(discriminator_loss=loss)
        return loss

    def draw(self, images, device):
        return self.generator(torch.randn(images, self.noise, 1, 1, device=device))

    def sample(self):
        return Image((self.draw(16, self.trainer.device)[:, 0].permute(1, 0, 2).flatten(1)[None] + 1) / 2)

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.data, batch_size, sampler=sampler(self.data))

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        networks = self.discriminator, self.generator
        return [torch.optim.Adam(net.parameters(), self.learning_rate, betas=(0.5, 0.99)) for net in networks], []
