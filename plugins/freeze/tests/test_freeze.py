"""What is frozen stays as it is, what is unfrozen is trained from then on, as by hand, and so after a resume."""

import re

import pytest
import torch

from hookline import CallbackInterface, Stage, copy_state, hookimpl
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
from hookline_freeze import Freeze

STAGED = {"patterns": ["net.0", "net.1"], "unfreeze": {"4 steps": "net.1", "1 epochs": "net.0.weight"}}


def train(*plugins, module=None, **options):
    trainer = tiny_trainer(plugins, module, **options)
    trainer.train()
    return trainer


def test_contract():
    check_plugin(Freeze, patterns="net.0")
    check_plugin(Freeze, **STAGED, batch_norm="train")


# By hand ------------------------------------------------------------------------------


def by_hand(stages, frozen_norm):
    """Train with a loop by hand that sets `requires_grad` after the steps of `stages`, and the mode of batch norm."""
    module, steps = TinyModule(), []

    def parameters(names):
        return [module.get_parameter(name) for name in names]

    for weight in parameters(stages[0]):
        weight.requires_grad_(False)

    def forward(call):
        if frozen_norm(len(steps)):
            module.net[1].eval()
        else:
            module.net[1].train()
        return call()

    def step(optimizer):
        optimizer.step()
        steps.append(None)
        for weight in parameters(stages.get(len(steps), [])):
            weight.requires_grad_(True)

    hand_written_loop(module, step=step, forward=forward)
    return module


FIRST = ["net.0.weight", "net.0.bias"]
NORM = ["net.1.weight", "net.1.bias"]


@pytest.mark.parametrize(
    ("options", "stages", "frozen_norm"),
    [
        ({"patterns": "net.0"}, {0: FIRST}, lambda step: False),
        ({"patterns": "net.[01]"}, {0: FIRST + NORM}, lambda step: True),
        ({"patterns": ["net.0", "net.1"], "batch_norm": "train"}, {0: FIRST + NORM}, lambda step: False),
        ({"patterns": ["*.bias"]}, {0: [*FIRST[1:], *NORM[1:], "net.4.bias"]}, lambda step: False),
        (STAGED, {0: FIRST + NORM, 4: NORM, 7: FIRST[:1]}, lambda step: step < 4),
        (
            {"patterns": ["net.0.*", "net.1.*"], "unfreeze": {"3 steps": ["net.0"], "80 samples": "net.?.bias"}},
            {0: FIRST + NORM, 3: FIRST, 11: NORM[1:]},
            lambda step: step < 11,
        ),
    ],
    ids=lambda given: str(given) if isinstance(given, dict) and "patterns" in given else "",
)
def test_has_the_bits_of_a_loop_by_hand(options, stages, frozen_norm):
    trainer = train(Freeze(**options))
    expected = by_hand(stages, frozen_norm)
    assert digest(trainer.module.state_dict()) == digest(expected.state_dict())
    assert digest(trainer.module.state_dict()) != digest(train().module.state_dict())
    for name in stages[0]:
        kept = torch.equal(trainer.module.get_parameter(name), TinyModule().get_parameter(name))
        assert kept == (not any(name in names for step, names in stages.items() if step)), name


def test_nothing_that_is_frozen_has_a_gradient_or_a_state():
    class Watch(CallbackInterface):
        names = ()

        @hookimpl
        def on_begin_optimizer_step(self, trainer):
            self.names += (sorted(name for name, w in trainer.module.named_parameters() if w.grad is not None),)

    watch = Watch()
    trainer = train(Freeze(**STAGED), watch)
    assert watch.names[0] == ["net.4.bias", "net.4.weight"]
    assert watch.names[4] == [*sorted(NORM), "net.4.bias", "net.4.weight"]
    assert watch.names[7] == ["net.0.weight", *sorted(NORM), "net.4.bias", "net.4.weight"]
    (optimizer,) = trainer.optimizers
    assert trainer.module.net[0].bias not in optimizer.state
    assert [optimizer.state[weight]["step"].item() for weight in trainer.module.net[1].parameters()] == [10, 10]


def test_a_group_of_its_own_has_its_own_learning_rate():
    class Groups(TinyModule):
        def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
            groups = [{"params": self.net[0].parameters(), "lr": 0.001}, {"params": self.net[1:].parameters()}]
            optimizer = torch.optim.Adam(groups, 0.01)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3)]

    trainer = train(Freeze("net.0", {"5 steps": "net.0"}), module=Groups())
    assert not torch.equal(trainer.module.net[0].weight, Groups().net[0].weight)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx([1e-7, 1e-6])


# Batch norm ---------------------------------------------------------------------------


class Norms(TinyModule):
    def __init__(self):
        super().__init__()
        self.net[1] = torch.nn.Sequential(torch.nn.BatchNorm1d(16, affine=False), torch.nn.BatchNorm1d(16).eval())

    def on_begin_train_epoch(self, global_step, epoch):
        self.net[1][0].train()


def test_statistics_of_frozen_batch_norm_stay_and_modes_are_the_modules():
    trainer = train(Freeze(["net.0", "net.1"]), module=Norms())
    plain, own = trainer.module.net[1]
    assert not plain.running_mean.any()
    assert (plain.training, own.training) == (False, False)
    trainer = train(Freeze(["net.0", "net.1"], {"1 epochs": "net.1"}), module=Norms(), evaluate_every="1 steps")
    plain, own = trainer.module.net[1]
    assert plain.running_mean.any()
    assert plain.num_batches_tracked == 7
    assert (plain.training, own.training) == (True, False)


def test_what_the_module_has_frozen_stays_frozen():
    module = TinyModule()
    module.net[0].bias.requires_grad_(False)
    trainer = train(Freeze("net.0", {"2 steps": "net.0"}), module=module)
    assert torch.equal(trainer.module.net[0].bias, TinyModule().net[0].bias)
    assert not torch.equal(trainer.module.net[0].weight, TinyModule().net[0].weight)


# Resume -------------------------------------------------------------------------------


def test_a_resumed_run_ends_with_the_same_bits():
    whole = Memory(every="1 steps")
    train(whole, Freeze(**STAGED), evaluate_every="3 steps")
    for step in range(1, 14):
        resumed = Memory(whole.states[step])
        train(resumed, Freeze(**STAGED), evaluate_every="3 steps")
        for memory in (whole, resumed):
            memory.state["trainer"]["counters"]["seconds"] = 0
        assert digest(resumed.state) == digest(whole.state), step


def test_a_state_that_is_put_back_is_frozen_as_it_was():
    class GoesBack(Memory):
        went = False

        @hookimpl(specname="on_boundary", trylast=True)
        def go_back(self, trainer):
            if trainer.global_step == 9 and not self.went:
                self.went = True
                trainer.hook.set_run_state(trainer=trainer, state=copy_state(self.states[2]), stage=Stage.TRAIN)

    ends = []
    for memory in (Memory(every="1 steps"), GoesBack(every="1 steps")):
        trainer = train(memory, Freeze(**STAGED))
        ends.append(digest(trainer.module.state_dict()))
    assert memory.went
    assert ends[0] == ends[1]


# Several ranks, and others ------------------------------------------------------------


SHARED = {
    "freeze": {"patterns": "net.0", "unfreeze": {"3 steps": "net.0"}},
    "accumulate": {"steps": 2},
    "clip": {"max_norm": 0.1},
}


def sharing():
    """Train on several ranks in several orders; return what is exported."""
    told = {}
    for strategy in ("ddp", "fsdp"):
        for order in (1, -1):
            trainer = tiny_trainer(dict([*SHARED.items(), (strategy, {})][::order]), PlainModule())
            trainer.train()
            told[strategy, order] = {name: tensor.clone() for name, tensor in trainer.export_model().items()}
    return told


@pytest.mark.plugins
def test_ranks_train_what_is_unfrozen():
    one, other = on_ranks(sharing, 2)
    assert digest(one) == digest(other)
    reference = tiny_trainer(SHARED, PlainModule())
    reference.train()
    expected = reference.export_model()
    for key, exported in one.items():
        assert digest(exported) == digest(one[key[0], 1]), key  # in each order the same bits
        torch.testing.assert_close(exported, dict(expected), rtol=1e-4, atol=1e-5)
    assert not torch.equal(expected["net.0.weight"], PlainModule().net[0].weight)


# Options ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": []}, "freeze.patterns: [] must be the name of a parameter or of a module"),
        ({"patterns": [3]}, "freeze.patterns: [3] must be the name"),
        ({"patterns": "x", "unfreeze": {"often": "x"}}, "freeze.unfreeze={'often': 'x'}: 'often' is not a cadence"),
        ({"patterns": "x", "unfreeze": {"0.5 epochs": "x"}}, "freeze.unfreeze={'0.5 epochs': 'x'}: '0.5 epochs' is"),
        ({"patterns": "x", "unfreeze": {"1 epochs": None}}, "freeze.unfreeze: None must be the name"),
        ({"patterns": "x", "batch_norm": "off"}, "freeze.batch_norm='off' must be eval or train"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Freeze(**options)


class Partly(TinyModule):
    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        return [torch.optim.SGD(self.net[1:].parameters(), 0.01)], []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": ["net.0", "net.O"]}, "freeze.patterns: 'net.O' names no parameter, did you mean 'net."),
        ({"patterns": "net"}, "freeze.patterns='net' freezes all that is trained; leave something to train"),
        (
            {"patterns": "net.0", "unfreeze": {"1 epochs": "net.1"}},
            "freeze.unfreeze: 'net.1' names nothing that freeze.",
        ),
        ({"patterns": "net.0", "unfreeze": {"1 epochs": "net.0"}}, "freeze.unfreeze: no optimizer has 'net.0.weight'"),
    ],
)
def test_refuses_what_does_not_fit_the_module_before_any_step(options, message):
    trainer = tiny_trainer([Freeze(**options)], Partly())
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer.train()
    assert trainer.global_step == 0
