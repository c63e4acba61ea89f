"""Handwritten digits of 8 x 8 pixels, a residual network, and a change of an image that leaves its digit."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset


def load():
    """Return the training images and those of the validation, with their labels."""
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float()[:, None] / 16, torch.from_numpy(digits.target)
    return TensorDataset(images[:1437], labels[:1437]), TensorDataset(images[1437:], labels[1437:])


def augment(images):
    """Move each image by up to one pixel, and add noise."""
    down, right = torch.randint(3, (2, len(images)), device=images.device)
    windows = F.pad(images, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)  # (image, channel, down, right, 8, 8)
    moved = windows[torch.arange(len(images), device=images.device), :, down, right]
    return moved + 0.05 * torch.randn_like(moved)


class Residual(nn.Module):
    """Two convolutions, whose result is added to what they got."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.past = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        return F.relu(self.body(x) + self.past(x))


def resnet(width):
    """Return a network for images of shape (1, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 1, 1), Residual(width, width, 1), Residual(width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
    )  # fmt: skip
