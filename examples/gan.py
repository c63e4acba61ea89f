"""A generator and a discriminator, each with an optimizer of its own, on points around eight places on a circle.

python -m examples.gan
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from hookline import ModuleInterface, Trainer, hookimpl, set_seed


def ring(points, places=8, spread=0.05):
    """Return points around places on the unit circle, float32 of shape (points, 2)."""
    angle = torch.arange(points) % places * (2 * math.pi / places)
    return torch.stack([angle.cos(), angle.sin()], dim=1) + spread * torch.randn(points, 2)


def mlp(inputs, width, outputs):
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, outputs),
    )


class Gan(ModuleInterface):
    """Learn to draw points as the data has them."""

    def __init__(self, points: int = 4096, noise: int = 8, width: int = 64, learning_rate: float = 1e-3):
        super().__init__()
        self.noise, self.learning_rate = noise, learning_rate
        self.data = ring(points)
        self.generator = mlp(noise, width, 2)
        self.discriminator = mlp(2, width, 1)

    @hookimpl
    def update(self, trainer, window):
        """Take the window through the model once for each network, and step that network's optimizer."""
        for self.turn, optimizer in zip(("discriminator", "generator"), trainer.optimizers, strict=True):
            outputs = trainer.hook.run_window(trainer=trainer, window=window)
            trainer.step([optimizer])  # and clear both: the generator's backward went through the discriminator
        return outputs

    def train_step(self, global_step, batch, device):
        fakes = self.draw(len(batch), device)
        if self.turn == "generator":
            return F.softplus(-self.discriminator(fakes)).mean()
        loss = F.softplus(-self.discriminator(batch)).mean() + F.softplus(self.discriminator(fakes.detach())).mean()
        self.log(discriminator_loss=loss)
        return loss

    def draw(self, points, device="cpu"):
        return self.generator(torch.randn(points, self.noise, device=device))

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.data, batch_size, sampler=sampler(self.data))

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        networks = self.discriminator, self.generator
        return [torch.optim.Adam(net.parameters(), self.learning_rate, betas=(0.5, 0.99)) for net in networks], []


if __name__ == "__main__":
    set_seed(0)
    gan = Gan()
    Trainer(gan, epochs=40, train_batch_size=128).train()
    print(gan.draw(10).detach())
