import contextlib
import re
from dataclasses import dataclass

import pytest
import torch

from hookline import CallbackInterface, hookimpl
from hookline.testing import Memory, TinyModule, calls_per_step, digest, on_ranks, tiny_trainer
from hookline_sample import Sample

MODES = []  # not of the module, which is as before after each call


class Speaking(TinyModule):
    """Draws, changes its buffers, logs and goes through its net."""

    def __init__(self, samples=50):
        super().__init__(samples)
        self.register_buffer("calls", torch.zeros(()))

    def sample(self):
        self.calls += 1
        MODES.append((self.training, self.net[3].training, torch.is_grad_enabled()))
        self.log(drawn=1.0)
        return {"draw": torch.rand(2).tolist(), "of ones": self.net(torch.ones(1, 8)).item()}

    def fail(self):
        raise ZeroDivisionError("by nothing")

    def nothing(self):
        return None

    def text(self):
        return "a text"


@dataclass(eq=False)
class Heard(CallbackInterface):
    """Keep what is logged."""

    observer = True

    def __post_init__(self):
        self.objects, self.numbers = [], set()

    @hookimpl
    def on_log_object(self, name, value, global_step):
        self.objects.append((global_step, name, value))

    @hookimpl
    def on_log(self, metrics):
        self.numbers |= set(metrics)


def train(*plugins, **options):
    module, heard = Speaking(), Heard()
    MODES.clear()
    trainer = tiny_trainer([*plugins, heard], module, **options)
    trainer.train()
    return trainer, heard


@pytest.mark.parametrize("every", ["eval", "3 steps"])
def test_training_gives_the_same_bits_and_numbers(every):
    without, heard = train()
    with_it, also_heard = train(Sample(every=every))
    assert digest(with_it.module.state_dict()) == digest(without.module.state_dict())
    assert with_it.metrics == without.metrics
    assert also_heard.numbers == heard.numbers
    assert {*MODES} == {(False, False, False)}
    assert with_it.module.training
    assert with_it.module.net[3].training
    assert also_heard.objects


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every": "eval"}, [7, 14]),
        ({"every": "2 evals"}, [14]),
        ({"every": "5 steps"}, [5, 10]),
        ({"every": "epoch"}, [7, 14]),
    ],
)
def test_when_and_under_which_names(options, steps):
    _, heard = train(Sample(**options), sanity_val_steps=1)
    assert [(step, name) for step, name, _ in heard.objects] == [
        (step, f"sample/{name}") for step in steps for name in ("draw", "of ones")
    ]
    draws = [value for _, name, value in heard.objects if name == "sample/draw"]
    assert draws == [draws[0]] * len(steps)
    torch.manual_seed(0)
    assert draws[0] == torch.rand(2).tolist()


def test_a_value_alone_has_the_name_of_the_method_and_none_is_nothing():
    assert train(Sample("text", every="7 steps"))[1].objects == [(7, "text", "a text"), (14, "text", "a text")]
    assert train(Sample("nothing"))[1].objects == []


@dataclass(eq=False)
class Ones(CallbackInterface):
    """Evaluate with other weights."""

    @hookimpl(wrapper=True)
    def evaluate(self, trainer):
        bias = trainer.module.net[4].bias
        with torch.no_grad():
            bias += 100
        metrics = yield
        with torch.no_grad():
            bias -= 100
        return metrics


def test_within_a_validation_the_weights_are_those_that_are_validated():
    value = {}
    for every in ("eval", "7 steps"):
        _, heard = train(Ones(), Sample(every=every))
        value[every] = heard.objects[1][2]
    assert value["eval"] > 90 > abs(value["7 steps"])


@pytest.mark.parametrize("every", ["2 evals", "3 steps", "epoch"])
def test_a_resumed_run_samples_at_the_same_steps(every):
    memory = Memory(every="1 steps")
    _, whole = train(memory, Sample(every=every))
    for step in range(1, 14):
        _, rest = train(Memory(memory.states[step]), Sample(every=every))
        assert rest.objects == [one for one in whole.objects if one[0] > step], step


def test_it_costs_nothing_within_steps():
    def run(plugins):
        options = {"epochs": 1, "evaluate_every": None, "eval_when_finish": False}
        return lambda steps: tiny_trainer(plugins, Speaking(8 * steps), **options).train()

    assert calls_per_step(run([Sample(), Heard()])) == calls_per_step(run([Heard()]))


# Ranks --------------------------------------------------------------------------------


def train_on_ranks():
    trainer = tiny_trainer({"ddp": {}, "sample": {}, "heard": (heard := Heard())}, Speaking(48))
    trainer.train()
    said = [[*MODES], heard.objects, MODES.clear()]
    sharded = {"fsdp": {"wrap": ["Linear"]}, "sample": {"every": "3 steps"}, "heard": (heard := Heard())}
    trainer = tiny_trainer(sharded, Speaking(48))
    trainer.train()
    said += [[*MODES], heard.objects]
    trainer = tiny_trainer({"fsdp": {}, "sample": {"all_ranks": False}}, Speaking(48))
    with contextlib.suppress(ValueError):
        trainer.train()
    return [*said, trainer.status]


@pytest.mark.plugins
def test_rank_0_samples_alone_and_all_do_where_they_share_the_weights():
    first, second = on_ranks(train_on_ranks, 2)
    assert len(first[0]) == 2
    assert second[0] == []
    assert len(first[3]) == len(second[3]) == 4
    assert [name for _, name, _ in first[1]] == ["sample/draw", "sample/of ones"] * 2
    assert [step for step, _, _ in first[4]] == [3, 3, 6, 6, 9, 9, 12, 12]
    assert second[1] == second[4] == []
    assert (first[5], second[5]) == ("failed", "failed")


# What is refused ----------------------------------------------------------------------


def test_a_method_that_raises_is_blamed():
    with pytest.raises(ZeroDivisionError) as raised:
        train(Sample("fail", every="2 steps"))
    assert "Speaking.fail() was called by the plugin sample at step 2 (every: 2 steps)" in raised.value.__notes__


def test_samples_that_nobody_takes(caplog):
    tiny_trainer([Sample()], Speaking()).train()
    assert "sample: nobody hears on_log_object, so the samples will be dropped" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sampel"}, "sample.method='sampel' is no method of Speaking, did you mean 'sample'?: write"),
        ({"method": "lr"}, "sample.method='lr' is no method of Speaking: write `def lr(self):` that returns"),
        ({"every": "often"}, "often"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train(Sample(**options))
