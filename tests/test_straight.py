"""Straight verbs: the same events, weights and errors as by the specifications themselves, in fewer calls."""

import inspect
import random
import re
import traceback

import pytest
import torch

from hookline import CallbackInterface, hookimpl, hookspecs
from hookline.plugins.straight import straight
from hookline.testing import ByClosure, TinyModule, digest, tiny_trainer

STEP = (
    "take_window", "count_samples", "get_weight", "update", "run_window", "forward_backward", "prepare_batch",
    "call_model", "scale_loss", "run_backward", "on_end_backward", "step_optimizers", "on_begin_optimizer_step",
    "should_step", "step_optimizer", "on_end_optimizer_step", "step_schedulers", "on_end_train_step", "on_boundary",
)  # fmt: skip


def shown(value):
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def recorder(hooks, told):
    """Return a plugin that tells each call of these hooks: the arguments and, of verbs, the answer."""

    def method(hook):
        names = [name for name in inspect.signature(getattr(hookspecs, hook)).parameters if name != "trainer"]
        taken = ", ".join(["self", "trainer", *names])
        told_of = f"told(({hook!r}, trainer.global_step, *map(shown, ({''.join(f'{name}, ' for name in names)}))))"
        if hook.startswith("on_"):
            body = f"def {hook}({taken}):\n    {told_of}"
        else:
            body = (
                f"def {hook}({taken}):\n    {told_of}\n    answer = yield\n    told(shown(answer))\n    return answer"
            )
        namespace = {"told": told, "shown": shown}
        exec(body, namespace)
        return hookimpl(wrapper=not hook.startswith("on_"))(namespace[hook])

    return type("Recorder", (CallbackInterface,), {hook: method(hook) for hook in hooks})()


class Skips(CallbackInterface):
    @hookimpl(wrapper=True)
    def should_step(self, trainer):
        return (yield) and trainer.global_step != 1


class Weighs(CallbackInterface):
    @hookimpl
    def get_weight(self, batch):
        return float(batch[0].shape[0]) if isinstance(batch, list | tuple) else 2.0


class Plain(CallbackInterface):
    """Wraps each call in itself, as a tool that measures does: the specifications are then called one by one."""

    @hookimpl
    def on_setup(self, trainer):
        trainer.plugins.wrap_calls(lambda hook, implementation: implementation.function)


class Closure(ByClosure, TinyModule):
    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        return [torch.optim.LBFGS(self.parameters(), 0.01, max_iter=2)], []


def run(module, hooks, extra, plain, window):
    told = []
    plugins = {"recorder": recorder(hooks, told.append), **extra}
    if plain:
        plugins["plain"] = Plain()
    trainer = tiny_trainer(plugins, module=module(), max_steps=4)
    trainer.window.resize(window)
    trainer.train()
    return told, digest(trainer.module.state_dict()), trainer.counters.skipped_steps


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("module", [TinyModule, Closure])
def test_any_plugins_are_told_the_same_as_by_the_specifications(module, seed):
    draw = random.Random(seed)
    hooks = draw.sample(STEP, draw.choice([0, 1, 3, 8]))
    extra = {name: kind() for name, kind in {"skips": Skips, "weighs": Weighs}.items() if draw.random() < 0.5}
    window = draw.choice([1, 2])
    by_specifications = run(module, hooks, extra, True, window)
    assert run(module, hooks, extra, False, window) == by_specifications
    assert bool(by_specifications[0]) == bool(hooks)


def test_an_error_shows_the_lines_of_the_specifications():
    class Fails(TinyModule):
        def train_step(self, global_step, batch, device):
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError) as caught:
        tiny_trainer(module=Fails()).train()
    frames = [one for one in traceback.extract_tb(caught.value.__traceback__) if one.filename == hookspecs.__file__]
    assert "trainer.built.model(" in frames[-1].line
    assert frames[-1].lineno in range(*lines_of("call_model"))


def lines_of(name):
    lines, first = inspect.getsourcelines(getattr(hookspecs, name))
    return first, first + len(lines)


def test_what_is_plugged_in_stays_a_call_and_what_is_not_leaves_none():
    everything = frozenset(STEP)
    assert not set(STEP) & set(straight(hookspecs, "update", everything).__code__.co_names)
    names = straight(hookspecs, "update", everything - {"scale_loss"}).__code__.co_names
    assert "scale_loss" in names
    assert "call_model" not in names


def test_a_plugin_that_joins_in_mid_run_is_called_from_then_on():
    heard = []

    class Late(CallbackInterface):
        @hookimpl
        def on_end_backward(self, global_step):
            heard.append(global_step)

        @hookimpl(wrapper=True)
        def take_window(self):
            window = yield
            heard.append(len(window))
            return window

    class Joins(CallbackInterface):
        @hookimpl
        def on_boundary(self, trainer, global_step):
            if global_step == 2:
                trainer.plugins.register(Late(), "late")
            if global_step == 4:
                trainer.plugins.unregister(name="late")

    tiny_trainer([Joins()], max_steps=6).train()
    assert heard == [2, 1, 3, 1]  # joins and leaves at boundaries, which come when the next window is taken
