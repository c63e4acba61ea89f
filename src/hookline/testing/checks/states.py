"""What a plugin keeps, and what a resumed run gets back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hookline.interfaces import CallbackInterface
from hookline.marks import hookimpl
from hookline.state import copy_state
from hookline.testing.checks.probes import Windows
from hookline.testing.checks.subject import Subject, check
from hookline.testing.digest import digest
from hookline.testing.memory import Memory

if TYPE_CHECKING:
    from hookline.trainer import Trainer


PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype)


@dataclass(eq=False)
class Look(CallbackInterface):
    """Keep the state that a plugin has when training begins."""

    plugin: Any = None

    @hookimpl(trylast=True)
    def on_begin_train(self, trainer: Trainer) -> None:
        self.found = copy_state(self.plugin.get_state())


@check("its state is plain, comes back as it was, and is left alone by the plugin that gets it")
def check_state(subject: Subject) -> None:
    """Ask for the state before, during and after a training, and give it back."""
    plugin = subject.make()
    subject.trainer(plugin)
    _is_plain_dict(plugin.get_state(), "get_state() before any training")
    memory = Memory(every="3 steps")
    subject.train(memory, plugin, max_steps=6)
    state = plugin.get_state()
    _is_plain_dict(state, "get_state()")
    if not state:
        return
    takes = type(plugin).update_state is not CallbackInterface.update_state
    assert takes, "get_state() returns something, and there is no update_state() to take it back"
    kept = memory.states[3]
    own, again = _state_in(kept, subject.name), subject.make()
    given, look = copy_state(own), Look(again)
    before = digest(own)
    subject.train(_Gives(kept, subject.name, given), again, look, max_steps=6)
    assert digest(look.found) == before, f"a resumed run begins with another state: {_differing(own, look.found)}"
    assert digest(given) == before, "update_state() keeps what it was given, and later steps change it: copy it"


class _Gives(Memory):
    """Resume with one section as it is, not a copy."""

    def __init__(self, state: Any, name: str, section: Any) -> None:
        super().__init__(state)
        self.name, self.section = name, section

    @hookimpl
    def restore(self, trainer: Trainer, stage: Any) -> bool:
        state = copy_state(self.state)
        for part in ("plugins", "own_plugins"):
            if self.name in state[part]:
                state[part] = {**state[part], self.name: self.section}
        return bool(trainer.hook.set_run_state(trainer=trainer, state=state, stage=stage))


def _state_in(kept: Any, name: str) -> Any:
    return {**kept["plugins"], **kept["own_plugins"]}.get(name, {})


def _is_plain_dict(state: Any, path: str) -> None:
    assert isinstance(state, dict), f"{path} must return a dict, not {type(state).__name__}"
    _is_plain(state, path)


def _is_plain(value: Any, path: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            assert isinstance(key, (str, int)), f"{path} has the key {key!r}, which is neither text nor a whole number"
            _is_plain(inner, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _is_plain(inner, f"{path}[{index}]")
    else:
        fine = isinstance(value, torch.Tensor) or type(value) in PLAIN
        assert fine, f"{path} is a {type(value).__name__}; a checkpoint holds tensors and plain data only"


def _differing(kept: Any, found: Any) -> str:
    names = {*kept, *found}
    return ", ".join(sorted(str(name) for name in names if digest(kept.get(name)) != digest(found.get(name))))


@check("a run that is cut at any step, or within one, ends with the same weights and the same state", quick=False)
def check_resume(subject: Subject) -> None:
    """Train whole, and from each step; then with windows of two micro-batches, cut within the third."""
    memory, plugin = Memory(every="1 step"), subject.make()
    whole = digest(subject.train(memory, plugin).module.state_dict())
    for step, state in memory.states.items():
        _goes_on(subject, state, (whole, _timeless(plugin)), f"step {step}")
    whole_plugin = subject.make()
    whole = digest(subject.train(Windows(), whole_plugin, train_batch_size=16).module.state_dict())
    cut = Memory()
    subject.train(cut, Windows(stop_at=5), subject.make(), train_batch_size=16)
    end = whole, _timeless(whole_plugin)
    _goes_on(subject, cut.state, end, "the middle of a window", Windows(), train_batch_size=16)


def _goes_on(subject: Subject, state: Any, end: tuple[str, str], where: str, *beside: Any, **options: Any) -> None:
    again = subject.make()
    resumed = subject.train(Memory(state), *beside, again, **options)
    assert digest(resumed.module.state_dict()) == end[0], f"resumed at {where}, training ends with other weights"
    assert _timeless(again) == end[1], f"resumed at {where}, the plugin ends with another state"


def _timeless(plugin: Any) -> str:
    """Return a hash over the state of a plugin, without what is called seconds: no two runs take as long."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(inner) for key, inner in value.items() if key != "seconds"}
        return value

    return digest(without(plugin.get_state()))
