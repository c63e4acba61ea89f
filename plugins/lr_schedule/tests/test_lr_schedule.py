"""Rates and values are those of torch's schedulers by hand at every step, of resumed runs and on several ranks too."""

import functools
import math
import re
from dataclasses import dataclass

import pytest
import torch
from torch.optim import lr_scheduler

from hookline import CallbackInterface, hookimpl
from hookline.testing import (
    Memory,
    PlainModule,
    TinyModule,
    check_plugin,
    digest,
    hand_written_loop,
    on_ranks,
    tiny_trainer,
    train_tiny,
)
from hookline_lr_schedule import LrSchedule

RATE = 1e-2


class Module(TinyModule):
    """Has no schedulers of its own."""

    def get_optimizers_schedulers(self, steps, epochs):
        return [torch.optim.Adam(self.parameters(), RATE)], []


class Two(TinyModule):
    def get_optimizers_schedulers(self, steps, epochs):
        return [torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.SGD(self.net[4].parameters(), 0.2)], []


class Log(CallbackInterface):
    """Keeps the rates of the first group of each optimizer, and what `look` returns, at each step."""

    def __init__(self, look=lambda trainer: None):
        self.rates, self.looked, self.look, self.seconds = [], [], look, []

    @hookimpl
    def on_begin_optimizer_step(self, trainer):
        rates = [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]
        self.rates.append(rates[0] if len(rates) == 1 else rates)
        self.looked.append(self.look(trainer))
        self.seconds.append(trainer.counters.seconds)


def train(options, *others, module=None, log=None, **trainer_options):
    log = log or Log()
    plugins = {"log": log, "lr_schedule": LrSchedule(**options), **{str(n): other for n, other in enumerate(others)}}
    trainer = tiny_trainer(plugins, module or Module(), **trainer_options)
    trainer.train()
    return trainer, log


def by_hand(make, moves, rate=RATE, before=0):
    """Return the rates of torch's scheduler at each of its moves."""
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], rate)
    scheduler, rates = make(optimizer), []
    for _ in range(moves):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def saw(moves, height=1.0):
    return height * (1 + moves % 3)


@dataclass
class Halving:
    """A function with state."""

    now: float = 2.0

    def __call__(self, moves):
        self.now /= 2
        return self.now


def sequence(optimizer, *schedulers_and_ends):
    schedulers, ends = schedulers_and_ends[::2], schedulers_and_ends[1::2]
    return lr_scheduler.SequentialLR(optimizer, [make(optimizer) for make in schedulers], list(ends))


def linear(begin, end, total):
    return lambda o: lr_scheduler.LinearLR(o, begin, end, total)


HERE = __name__
CASES = {  # the options, and torch's scheduler for a run of `n` steps, by epochs of `e`
    "constant": ({"schedule": "constant"}, lambda o, n, e: lr_scheduler.LambdaLR(o, lambda move: 1.0)),
    "linear": ({"schedule": "linear"}, lambda o, n, e: lr_scheduler.LinearLR(o, 1.0, 0.0, n)),
    "cosine": ({"schedule": "cosine"}, lambda o, n, e: lr_scheduler.CosineAnnealingLR(o, n)),
    "polynomial": (
        {"schedule": {"polynomial": {"power": 2.0}}},
        lambda o, n, e: lr_scheduler.PolynomialLR(o, n, 2.0),
    ),
    "exponential": ({"schedule": {"exponential": {"gamma": 0.9}}}, lambda o, n, e: lr_scheduler.ExponentialLR(o, 0.9)),
    "step": ({"schedule": {"step": {"step_size": "1 epoch"}}}, lambda o, n, e: lr_scheduler.StepLR(o, e)),
    "multi_step": (
        {"schedule": {"multi_step": {"milestones": ["1 steps", "50%"], "gamma": 0.5}}},
        lambda o, n, e: lr_scheduler.MultiStepLR(o, [1, n // 2], 0.5),
    ),
    "inverse_sqrt": (
        {"schedule": "inverse_sqrt", "warmup": "2 steps"},
        lambda o, n, e: sequence(
            o, linear(0.5, 1.0, 2), 2, lambda o: lr_scheduler.LambdaLR(o, lambda move: math.sqrt(2 / (2 + move)))
        ),
    ),
    "function": (
        {"schedule": {"function": {"path": f"{HERE}.saw", "height": 0.5}}},
        lambda o, n, e: lr_scheduler.LambdaLR(o, lambda move: saw(move, 0.5)),
    ),
    "one_cycle": (
        {"schedule": {"one_cycle": {"pct_start": 0.4}}},
        lambda o, n, e: lr_scheduler.OneCycleLR(o, RATE, n, pct_start=0.4, cycle_momentum=False),
    ),
    "triangular": (
        {"schedule": {"triangular": {"base_lr": 1e-3, "step_size_up": "2 steps"}}},
        lambda o, n, e: lr_scheduler.CyclicLR(o, 1e-3, RATE, 2, cycle_momentum=False),
    ),
    "warm-up and cosine": (
        {"schedule": {"cosine": {"eta_min": 1e-4}}, "warmup": "2 steps"},
        lambda o, n, e: sequence(o, linear(0.5, 1.0, 2), 2, lambda o: lr_scheduler.CosineAnnealingLR(o, n - 2, 1e-4)),
    ),
    "warm-up, stable, decay": (
        {"schedule": {"warmup_stable_decay": {"warmup": "2 steps", "decay": "2 steps"}}},
        lambda o, n, e: sequence(
            o, linear(0.5, 1.0, 2), 2, lambda o: lr_scheduler.ConstantLR(o, 1.0), n - 2, linear(1.0, 0.0, 2)
        ),
    ),
    "phases": (
        {
            "schedule": [
                {"warmup": {"start_factor": 0.1}, "for": "50%"},
                {"exponential": {"gamma": 0.5}, "for": "1 steps"},
                {"linear": {"end_factor": 0.5}},
            ]
        },
        lambda o, n, e: sequence(
            o,
            *(linear(0.1, 1.0, n // 2), n // 2, lambda o: lr_scheduler.ExponentialLR(o, 0.5), n // 2 + 1),
            linear(1.0, 0.5, n - n // 2 - 1),
        ),
    ),
}
EACH = pytest.mark.parametrize("name", CASES)


def test_contract():
    check_plugin(LrSchedule, replace=True)
    check_plugin(LrSchedule, replace=True, values={"optimizer.weight_decay": {"cosine": {"from": 0.1}}}, epochs=1)


# Rates --------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("window", [1, 3])
def test_rates_are_those_of_torch(name, window):
    options, make = CASES[name]

    class Windows(CallbackInterface):
        @hookimpl
        def get_window_size(self):
            return window

    trainer, log = train(options, Windows(), train_batch_size=8 * window)
    steps, per_epoch = {1: (14, 7), 3: (6, 3)}[window]
    assert log.rates == by_hand(lambda o: make(o, steps, per_epoch), steps)
    assert trainer.global_step == steps


@EACH
def test_a_run_resumed_at_each_step_ends_with_the_same_bits(name):
    options, whole = CASES[name][0], Memory(every="1 steps")
    _, log = train(options, whole, epochs=1)
    for step in range(1, 7):
        memory = Memory(whole.states[step])
        _, resumed = train(options, memory, epochs=1)
        assert resumed.rates == log.rates[step:], step
        for state in (memory.state, whole.state):
            state["trainer"]["counters"]["seconds"] = 0
        assert digest(memory.state) == digest(whole.state), step


@pytest.mark.parametrize("name", ["linear", "cosine", "warm-up and cosine", "phases"])
def test_a_longer_run_goes_on_by_the_new_schedule(name, caplog):
    options, make = CASES[name]
    memory = Memory(every="1 steps")
    train(options, memory)
    _, log = train(options, Memory(memory.states[5]), epochs=4)
    assert log.rates == by_hand(lambda o: make(o, 28, 7), 28)[5:]
    assert "was another one when it was saved" in caplog.text


def test_the_length_is_that_of_the_run():
    _, log = train({"schedule": "linear"}, epochs=None, max_steps=10)
    assert log.rates == by_hand(linear(1.0, 0.0, 10), 10)


@pytest.mark.parametrize("options", [{}, {"warmup": "5 steps"}, {"values": {"optimizer.eps": "linear"}}], ids=str)
def test_a_run_that_trains_nothing_needs_no_schedule(options):
    assert train(options, epochs=0)[1].rates == []


def test_a_phase_without_a_move_is_left_out():
    _, log = train({"schedule": [{"warmup": {}, "for": "0%"}, {"constant": {}, "for": "0%"}, "linear"]})
    assert log.rates == by_hand(linear(1.0, 0.0, 14), 14)
    _, log = train({"schedule": ["linear", {"constant": {}, "for": "0%"}]})
    assert log.rates == by_hand(linear(1.0, 0.0, 14), 14)


def test_by_epochs():
    _, log = train({"schedule": "linear", "by": "epochs", "warmup": "1 epoch"}, epochs=3)
    rates = by_hand(lambda o: sequence(o, linear(1.0, 1.0, 1), 1, linear(1.0, 0.0, 2)), 3)
    assert log.rates == [rate for rate in rates for _ in range(7)]


def test_by_the_time_where_only_that_limits_the_run():
    _, log = train({"schedule": "linear", "warmup": "10%"}, epochs=None, max_time="1 s", evaluate_every=None)
    factors = by_hand(lambda o: sequence(o, linear(0.01, 1.0, 100), 100, linear(1.0, 0.0, 900)), 1000, rate=1.0)
    moments = [0, *(int(1000 * seconds) for seconds in log.seconds[:-1])]
    assert log.rates == [RATE * factors[moment] for moment in moments]
    assert max(moments) > 900


@pytest.mark.parametrize(("max_time", "left"), [("1000 s", 0.5), ("2000 s", 0.75)])
def test_a_run_resumed_in_time_goes_on_by_the_share_that_is_over(max_time, left):
    options, memory = {"schedule": "linear", "by": "time"}, Memory(every="1 steps")
    train(options, memory, max_time="1000 s")
    state = memory.states[3]
    state["trainer"]["counters"]["seconds"], state["schedulers"][0]["moves"] = 500.0, 500
    _, log = train(options, Memory(state), max_time=max_time)
    assert log.rates[1:] == pytest.approx([RATE * left] * 10, rel=0.05)


def test_a_group_keeps_its_share():
    class Groups(TinyModule):
        def get_optimizers_schedulers(self, steps, epochs):
            groups = [{"params": self.net[0].parameters(), "lr": 0.1}, {"params": self.net[4].parameters()}]
            return [torch.optim.SGD(groups, 0.4)], []

    look = Log(lambda trainer: [group["lr"] for group in trainer.optimizers[0].param_groups])
    train({"schedule": "linear"}, module=Groups(), log=look)
    assert look.looked == [
        list(rates) for rates in zip(*(by_hand(linear(1.0, 0.0, 14), 14, r) for r in (0.1, 0.4)), strict=True)
    ]


def test_one_schedule_for_all_optimizers_or_one_each():
    _, log = train({"schedule": "linear"}, module=Two())
    assert log.rates == [[*r] for r in zip(*(by_hand(linear(1.0, 0.0, 14), 14, r) for r in (0.1, 0.2)), strict=True)]
    second = LrSchedule({"exponential": {"gamma": 0.5}}, optimizer=1)
    _, log = train({"schedule": "linear", "optimizer": 0}, second, module=Two())
    halves = by_hand(lambda o: lr_scheduler.ExponentialLR(o, 0.5), 14, 0.2)
    assert log.rates == [[*r] for r in zip(by_hand(linear(1.0, 0.0, 14), 14, 0.1), halves, strict=True)]


def test_a_plateau_follows_its_metric_behind_a_warm_up():
    options = {"schedule": {"plateau": {"patience": 0, "threshold": 10.0, "factor": 0.5}}, "warmup": "2 steps"}
    _, log = train(options, epochs=4)
    assert log.rates == pytest.approx(
        [RATE / 2, RATE * 0.75, *[RATE] * 5, *[RATE / 2] * 7, *[RATE / 4] * 7, *[RATE / 8] * 7]
    )


def test_a_plateau_knows_the_direction_of_its_metric():
    class Accurate(Module):
        def val_step(self, global_step, batch, device):
            self.log(val_accuracy=float(global_step))
            return super().val_step(global_step, batch, device)

    plateau = {"metric": "val_accuracy", "patience": 0, "factor": 0.5}
    _, log = train({"schedule": {"plateau": plateau}}, module=Accurate(), epochs=4)
    assert set(log.rates) == {RATE}  # it rises
    _, log = train({"schedule": {"plateau": {**plateau, "mode": "min"}}}, module=Accurate(), epochs=4)
    assert log.rates[-1] == RATE / 4


def test_replaces_the_schedulers_of_the_module():
    class Warm(TinyModule):
        def get_optimizers_schedulers(self, steps, epochs):
            optimizer = torch.optim.Adam(self.parameters(), RATE)
            return [optimizer], [(lr_scheduler.LinearLR(optimizer, 0.1), "epoch")]

    _, log = train({"schedule": "linear", "replace": True}, module=Warm())
    assert log.rates == by_hand(linear(1.0, 0.0, 14), 14)


def test_a_run_that_ends_before_its_phases_says_so(caplog):
    _, log = train({"schedule": "cosine", "warmup": "100 steps"})
    assert log.rates == by_hand(linear(0.01, 1.0, 100), 14)
    assert "lr_schedule.schedule: the run ends before its phases (warmup 100): it has 14 steps" in caplog.text


# Values -------------------------------------------------------------------------------

VALUES = {
    "optimizer.weight_decay": {"cosine": {"from": 0.04, "to": 0.4}},
    "optimizer.betas.0": {"linear": {"to": 0.8}},
    "module.net.3.p": {"linear": {"from": 0.5, "to": 0.1}, "for": "50%"},
    "module.temperature": {"function": f"{HERE}.saw"},
}


class Warmed(Module):
    temperature = 1.0

    def train_step(self, global_step, batch, device):
        loss, predictions = super().train_step(global_step, batch, device)
        return loss / self.temperature, predictions


def values_at(move):
    """Return the values of `VALUES` before a step of a run of 14."""
    cosine = by_hand(lambda o: lr_scheduler.CosineAnnealingLR(o, 14), 15, 1.0)[move]
    falls = by_hand(linear(1.0, 0.0, 14), 15, 1.0)[move]
    half = by_hand(linear(1.0, 0.0, 7), 15, 1.0)[move]
    return [0.4 + (0.04 - 0.4) * cosine, 0.8 + (0.9 - 0.8) * falls, 0.1 + (0.5 - 0.1) * half, float(saw(move))]


def values_of(optimizer, module):
    (group,) = optimizer.param_groups
    return [group["weight_decay"], group["betas"][0], module.net[3].p, module.temperature]


def test_values_hold_for_the_step_that_they_were_set_before():
    log = Log(lambda trainer: values_of(trainer.optimizers[0], trainer.module))
    trainer, _ = train({"schedule": None, "values": VALUES}, module=Warmed(), log=log)
    assert log.looked == [values_at(move) for move in range(14)]

    class ByHand(Warmed):
        def get_optimizers_schedulers(self, steps, epochs):
            (self.optimizer,), schedulers = super().get_optimizers_schedulers(steps, epochs)
            self.set_values(0)
            return [self.optimizer], schedulers

        def set_values(self, move):
            decay, beta, self.net[3].p, self.temperature = values_at(move)
            self.optimizer.param_groups[0].update(weight_decay=decay, betas=(beta, 0.999))

    module, moves = ByHand(), iter(range(1, 15))

    def step(optimizer):
        optimizer.step()
        module.set_values(next(moves))

    hand_written_loop(module, step=step)
    assert digest(module.state_dict()) == digest(trainer.module.state_dict())


def test_values_are_exact_at_every_resume():
    look = functools.partial(Log, lambda trainer: values_of(trainer.optimizers[0], trainer.module))
    options, whole = {"values": VALUES}, Memory(every="1 steps")
    trainer, log = train(options, whole, module=Warmed(), log=look())
    for step in range(1, 14):
        resumed, rest = train(options, Memory(whole.states[step]), module=Warmed(), log=look())
        assert rest.looked == log.looked[step:], step
        assert digest(resumed.module.state_dict()) == digest(trainer.module.state_dict()), step


def test_a_function_may_have_state():
    options = {"schedule": None, "values": {"module.temperature": {"function": f"{HERE}.Halving"}}}
    look = functools.partial(Log, lambda trainer: trainer.module.temperature)
    memory = Memory(every="1 steps")
    _, log = train(options, memory, module=Warmed(), log=look())
    assert log.looked == [2.0**-move for move in range(14)]
    _, rest = train(options, Memory(memory.states[4]), module=Warmed(), log=look())
    assert rest.looked == log.looked[4:]


# Several ranks ------------------------------------------------------------------------


def rates_and_seconds(trainer):
    log = trainer.plugins.get_plugin("log")
    return log.rates, log.seconds


@pytest.mark.plugins
def test_ranks_follow_the_time_together():
    plugins = {"ddp": {}, "log": Log(at_rest), "lr_schedule": {"schedule": "linear"}}
    ranks = on_ranks(
        train_tiny, 2, plugins, PlainOne, look=rates_and_seconds, epochs=None, max_time="1 s", evaluate_every=None
    )
    (rates, seconds), other = (rank.looked for rank in ranks)
    assert (rates, seconds) == other
    assert digest(ranks[0].weights) == digest(ranks[1].weights)
    assert len(set(rates)) > 10


def at_rest(trainer):
    return None


class PlainOne(PlainModule):
    def get_optimizers_schedulers(self, steps, epochs):
        return [torch.optim.Adam(self.parameters(), RATE)], []


# Errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"schedule": "cosin"},
            "lr_schedule.schedule: there is no schedule 'cosin', did you mean 'cosine'?; there are",
        ),
        ({"schedule": 3}, "lr_schedule.schedule=3 must be a name, {name: options, for: length} or a list of such"),
        (
            {"schedule": {"cosine": {"eta": 1}}},
            "lr_schedule.schedule.cosine has no option 'eta', did you mean 'eta_min'?",
        ),
        ({"schedule": {"constant": {"factor": 1}}}, "lr_schedule.schedule.constant has no option 'factor'"),
        ({"schedule": ["cosine", "linear"]}, "more than one phase has no length; give all but one a `for`"),
        ({"schedule": ["one_cycle", "linear"]}, "one_cycle sets rates of its own and cannot be one phase of several"),
        ({"schedule": {"function": {"height": 1}}}, "lr_schedule.schedule.function.path is needed: the dotted path of"),
        ({"by": "step"}, "lr_schedule.by='step' must be one of steps, epochs, time, or null"),
        ({"schedule": None}, "lr_schedule has nothing to do: give schedule, values or both"),
        ({"schedule": "one_cycle", "warmup": "5%"}, "one_cycle begins with a warm-up of its own"),
        ({"schedule": None, "values": VALUES, "warmup": "5%"}, "needs a schedule to come after it, such as constant"),
        ({"schedule": "plateau", "warmup": "5%"}, 'before plateau it must be like "500 steps" or "1 epoch"'),
        ({"values": {"ema.decay": "cosine"}}, "lr_schedule.values.ema.decay must be optimizer.NAME or module.PATH"),
        ({"values": {"optimizer.lr": "cosine"}}, "learning rates follow lr_schedule.schedule"),
        ({"values": {"module.p": "plateau"}}, "a value follows one schedule of a shape"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LrSchedule(**options)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class Endless(Module):
    """Its loader has no length."""

    def get_train_dataloader(self, sampler, batch_size):
        loader = super().get_train_dataloader(sampler, batch_size)
        return torch.utils.data.DataLoader(Stream(loader.dataset), batch_size)


@pytest.mark.parametrize(
    ("options", "module", "message"),
    [
        ({}, TinyModule, "TinyModule.get_optimizers_schedulers returned CosineAnnealingLR for the same optimizer"),
        ({"warmup": "soon"}, Module, "lr_schedule.schedule.for='soon' must be like \"500 steps\", \"2 epochs\""),
        ({"warmup": "10 min"}, Module, "this schedule goes by steps and counts steps, or epochs of a known length, or"),
        ({"schedule": [{"linear": {}, "for": "5 steps"}]}, Module, "the phases end 9 steps before the run"),
        ({"by": "time"}, Module, "lr_schedule.by='time' follows the share of trainer.max_time, which is not set"),
        ({"optimizer": 1}, Module, "lr_schedule.optimizer=1: the module has 1 optimizer(s), from 0"),
        ({}, Endless, "lr_schedule.schedule.cosine ends with the run, whose length is unknown"),
        ({"warmup": "10%"}, Endless, "lr_schedule.schedule.for='10%' is a share of a run whose length is unknown"),
        ({"schedule": "exponential"}, Module, "lr_schedule.schedule.exponential: ExponentialLR: "),
        ({"schedule": "inverse_sqrt"}, Module, "inverse_sqrt.timescale is needed where no warm-up comes before"),
        ({"schedule": {"function": "nowhere.at"}}, Module, "function.path='nowhere.at' cannot be imported: No module"),
        ({"values": {"optimizer.momentum": "linear"}}, Module, "the optimizer's groups have no 'momentum'"),
        ({"values": {"optimizer.betas.7": "linear"}}, Module, "betas is (0.9, 0.999), which has no item 7"),
        ({"values": {"module.net.3.q": "linear"}}, Module, "Dropout has no attribute 'q'"),
        ({"values": {"module.net.9.p": "linear"}}, Module, "lr_schedule.values.module.net.9.p: "),
        ({"values": {"module.net.3": "linear"}}, Module, "no number that a schedule could move"),
    ],
)  # fmt: skip
def test_refuses_what_does_not_fit_the_run(options, module, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train(options, module=module())


def test_refuses_who_moves_schedulers_in_another_way():
    class Moves(Module):
        @hookimpl
        def step_schedulers(self):
            return True

    with pytest.raises(ValueError, match="module moves schedulers in a way of its own, which would leave these out"):
        train({}, module=Moves())


def test_cannot_replace_what_has_overwritten_the_rates():
    class Cycle(TinyModule):
        def get_optimizers_schedulers(self, steps, epochs):
            optimizer = torch.optim.Adam(self.parameters(), RATE)
            return [optimizer], [lr_scheduler.OneCycleLR(optimizer, 0.1, 14)]

    with pytest.raises(ValueError, match="OneCycleLR has overwritten the optimizer's rates; return none"):
        train({"replace": True}, module=Cycle())
