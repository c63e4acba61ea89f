"""Metrics of two ranks: exact over uneven data, and each goes on with its own where it was cut in mid-epoch."""

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


class Boxes(torchmetrics.Metric):
    """Keeps a tensor for each sample, of which some are empty, as metrics of detection do."""

    def __init__(self):
        super().__init__()
        self.add_state("boxes", [], dist_reduce_fx=None)
        self.add_state("ids", [], dist_reduce_fx=None)

    def update(self, ids):
        for number in ids.tolist():
            self.boxes.append(torch.ones(number % 3, 4))
            self.ids.append(torch.tensor(number))

    def compute(self):
        assert [len(boxes) for boxes in self.boxes] == [int(number) % 3 for number in self.ids]
        return {"samples": float(len(self.ids)), "boxes": float(sum(map(len, self.boxes)))}


class Uneven(TinyModule):
    """Three loaders: one of 7 samples, of which a rank has one more, one of a single sample, and one of 8."""

    def __init__(self):
        super().__init__()
        self.told, self.drawn = {}, []

    def val_step(self, global_step, batch, device):
        _, _, ids = batch
        scores = torch.sin(torch.arange(9.0).reshape(3, 3)[ids % 3] + ids[:, None]).softmax(1)
        return ids.float().mean(), {
            **dict.fromkeys(("f1", "by_class", "both", "roc", "confusion"), (scores, ids % 3)),
            "of": (ids,),
        }

    def get_val_dataloaders(self, sampler, batch_size):
        loader = {}
        for key, size in (("seven", 7), ("one", 1), ("eight", 8)):
            data = torch.utils.data.TensorDataset(*(torch.zeros(size),) * 2, torch.arange(size))
            loader[key] = torch.utils.data.DataLoader(data, 2, sampler=sampler(data))
        return loader

    @hookimpl
    def on_log_object(self, name, value):
        self.drawn.append(name)
        self.told[name] = [line.get_xydata().tolist() for axes in value.axes for line in axes.lines] or [
            text.get_text() for axes in value.axes for text in axes.texts
        ]


def evaluated(plugins):
    torch.set_num_threads(1)
    module = Uneven()
    f1 = {"_target_": "torchmetrics.classification.MulticlassF1Score", "num_classes": 3, "average": None}
    metrics = {
        "f1": f1,
        "roc": {"_target_": "torchmetrics.classification.MulticlassROC", "num_classes": 3},
        "by_class": {"_target_": "torchmetrics.ClasswiseWrapper", "metric": f1},
        "both": {
            "_target_": "torchmetrics.MetricCollection",
            "metrics": {"f1": f1, "micro": {**f1, "average": "micro"}},
        },
        "confusion/one": {"_target_": "torchmetrics.classification.MulticlassConfusionMatrix", "num_classes": 3},
    }
    measured = tiny_trainer({**plugins, "metrics": Metrics(val={**metrics, "of": Boxes()})}, module).validate()
    return {name: value for name, value in measured.items() if "loss" not in name}, module.told, module.drawn


@pytest.mark.filterwarnings("ignore:No (positive|negative) samples")  # the loader of one sample has one class
def test_values_are_exact_over_uneven_ranks_and_rank_0_draws_them():
    values, told, drawn = evaluated({})
    outcomes = run_ranks(evaluated, 2, {"distributed": {}})
    assert [outcome.code for outcome in outcomes] == [0, 0], "\n".join(outcome.output for outcome in outcomes)
    first, second = [outcome.value for outcome in outcomes]
    assert first[0] == second[0] == values
    assert len(values) == 3 * (3 + 3 + 4 + 2)
    assert (values["val_of_samples/seven"], values["val_of_samples/one"], values["val_of_boxes/seven"]) == (7, 1, 6)
    assert sorted(drawn) == sorted(first[2]) == ["val_confusion/one", "val_roc/eight", "val_roc/one", "val_roc/seven"]
    assert first[1] == told
    assert second[2] == []
