"""The calls of verbs: they do what pluggy would do, in its order, whatever wrappers and performer do."""

import itertools
import random

import pytest

from hookline import CallbackInterface, hookimpl
from hookline.plugins import PluginManager


class Told(CallbackInterface):
    """A plugin that notes what is done in it.

    Args:
        name: in the notes.
        notes: gets them.
    """

    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def note(self, *what):
        self.notes.append((self.name, *map(str, what)))


class Passes(Told):
    @hookimpl(wrapper=True)
    def should_step(self, optimizers, trainer):
        self.note("begins", len(optimizers), trainer)
        answer = yield
        self.note("gets", answer)
        return answer


class Changes(Told):
    @hookimpl(wrapper=True, tryfirst=True)
    def should_step(self, trainer, optimizers=None):
        answer = yield
        self.note("changes", answer, len(optimizers))
        return [answer, self.name]


class Forgets(Told):
    @hookimpl(wrapper=True)
    def should_step(self):
        self.note("gets", (yield))


class FailsBefore(Told):
    @hookimpl(wrapper=True)
    def should_step(self):
        self.note("fails")
        raise ValueError(self.name)
        yield


class FailsAfter(Told):
    @hookimpl(wrapper=True, trylast=True)
    def should_step(self):
        self.note("gets", (yield))
        raise LookupError(self.name)


class Saves(Told):
    @hookimpl(wrapper=True)
    def should_step(self):
        try:
            return (yield)
        except (Exception, KeyboardInterrupt) as error:
            self.note("saves from", type(error), error)
            return "saved"


class Replaces(Told):
    @hookimpl(wrapper=True)
    def should_step(self):
        try:
            return (yield)
        except (Exception, KeyboardInterrupt) as error:
            raise OSError(self.name) from error


class Finishes(Told):
    @hookimpl(wrapper=True)
    def should_step(self):
        try:
            return (yield)
        finally:
            self.note("finishes")


class NeverYields(Told):
    @hookimpl(wrapper=True)
    def should_step(self):
        self.note("returns")
        if self.name:
            return 1
        yield


class YieldsTwice(Told):
    @hookimpl(wrapper=True)
    def should_step(self):
        try:
            yield
        except ValueError:
            self.note("saves")
        yield


class Stops(Told):
    @hookimpl(wrapper=True)
    def should_step(self):
        yield
        raise StopIteration(self.name)


class Holds(Told):
    @hookimpl(wrapper=True)
    def should_step(self):
        yield
        try:
            yield
        except GeneratorExit:
            raise KeyError(self.name) from None


class Performs(Told):
    @hookimpl
    def should_step(self, optimizers, trainer):
        self.note("performs", len(optimizers))
        return "performed"


class PerformsBadly(Told):
    error = ValueError

    @hookimpl
    def should_step(self):
        raise self.error(self.name)


class PerformsStopped(PerformsBadly):
    error = StopIteration


class PerformsInterrupted(PerformsBadly):
    error = KeyboardInterrupt


WRAPPERS = (
    Passes, Changes, Forgets, FailsBefore, FailsAfter, Saves, Replaces, Finishes, NeverYields, YieldsTwice, Stops,
    Holds,
)  # fmt: skip
PERFORMERS = (Performs, PerformsBadly, PerformsStopped, PerformsInterrupted)


def managed(named):
    """Return a manager with plugins."""
    manager = PluginManager()
    manager.register_all(named)
    return manager


def outcome(call, notes):
    """Return what a call answers or raises, and what was noted meanwhile."""
    notes.clear()
    try:
        answer = call(trainer="trainer", optimizers=[1, 2])
    except BaseException as error:
        if isinstance(error, TypeError) and "got no answer" in str(error):
            return None, [*notes]
        return (type(error), str(error), type(error.__cause__)), [*notes]
    return answer, [*notes]


def chains():
    """Give each wrapper alone with each performer and with none, and longer chains by chance."""
    yield from itertools.product(map(list, zip(WRAPPERS)), (None, *PERFORMERS))
    draw = random.Random(0)
    for _ in range(100):
        yield draw.choices(WRAPPERS, k=draw.randint(2, 4)), draw.choice((None, *PERFORMERS))


def test_wrappers_and_performer_are_called_as_pluggy_calls_them():
    seen = set()
    for wrappers, performer in chains():
        kinds, notes = [*wrappers, *([performer] if performer else [])], []
        named = {f"{kind.__name__}-{place}": kind(f"{place}", notes) for place, kind in enumerate(kinds)}
        manager = managed(named)
        by_pluggy = outcome(manager.hook.should_step, notes)
        assert outcome(manager.routes.should_step, notes) == by_pluggy, named
        seen.add(str(by_pluggy[0]))
    assert len(seen) > 20  # answers and errors of many kinds


def test_a_wrapper_that_does_not_yield_once_is_named():
    for kind, said in ((NeverYields, "did not yield"), (YieldsTwice, "has second yield")):
        call = managed({"mine": kind("mine", [])}).routes.should_step
        with pytest.raises(RuntimeError, match=rf"wrap_controller at 'should_step' .*test_routes.py:\d+ {said}"):
            call(trainer="trainer", optimizers=[])
