"""What a test of a plugin of several ranks is written with: functions on ranks, and what trainings come to."""

import os

import pytest
import torch

from hookline import CallbackInterface, hookimpl
from hookline.testing import PlainModule, assert_one_model, digest, on_ranks, train_tiny

ranks = pytest.mark.xdist_group("ranks")


def place(word, fails=None, *, end=""):
    if os.environ["RANK"] == fails:
        raise ZeroDivisionError(f"on rank {fails}")
    return word + os.environ["RANK"] + os.environ["WORLD_SIZE"] + end


@ranks
def test_each_rank_returns_what_it_has_found():
    assert on_ranks(place, 2, "rank ", end="!") == ["rank 02!", "rank 12!"]


@ranks
def test_a_rank_that_fails_is_shown():
    with pytest.raises(AssertionError, match="(?s)--- rank 0: 0\n.*--- rank 1: 1\n.*ZeroDivisionError: on rank 1"):
        on_ranks(place, 2, "rank ", "1")


def look(trainer):
    return trainer.global_step


def test_a_training_is_kept_and_gone_on_with():
    whole = train_tiny({}, keep=True, look=look)
    assert list(whole.states) == list(range(1, 9))
    assert whole.looked == 8
    assert whole.again == whole.metrics
    resumed = train_tiny({}, begin=[whole.states[5]])
    assert digest(resumed.weights) == digest(whole.weights)
    assert resumed.states.keys() == {8}  # the end of training is saved as well
    assert train_tiny({}).states == {}


class Changes(CallbackInterface):
    """Adds something to a weight before an evaluation, or to a metric."""

    def __init__(self, weight=0.0, metric=0.0):
        self.weight, self.metric = weight, metric

    @hookimpl
    def on_begin_evaluation(self, trainer):
        with torch.no_grad():
            trainer.module.net[0].weight[0, 0] += self.weight

    @hookimpl
    def on_end_val_epoch(self, trainer):
        trainer.log(val_own=1.0 + self.metric)


@pytest.mark.parametrize(
    ("trained", "expected", "message"),
    [
        ([{}, {"weight": 1e-3}], {}, "rank 1 has other weights than rank 0"),
        ([{}, {"metric": 1e-3}], {}, "rank 1 has .*, and rank 0 "),
        ([{"weight": 1e-3}] * 2, {}, "Mismatched elements: 1"),
        ([{"metric": 1e-3}] * 2, {}, "not close"),
        ([{"metric": 1e-3}] * 2, {"metric": 1e-3}, None),
    ],
)
def test_what_is_another_model_is_told(trained, expected, message):
    found = [train_tiny({"changes": Changes(**change)}, PlainModule, max_steps=1) for change in trained]
    alone = train_tiny({"changes": Changes(**expected)}, PlainModule, max_steps=1)
    if message is None:
        assert_one_model(found, alone)
        return
    with pytest.raises(AssertionError, match=message):
        assert_one_model(found, alone)
