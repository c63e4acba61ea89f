"""The plugin manager: what it refuses and in which words, the order, the shortest ways, conflicts, blame."""

import gc
import logging
import types
from dataclasses import dataclass

import pytest

from hookline import CallbackInterface, Trainer, event, hookimpl, verb
from hookline.plugins import PluginManager, build
from hookline.testing import Memory, TinyModule, digest, tiny_trainer


def register(plugin, name="mine"):
    manager = PluginManager()
    manager.register(plugin, name)
    return manager


def plugin_with(**methods):
    return type("Mine", (CallbackInterface,), methods)()


# What is refused ----------------------------------------------------------------------


def test_a_class_instead_of_an_object():
    with pytest.raises(TypeError, match=r"plugin 'mine' is the class Mine; register an object: Mine\(…\)"):
        register(type("Mine", (CallbackInterface,), {}))


def test_a_dataclass_that_compares_by_value():
    @dataclass
    class Twin(CallbackInterface):
        strength: float = 1.0

    with pytest.raises(TypeError, match=r"Twin compares by value.*@dataclass\(eq=False\)"):
        register(Twin())


def test_the_same_object_twice():
    plugin, manager = plugin_with(), PluginManager()
    manager.register(plugin, "one")
    with pytest.raises(ValueError, match="plugin 'two' is the very object that is registered as 'one'; make another"):
        manager.register(plugin, "two")


def test_a_name_twice():
    manager = register(plugin_with())
    with pytest.raises(ValueError, match="a plugin named 'mine' is registered already; give this one another name"):
        manager.register(plugin_with(), "mine")


def test_star_arguments_of_a_marked_hook():
    @hookimpl
    def on_end_train_step(self, *outputs): ...

    expected = (
        r"plugin 'mine': on_end_train_step\(\) takes \*outputs, which on_end_train_step cannot give; ask for "
        r"train_step_collated_outputs by name, or leave the mark away"
    )
    with pytest.raises(TypeError, match=expected):
        register(plugin_with(on_end_train_step=on_end_train_step))


def test_keyword_only_arguments():
    @hookimpl
    def on_end_val_step(self, *, key="default"): ...

    with pytest.raises(TypeError, match="takes key by keyword only, and would never get it; remove the `\\*`"):
        register(plugin_with(on_end_val_step=on_end_val_step))


def test_double_star_arguments():
    @hookimpl
    def on_boundary(self, **everything): ...

    with pytest.raises(TypeError, match=r"takes \*\*everything.*name what you need of trainer, global_step"):
        register(plugin_with(on_boundary=on_boundary))


@pytest.mark.parametrize("default", [False, True])
def test_an_argument_that_the_hook_does_not_give(default):
    if default:

        @hookimpl
        def on_end_val_step(self, ky="default"): ...
    else:

        @hookimpl
        def on_end_val_step(self, ky): ...

    expected = (
        "asks for 'ky', did you mean 'key'\\?, which on_end_val_step cannot give; it gives trainer, outputs, batch"
    )
    with pytest.raises(TypeError, match=expected):
        register(plugin_with(on_end_val_step=on_end_val_step))


def test_a_marked_name_that_is_no_hook():
    @hookimpl
    def on_end_backwards(self): ...

    with pytest.raises(TypeError, match="there is no hook 'on_end_backwards', did you mean 'on_end_backward'"):
        register(plugin_with(on_end_backwards=on_end_backwards))


def test_an_unmarked_hook():
    def on_boundary(self, trainer): ...

    with pytest.raises(
        TypeError, match=r"on_boundary\(\) has the name of a hook and would not be called; mark it @hookimpl"
    ):
        register(plugin_with(on_boundary=on_boundary))


def test_an_unmarked_verb():
    def save(self): ...

    with pytest.raises(TypeError, match=r"save\(\) has the name of a hook and would not be called; mark it"):
        register(plugin_with(save=save))


def test_an_override_that_lost_the_mark_of_its_base():
    class Base(CallbackInterface):
        @hookimpl
        def on_boundary(self, trainer): ...

    class Derived(Base):
        def on_boundary(self, trainer): ...

    with pytest.raises(TypeError, match="mark it @hookimpl, or rename it"):
        register(Derived())


def test_an_event_that_does_not_exist():
    def on_end_epoch(self): ...

    with pytest.raises(TypeError, match="looks like an event, but there is none of this name, did you mean 'on_end_"):
        register(plugin_with(on_end_epoch=on_end_epoch))


def test_a_seed_event_that_cannot_be_called_by_position():
    def on_begin_train_epoch(self, step): ...

    expected = (
        r"on_begin_train_epoch\(\) cannot be called as on_begin_train_epoch\(self, global_step.*, epoch.*too many"
    )
    with pytest.raises(TypeError, match=expected):
        register(plugin_with(on_begin_train_epoch=on_begin_train_epoch))


def test_an_old_style_wrapper():
    @hookimpl(hookwrapper=True)
    def evaluate(self):
        yield

    with pytest.raises(TypeError, match=r"old-style wrapper; write @hookimpl\(wrapper=True\) and return \(yield\)"):
        register(plugin_with(evaluate=evaluate))


def test_a_wrapper_of_an_event():
    @hookimpl(wrapper=True)
    def on_boundary(self):
        return (yield)

    with pytest.raises(TypeError, match=r"on_boundary\(\) wraps an event; only verbs may be wrapped"):
        register(plugin_with(on_boundary=on_boundary))


def test_a_method_hidden_by_none_is_not_implemented():
    class Mine(CallbackInterface):
        def __init__(self):
            self.on_boundary = self.on_end_train = None

        @hookimpl
        def on_boundary(self): ...

        def on_end_train(self, gs): ...

    assert not any(register(Mine()).heard.values())


def test_a_wrapper_that_does_not_yield():
    @hookimpl(wrapper=True)
    def evaluate(self):
        return {}

    with pytest.raises(TypeError, match="is a wrapper without a yield"):
        register(plugin_with(evaluate=evaluate))


def test_an_observer_that_implements_a_verb():
    @hookimpl(wrapper=True)
    def evaluate(self):
        return (yield)

    with pytest.raises(TypeError, match=r"evaluate\(\) implements a verb, but the plugin says observer = True"):
        register(plugin_with(observer=True, evaluate=evaluate))


def test_a_refused_plugin_leaves_nothing_behind():
    @hookimpl
    def on_boundary(self, trainer): ...

    @hookimpl
    def on_log(self, metrix): ...

    manager = PluginManager()
    with pytest.raises(TypeError):
        manager.register(plugin_with(on_boundary=on_boundary, on_log=on_log), "mine")
    assert not any(manager.heard.values())


def test_a_module_may_have_methods_of_any_name_but_is_warned_of_unheard_events():
    class Mine(TinyModule):
        def save(self, path): ...

        def on_boundary(self, trainer): ...

        def update(self, trainer, window): ...

    with pytest.warns(UserWarning, match=r"\(\) has the name of a hook and is not marked @hookimpl") as warned:
        Trainer(Mine())
    assert sorted(str(warning.message).split("()")[0] for warning in warned) == [
        "plugin 'module': on_boundary",
        "plugin 'module': update",
    ]


# Building -----------------------------------------------------------------------------


def test_names_of_plugins_in_a_list():
    class WeightNoise(CallbackInterface): ...

    assert list(build([WeightNoise()])) == ["weight_noise"]


def test_two_of_one_name():
    class Noise(CallbackInterface): ...

    with pytest.raises(ValueError, match=r"two plugins are named 'noise'; name them yourself: plugins=\{\"noise\": …"):
        build([Noise(), Noise()])
    assert list(build({"noise": Noise(), "more": Noise()})) == ["noise", "more"]


def test_a_class_in_the_list():
    class Noise(CallbackInterface): ...

    with pytest.raises(TypeError, match=r"plugins=\[Noise\] is a class; give an object: Noise\(…\)"):
        build([Noise])
    with pytest.raises(TypeError, match=r"plugins\['n'\] is the class Noise"):
        build({"n": Noise})


def test_an_unknown_name():
    with pytest.raises(ValueError, match="no plugin named 'teleport' is installed.*`pip install hookline-teleport`"):
        build(["teleport"])


@dataclass(eq=False)
class First(CallbackInterface):
    """Required by others."""


@dataclass(eq=False)
class Second(CallbackInterface):
    """Requires the first by its dotted path."""

    requires = (f"{__name__}.First",)


def test_what_is_required_stands_just_before(request):
    built = build({"other": plugin_with(), "second": Second()})
    assert list(built) == ["other", f"{__name__}.First", "second"]


def test_a_requirement_that_is_turned_off():
    with pytest.raises(ValueError, match="plugin 'second' requires '.*First', which is turned off"):
        build({"second": Second(), f"{__name__}.First": None})


def test_a_circle_of_requirements():
    one, two = plugin_with(requires=("two",)), plugin_with(requires=("one",))
    with pytest.raises(ValueError, match="plugins require each other in a circle: one -> two -> one"):
        build({"one": one, "two": two})


def test_a_plugin_that_is_turned_off():
    assert build({"one": plugin_with(), "two": None}).keys() == {"one"}


def test_options_that_a_plugin_does_not_take():
    with pytest.raises(ValueError, match=r"plugins.one: .*unexpected keyword argument 'strenght'"):
        build({"one": {"_plugin_": f"{__name__}.First", "strenght": 1}})


# Order --------------------------------------------------------------------------------


def recording(log, name, **opts):
    @hookimpl(**opts)
    def on_boundary(self):
        log.append(name)

    return plugin_with(on_boundary=on_boundary)


def test_the_order_of_plugins_is_the_order_of_the_list_and_the_module_comes_last():
    heard = []

    class Module(TinyModule):
        @hookimpl
        def on_boundary(self):
            heard.append("module")

    plugins = {
        "a": recording(heard, "a"),
        "last": recording(heard, "last", trylast=True),
        "b": recording(heard, "b"),
        "first": recording(heard, "first", tryfirst=True),
    }
    tiny_trainer(plugins, Module(), max_steps=1).train()
    assert heard == ["first", "a", "b", "module", "last"]


def test_the_first_listed_wraps_the_others():
    heard = []

    def wrapping(name):
        @hookimpl(wrapper=True)
        def update(self):
            heard.append(f"{name} begins")
            result = yield
            heard.append(f"{name} ends")
            return result

        return plugin_with(update=update)

    tiny_trainer({"outer": wrapping("outer"), "inner": wrapping("inner")}, max_steps=1).train()
    assert heard == ["outer begins", "inner begins", "inner ends", "outer ends"]


def test_a_plugin_registered_in_the_middle_of_an_epoch_is_heard_at_the_next_call():
    heard = []

    class Late(CallbackInterface):
        @hookimpl
        def on_setup(self, trainer):
            heard.append("setup")

        def update_state(self, state):
            heard.append(state)

        @hookimpl
        def on_boundary(self, global_step):
            heard.append(global_step)

    class Brings(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, trainer, global_step):
            if global_step == 3:
                trainer.plugins.receive({"late": "its state"})
                trainer.plugins.register(Late(), "late")
            if global_step == 5:
                trainer.plugins.unregister(name="late")

    tiny_trainer([Brings()], epochs=1).train()
    assert heard == ["setup", "its state", 3, 4]


# Verbs --------------------------------------------------------------------------------


def performing(name, answer):
    @hookimpl(specname=name)
    def perform(self):
        return answer

    return plugin_with(perform=perform)


def test_two_that_perform_one_verb():
    plugins = {"one": performing("get_window_size", 2), "two": performing("get_window_size", 3)}
    with pytest.raises(ValueError, match="'one' and 'two' both perform 'get_window_size'.*plugins.two: null"):
        tiny_trainer(plugins)


def test_a_plugin_that_performs_what_the_module_performs():
    class Own(TinyModule):
        @hookimpl(specname="get_window_size")
        def how_many(self):
            return 2

    said = r"^'one' and the module \(Own.how_many\) both perform 'get_window_size', .* \(`plugins.one: null`\)"
    with pytest.raises(ValueError, match=said):
        tiny_trainer({"one": performing("get_window_size", 2)}, Own())


def test_a_performer_that_forgot_its_return_does_not_fall_through_to_the_core():
    with pytest.raises(TypeError, match="the verb 'update' got no answer from forgetful: an implementation forgot"):
        tiny_trainer({"forgetful": performing("update", None)}).train()


def test_a_wrapper_that_forgot_its_return_is_named_with_its_chain():
    @hookimpl(wrapper=True)
    def take_window(self):
        yield

    plugins = {"leaky": plugin_with(take_window=take_window)}
    with pytest.raises(TypeError, match="'take_window' got no answer from leaky.*`return \\(yield\\)`"):
        tiny_trainer(plugins).train()


def test_a_performer_may_call_the_cores_way():
    from hookline import hookspecs

    seen = []

    @hookimpl
    def run_window(self, trainer, window):
        seen.append(len(window))
        return hookspecs.run_window(trainer, window)

    tiny_trainer({"watch": plugin_with(run_window=run_window)}, epochs=1).train()
    assert seen == [1] * 7


# Contracts among strangers ------------------------------------------------------------


@event
def on_weather(trainer, weather, wind="none"): ...


@verb
def forecast(trainer, day):
    return "sun" if day else "rain"


weather_contract = types.ModuleType("weather_contract")
weather_contract.on_weather, weather_contract.forecast = on_weather, forecast


def test_a_plugin_brings_hooks_of_its_own():
    heard = []

    class Station(CallbackInterface):
        hookspecs = weather_contract

        @hookimpl
        def on_boundary(self, trainer):
            trainer.hook.on_weather(trainer=trainer, weather=trainer.hook.forecast(trainer=trainer, day=1))

    class Hears(CallbackInterface):
        @hookimpl
        def on_weather(self, weather, wind):
            assert wind == "none"
            heard.append(weather)

    tiny_trainer([Station(), Hears()], max_steps=1).train()
    assert heard == ["sun"]

    class Gloomy(CallbackInterface):
        @hookimpl(wrapper=True)
        def forecast(self):
            return f"not {(yield)}"

    tiny_trainer([Station(), Hears(), Gloomy()], max_steps=1).train()
    assert heard == ["sun", "not sun"]


# Observers ----------------------------------------------------------------------------


def test_a_hook_of_an_observer_that_fails_is_switched_off_and_training_goes_on(caplog):
    calls = []

    class Frail(CallbackInterface):
        observer = True

        @hookimpl
        def on_end_train_step(self):
            calls.append("step")
            raise OSError("no network")

        @hookimpl
        def on_end_run(self, status):
            calls.append(status)

    trainer = tiny_trainer([Frail()])
    with caplog.at_level(logging.WARNING, logger="hookline"):
        trainer.train()
    assert calls == ["step"] * 3 + ["finished"]
    assert [record.getMessage() for record in caplog.records] == [
        "plugin 'frail' failed in on_end_train_step, and the run goes on: OSError: no network",
        "plugin 'frail' is switched off in on_end_train_step after 3 failures in a row: OSError: no network",
        "plugin 'frail' lost 14 call(s) of on_end_train_step; it is switched off there since OSError: no network",
    ]
    assert trainer.plugins.cost["frail"] > 0


def test_a_hook_that_always_fails_between_others_that_do_not_is_said_and_costs_the_others_nothing(caplog):
    calls = []

    class Frail(CallbackInterface):
        observer = True

        @hookimpl
        def on_log(self):
            calls.append("log")
            raise OSError("no network")

        @hookimpl
        def on_end_train_step(self):
            calls.append("step")

        @hookimpl
        def on_boundary(self, global_step):
            calls.append("boundary")
            if global_step % 4 in (1, 2):  # twice in a row, not three times
                raise ValueError("now and then")

    trainer = tiny_trainer([Frail()], log_every="1 steps")
    for _ in range(2):  # the second has nothing left to train
        trainer.train()
    assert (calls.count("step"), calls.count("boundary"), calls.count("log")) == (14, 14, 3)
    lost = [record.getMessage() for record in caplog.records if "lost" in record.getMessage()]
    assert lost == [
        "plugin 'frail' lost 18 call(s) of on_log; it is switched off there since OSError: no network",
        "plugin 'frail' lost 8 call(s) of on_boundary",
    ]
    firsts = [record for record in caplog.records if " failed in " in record.getMessage()]
    assert [record.getMessage().partition(",")[0] for record in firsts] == [
        "plugin 'frail' failed in on_log",
        "plugin 'frail' failed in on_boundary",
    ]
    assert all(record.exc_info for record in firsts)


def test_an_observer_that_fails_at_the_beginning_or_the_end_ends_no_run_and_is_reported(caplog):
    class Frail(CallbackInterface):
        observer = True

        @hookimpl
        def on_begin_run(self):
            raise OSError("read-only")

        @hookimpl
        def on_end_run(self):
            raise OSError("still read-only")

    trainer = tiny_trainer([Frail()], max_steps=1)
    with caplog.at_level(logging.WARNING, logger="hookline"):
        trainer.train()
    assert trainer.status == "finished"
    assert [record.getMessage() for record in caplog.records if record.name == "hookline.plugins"] == [
        "plugin 'frail' failed in on_begin_run, and the run goes on: OSError: read-only",
        "plugin 'frail' failed in on_end_run, and the run goes on: OSError: still read-only",
        "plugin 'frail' lost 1 call(s) of on_begin_run",
        "plugin 'frail' lost 1 call(s) of on_end_run",
    ]


def test_a_marked_method_may_bear_any_name():
    heard = []

    class Mine(CallbackInterface):
        @hookimpl(specname="on_end_train_step")
        def _count(self, global_step):
            heard.append(global_step)

    tiny_trainer([Mine()], max_steps=2).train()
    assert heard == [1, 2]


def test_others_are_told_before_and_despite_an_observer_that_raises():
    heard = []

    class Frail(CallbackInterface):
        observer = True

        @hookimpl
        def on_boundary(self):
            heard.append("frail")
            raise OSError

    tiny_trainer({"frail": Frail(), "sound": recording(heard, "sound")}, max_steps=1).train()
    assert heard == ["sound", "frail"]


# Blame and plan -----------------------------------------------------------------------


def test_an_exception_names_hook_plugin_and_where_it_is_from():
    class Boom(CallbackInterface):
        def on_end_train_step(self, gs):
            raise ZeroDivisionError("x")

    with pytest.raises(ZeroDivisionError) as caught:
        tiny_trainer([Boom()]).train()
    # The unmarked override is called by its bridge, which is what pluggy called.
    assert any("raised in on_end_train_step by plugin 'boom'" in note for note in caught.value.__notes__)


def test_blame_finds_the_innermost_and_sees_through_wrappers():
    class Boom(CallbackInterface):
        @hookimpl
        def run_backward(self, loss):
            raise ZeroDivisionError("x")

    class Around(CallbackInterface):
        @hookimpl(wrapper=True)
        def update(self):
            return (yield)

    with pytest.raises(ZeroDivisionError) as caught:
        tiny_trainer([Around(), Boom()]).train()
    (note,) = caught.value.__notes__
    assert note.startswith(f"raised in run_backward by plugin 'boom' ({__name__}")


def test_the_end_of_the_run_reaches_every_plugin_and_its_errors_become_notes():
    heard = []

    class Boom(CallbackInterface):
        @hookimpl
        def on_boundary(self):
            raise ZeroDivisionError("first")

        @hookimpl
        def on_end_run(self):
            raise OSError("second")

    class Sound(CallbackInterface):
        @hookimpl
        def on_exception(self, exception):
            heard.append(type(exception))

        @hookimpl
        def on_end_run(self, status, reason):
            heard.append((status, reason))

    with pytest.raises(ZeroDivisionError) as caught:
        tiny_trainer([Boom(), Sound()]).train()
    assert heard == [ZeroDivisionError, ("failed", "ZeroDivisionError: first")]
    assert "and then OSError: second" in caught.value.__notes__[-1]
    assert "on_end_run by plugin 'boom'" in caught.value.__notes__[-1]


def test_an_error_in_teardown_alone_is_raised():
    class Boom(CallbackInterface):
        @hookimpl
        def on_end_run(self):
            raise OSError("teardown")

    with pytest.raises(OSError, match="teardown"):
        tiny_trainer([Boom()], max_steps=1).train()


def test_the_plan_says_who_wraps_and_who_does():
    @hookimpl(wrapper=True)
    def call_model(self):
        return (yield)

    plugins = {"half": plugin_with(call_model=call_model), "two": performing("get_window_size", 2)}
    plan = {row["hook"]: row for row in tiny_trainer(plugins).plugins.plan()}
    assert plan["call_model"] == {"hook": "call_model", "kind": "verb", "wrapped_by": ["half"], "done_by": ["core"]}
    assert plan["get_window_size"]["done_by"] == ["two"]
    assert plan["on_boundary"] == {"hook": "on_boundary", "kind": "event", "wrapped_by": [], "done_by": []}
    assert list(plan).index("get_window_size") < list(plan).index("call_model") < list(plan).index("save")


def test_a_manager_and_its_plugins_can_be_collected():
    import weakref

    trainer = tiny_trainer(max_steps=1)
    trainer.train()
    gone = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert gone() is None


# States ---------------------------------------------------------------------------------


def test_an_observer_that_cannot_tell_its_state_costs_no_run(caplog):
    class Forgets(CallbackInterface):
        observer = True
        asked = 0

        def get_state(self):
            self.asked += 1
            raise OSError("the file is not there yet")

    class Matters(Forgets):
        observer = False

    memory, forgets = Memory(every="1 steps"), Forgets()
    tiny_trainer([memory, forgets], epochs=1).train()
    assert forgets.asked == 3
    assert memory.state["plugins"] == {}
    assert "plugin 'forgets' is switched off in get_state after 3 failures in a row: OSError" in caplog.text
    assert "plugin 'forgets' lost 7 call(s) of get_state" in caplog.text
    with pytest.raises(OSError, match="the file is not there yet"):
        tiny_trainer([Memory(), Matters()], epochs=1).train()


# Tools that measure -------------------------------------------------------------------


def test_calls_can_be_wrapped_those_of_the_core_and_of_plugins_that_join_later():
    called, asked = [], []

    def wrap(hook, implementation):
        asked.append((hook, implementation.plugin_name))

        def call(*arguments, **named):
            called.append((hook, implementation.plugin_name))
            return implementation_function(*arguments, **named)

        implementation_function = implementation.function
        return call

    def run_window(self):
        return (yield)

    def on_begin_train(self, trainer):
        trainer.plugins.register(plugin_with(on_end_train_step=hookimpl(lambda self: None)), "later")

    mine = plugin_with(run_window=hookimpl(wrapper=True)(run_window), on_begin_train=hookimpl(on_begin_train))
    plain = tiny_trainer(max_steps=2)
    plain.train()
    trainer = tiny_trainer({"mine": mine}, max_steps=2)
    trainer.plugins.wrap_calls(wrap)
    trainer.train()
    assert len(asked) == len(set(asked))
    for call in (("run_window", "mine"), ("run_window", "core"), ("update", "core"), ("on_end_train_step", "later")):
        assert called.count(call) == 2
    assert called.count(("on_begin_train", "mine")) == 1
    assert digest(plain.module.state_dict()) == digest(trainer.module.state_dict())
