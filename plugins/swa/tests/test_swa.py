"""The average has the bits of torch's, is what is evaluated and exported when training ends, and survives a resume."""

import re

import pytest
import torch
from torch.optim.swa_utils import SWALR, AveragedModel, get_swa_multi_avg_fn, update_bn

from hookline import CallbackInterface, Stage, copy_state, hookimpl
from hookline.counters import Cursor
from hookline.data import sampler_class
from hookline.testing import (
    Memory,
    PlainModule,
    TinyModule,
    check_plugin,
    digest,
    hand_written_loop,
    on_ranks,
    tiny_trainer,
)
from hookline_swa import Swa

LAST = 14  # steps of `tiny_trainer`


def train(*plugins, module=None, **options):
    trainer = tiny_trainer(plugins, module, **options)
    trainer.train()
    return trainer


def test_contract():
    check_plugin(Swa)
    check_plugin(Swa, begin=3, every=2, lr=0.05, anneal=2, anneal_strategy="linear", evaluate=True)


# By hand ------------------------------------------------------------------------------


class Forward(torch.nn.Module):
    """A model for `update_bn`, which passes inputs alone."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, inputs):
        return self.module.net(inputs)


def by_hand(begin, every, lr=None, anneal=10, strategy="cos", batches=None):
    """Train with a loop by hand; return the trained module and torch's average of it, with statistics of its own."""
    module, steps, schedulers = TinyModule(), [], []
    averaged = AveragedModel(module, multi_avg_fn=get_swa_multi_avg_fn())

    def step(optimizer):
        if lr is not None and not steps:
            schedulers.append(SWALR(optimizer, lr, anneal, strategy))
        optimizer.step()
        steps.append(len(steps) + 1)
        if steps[-1] <= begin:
            return None
        if steps[-1] % every == 0:
            averaged.update_parameters(module)
            for scheduler in schedulers:
                scheduler.step()
        return None if lr is None else False  # schedulers stand still

    hand_written_loop(module, step=step)
    cursor = Cursor(seed=0)
    cursor.begin_epoch(0)
    sampler = sampler_class(cursor, shuffle=True, share=0, shares=1)
    loader = list(module.get_train_dataloader(sampler=sampler, batch_size=8))
    update_bn(loader[:batches], Forward(averaged.module))
    return module, averaged.module


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"begin": 11, "every": 7}),
        ({"begin": 0.0}, {"begin": 0, "every": 7}),
        ({"begin": 0.25, "every": 1}, {"begin": 4, "every": 1}),
        ({"begin": 5, "every": 2, "batch_norm": 3}, {"begin": 5, "every": 2, "batches": 3}),
        ({"begin": 3, "every": 2, "lr": 0.1, "anneal": 3}, {"begin": 3, "every": 2, "lr": 0.1, "anneal": 3}),
        (
            {"begin": 0, "every": 1, "lr": 0.1, "anneal_strategy": "linear"},
            {"begin": 0, "every": 1, "lr": 0.1, "strategy": "linear"},
        ),
    ],
    ids=str,
)
def test_has_the_bits_of_a_loop_by_hand(options, expected):
    module, averaged = by_hand(**expected)
    trainer = train(Swa(**options))
    assert digest(trainer.module.state_dict()) == digest(module.state_dict())
    assert digest(trainer.export_model()) == digest(averaged.state_dict())
    assert digest(averaged.state_dict()) != digest(module.state_dict())


def test_the_metrics_are_those_of_a_module_with_the_average():
    trainer = train(Swa(0.0, every=1))
    module = TinyModule()
    module.load_state_dict(trainer.export_model())
    alone = tiny_trainer(module=module)
    assert trainer.validate() == alone.validate()
    assert trainer.test() == alone.test()
    assert digest(trainer.module.state_dict()) == digest(train().module.state_dict())


@pytest.mark.parametrize("evaluate", [False, True])
def test_changes_no_bit_of_the_training(evaluate):
    states = []
    for plugins in ([], [Swa(0.0, every=1, evaluate=evaluate)]):
        memory = Memory()
        train(memory, *plugins)
        states.append({name: memory.state[name] for name in ("module", "optimizers", "schedulers", "rng")})
    assert digest(states[0]) == digest(states[1])


# Evaluating and exporting -------------------------------------------------------------


class Seen(CallbackInterface):
    """Notes the weights that evaluations and exports have within training."""

    def __init__(self):
        self.evaluated, self.exported, self.trained = [], [], []

    @hookimpl
    def on_end_val_epoch(self, trainer):
        self.evaluated.append(digest(trainer.module.net[0].weight))

    @hookimpl
    def on_boundary(self, trainer):
        self.exported.append(digest(trainer.export_model()["net.0.weight"]))
        self.trained.append(digest(trainer.module.net[0].weight))


def test_within_training_both_have_the_trained_weights_or_the_average():
    seen = Seen()
    train(seen, Swa(0.0, every=1), evaluate_every="1 steps")
    assert seen.evaluated == seen.exported == seen.trained
    seen = Seen()
    train(seen, Swa(3, every=2, evaluate=True), evaluate_every="1 steps")
    assert seen.evaluated == seen.exported
    same = [one == other for one, other in zip(seen.exported, seen.trained, strict=True)]
    assert same == [True] * 4 + [False] * 0 + same[4:]
    assert not any(same[4:])


def test_the_pass_over_the_data_leaves_no_trace():
    class Logs(TinyModule):
        def train_step(self, global_step, batch, device):
            self.log(mine=1.0)
            return super().train_step(global_step, batch, device)

    class Hears(CallbackInterface):
        def __init__(self):
            self.values, self.random = [], []

        @hookimpl
        def on_log(self, metrics):
            self.values += [metrics["mine"]] if "mine" in metrics else []

        @hookimpl(trylast=True)
        def on_end_train(self, trainer):
            self.random = [torch.rand(()).item(), trainer.position]

    told = []
    for plugins in ([], [Swa(0.0)]):
        hears = Hears()
        trainer = train(hears, *plugins, module=Logs())
        told.append((hears.values, hears.random, trainer.module.seen, trainer.module.net[1].num_batches_tracked.item()))
    assert told[0] == told[1]


def test_batch_norm_in_eval_mode_keeps_its_statistics():
    class Frozen(TinyModule):
        def on_begin_train_epoch(self, global_step, epoch):
            self.net[1].eval()

    trainer = train(Swa(0.0), module=Frozen())
    assert not trainer.export_model()["net.1.running_mean"].any()
    assert not trainer.module.net[1].training


def test_without_batch_norm_and_without_statistics():
    trainer = train(Swa(0.0), module=PlainModule(dropout=0.2))
    assert digest(trainer.export_model()) != digest(trainer.module.state_dict())
    trainer = train(Swa(0.0, batch_norm=0))
    assert torch.equal(trainer.export_model()["net.1.running_mean"], trainer.module.net[1].running_mean)


def test_where_nothing_is_averaged_it_is_said(caplog):
    trainer = train(Swa(LAST), epochs=2)
    assert digest(trainer.export_model()) == digest(trainer.module.state_dict())
    said = [record.getMessage() for record in caplog.records if record.name == "hookline.swa"]
    assert said == ["swa has averaged nothing: no step after step 14 is a multiple of 7"]


def test_half_precision_is_averaged_in_float32_and_what_is_frozen_is_left():
    class Mixed(TinyModule):
        def __init__(self):
            super().__init__()
            self.small = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
            self.net[0].bias.requires_grad_(False)

        def train_step(self, global_step, batch, device):
            loss, _ = super().train_step(global_step, batch, device)
            return loss + self.small.sum().float()

    swa = Swa(0.0, every=1)
    train(swa, module=Mixed())
    average = swa.get_state()["average"]
    assert average["small"].dtype == torch.float32
    assert "net.0.bias" not in average


# Resume -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"every": 1}, {"begin": 4, "every": 2, "lr": 0.1, "anneal": 3}], ids=str)
def test_a_resumed_run_ends_with_the_same_bits(options):
    whole = Memory(every="1 steps")
    ended = train(whole, Swa(**options))
    for step in range(1, LAST):
        resumed = Memory(whole.states[step])
        again = train(resumed, Swa(**options))
        for memory in (whole, resumed):
            memory.state["trainer"]["counters"]["seconds"] = 0
        assert digest(resumed.state) == digest(whole.state), step
        assert digest(again.export_model()) == digest(ended.export_model()), step


def test_a_state_that_is_put_back_has_its_own_average():
    class GoesBack(Memory):
        went = False

        @hookimpl(specname="on_boundary", trylast=True)
        def go_back(self, trainer):
            if trainer.global_step == 9 and not self.went:
                self.went = True
                trainer.hook.set_run_state(trainer=trainer, state=copy_state(self.states[5]), stage=Stage.TRAIN)

    ends = []
    for memory in (Memory(every="1 steps"), GoesBack(every="1 steps")):
        ends.append(digest(train(memory, Swa(2, every=2, lr=0.1, anneal=3)).export_model()))
    assert memory.went
    assert ends[0] == ends[1]


def test_an_evaluation_and_a_finished_run_have_the_average_of_the_state():
    memory = Memory()
    ended = train(memory, Swa(0.0))
    evaluated = tiny_trainer([Memory(memory.state), Swa(0.0)])
    assert evaluated.test() == ended.test()
    nothing_left = train(Memory(memory.state), Swa(0.0))
    assert digest(nothing_left.export_model()) == digest(ended.export_model())


@pytest.mark.plugins
@pytest.mark.parametrize("order", [1, -1])
def test_with_best(order):
    """The average of the best evaluation comes back, and gets statistics of its own."""
    exported = {}

    class Keeps(CallbackInterface):
        @hookimpl
        def on_boundary(self, trainer, global_step):
            exported[global_step] = copy_state(trainer.export_model())

    class Scored(TinyModule):
        def val_step(self, global_step, batch, device):
            self.log(val_error=abs(global_step - 9.0))

    plugins = [("swa", {"begin": 3, "every": 1, "evaluate": True}), ("best", {"metric": "val_error"})][::order]
    trainer = tiny_trainer({"keeps": Keeps(), **dict(plugins)}, Scored(), evaluate_every="1 steps")
    trainer.train()
    best = trainer.export_model()
    for name in ("net.0.weight", "net.1.bias"):
        assert torch.equal(best[name], exported[9][name])
        assert not torch.equal(best[name], exported[14][name])
    assert best["net.1.num_batches_tracked"] == 7


@pytest.mark.plugins
@pytest.mark.parametrize("order", [1, -1])
def test_two_averages_are_refused(order):
    trainer = tiny_trainer(dict([("ema", {}), ("swa", {})][::order]))
    with pytest.raises(ValueError, match="ema and swa would each evaluate and export an average of the weights; name"):
        trainer.train()
    assert trainer.global_step == 0


# Several ranks ------------------------------------------------------------------------


class Normed(TinyModule):
    """Has batch norm behind what is the same on all ranks, so that its statistics are those of the data."""

    def __init__(self):
        super().__init__(samples=48, dropout=0.0)
        self.net = torch.nn.Sequential(torch.nn.BatchNorm1d(8, affine=False), torch.nn.Linear(8, 1))
        torch.nn.init.ones_(self.net[1].weight)
        torch.nn.init.zeros_(self.net[1].bias)


def sharing():
    """Train on several ranks that share the model; return the averages."""
    told = {}
    for strategy in ("ddp", "fsdp"):
        for order in (1, -1):
            plugins = {"swa": {"begin": 0.0, "every": 1}, "clip": {"max_norm": 0.5}, "accumulate": {"steps": 2}}
            memory = Memory()
            listed = dict([*plugins.items(), (strategy, {})][::order])
            trainer = tiny_trainer({**listed, "memory": memory}, Normed())
            trainer.train()
            told[strategy, order] = {name: tensor.clone() for name, tensor in trainer.export_model().items()}
            told[strategy, order] |= trainer.validate()
            nothing_left = tiny_trainer({**listed, "memory": Memory(memory.state)}, Normed())
            nothing_left.train()
            assert digest(nothing_left.export_model()) == digest(trainer.export_model())
    return told


@pytest.mark.plugins
def test_ranks_have_one_average():
    one, other = on_ranks(sharing, 2)
    assert digest(one) == digest(other)
    data = Normed().inputs
    for strategy in ("ddp", "fsdp"):
        average = one[strategy, 1]
        assert digest(average) == digest(one[strategy, -1])
        torch.testing.assert_close(average["net.0.running_mean"], data.mean(0))  # that of all samples
        assert average["val_loss"] == one["ddp", 1]["val_loss"]
        assert not torch.equal(average["net.1.weight"], Normed().net[1].weight)
    torch.testing.assert_close(one["ddp", 1], one["fsdp", 1], rtol=1e-4, atol=1e-5)


# Options ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"begin": 1.0}, "swa.begin=1.0 must be a share of the run, such as 0.75, or steps from 0"),
        ({"begin": -1}, "swa.begin=-1 must be a share of the run"),
        ({"begin": "late"}, "swa.begin='late' must be a share of the run"),
        ({"every": 0}, "swa.every=0 must be at least 1"),
        ({"anneal": 0}, "swa.anneal=0 must be at least 1"),
        ({"batch_norm": -1}, "swa.batch_norm=-1 must be at least 0"),
        ({"lr": -0.1}, "swa.lr=-0.1 must be a learning rate from 0, or null"),
        ({"anneal_strategy": "fast"}, "swa.anneal_strategy='fast' must be cos or linear"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Swa(**options)


class Stream(TinyModule):
    def get_train_dataloader(self, sampler, batch_size):
        return (batch for batch in [*super().get_train_dataloader(sampler, batch_size)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "swa.every=null is an epoch, whose length is unknown; give a number of steps"),
        ({"every": 1}, "swa.begin=0.75 is of a run whose length is unknown; give a number of steps"),
        (
            {"every": 1, "begin": 1},
            "swa.batch_norm=null is an epoch, whose length is unknown; give a number of batches",
        ),
    ],
)
def test_refuses_what_the_length_of_the_run_does_not_tell(options, message):
    trainer = tiny_trainer([Swa(**options)], Stream())
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer.train()
    assert trainer.global_step == 0
    train(Swa(begin=1, every=1, batch_norm=2), module=Stream())
