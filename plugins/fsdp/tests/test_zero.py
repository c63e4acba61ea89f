"""What ZeRO-1 promises, by shares that stay together from forward to backward: states in parts, in any layout."""

import pytest
import torch

from hookline.testing import PlainModule, assert_one_model, digest, on_ranks, train_tiny

pytestmark = [pytest.mark.plugins, pytest.mark.xdist_group("ranks")]
ZERO = {"fsdp": {"wrap": ["Linear"], "reshard_after_forward": False}}


class Groups(PlainModule):
    """Has its biases in a group of their own, without decay."""

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        weights = [weight for weight in self.parameters() if weight.ndim > 1]
        biases = {"params": [weight for weight in self.parameters() if weight.ndim == 1], "weight_decay": 0.0}
        return [torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, biases], 1e-3)], []


def states_here(trainer):
    """Return how many numbers of optimizer states this rank has, and the decay of each group."""
    (optimizer,) = trainer.optimizers
    kept = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    here = sum((value.to_local() if hasattr(value, "to_local") else value).numel() for value in kept)
    return here, [group["weight_decay"] for group in optimizer.param_groups]


def train(others, begin=None):
    begin = () if begin is None else [begin] * 2
    return train_tiny({**others, "accumulate": {"steps": 2}}, Groups, keep=True, begin=begin, look=states_here)


def test_states_are_shared_and_go_on_in_any_layout():
    ranks, alone = on_ranks(train, 2, ZERO), train({})
    assert_one_model(ranks, alone)
    assert sum(rank.looked[0] for rank in ranks) == alone.looked[0]
    assert max(rank.looked[0] for rank in ranks) <= 0.6 * alone.looked[0]
    assert ranks[0].looked[1] == [0.1, 0.0]
    middle = ranks[0].states[2]
    resumed = on_ranks(train, 2, ZERO, begin=middle)
    assert {digest(rank.weights) for rank in resumed} == {digest(ranks[0].weights)}
    assert_one_model(on_ranks(train, 2, {"ddp": {}}, begin=middle), alone)
    assert_one_model([train({}, begin=middle)], alone)
