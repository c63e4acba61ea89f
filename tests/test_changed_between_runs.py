"""What was added, removed, exchanged or renamed between two sessions of a run: each has a rule, and is told."""

import functools
import logging

import pytest
import torch
from torch.optim import lr_scheduler

from hookline import CallbackInterface, hookimpl
from hookline.testing import Memory, TinyModule, digest, tiny_trainer


class Module(TinyModule):
    """Makes the optimizers and schedulers that it is told to."""

    def __init__(self, schedulers=(), optimizers=None):
        super().__init__(dropout=0.0)
        self.make_schedulers, self.make_optimizers = schedulers, optimizers or [Adam]

    def get_optimizers_schedulers(self, steps, epochs):
        optimizers = [make(self) for make in self.make_optimizers]
        return optimizers, [make(optimizers[0]) for make in self.make_schedulers]


def Adam(module):
    return torch.optim.Adam(module.parameters(), 0.01)


def sgd(module):
    return torch.optim.SGD(module.parameters(), 0.01)


def adamw(module):
    return torch.optim.AdamW(module.parameters(), 0.01, weight_decay=0.0)


def slower(module):
    return torch.optim.Adam(module.parameters(), 0.001, weight_decay=0.1)


def two_groups(module):
    weights = [*module.parameters()]
    return torch.optim.Adam([{"params": weights[:2]}, {"params": weights[2:]}], 0.01)


def half(module):
    return torch.optim.Adam([*module.parameters()][:2], 0.01)


def rest(module):
    return torch.optim.Adam([*module.parameters()][2:], 0.01)


def cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, 14)


def stepped(optimizer):
    return lr_scheduler.StepLR(optimizer, 5, 0.5)


def by_epoch(optimizer):
    return lr_scheduler.ExponentialLR(optimizer, 0.5), "epoch"


def plateau(optimizer):
    return lr_scheduler.ReduceLROnPlateau(optimizer)


def warm_cosine(optimizer):
    warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    return lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.CosineAnnealingLR(optimizer, 11)], [3])


def warm_steps(optimizer):
    warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    return lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.StepLR(optimizer, 5, 0.5)], [3])


class Rates(CallbackInterface):
    """Keep the learning rate of each step."""

    observer = True

    def __init__(self):
        self.rates = {}

    @hookimpl(trylast=True)
    def on_begin_optimizer_step(self, trainer):
        self.rates[trainer.global_step] = [group["lr"] for one in trainer.optimizers for group in one.param_groups]


def run(state=None, schedulers=(), optimizers=None, plugins=None, **options):
    memory, rates = Memory(state, every="1 step"), Rates()
    named = {"memory": memory, **(plugins or {}), "rates": rates}
    trainer = tiny_trainer(named, Module(schedulers, optimizers), **options)
    trainer.train()
    return trainer, memory, rates.rates


SETS = {
    "none": (),
    "cosine": (cosine,),
    "stepped": (stepped,),
    "by_epoch": (by_epoch,),
    "two": (cosine, by_epoch),
    "warm_cosine": (warm_cosine,),
    "warm_steps": (warm_steps,),
}


@functools.cache
def whole(schedulers="none"):
    """Return an unbroken run with these schedulers."""
    return run(schedulers=SETS[schedulers])


@pytest.mark.parametrize("after", [name for name in SETS if name != "none"])
@pytest.mark.parametrize("before", ["none", "cosine", "warm_steps"])
def test_other_schedulers_go_on_as_they_are_built_now_where_the_run_is(before, after, caplog):
    _, kept, _ = whole(before)
    _, _, unbroken = whole(after)
    caplog.clear()
    _, _, rates = run(kept.states[9], SETS[after])
    assert rates == {step: pytest.approx(unbroken[step]) for step in range(9, 14)}
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == (before != after), said
    assert all("the checkpoint has other schedulers (" in one and "than the run builds (" in one for one in said)


def test_a_scheduler_that_is_gone_leaves_the_rates_where_they_were_and_says_so(caplog):
    _, kept, before = whole("cosine")
    _, _, rates = run(kept.states[5])
    assert all(rate == before[5] for rate in rates.values())
    assert "T_max=14, eta_min=0.0) than the run builds (none): its learning rates stay" in caplog.text


def test_one_that_follows_a_metric_begins_anew_at_the_rates_as_built():
    _, kept, _ = whole("stepped")
    _, _, rates = run(kept.states[9], [plateau])
    assert rates[9] == [0.01]


@pytest.mark.parametrize("after", ["none", "stepped", "two"])
def test_as_saved_needs_the_schedulers_that_were_saved(after):
    _, kept, _ = whole("cosine")
    with pytest.raises(ValueError, match="trainer.schedulers=as_saved: build those of the checkpoint, or set as_built"):
        tiny_trainer([Memory(kept.states[5])], Module(SETS[after]), schedulers="as_saved").train()


@pytest.mark.parametrize(
    ("optimizers", "message"),
    [
        ([half, rest], "the optimizers of the checkpoint are Adam, the run's Adam, Adam; trainer.reset_optimizers_"),
        ([sgd], "the optimizers of the checkpoint are Adam, the run's SGD; trainer.reset_optimizers_schedulers=true"),
        ([adamw], "the optimizers of the checkpoint are Adam, the run's AdamW; trainer.reset_optimizers_schedulers"),
        ([two_groups], r"parameters by group: saved \[6\], here \[2, 4\]; trainer.reset_optimizers_schedulers=true"),
        ([half], r"only saved \['net.1.bias', .*; trainer.reset_optimizers_schedulers=true begins with those of"),
    ],
)
def test_other_optimizers_are_refused_with_the_way_on(optimizers, message):
    _, kept, _ = whole()
    with pytest.raises(ValueError, match=message):
        run(kept.states[5], optimizers=optimizers)
    assert run(kept.states[5], optimizers=optimizers, reset_optimizers_schedulers=True)[0].global_step == 14


def test_two_optimizers_saved_and_one_built():
    _, kept, _ = run(optimizers=[half, rest])
    with pytest.raises(ValueError, match="checkpoint are Adam, Adam, the run's Adam; trainer.reset_optimizers"):
        run(kept.states[5])


def test_other_options_of_an_optimizer_are_told_since_the_saved_ones_count(caplog):
    _, kept, _ = whole()
    _, _, rates = run(kept.states[5], optimizers=[slower])
    assert rates[9] == [0.01]
    assert (
        "Adam goes on with the options of the checkpoint: lr 0.01 (not 0.001), weight_decay 0 (not 0.1)" in caplog.text
    )
    caplog.clear()
    run(kept.states[5])
    assert "goes on with the options" not in caplog.text


class Counts(CallbackInterface):
    """Keep how many steps it has seen."""

    seen = 0

    @hookimpl
    def on_end_train_step(self):
        self.seen += 1

    def get_state(self):
        return {"seen": self.seen}

    def update_state(self, state):
        self.seen = state["seen"]


def test_a_plugin_that_was_added_begins_anew_and_one_that_was_removed_changes_nothing():
    unbroken, kept, _ = run(plugins={"counts": Counts()})
    resumed, _, _ = run(kept.states[5])
    assert digest(resumed.module.state_dict()) == digest(unbroken.module.state_dict())
    _, plain, _ = whole()
    late = Counts()
    resumed, _, _ = run(plain.states[5], plugins={"counts": late})
    assert late.seen == 9
    assert digest(resumed.module.state_dict()) == digest(unbroken.module.state_dict())


def test_a_plugin_that_no_longer_has_a_state_goes_on_without_it():
    class Stateless:
        """Has no base class, and so no `update_state`."""

    _, kept, _ = run(plugins={"counts": Counts()})
    assert run(kept.states[5], plugins={"counts": Stateless()})[0].global_step == 14


def test_a_state_belongs_to_the_name_not_to_the_class():
    _, kept, _ = run(plugins={"counts": Counts()})
    same, other = Counts(), Counts()
    run(kept.states[5], plugins={"counts": same})
    run(kept.states[5], plugins={"another": other})
    assert (same.seen, other.seen) == (14, 9)
