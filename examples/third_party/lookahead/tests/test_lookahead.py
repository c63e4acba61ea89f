from pathlib import Path

import pytest
import torch
from hookline import CallbackInterface, hookimpl
from hookline.testing import CHECKS, TinyModule, check_plugin, digest, hand_written_loop, tiny_trainer

from hookline_lookahead import Lookahead

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.parametrize("check", CHECKS)
def test_the_plugin_keeps(check):
    check_plugin(Lookahead, checks=[check], readme=README, every=3)


def test_trains_the_bits_of_a_loop_by_hand():
    by_hand, ours, steps = TinyModule(), TinyModule(), []
    slow = [weight.detach().clone() for weight in by_hand.parameters()]

    def step(optimizer):
        optimizer.step()
        steps.append(1)
        if len(steps) % 3 == 0:
            with torch.no_grad():
                for kept, weight in zip(slow, by_hand.parameters(), strict=True):
                    kept.lerp_(weight, 0.25)
                    weight.copy_(kept)

    hand_written_loop(by_hand, step=step)
    tiny_trainer([Lookahead(every=3, alpha=0.25)], ours).train()
    assert digest(ours.state_dict()) == digest(by_hand.state_dict())


def test_alpha_1_is_the_optimizer_alone():
    plain, ours = TinyModule(), TinyModule()
    tiny_trainer([], plain).train()
    tiny_trainer([Lookahead(every=2, alpha=1.0)], ours).train()
    assert all(torch.allclose(one, other) for one, other in zip(plain.parameters(), ours.parameters(), strict=True))


def test_a_refused_step_does_not_count():
    class Refuses(CallbackInterface):
        @hookimpl(wrapper=True)
        def should_step(self, trainer):
            return (yield) and trainer.global_step % 2 == 0

    ours = Lookahead(every=100)
    trainer = tiny_trainer([Refuses(), ours])
    trainer.train()
    assert ours.get_state()["steps"] == {"0": trainer.global_step - trainer.counters.skipped_steps}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "lookahead.every=0 must be a number of steps from 1"),
        ({"alpha": 0.0}, "lookahead.alpha=0.0 must be above 0 and at most 1"),
        ({"alpha": 1.5}, "lookahead.alpha=1.5 must be above 0 and at most 1"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Lookahead(**options)
