import pytest
import torch

from hookline import CallbackInterface, hookimpl
from hookline.testing import Memory, TinyModule, check_plugin, digest, tiny_trainer
from hookline_finite import Finite


class Exploding(TinyModule):
    """Gives a bad loss at some steps."""

    def __init__(self, at=(), value=float("nan")):
        super().__init__()
        self.at, self.value = at, value

    def train_step(self, global_step, batch, device):
        loss, predictions = super().train_step(global_step, batch, device)
        return (loss * self.value if global_step in self.at else loss), predictions


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_contract_and_a_healthy_run_keeps_its_bits(policy):
    check_plugin(Finite, policy=policy)
    plain, watched = tiny_trainer(), tiny_trainer([Finite(policy)])
    plain.train()
    watched.train()
    assert digest(plain.module.state_dict()) == digest(watched.module.state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stops_at_the_next_reading_and_names_the_step(value):
    with pytest.raises(
        FloatingPointError, match=r"of optimizer step 3 are not finite \(rank 0, now at step 5\)"
    ) as caught:
        tiny_trainer([Finite(every="5 steps")], Exploding({3}, value)).train()
    assert "on_boundary by plugin 'finite' (hookline-finite" in caught.value.__notes__[0]


def test_no_bad_state_is_ever_saved():
    memory = Memory(every="2 steps")
    with pytest.raises(FloatingPointError, match="of optimizer step 3 .*now at step 4"):
        tiny_trainer([memory, Finite()], Exploding({3})).train()
    assert list(memory.states) == [2]
    assert all(weight.isfinite().all() for weight in memory.state["module"].values())


def test_the_end_of_training_reads_the_verdict_too():
    with pytest.raises(FloatingPointError, match="of optimizer step 14 "):
        tiny_trainer([Finite()], Exploding({14})).train()


def test_gradients_count_as_the_loss_does():
    class Spoils(CallbackInterface):
        @hookimpl
        def on_begin_optimizer_step(self, trainer, optimizers):
            if trainer.global_step == 1:
                optimizers[0].param_groups[0]["params"][0].grad[0, 0] = float("inf")

    with pytest.raises(FloatingPointError, match="of optimizer step 2 "):
        tiny_trainer([Finite(every="1 steps"), Spoils()]).train()


def test_a_step_that_somebody_else_refused_does_no_harm():
    class Refuses(CallbackInterface):
        @hookimpl(wrapper=True)
        def should_step(self, trainer):
            return (yield) and trainer.global_step != 2

    trainer = tiny_trainer([Finite(every="1 steps"), Refuses()], Exploding({3}))
    trainer.train()
    assert trainer.counters.skipped_steps == 1


def test_skips_and_counts():
    trainer = tiny_trainer([Finite("skip")], Exploding({3, 5, 6}))
    trainer.train()
    assert (trainer.global_step, trainer.counters.skipped_steps) == (14, 3)
    assert all(weight.isfinite().all() for weight in trainer.module.net.parameters())


def test_skips_no_more_than_so_many_in_a_row():
    with pytest.raises(
        FloatingPointError, match="of optimizer step 5, after 2 in a row that were skipped, are not finite"
    ):
        tiny_trainer([Finite("skip", max_skips=2)], Exploding({3, 4, 5})).train()
    trainer = tiny_trainer([Finite("skip", max_skips=2)], Exploding({3, 4, 6, 7}))
    trainer.train()
    assert trainer.counters.skipped_steps == 4


def test_the_count_in_a_row_survives_a_resume():
    memory = Memory(every="1 steps")
    with pytest.raises(FloatingPointError):
        tiny_trainer([memory, Finite("skip", max_skips=2)], Exploding({3, 4, 5})).train()
    with pytest.raises(FloatingPointError, match="of optimizer step 5"):
        tiny_trainer([Memory(memory.states[4]), Finite("skip", max_skips=2)], Exploding({5})).train()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "ignore"}, r"finite\.policy='ignore' must be one of stop, skip"),
        ({"every": "often"}, r"finite\.every: 'often' is not a cadence"),
        ({"max_skips": -1}, r"finite\.max_skips=-1 must be at least 0"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        Finite(**options)


def test_stop_waits_for_nothing_on_an_ordinary_step():
    from hookline.testing import calls_per_step

    def run(steps):
        module = TinyModule(samples=8 * steps)
        options = {"epochs": 1, "evaluate_every": None, "eval_when_finish": False}
        tiny_trainer([Finite(every="99999 steps")], module, **options).train()

    plain = calls_per_step(lambda steps: tiny_trainer((), TinyModule(8 * steps), epochs=1, evaluate_every=None).train())
    assert calls_per_step(run).syncs <= plain.syncs


def test_two_optimizers_in_turn():
    class Two(TinyModule):
        def get_optimizers_schedulers(self, steps, epochs):
            first, last = self.net[0].parameters(), self.net[4].parameters()
            return [torch.optim.SGD(first, 0.01), torch.optim.SGD(last, 0.01)], []

        @hookimpl
        def update(self, trainer, window):
            for optimizer in trainer.optimizers:
                outputs = trainer.hook.run_window(trainer=trainer, window=window)
                trainer.step([optimizer])
            return outputs

    trainer = tiny_trainer([Finite(every="1 steps")], Two())
    trainer.train()
    assert trainer.global_step == 14
