"""Metrics of training on two ranks that were cut in the middle of an epoch: each goes on with its own."""

import logging

import pytest
import torch
import torchmetrics

from hookline import hookimpl
from hookline.testing import TinyModule, digest, run_ranks, tiny_trainer
from hookline.testing.faults import PRELOADED
from hookline_metrics import Metrics

pytestmark = [pytest.mark.plugins, pytest.mark.xdist_group("ranks")]
PRELOADED += [__name__, "hookline_distributed", "hookline_ddp", "hookline_checkpoint"]


class Logs(TinyModule):
    """Keeps the values of its metrics."""

    def __init__(self):
        super().__init__(samples=48)
        self.logged = []

    @hookimpl
    def on_log(self, metrics):
        self.logged += [value for name, value in metrics.items() if name.startswith("train_of")]


class Kept(Metrics):
    """Tells what its metrics of training have gathered at each boundary."""

    def __post_init__(self):
        super().__post_init__()
        self.gathered = []

    @hookimpl
    def on_boundary(self, trainer):
        self.gathered.append(digest(trainer.plugins.get_plugin("metrics.train").get_state()))


def trained(folder, options):
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    kept = Kept(train={"of_all": torchmetrics.MeanMetric(), "of_each": torchmetrics.CatMetric()}, inputs=[1])
    module = Logs()
    plugins = {"ddp": {}, "metrics": kept, "checkpoint": {"every": "1000 steps"}}
    tiny_trainer(plugins, module, runs_folder=folder, evaluate_every=None, **options).train()
    return module.logged, kept.gathered


def two(folder, options):
    outcomes = run_ranks(trained, 2, folder, options)
    assert [outcome.code for outcome in outcomes] == [0, 0], "\n".join(outcome.output for outcome in outcomes)
    return [outcome.value for outcome in outcomes], outcomes[0].output


def test_a_resume_in_mid_epoch_has_the_bits_of_each_rank(tmp_path):
    whole, _ = two(str(tmp_path / "whole"), {"epochs": 2})
    cut = str(tmp_path / "cut")
    two(cut, {"max_steps": 3})
    resumed, said = two(cut, {"epochs": 2, "resume": True})
    assert "lost" not in said
    for (values, gathered), (values_after, gathered_after) in zip(whole, resumed, strict=True):
        assert gathered_after == gathered[3:]
        assert values_after == values
    assert whole[0][1][:6] != whole[1][1][:6]  # ranks had gathered something else


def test_a_run_of_fewer_ranks_says_what_is_lost(tmp_path, caplog):
    folder = str(tmp_path)
    two(folder, {"max_steps": 3})
    with caplog.at_level(logging.WARNING, "hookline"):
        alone, _ = trained(folder, {"epochs": 1, "resume": True})
    words = "this run has 1 rank(s), and had 2 before: what ranks from 1 on kept for themselves (metrics.train) is lost"
    assert words in caplog.text
    assert len(alone) == 1
