"""How a plugin behaves in a run, beside others and in all stages."""

from __future__ import annotations

import itertools
import random
from typing import Any

from hookline.installed import name_of
from hookline.plugins import is_observer
from hookline.state import copy_state
from hookline.testing.caught import warnings_of
from hookline.testing.checks.probes import Gate, Halver
from hookline.testing.checks.subject import Subject, check
from hookline.testing.digest import digest
from hookline.trainer import Trainer


def whole(trainer: Trainer) -> dict[str, str]:
    """Return a hash over each part of the state of a run, but for what plugins keep and for the clock."""
    state = copy_state(trainer.hook.get_run_state(trainer=trainer))
    state["trainer"]["counters"].pop("seconds")
    state["trainer"].pop("best", None)  # is kept where somebody may ask for it
    parts = ("module", "optimizers", "schedulers", "trainer", "rng")
    return {part: digest(state[part]) for part in parts} | {"options": digest(vars(trainer.options))}


@check("an observer changes no bit, no random state, no counter and no option, and its hooks do not fail")
def check_observer(subject: Subject) -> None:
    """Train with it and without it."""
    if not is_observer(subject.plugin_class):
        return
    random.seed(5)
    alone = whole(subject.train())
    random.seed(5)
    with warnings_of("plugins") as said:
        watched = whole(subject.train(subject.make()))
    assert not said, f"it fails: {said[0]}"
    changed = [part for part in alone if alone[part] != watched[part]]
    assert not changed, f"it says that it only watches, and changes {', '.join(changed)} of what is trained"


def predict(trainer: Trainer) -> None:
    """Predict, and take what is predicted."""
    trainer.predict(collect=True)


@check("validates, tests, predicts and exports with and without a training before, and works in a second run")
def check_stages(subject: Subject) -> None:
    """Run each stage alone, then all after a training, then one object in two runs."""
    for stage in (Trainer.validate, Trainer.test, predict):
        trainer = subject.trainer(subject.make())
        stage(trainer)
        trainer.export_model()
    plugin = subject.make()
    trainer = subject.train(plugin)
    weights = digest(trainer.module.state_dict())
    first = trainer.validate()
    trainer.test()
    predict(trainer)
    trainer.export_model()
    assert digest(trainer.module.state_dict()) == weights, "evaluations change the weights"
    second = trainer.validate()
    differing = [name for name in first if digest(first[name]) != digest(second.get(name))]
    assert not differing, f"two validations of one model give different {', '.join(differing)}"
    subject.train(plugin)  # in a notebook, one object is used again


@check("trains the same bits wherever it stands in the list")
def check_order(subject: Subject) -> None:
    """Train with others in every order."""
    beside = [*(Halver, Gate), *subject.beside]
    digests: dict[str, list[str]] = {}
    for order in itertools.permutations(range(len(beside) + 1)):
        made: list[Any] = [subject.make(), *(other() for other in beside)]
        trainer = subject.train(*(made[index] for index in order), epochs=1)
        names = ", ".join(name_of(type(made[index])) for index in order)
        digests.setdefault(digest(trainer.module.state_dict()), []).append(names)
    firsts = " and as ".join(f"[{names[0]}]" for names in digests.values())
    assert len(digests) == 1, f"the bits depend on the order of the list: listed as {firsts} they differ"


@check("an update that another plugin refuses stays refused, and everyone is told so")
def check_gates(subject: Subject) -> None:
    """Refuse every third update, from outside this plugin and from inside."""
    for outside in (True, False):
        gate, plugin = Gate(), subject.make()
        subject.train(*([gate, plugin] if outside else [plugin, gate]))
        took = [step for step in gate.refused if gate.said.get(step)]
        assert not took, f"the update of step {took[0]} was refused, and was made: return what `yield` gave, and refuse"
        assert not gate.moved, f"the update of step {gate.moved[0]} was refused, and the weights have changed"
        asked = {step for step in gate.said if step % 3 == 1} - set(gate.refused)
        assert not asked, f"nobody asked the others about the update of step {min(asked)}"
