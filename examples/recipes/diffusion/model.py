"""Handwritten digits that noise dissolves in 100 steps, and a network that tells the noise (DDPM)."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import mse_loss

STEPS = 100
BETAS = torch.linspace(1e-3, 0.1, STEPS)
KEPT = (1 - BETAS).cumprod(dim=0)  # how much of an image is left after a step


def load():
    """Return the images of training and of validation, float32 of shape (1, 8, 8) from -1 to 1."""
    return (torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1).split([1500, 297])


class Denoiser(nn.Module):
    """Tell the noise in an image, given how many steps made it."""

    def __init__(self, width):
        super().__init__()
        self.time = nn.Embedding(STEPS, width)
        self.down = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1), nn.GroupNorm(4, width), nn.SiLU())
        self.deep = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, 2, 1), nn.GroupNorm(4, 2 * width), nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.GroupNorm(4, 2 * width), nn.SiLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.GroupNorm(4, width), nn.SiLU(),
        )  # fmt: skip
        self.up = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, 1, 1), nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 1, 3, 1, 1)
        )

    def forward(self, images, steps):
        seen = self.down(images) + self.time(steps)[:, :, None, None]
        return self.up(torch.cat([seen, self.deep(seen)], dim=1))


def loss_of(net, images, steps, noise):
    """Return how far the network is from the noise that was added to images."""
    kept = KEPT.to(images.device)[steps][:, None, None, None]
    return mse_loss(net(kept.sqrt() * images + (1 - kept).sqrt() * noise, steps), noise)


def random(images, generator=None):
    """Return steps and noise for a batch of images."""
    drawn = {"generator": generator, "device": images.device}
    return torch.randint(STEPS, (len(images),), **drawn), torch.randn(images.shape, **drawn)


@torch.no_grad()
def draw(net, images, device="cpu"):
    """Return so many new images: noise from which the network takes its noise step by step."""
    now = torch.randn(images, 1, 8, 8, device=device)
    for step in reversed(range(STEPS)):
        told = net(now, torch.full((images,), step, device=device))
        now = (now - BETAS[step] / (1 - KEPT[step]).sqrt() * told) / (1 - BETAS[step]).sqrt()
        if step:
            now = now + BETAS[step].sqrt() * torch.randn_like(now)
    return now.clamp(-1, 1)
