"""Groups are those that one would write by hand, in every order of the list, when resumed and on several ranks."""

import itertools
import logging
import re

import pytest
import torch

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
from hookline_param_groups import ParamGroups

RATE, DECAY = 1e-2, 0.1


class Module(TinyModule):
    """Has weight decay and no schedulers; `get_blocks` are its two layers."""

    def get_blocks(self):
        return [self.net[0], self.net[4]]

    def get_optimizers_schedulers(self, steps, epochs):
        return [torch.optim.AdamW(self.parameters(), RATE, weight_decay=DECAY)], []


def by_hand(make_groups):
    """Return a module whose optimizer has groups of its own."""

    class ByHand(Module):
        def get_optimizers_schedulers(self, steps, epochs):
            return [torch.optim.AdamW(make_groups(self), RATE, weight_decay=DECAY)], []

    return ByHand()


def train(options, *others, module=None, **trainer_options):
    plugins = {"param_groups": ParamGroups(**options), **{str(number): one for number, one in enumerate(others)}}
    trainer = tiny_trainer(plugins, module or Module(), **trainer_options)
    trainer.train()
    return trainer


def groups_of(trainer):
    """Return the groups by name: the names of their parameters, their rate and their decay."""
    names = {id(weight): name for name, weight in trainer.module.named_parameters()}
    return {
        group["name"]: ([names[id(p)] for p in group["params"]], group["lr"], group["weight_decay"])
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
    }


def no_decay_by_hand(module):
    net = module.net
    rest = [net[0].bias, net[1].weight, net[1].bias, net[4].bias]
    return [{"params": [net[0].weight, net[4].weight]}, {"params": rest, "weight_decay": 0.0}]


def layers_by_hand(module):
    net = module.net
    return [
        {"params": [*net[0].parameters()], "lr": RATE * 0.5**2},
        {"params": [*net[1].parameters()], "lr": RATE},
        {"params": [*net[4].parameters()], "lr": RATE * 0.5},
    ]


def patterns_by_hand(module):
    net = module.net
    return [
        {"params": [net[0].weight], "lr": 1e-3},
        {"params": [net[0].bias], "lr": 1e-3, "weight_decay": 0.0},
        {"params": [net[1].weight, net[4].weight]},
        {"params": [net[1].bias, net[4].bias], "weight_decay": 0.0},
    ]


PATTERNS = {"net.0.*": {"lr": 1e-3}, "*.bias": {"weight_decay": 0.0}}
CASES = {
    "no_decay": ({}, no_decay_by_hand),
    "layers": ({"no_decay": False, "layer_decay": 0.5}, layers_by_hand),
    "patterns": ({"no_decay": False, "groups": PATTERNS}, patterns_by_hand),
}
EACH = pytest.mark.parametrize("name", CASES)


def test_contract():
    check_plugin(ParamGroups)


@EACH
def test_trains_what_groups_by_hand_train(name):
    options, make_groups = CASES[name]
    module = by_hand(make_groups)
    hand_written_loop(module)
    trainer = train(options)
    assert digest(trainer.module.state_dict()) == digest(module.state_dict())
    plain = Module()
    hand_written_loop(plain)
    assert digest(plain.state_dict()) != digest(module.state_dict())


@EACH
def test_a_run_resumed_at_each_step_ends_with_the_same_bits(name):
    whole = Memory(every="1 steps")
    trainer = train(CASES[name][0], whole, epochs=1)
    for step in range(1, 7):
        resumed = train(CASES[name][0], Memory(whole.states[step]), epochs=1)
        assert digest(resumed.module.state_dict()) == digest(trainer.module.state_dict()), step
        assert groups_of(resumed) == groups_of(trainer)


def test_all_at_once_and_each_parameter_once():
    groups = {"net.0.bias": {"weight_decay": 0.3}, "*.bias": {"lr": 0.5}}
    trainer = train({"layer_decay": 0.5, "layers": ["Linear"], "groups": groups})
    assert groups_of(trainer) == {
        "layer 1": (["net.0.weight"], RATE / 4, DECAY),
        "layer 1 net.0.bias *.bias": (["net.0.bias"], 0.5, 0.3),
        "layer 3 no_decay": (["net.1.weight"], RATE, 0.0),
        "layer 3 *.bias no_decay": (["net.1.bias"], 0.5, 0.0),
        "layer 2": (["net.4.weight"], RATE / 2, DECAY),
        "layer 2 *.bias no_decay": (["net.4.bias"], 0.5, 0.0),
    }


def test_groups_of_the_module_keep_their_options_and_names():
    def two(module):
        first = {"params": module.net[:4].named_parameters(), "lr": 0.2, "name": "body"}
        return [first, {"params": module.net[4].named_parameters()}]

    trainer = train({"groups": {"*.bias": {"lr": 0.5}}, "no_decay": False}, module=by_hand(two))
    assert groups_of(trainer) == {
        "body": (["net.0.weight", "net.1.weight"], 0.2, DECAY),
        "body *.bias": (["net.0.bias", "net.1.bias"], 0.5, DECAY),
        "rest": (["net.4.weight"], RATE, DECAY),
        "*.bias": (["net.4.bias"], 0.5, DECAY),
    }
    names = [group["param_names"] for group in trainer.optimizers[0].param_groups]
    assert names == [["0.weight", "1.weight"], ["0.bias", "1.bias"], ["weight"], ["bias"]]


def test_every_optimizer_is_regrouped():
    class Two(TinyModule):
        def get_optimizers_schedulers(self, steps, epochs):
            parts = self.net[:4], self.net[4]
            return [torch.optim.SGD(part.parameters(), 0.1, weight_decay=DECAY) for part in parts], []

    trainer = train({}, module=Two())
    assert [[len(group["params"]) for group in one.param_groups] for one in trainer.optimizers] == [[1, 3], [1, 1]]


def test_an_optimizer_without_decay_has_nothing_to_exempt():
    trainer = train({}, module=TinyModule())
    assert len(trainer.optimizers[0].param_groups) == 1
    assert "name" not in trainer.optimizers[0].param_groups[0]


def test_the_log_tells_the_groups(caplog):
    caplog.set_level(logging.INFO, "hookline")
    train({})
    assert "group rest: 2 parameters, {'lr': 0.01, 'weight_decay': 0.1}" in caplog.text
    assert "group no_decay: 4 parameters, {'lr': 0.01, 'weight_decay': 0.0}" in caplog.text


# With other plugins -------------------------------------------------------------------


class WithScheduler(Module):
    def get_optimizers_schedulers(self, steps, epochs):
        (optimizer,), _ = super().get_optimizers_schedulers(steps, epochs)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 0.1)]


@pytest.mark.plugins
@pytest.mark.parametrize("module", [Module, WithScheduler])
def test_schedules_come_after_the_groups_in_every_order_of_the_list(module):
    plugins = {
        "lr_schedule": {"schedule": "linear", "replace": True},
        "param_groups": {"groups": {"net.0.*": {"lr": 0.5}}},
        "accumulate": {"steps": 2},
        "clip": {"max_norm": 0.1},
    }
    ends = set()
    for order in itertools.permutations(plugins, 4):
        if order[0] in ("lr_schedule", "param_groups"):
            trainer = tiny_trainer({name: plugins[name] for name in order}, module(), epochs=1, max_steps=2)
            trainer.train()
            scheduler = trainer.schedulers[0].scheduler
            assert scheduler.base_lrs == [0.5, 0.5, RATE, RATE], order
            ends.add(digest(trainer.module.state_dict()))
    assert len(ends) == 1


def test_a_scheduler_for_the_groups_as_they_were_is_refused():
    message = "WithScheduler.get_optimizers_schedulers returned LinearLR, made for the groups as they were; return no"
    with pytest.raises(ValueError, match=message):
        train({}, module=WithScheduler())


class Decaying(PlainModule):
    def get_optimizers_schedulers(self, steps, epochs):
        return [torch.optim.AdamW(self.parameters(), RATE, weight_decay=DECAY)], []


def names_and_rates(trainer):
    return groups_of(trainer)


@pytest.mark.plugins
def test_ranks_that_share_the_model_have_the_same_groups():
    plugins = {"param_groups": {"layer_decay": 0.5, "layers": ["Linear"]}}
    alone = train_tiny(plugins, Decaying, look=names_and_rates)
    ranks = on_ranks(train_tiny, 2, {"fsdp": {}, **plugins}, Decaying, look=names_and_rates)
    assert ranks[0].looked == ranks[1].looked == alone.looked
    assert len(alone.looked) == 4
    torch.testing.assert_close(dict(ranks[0].weights), dict(alone.weights), rtol=1e-5, atol=1e-6)


# Errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_decay": 0.0}, "param_groups.layer_decay=0.0 must be above 0 and at most 1, such as 0.75"),
        ({"layers": ["Linear"]}, "param_groups.layers says what a layer is for param_groups.layer_decay, which is not"),
        ({"groups": {"*.bias": {}}}, "param_groups.groups.*.bias={} must be options of the optimizer, such as"),
        ({"groups": {"*": {"params": []}}}, "param_groups.groups.*={'params': []} must be options of the optimizer"),
    ],
)  # fmt: skip
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ParamGroups(**options)


class LBFGS(TinyModule):
    def get_optimizers_schedulers(self, steps, epochs):
        return [torch.optim.LBFGS(self.parameters())], []


@pytest.mark.parametrize(
    ("options", "module", "message"),
    [
        (
            {"groups": {"net.0.weigth": {"lr": 1.0}}},
            Module,
            "param_groups.groups.net.0.weigth matches no parameter of an optimizer, did you mean 'net.0.weight'?; they",
        ),
        (
            {"groups": {"*.bias": {"rate": 1.0}}},
            Module,
            "param_groups.groups.*.bias.rate: the optimizer has no such option; its groups have lr, betas, eps, weight",
        ),
        ({"layer_decay": 0.5}, TinyModule, "name their class in param_groups.layers, or give TinyModule a method"),
        ({"layer_decay": 0.5, "layers": ["Linea"]}, Module, "param_groups.layers names Linea, and the model has none"),
        ({"groups": {"*.bias": {"lr": 0.5}}}, LBFGS, "LBFGS takes all parameters as one group; take another optimizer"),
    ],
)  # fmt: skip
def test_refuses_what_does_not_fit_the_module(options, module, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train(options, module=module())


def test_other_groups_than_the_saved_ones_are_refused():
    memory = Memory(every="1 steps")
    train({}, memory)
    with pytest.raises(ValueError, match="is over other parameters than this one, or groups them otherwise"):
        train({"no_decay": False, "groups": PATTERNS}, Memory(memory.states[3]))
