"""Row G of the fault catalogue, of experts on two ranks: one breaks while the other waits for its tokens."""

import os
import signal
import time

import pytest
import torch
from tests.faults.test_g_ranks import ACTIONS, SOON, WATCHED, codes, outlived, outputs, stacks

from hookline.testing import PlainModule, digest, on_ranks, run_ranks, tiny_trainer
from hookline_expert_parallel import Experts, MixtureOfExperts

pytestmark = [pytest.mark.plugins, pytest.mark.xdist_group("ranks")]

SAVED = {"checkpoint": {"every": "1 steps"}, "ddp": {}, "expert_parallel": {}}


class Breaking(Experts):
    """Does something else in the forward or the backward of the third step, on one rank."""

    fault = None

    def forward(self, tokens, counts=None):
        self.calls = getattr(self, "calls", 0) + self.training
        answers = super().forward(tokens, counts)
        if self.fault and self.calls == 3:
            where, act = self.fault
            if where == "backward":
                answers.register_hook(lambda _: act())
            else:
                act()
        return answers


class Module(PlainModule):
    def __init__(self):
        super().__init__(dropout=0.2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net[1] = MixtureOfExperts(16, 24, experts=4)
            self.net[1].experts = Breaking(4, 16, 24)


def train(folder, fault=None, plugins=None, resume=False):
    """Train on this rank; `fault` says which rank does what, and where."""
    torch.set_num_threads(1)
    module = Module()
    if fault and os.environ["RANK"] == str(fault[0]):
        rank, action, where = fault

        def act():
            (folder / f"fault-{rank}").write_text(f"{time.monotonic()} {os.getpid()}")
            ACTIONS[action](folder)

        module.net[1].experts.fault = where, act
    trainer = tiny_trainer({**SAVED, **(plugins or {})}, module, runs_folder=str(folder), resume=resume)
    trainer.train()
    return digest(trainer.export_model())


def go_on(folder):
    """Go on with the broken run, and train another that nothing happens to."""
    return train(folder, resume=True), train(folder / "undisturbed")


def assert_it_goes_on(folder):
    resumed, undisturbed = zip(*on_ranks(go_on, 2, folder), strict=True)
    assert len({*resumed, *undisturbed}) == 1


@pytest.mark.parametrize(
    ("action", "where", "code"),
    [
        ("is killed", "forward", -signal.SIGKILL),
        pytest.param("is killed", "backward", -signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("raises", "forward", 1, marks=pytest.mark.slow),
        pytest.param("raises", "backward", 1, marks=pytest.mark.slow),
    ],
)
def test_g50_a_rank_that_is_gone_in_its_experts_ends_the_other(action, where, code, tmp_path):
    outcomes = run_ranks(train, 2, tmp_path, (1, action, where))
    assert outlived(tmp_path, 1) < SOON
    assert codes(outcomes) == [1, code], outputs(outcomes)
    assert "rank 0 of 2 has lost another rank, or waited for it longer than" in outcomes[0].output
    assert ("Broken: on purpose" in outcomes[1].output) is (action == "raises")
    assert_it_goes_on(tmp_path)


@pytest.mark.parametrize("where", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
def test_g50_a_rank_that_hangs_in_its_experts_is_named_with_its_stack(where, tmp_path):
    outcomes = run_ranks(train, 2, tmp_path, (1, "loops", where), WATCHED)
    assert outlived(tmp_path, 1) < SOON
    assert codes(outcomes) == [124, 124], outputs(outcomes)
    left = stacks(tmp_path)
    assert "in loop_for_ever" in left[1]
    assert "loop_for_ever" not in left[0]
    assert "in swapped" in left[0]
    assert_it_goes_on(tmp_path)


@pytest.mark.slow
def test_g50_a_rank_that_is_silent_is_given_up_after_the_timeout(tmp_path):
    outcomes = run_ranks(
        train, 2, tmp_path, (1, "is stopped", "forward"), WATCHED | {"distributed": {"timeout": "3 s"}}
    )
    assert outlived(tmp_path, 1) < SOON
    assert codes(outcomes)[0] != 0
    assert codes(outcomes)[1] == -signal.SIGKILL, outputs(outcomes)
    assert_it_goes_on(tmp_path)
