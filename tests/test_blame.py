"""An exception says which plugin raised it, in what of it, and where: whoever called it, in a run and outside one."""

import logging

import pytest

from hookline import CallbackInterface, Trainer, hookimpl
from hookline.testing import Memory, TinyModule, tiny_trainer


def blamed(call):
    """Return what the one note of the exception says after "raised in"."""
    with pytest.raises(ZeroDivisionError) as caught:
        call()
    (note,) = caught.value.__notes__
    assert note.startswith("raised in ")
    return note.removeprefix("raised in ")


def here(called, name):
    """Return the note of a plugin in this file, up to the line."""
    return f"{called} by plugin {name!r} ({__name__}), test_blame.py:"


class Fails(CallbackInterface):
    """Fails where it is told to."""

    def __init__(self, **where):
        self.where = where

    def _fail(self, place):
        if self.where.get(place):
            raise ZeroDivisionError(place)

    def get_state(self):
        self._fail("get_state")
        return {"x": 1}

    def update_state(self, state):
        self._fail("update_state")

    def count(self):
        self._fail("count")

    @property
    def size(self):
        return self._fail("size")

    @hookimpl
    def on_setup(self):
        self._fail("on_setup")

    @hookimpl
    def on_log_object(self):
        self._fail("on_log_object")

    @hookimpl(wrapper=True)
    def export_model(self):
        exported = yield
        self._fail("export_model")
        return exported

    @hookimpl(wrapper=True)
    def should_step(self):
        self._fail("should_step")
        return (yield)

    @hookimpl(wrapper=True)
    def find_state(self):
        self._fail("find_state")
        return (yield)


def plugins(memory=None, **where):
    return {"memory": memory or Memory(every="2 steps"), "sound": Fails(), "frail": Fails(**where), "third": Fails()}


def test_a_state_is_of_the_plugin_that_cannot_give_or_take_it_not_of_who_asked():
    assert blamed(tiny_trainer(plugins(get_state=True)).train).startswith(here("get_state", "frail"))
    memory = Memory(every="2 steps")
    tiny_trainer(plugins(memory)).train()
    resumed = tiny_trainer(plugins(Memory(memory.states[4]), update_state=True))
    assert blamed(resumed.train).startswith(here("update_state", "frail"))
    assert blamed(tiny_trainer(plugins(Memory(memory.states[4]), update_state=True)).validate).startswith(
        here("update_state", "frail")
    )


def test_outside_a_run_too():
    trainer = tiny_trainer(plugins(get_state=True, export_model=True, on_log_object=True, find_state=True))
    assert blamed(trainer.export_model).startswith(here("export_model", "frail"))
    assert blamed(lambda: trainer.hook.get_run_state(trainer=trainer)).startswith(here("get_state", "frail"))
    assert blamed(lambda: trainer.log_object("a", "b")).startswith(here("on_log_object", "frail"))
    assert blamed(lambda: trainer.resuming).startswith(here("find_state", "frail"))
    frail = Fails(update_state=True)
    trainer = tiny_trainer({"frail": frail})
    assert blamed(lambda: trainer.plugins.receive({"frail": {}})).startswith(here("update_state", "frail"))


def test_a_plugin_that_joins_late_is_blamed_for_its_setup_and_its_state_and_leaves_nothing():
    trainer = tiny_trainer()
    trainer.plugins.receive({"late": {"x": 1}})
    late = Fails(on_setup=True)
    assert blamed(lambda: trainer.plugins.register(late, "late")).startswith(here("on_setup", "late"))
    assert trainer.plugins.listed() == []
    late = Fails(update_state=True)
    assert blamed(lambda: trainer.plugins.register(late, "late")).startswith(here("update_state", "late"))
    assert blamed(lambda: Trainer(TinyModule(), {"early": Fails(on_setup=True)})).startswith(here("on_setup", "early"))


@pytest.mark.parametrize("called", ["count", "size", "_fail"])
def test_a_method_that_another_plugin_calls(called):
    class Asks(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, trainer):
            asked = getattr(trainer.plugins.get_plugin("frail"), called)
            asked("count") if called == "_fail" else asked()

    trainer = tiny_trainer({"asks": Asks(), **plugins(count=True, size=True)})
    assert blamed(trainer.train).startswith(here(called, "frail"))


def test_a_gate_that_another_plugin_opens_in_a_step_of_its_own():
    class Steps(CallbackInterface):
        @hookimpl
        def on_begin_train(self, trainer):
            trainer.step()

    assert blamed(tiny_trainer({"steps": Steps(), **plugins(should_step=True)}).train).startswith(
        here("should_step", "frail")
    )


def test_two_of_one_class_are_told_apart():
    for first in ("frail", "third"):
        named = {first: Fails(should_step=True), **{name: Fails() for name in ("frail", "third") if name != first}}
        assert blamed(tiny_trainer(named).train).startswith(here("should_step", first))


def test_an_error_of_the_module_is_nobody_elses():
    class Breaks(TinyModule):
        def train_step(self, global_step, batch, device):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        tiny_trainer(plugins(), Breaks()).train()
    assert getattr(caught.value, "__notes__", []) == []


def test_an_observer_that_cannot_take_its_state_costs_no_run(caplog):
    class Watches(CallbackInterface):
        observer = True

        def get_state(self):
            return {"old": 1}

        def update_state(self, state):
            self.seen = state["new"]

    memory = Memory(every="2 steps")
    tiny_trainer({"memory": memory, "watches": Watches()}).train()
    resumed = tiny_trainer({"memory": Memory(memory.states[4]), "watches": Watches()})
    with caplog.at_level(logging.WARNING):
        resumed.train()
    assert resumed.global_step == 14
    assert "plugin 'watches' failed in update_state, and the run goes on: KeyError: 'new'" in caplog.text
