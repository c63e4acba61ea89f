"""It stops where a rule by hand does, on all ranks alike, and a run that it has stopped stays stopped."""

import logging
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hookline import CallbackInterface, ModuleInterface, hookimpl, sharded
from hookline.testing import Memory, TinyModule, check_plugin, digest, on_ranks, tiny_trainer
from hookline_early_stop import EarlyStop

nan, inf = math.nan, math.inf


class Scripted(ModuleInterface):
    """Its weight is the number of the step; its validation loss, score and training loss are those given, by step."""

    def __init__(self, values, name="val_loss", per_epoch=1000):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.values, self.name, self.per_epoch = values, name, per_epoch

    def train_step(self, global_step, batch, device):
        if self.name.startswith("train") and global_step <= len(self.values):
            value = self.values[global_step - 1]
            if value is not None:
                self.log(**{self.name: value}, reduce="last")
        return -self.weight

    def val_step(self, global_step, batch, device):
        self.log(**{self.name: self.values[global_step - 1]})

    def get_train_dataloader(self, sampler, batch_size):
        return sharded([torch.zeros(1)] * self.per_epoch)

    def get_val_dataloaders(self, sampler, batch_size):
        return sharded([torch.zeros(1)])

    def get_optimizers_schedulers(self, steps, epochs):
        return [torch.optim.SGD([self.weight], 1.0)], []


def run(plugin, values, *plugins, name="val_loss", per_epoch=1000, evaluate_every="1 steps", **options):
    """Train a step for each value; return the trainer."""
    module = Scripted(values, name, per_epoch)
    options = {"max_steps": len(values), "evaluate_every": evaluate_every, **options}
    trainer = tiny_trainer([plugin, *plugins], module, epochs=None, **options)
    trainer.train()
    return trainer


def stops_at(plugin, values, **options):
    """Return the step at which it stops, None where it does not."""
    trainer = run(plugin, values, **options)
    assert trainer.module.weight.item() == trainer.global_step
    return trainer.global_step if trainer.status == "stopped" else None


def test_contract():
    check_plugin(EarlyStop)
    check_plugin(EarlyStop, metric="train_loss_epoch", patience=None, threshold=-1.0)


# When ---------------------------------------------------------------------------------


def by_hand(values, every, mode, patience, delta, share, threshold, divergence):
    """Return the step of the evaluation after which a loop by hand would break."""
    best, waited, sign = None, 0, 1 if mode == "min" else -1
    for step in range(every, len(values) + 1, every):
        value = values[step - 1]
        margin = delta if not share or best is None else abs(best) * delta
        if best is None or (sign * value < sign * best and abs(value - best) > margin):
            best, waited = value, 0
        else:
            waited += 1
        if threshold is not None and sign * value <= sign * threshold:
            return step
        if divergence is not None and sign * value > sign * divergence:
            return step
        if waited >= patience:
            return step
    return None


quarters = st.integers(-12, 12).map(lambda number: number / 4)


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(quarters, min_size=1, max_size=12),
    every=st.integers(1, 3),
    mode=st.sampled_from(["min", "max"]),
    patience=st.integers(1, 4),
    delta=st.sampled_from([(0.0, False), (0.5, False), (0.5, True)]),
    threshold=st.none() | quarters,
    divergence=st.none() | quarters,
    as_text=st.booleans(),
)
def test_stops_at_the_step_of_a_rule_by_hand(values, every, mode, patience, delta, threshold, divergence, as_text):
    amount, share = delta
    plugin = EarlyStop(
        mode=mode,
        patience=f"{patience} evaluations" if as_text else patience,
        min_delta=f"{amount * 100} %" if share else amount,
        threshold=threshold,
        divergence=divergence,
    )
    step = stops_at(plugin, values, evaluate_every=f"{every} steps", eval_when_finish=False)
    expected = by_hand(values, every, mode, patience, amount, share, threshold, divergence)
    assert step == (None if expected == len(values) else expected)  # at the last step it has finished anyway


WORSE = [1.0, *range(2, 20)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"patience": "5 steps"}, 6),
        ({"patience": "5 steps", "evaluate_every": "3 steps"}, 9),  # looked at where a value comes
        ({"patience": "2 epochs", "per_epoch": 4}, 8),
        ({"patience": "6 samples"}, 7),
        ({"patience": "30 days"}, None),
        ({"patience": None, "divergence": 7.0}, 8),
        ({"patience": 2, "metric": "val_acc", "name": "val_acc"}, None),  # of which the largest is the best
        ({"patience": 2, "metric": "val_acc", "name": "val_acc", "mode": "min"}, 3),
        ({"patience": 2, "eval_when_start": True}, 3),  # a value before the first step is none
    ],
    ids=str,
)
def test_patience(options, expected):
    own = {name: value for name, value in options.items() if name in ("patience", "divergence", "metric", "mode")}
    of_run = {name: value for name, value in options.items() if name not in own}
    assert stops_at(EarlyStop(**own), WORSE, **of_run) == expected


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_a_value_that_is_not_finite(bad):
    assert stops_at(EarlyStop(), [3.0, bad, 1.0, 2.0]) == 2
    assert stops_at(EarlyStop(stop_at_nan=False, patience=2), [3.0, bad, 1.0, bad, bad, 0.0]) == 5
    assert stops_at(EarlyStop(stop_at_nan=False, patience=2), [bad] * 6) == 2


def test_the_reason_says_value_best_and_steps():
    reason = run(EarlyStop(patience=2), [3.0, 1.25, 2.0, 1.5, 0.0]).stop_reason
    assert reason == "early_stop: val_loss=1.5 at step 4 has not improved within patience=2; the best: 1.25 at step 2"
    reason = run(EarlyStop(threshold=1.5), [3.0, 1.25, 2.0]).stop_reason
    assert reason == "early_stop: val_loss=1.25 at step 2 reaches threshold=1.5; the best: 1.25 at step 2"
    reason = run(EarlyStop(divergence=1.5), [1.0, 2.0, 2.0]).stop_reason
    assert reason == "early_stop: val_loss=2 at step 2 is worse than divergence=1.5; the best: 1 at step 1"
    assert run(EarlyStop(), [nan, 1.0]).stop_reason == (
        "early_stop: val_loss=nan at step 1 is not finite; the best: none was finite"
    )


def test_what_is_logged_when_a_validation_ends_counts():
    class Late(CallbackInterface):
        @hookimpl
        def on_end_validation(self, trainer, global_step):
            trainer.log(val_error=global_step)

    assert run(EarlyStop("val_error", patience=1), WORSE, Late()).global_step == 2


# Training values ----------------------------------------------------------------------


def test_a_value_that_training_logs():
    values = [3.0, 2.0, 5.0, 4.0, 1.0, 0.0, 0.0]
    options = {"name": "train_error", "evaluate_every": None, "eval_when_finish": False}
    plugin = EarlyStop("train_error", patience=2)
    assert stops_at(plugin, values, log_every="1 steps", **options) == 4
    plugin = EarlyStop("train_error", patience=1)  # hears the steps 2, 4 and 6
    assert stops_at(plugin, values, log_every="2 steps", **options) == 4


@pytest.mark.parametrize(("metric", "expected"), [("train_loss", 8), ("train_loss_epoch", 9)])
def test_the_losses_of_training(metric, expected):
    """The loss falls by 1 with each step: to -6.5 in the interval of the steps 7 and 8, to -7 in the third epoch."""
    plugin = EarlyStop(metric, threshold=-6.0)
    options = {"evaluate_every": None, "eval_when_finish": False, "log_every": "2 steps", "per_epoch": 3}
    assert stops_at(plugin, [0.0] * 20, **options) == expected


def test_no_value_is_said_at_the_end(caplog):
    run(EarlyStop("train_los", mode="min"), [1.0] * 3)
    run(EarlyStop(), [1.0] * 3, evaluate_every=None, eval_when_finish=False)
    assert [record.getMessage() for record in caplog.records if record.name == "hookline.early_stop"] == [
        "early_stop has decided nothing: no value of 'train_los' came after a step",
        "early_stop has decided nothing: no value of 'val_loss' came after a step",
    ]


def own_values():
    """Train on several ranks, each with values of its own; one has none at some steps."""
    ends = []
    for values in ([[4.0, 1.0, 1.0, 3.0, 0.0, 0.0], [0.0, 1.0, 4.0, 2.0, 0.0, 0.0]], [[4.0, None, 0.0], [None] * 3]):
        plugins = {"stop": EarlyStop("train_error", patience=2, threshold=0.0), "ddp": {}}
        trainer = tiny_trainer(plugins, Scripted([], "train_error", 12), epochs=1, log_every="1 steps")
        trainer.module.values = values[trainer.rank]
        trainer.train()
        ends.append((trainer.global_step, trainer.status, trainer.stop_reason))
    for values in ([1.0, 3.0], [3.0, 1.0]), ([3.0, 4.0], [5.0, 4.0]):  # of an evaluation: means 2, 2 and 4, 4
        plugins = {"stop": EarlyStop(patience="1 steps"), "ddp": {}}
        trainer = tiny_trainer(plugins, Scripted([], per_epoch=12), epochs=1, evaluate_every="1 steps")
        trainer.module.values = values[trainer.rank] + [nan] * 10
        trainer.train()
        ends.append((trainer.global_step, trainer.status, trainer.stop_reason))
    return ends


@pytest.mark.plugins
def test_ranks_decide_alike_whatever_each_has_logged():
    one, other = on_ranks(own_values, 2)
    assert one == other
    assert [end[:2] for end in one] == [(4, "stopped"), (3, "stopped"), (2, "stopped"), (2, "stopped")]
    assert "train_error=2.5 at step 4 has not improved within patience=2; the best: 1 at step 2" in one[0][2]
    assert "train_error=0 at step 3 reaches threshold=0.0" in one[1][2]


# Resume -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "patience"),
    [([5.0, 3.0, 4.0, 2.0, 2.0, 3.0, 3.0, 1.0], 3), ([5.0, 3.0, 4.0, 2.0, 2.0, 3.0, 3.0, 1.0], "3 steps")],
)
def test_a_resumed_run_stops_at_the_same_step_with_the_same_bits(values, patience):
    whole = Memory(every="1 steps")
    ended = run(EarlyStop(patience=patience), values, whole)
    assert (ended.global_step, ended.status) == (7, "stopped")
    for step in range(1, 8):
        resumed = Memory(whole.states[step])
        again = run(EarlyStop(patience=patience), values, resumed)
        assert (again.global_step, again.status, again.stop_reason) == (7, "stopped", ended.stop_reason), step
        for memory in (whole, resumed):
            memory.state["trainer"]["counters"]["seconds"] = 0
            (memory.state["plugins"]["early_stop"]["since"] or {})["seconds"] = 0
        assert digest(resumed.state) == digest(whole.state), step


def test_a_stopped_run_stays_stopped_and_trains_no_step(caplog):
    values, memory = [1.0, *[2.0] * 8], Memory()
    stopped = run(EarlyStop(patience=2), values, memory)
    with caplog.at_level(logging.WARNING, "hookline.early_stop"):
        again = run(EarlyStop(patience=2), values, Memory(memory.state))
    assert (again.global_step, again.status, again.stop_reason) == (3, "stopped", stopped.stop_reason)
    assert again.module.weight.item() == 3
    assert caplog.messages[-1] == (
        f"stopped before, and it stays so: {stopped.stop_reason}; early_stop.resume_stopped=true goes on"
    )
    stopped.train()  # the same trainer, once more
    assert (stopped.global_step, stopped.status) == (3, "stopped")


def test_a_stopped_run_goes_on_where_that_is_asked_for():
    values, memory = [1.0, *[2.0] * 8], Memory()
    run(EarlyStop(patience=2), values, memory)
    state = memory.state
    for patience, expected in ((2, 5), ("2 steps", 5), (4, 7)):
        memory = Memory(state)
        again = run(EarlyStop(patience=patience, resume_stopped=True), values, memory)
        assert (again.global_step, again.status) == (expected, "stopped"), patience
    assert run(EarlyStop(patience=4), values, Memory(memory.state)).global_step == 7  # and it is stopped once more


def test_an_object_begins_anew_with_another_trainer():
    plugin = EarlyStop(patience=1)
    assert stops_at(plugin, [1.0, 2.0, 3.0]) == 2
    assert stops_at(plugin, [9.0, 8.0, 9.0, 0.0]) == 3


@pytest.mark.plugins
def test_with_checkpoints(tmp_path):
    plugins = {"early_stop": {"metric": "train_loss", "threshold": 1e9}, "checkpoint": {"every": "1 steps"}}
    options = {"runs_folder": str(tmp_path), "log_every": "2 steps"}
    first = tiny_trainer(plugins, **options)
    first.train()
    again = tiny_trainer(plugins, resume=True, **options)
    again.train()
    assert (first.global_step, again.global_step, again.status) == (2, 2, "stopped")
    plugins["early_stop"]["resume_stopped"] = True
    more = tiny_trainer(plugins, resume=True, **options)
    more.train()
    assert (more.global_step, more.status) == (4, "stopped")


# Options ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": ""}, "early_stop.metric='' must be the name of a metric"),
        ({"mode": "least"}, "early_stop.mode='least' must be min or max, or null"),
        (
            {"patience": 0},
            "early_stop.patience=0 must be a number of values from 1, a cadence, or null: 0 is not a cad",
        ),
        (
            {"patience": "often"},
            "early_stop.patience='often' must be a number of values from 1, a cadence, or null: 'oft",
        ),
        ({"patience": "0.5 epoch"}, "early_stop.patience='0.5 epoch' must be a number of values from 1, a cadence"),
        ({"patience": [3]}, "early_stop.patience=[3] must be a number of values from 1"),
        ({"patience": True}, "early_stop.patience=True must be a number of values from 1"),
        ({"min_delta": -1.0}, 'early_stop.min_delta=-1.0 must be a number from 0, or a share such as "1%"'),
        ({"min_delta": "much"}, "early_stop.min_delta='much' must be a number from 0"),
        ({"min_delta": nan}, "early_stop.min_delta=nan must be a number from 0"),
        ({"threshold": nan}, "early_stop.threshold=nan must be a finite number, or null"),
        ({"divergence": inf}, "early_stop.divergence=inf must be a finite number, or null"),
        (
            {"patience": None, "stop_at_nan": False},
            "early_stop has nothing to do: give patience, threshold, divergence",
        ),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        EarlyStop(**options)


def test_a_metric_that_does_not_come_or_that_nobody_knows():
    with pytest.raises(ValueError, match="early_stop.metric='val_acc': the evaluation has no metric 'val_acc'; it has"):
        tiny_trainer([EarlyStop("val_acc")]).train()
    trainer = tiny_trainer([EarlyStop("val_score")], TinyModule())
    with pytest.raises(ValueError, match="early_stop.metric='val_score': nobody knows whether the smallest"):
        trainer.train()
    assert trainer.global_step == 0
