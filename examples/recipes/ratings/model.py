"""Ratings that were made up, and a model of who likes what (matrix factorization)."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

USERS, ITEMS = 300, 150


def load(ratings=9000):
    """Return ratings from 1 to 5 of pairs (user, item), for training and validation; a hidden taste makes them."""
    drawn = torch.Generator().manual_seed(0)
    users, items = (torch.randint(many, (ratings,), generator=drawn) for many in (USERS, ITEMS))
    tastes, kinds = torch.randn(USERS, 3, generator=drawn), torch.randn(ITEMS, 3, generator=drawn)
    liked = (tastes[users] * kinds[items]).sum(dim=1) * 0.6 + 0.3 * torch.randn(ratings, generator=drawn)
    stars = (3 + liked).round().clamp(1, 5)
    train = ratings * 9 // 10
    return TensorDataset(users[:train], items[:train], stars[:train]), TensorDataset(
        users[train:], items[train:], stars[train:]
    )


class Tastes(nn.Module):
    """What each user likes, what each item is, and how well they fit."""

    def __init__(self, width):
        super().__init__()
        self.users, self.items = nn.Embedding(USERS, width), nn.Embedding(ITEMS, width)
        self.of_users, self.of_items = nn.Embedding(USERS, 1), nn.Embedding(ITEMS, 1)
        for table in (self.users, self.items, self.of_users, self.of_items):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, users, items):
        fit = (self.users(users) * self.items(items)).sum(dim=1, keepdim=True)
        return (3 + fit + self.of_users(users) + self.of_items(items)).squeeze(1)
