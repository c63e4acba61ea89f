"""The promise of the hook API: plugins written against 0.1 train; what is deprecated warns and works."""

import dataclasses
import importlib
import warnings
from pathlib import Path

import pytest
import torch
from tests.api_0_1 import events, old_style, performers, wrappers

import hookline.testing
from hookline import CallbackInterface, event, hookimpl, verb
from hookline.cli.hooks import read_hooks
from hookline.options import Options
from hookline.testing import Memory, TinyModule, digest, tiny_trainer

API = Path(__file__).parent / "api_0_1"
HOOKS = [line.split(None, 2) for line in (API / "hooks.txt").read_text().splitlines()[1:]]


def everything(trainer):
    """Do what calls every hook."""
    trainer.train()
    trainer.validate()
    trainer.test()
    trainer.predict(collect=True)
    assert trainer.resuming is None or trainer.resuming.global_step == 14
    trainer.log_object("text", "x")
    trainer.export_model()
    with trainer.rank_zero_first():
        pass
    call = trainer.hook
    call.all_gather(trainer=trainer, value=1)
    call.vote(trainer=trainer, asked=False, seconds=0.0)
    call.allocate(trainer=trainer, path=("module", "net.0.weight"), shape=(16, 8), dtype=torch.float32)
    call.get_mode(trainer=trainer, metric="val_loss")
    call.get_watched_metrics(trainer=trainer)
    call.join_loaders(trainer=trainer, loaders={"one": []}, sampler=torch.utils.data.Sampler)
    call.on_checkpoint(trainer=trainer, path=Path(), kind="model")
    state = call.get_run_state(trainer=trainer)
    call.set_run_state(trainer=trainer, state=state, stage=trainer.stage)


@pytest.fixture(scope="module")
def plain():
    trainer = tiny_trainer()
    trainer.train()
    return digest(trainer.module.state_dict())


class Fails(TinyModule):
    def train_step(self, global_step, batch, device):
        raise ZeroDivisionError


def test_every_event_is_heard_with_every_argument_of_0_1(plain):
    heard = events.Events()
    trainer = tiny_trainer({"events": heard, "memory": Memory(every="4 steps")})
    everything(trainer)
    with pytest.raises(ZeroDivisionError):
        tiny_trainer([heard], Fails()).train()
    assert set(heard.heard) == {name for name, kind, _ in HOOKS if kind == "event"}
    assert digest(trainer.module.state_dict()) == plain


def test_every_verb_is_wrapped_with_every_argument_of_0_1(plain):
    around = wrappers.Wrappers()
    memory = Memory(every="4 steps")
    trainer = tiny_trainer({"wrappers": around, "memory": memory})
    everything(trainer)
    tiny_trainer({"wrappers": around, "memory": Memory(memory.states[4])}).train()
    assert set(around.answers) == {name for name, kind, _ in HOOKS if kind == "verb"}
    assert digest(trainer.module.state_dict()) == plain


def test_every_verb_is_performed_by_the_cores_way_of_0_1(plain):
    does = performers.Performers()
    trainer = tiny_trainer([does])
    everything(trainer)
    assert does.done == {name for name, kind, _ in HOOKS if kind == "verb"}
    assert digest(trainer.module.state_dict()) == plain


def test_the_files_of_0_1_have_every_hook_that_0_1_had():
    now = {hook.name: hook for hook in read_hooks()}
    for name, kind, arguments in HOOKS:
        assert now[name].kind == kind, name
        assert set(arguments.split(", ")) <= set(now[name].arguments), name


def test_plugins_in_the_old_style(plain):
    spread, without, bare, loud = old_style.Spread(), old_style.Plain(), old_style.Unbased(), old_style.Loud(factor=3.0)
    named = {"spread": spread, "plain": without, "bare": bare, "watches": old_style.Watches(), "loud": loud}
    memory = Memory(every="4 steps")
    trainer = tiny_trainer({**named, "memory": memory})
    trainer.train()
    assert digest(trainer.module.state_dict()) == plain
    assert [len(spread.heard[name]) for name in spread.heard] == [2, 2, 3, 5, 3, 1]
    assert without.heard[-3:] == [("step", 14), ("val", 14), ("epoch", 14, without.heard[-1][2])]
    assert bare.heard == ["first", "last"] * (len(bare.heard) // 2)
    assert loud.levels == [1.5, 1.5]
    resumed = old_style.Loud()
    tiny_trainer({"loud": resumed, "memory": Memory(memory.state)}, epochs=3).train()
    assert resumed.levels == [1.5, 1.5, 1.0]


def test_names_attributes_and_options_of_0_1_are_there():
    trainer = tiny_trainer(max_steps=1)
    trainer.train()
    options = {field.name: field.default for field in dataclasses.fields(Options)}
    homes = {"hookline": hookline, "testing": hookline.testing, "trainer": trainer}
    for line in (API / "names.txt").read_text().splitlines():
        home, _, name = line.rpartition(".") if "=" not in line else ("options", "", line)
        if home == "options":
            name, _, default = name.removeprefix("options.").partition("=")
            assert repr(options[name]) == default, line
        else:
            assert hasattr(homes[home.rpartition(".")[2]], name), line
    assert importlib.import_module("hookline.hookspecs") is hookline.hookspecs


# What is deprecated -------------------------------------------------------------------


class Sounds:
    """The hooks of a plugin whose second version has renamed an event, an argument and a verb."""

    @staticmethod
    @event(warn_on_impl=DeprecationWarning("on_noise is on_sound since 0.2, and ends with 0.4"))
    def on_noise(trainer, level):
        """Hear a sound."""

    @staticmethod
    @event(warn_on_impl_args={"loudness": DeprecationWarning("loudness is level since 0.2, and ends with 0.4")})
    def on_sound(trainer, level, loudness):
        """Hear a sound."""

    @staticmethod
    @verb(warn_on_impl=DeprecationWarning("get_loudness is get_level since 0.2, and ends with 0.4"))
    def get_loudness(trainer):
        """Return how loud it is."""
        return 0.5

    @staticmethod
    @verb
    def get_level(trainer):
        """Return how loud it is."""
        return trainer.hook.get_loudness(trainer=trainer)


class Brings(CallbackInterface):
    hookspecs = Sounds

    @hookimpl
    def on_end_train(self, trainer):
        level = trainer.hook.get_level(trainer=trainer)
        trainer.hook.on_noise(trainer=trainer, level=level)
        trainer.hook.on_sound(trainer=trainer, level=level, loudness=level)


class Old(CallbackInterface):
    def __init__(self):
        self.heard = []

    @hookimpl
    def on_noise(self, level):
        self.heard.append(level)

    @hookimpl
    def on_sound(self, loudness):
        self.heard.append(loudness)

    @hookimpl(wrapper=True)
    def get_loudness(self):
        return (yield) + 1


class New(Old):
    on_noise = get_loudness = None

    @hookimpl
    def on_sound(self, level):
        self.heard.append(level)

    @hookimpl(wrapper=True)
    def get_level(self):
        return (yield) * 2


def test_what_is_deprecated_works_and_warns_who_uses_it_and_where():
    old, new = Old(), New()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = tiny_trainer({"brings": Brings(), "old": old, "new": new}, max_steps=1)
    assert {str(one.message).partition(" ")[0] for one in caught} == {"on_noise", "loudness", "get_loudness"}
    assert {(one.category, one.filename) for one in caught} == {(DeprecationWarning, __file__)}
    trainer.train()
    assert (old.heard, new.heard) == ([3.0, 3.0], [3.0])


def test_who_uses_the_new_way_is_not_warned():
    new = New()
    trainer = tiny_trainer({"brings": Brings(), "new": new}, max_steps=1)  # warnings are errors
    trainer.train()
    assert new.heard == [1.0]
