"""Networks that learn from images without labels (BYOL), and how good what they have learned is."""

import torch
from torch import nn
from torch.nn.functional import affine_grid, grid_sample, normalize

KNOWN = 100  # images whose labels are known, to measure by


def view(images):
    """Turn, stretch and move each image, and add noise."""
    turn, size, right, down = torch.rand(4, len(images), device=images.device) * 2 - 1
    size = 1 + 0.2 * size
    across, along = (0.35 * turn).cos() * size, (0.35 * turn).sin() * size
    rows = torch.stack([across, -along, 0.3 * right]), torch.stack([along, across, 0.3 * down])
    grid = affine_grid(torch.stack(rows).permute(2, 0, 1), images.shape, align_corners=False)
    seen = grid_sample(images, grid, align_corners=False)
    return seen + 0.1 * torch.randn_like(seen)


def network(width):
    """Return an encoder of images, and behind it a projector."""
    encoder = nn.Sequential(
        nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * width, 64),
    )  # fmt: skip
    return nn.Sequential(encoder, head())


def head():
    """Return a projector, or a predictor."""
    return nn.Sequential(nn.Linear(64, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64))


def distance(predicted, target):
    """Return how far predictions point elsewhere than their targets, from 0 to 4."""
    return 2 - 2 * (normalize(predicted) * normalize(target)).sum(dim=1).mean()


def right(features, labels, known, known_labels):
    """Return the share of images whose nearest known image has their label."""
    nearest = (normalize(features) @ normalize(known).T).argmax(dim=1)
    return (known_labels[nearest] == labels).float().mean()
