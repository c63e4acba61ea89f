"""Which way is better, and what becomes of a value that is looked at and never comes."""

from __future__ import annotations

import re

import pytest
import torch

from hookline import CallbackInterface, hookimpl
from hookline.testing import Memory, TinyModule, tiny_trainer


def mode(metric, module=None, plugins=(), **options):
    trainer = tiny_trainer(list(plugins), module, **options)
    return trainer.hook.get_mode(trainer=trainer, metric=metric)


@pytest.mark.parametrize(
    "metric",
    [
        *("val_loss", "val_mse", "val_error", "val_perplexity", "val_wer", "val_rmse", "val_nll", "top5_error", "Loss"),
        *("val_loss/few", "val/loss", "valid/loss_1", "val_cross_entropy", "crossEntropy", "MeanSquaredError", "bce-2"),
        *("train_loss", "val_log_loss", "edit distance", "FID", "l1.mae", "val_loss/accuracy"),
    ],
)
def test_the_smallest(metric):
    assert mode(metric) == "min"


@pytest.mark.parametrize(
    "metric",
    [
        *("val_accuracy", "val_acc", "top5acc", "acc@1", "top-1-accuracy", "val_f1", "f1score", "F1Score", "mAP50"),
        *("mAP@.5", "IoU", "mIoU", "ndcg@10", "hit_rate", "R2Score", "val/acc", "accuracy/hard_errors", "val_recall_3"),
        *("MulticlassAccuracy", "episode_return", "rougeL_fmeasure", "AUROC", "valAUC", "dice2"),
    ],
)
def test_the_largest(metric):
    assert mode(metric) == "max"


@pytest.mark.parametrize(
    ("metric", "why"),
    [
        ("val_score", "no word of its name says so"),
        ("val_top5", "no word of its name says so"),
        ("score/error", "no word of its name says so"),
        ("val", "no word of its name says so"),
        ("", "no word of its name says so"),
        ("dice_loss", "'loss' speaks for min, 'dice' for max"),
        ("neg_mse", "'mse' speaks for min, 'neg' for neither"),
        ("1 - accuracy", "'accuracy' for max, 'minus' for neither"),
        ("accuracy_gap", "'accuracy' for max, 'gap' for neither"),
    ],
)
def test_nobody_knows(metric, why):
    said = f"whether the smallest or the largest value of {metric!r} is the best: {why}; give the option mode: "
    with pytest.raises(ValueError, match=re.escape(said)):
        mode(metric)


def test_a_loss_of_another_name_and_a_module_that_knows_better():
    class Knows(TinyModule):
        @hookimpl
        def get_mode(self, metric):
            return "max" if metric == "val_score" else "min"

    assert mode("objective/few", val_loss_metric_name="objective") == "min"
    assert mode("val_score", Knows()) == "max"


# A value that never comes -------------------------------------------------------------


class Looks(CallbackInterface):
    """Watches a metric that there is, and one that there is not."""

    @hookimpl(wrapper=True)
    def get_watched_metrics(self):
        return (yield) | {"val_loss": "looks.here", "val_acc": "looks.at"}


class LogsLate(TinyModule):
    heard = 0

    @hookimpl
    def on_end_validation(self):
        self.heard += 1


def test_what_never_comes_is_refused_when_the_state_is_saved():
    memory = Memory()
    trainer = tiny_trainer([Looks(), memory], evaluate_every="3 steps")
    said = (
        "looks.at: the evaluation has no metric 'val_acc'; it has val_loss (what a training step logs is not among "
        "it). Correct the name, or log this value in every evaluation; step 3 is saved, to go on with"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        trainer.train()
    assert memory.state["trainer"]["counters"]["global_step"] == 3
    whole, again = tiny_trainer(), tiny_trainer([Memory(memory.state)])
    whole.train()
    again.train()
    assert all(map(torch.equal, whole.module.state_dict().values(), again.module.state_dict().values()))


def test_it_is_not_said_to_be_saved_where_nobody_saves():
    with pytest.raises(ValueError, match="in every evaluation$"):
        tiny_trainer([Looks()]).train()


@pytest.mark.parametrize("options", [{"sanity_val_steps": 1}, {"eval_when_start": True}])
def test_it_is_refused_before_any_step_unless_somebody_logs_when_an_evaluation_is_over(options):
    trainer = tiny_trainer([Looks()], **options)
    with pytest.raises(ValueError, match="looks.at: the evaluation has no metric 'val_acc'"):
        trainer.train()
    assert trainer.global_step == 0
    trainer = tiny_trainer([Looks()], LogsLate(), **options)
    with pytest.raises(ValueError, match="looks.at: the evaluation has no metric 'val_acc'"):
        trainer.train()
    assert (trainer.global_step, trainer.module.heard) == (7, 1 + ("eval_when_start" in options))


def test_the_core_watches_what_schedulers_follow():
    class Follows(TinyModule):
        def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
            optimizer = torch.optim.SGD(self.parameters(), 0.01)
            return [optimizer], [(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), "validation")]

    trainer = tiny_trainer([], Follows(), epochs=1)
    trainer.train()
    assert trainer.hook.get_watched_metrics(trainer=trainer) == {"val_loss": "ReduceLROnPlateau"}
    trainer = tiny_trainer([], Follows(), epochs=1, val_loss_metric_name="other", max_steps=1)
    trainer.module.val_step = lambda **_: None
    with pytest.raises(ValueError, match="ReduceLROnPlateau: the evaluation has no metric 'other'"):
        trainer.train()


def test_an_evaluation_before_the_first_step_is_not_due_at_the_boundary_of_that_step():
    due = []

    class Asks(CallbackInterface):
        @hookimpl
        def on_boundary(self, trainer):
            due.append(trainer.due("eval"))

    tiny_trainer([Asks()], eval_when_start=True, evaluate_every="3 steps", epochs=1, max_steps=4).train()
    assert due == [False, False, True, True]
