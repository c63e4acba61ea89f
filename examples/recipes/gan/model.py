"""Handwritten digits, a network that draws them and one that tells drawn ones from real ones."""

import torch
from sklearn.datasets import load_digits
from torch import nn


def load():
    """Return the images, float32 of shape (1, 8, 8) from -1 to 1."""
    return torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1


def generator(noise, width):
    """Return a network that makes images of noise of shape (noise, 1, 1)."""
    return nn.Sequential(
        nn.ConvTranspose2d(noise, 2 * width, 4, 1, 0, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 1, 3, 1, 1), nn.Tanh(),
    )  # fmt: skip


def discriminator(width):
    """Return a network that gives one number to each image, large for a real one."""
    return nn.Sequential(
        nn.Conv2d(1, width, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(8 * width, 1),
    )  # fmt: skip
