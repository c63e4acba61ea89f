"""Ranks over gloo that normalize by the batches of all, against one process with the whole batch."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hookline import ModuleInterface
from hookline.testing import assert_one_model, on_ranks, run_ranks, train_tiny

pytestmark = [pytest.mark.plugins, pytest.mark.xdist_group("ranks")]


class Normed(ModuleInterface):
    """Has batch norm over pictures and over rows, with running means of both kinds, and without."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pictures = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()]
            rows = [nn.Linear(24, 8), nn.BatchNorm1d(8, momentum=None), nn.ReLU()]
            last = [nn.Linear(8, 4), nn.BatchNorm1d(4, affine=False, track_running_stats=False), nn.Linear(4, 1)]
            self.net, self.last = nn.Sequential(*pictures, *rows), nn.Sequential(*last)
            self.data = TensorDataset(3 + torch.randn(48, 2, 4, 4), torch.randn(48, 1))

    def train_step(self, global_step, batch, device):
        pictures, wanted = batch
        return (self.last(self.net(pictures)) - wanted).square().mean()

    def val_step(self, global_step, batch, device):
        return self.net(batch[0]).square().mean()

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.data, batch_size, sampler=sampler(self.data))

    get_val_dataloaders = get_train_dataloader

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)], []


def train(*others, sync=True):
    """Train once with each of several sets of other plugins."""
    mine = {"sync_batchnorm": {}} if sync else {}
    return [train_tiny({**mine, **plugins}, Normed) for plugins in others]


TWO = {"ddp": {}}, {"fsdp": {"wrap": ["Sequential"]}}
FOUR = {"ddp": {}}, {"fsdp": {"replicas": 2}}
assert_alike = functools.partial(assert_one_model, rtol=2e-5, atol=2e-6, rtol_of_metrics=1e-5)


@pytest.mark.parametrize(("world_size", "others"), [(2, TWO), pytest.param(4, FOUR, marks=pytest.mark.slow)])
def test_ranks_normalize_as_one_process_does(world_size, others):
    (alone,) = train({}, sync=False)
    for ranks in zip(*on_ranks(train, world_size, *others), strict=True):
        assert_alike(ranks, alone)  # running statistics are of the weights that are compared
    assert alone.weights["net.5.num_batches_tracked"] == 8


def test_without_it_ranks_train_something_else():
    (alone,) = train({}, sync=False)
    (ranks,) = zip(*on_ranks(train, 2, {"ddp": {}}, sync=False), strict=True)
    with pytest.raises(AssertionError, match="not close"):
        assert_alike(ranks, alone)


def test_batches_that_only_fill_up_are_refused():
    for outcome in run_ranks(train, 2, {"ddp": {}, "distributed": {"uneven": "pad"}}):
        assert "uneven=pad does not go with the SyncBatchNorm net.1, whose statistics are" in outcome.output


def test_ranks_that_have_the_same_samples_are_refused():
    plugins = {"tp": {"plan": {"net.4": "column to whole"}}}
    for outcome in run_ranks(train, 2, plugins):
        assert "there are 1 shares of the data: samples that several ranks have" in outcome.output
