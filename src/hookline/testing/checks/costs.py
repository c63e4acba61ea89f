"""What a plugin costs on an ordinary step."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from hookline.testing.budgets import Budget, calls_per_step
from hookline.testing.checks.probes import Collectives
from hookline.testing.checks.subject import Subject, check
from hookline.testing.tiny import TinyModule

BUDGET = re.compile(r"Budget: (\d+) Python calls a step")
FEW, MANY = 40, 140


class Steady(TinyModule):
    """Lists nothing that it has seen: a pass that does not count goes over what a module has."""

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        """Return the loss and the predictions."""
        self.seen.clear()
        return super().train_step(global_step, batch, device)


@check("a step waits for nothing, communicates nothing, and makes no more calls than the README says", quick=False)
def check_cost(subject: Subject) -> None:
    """Count calls, waits for the device and collectives of an ordinary step, with the plugin and without."""
    collectives = []
    for steps in (FEW, MANY):
        counter = Collectives()
        _steps(subject, lambda counter=counter: [counter, subject.make()])(steps)  # type: ignore[misc]
        collectives.append(counter.count)
    more = (collectives[1] - collectives[0]) / (MANY - FEW)
    assert more <= 0.05, f"it communicates {more:g} times a step: do so at boundaries that are due"
    without, ours = _measure(subject, list), _measure(subject, lambda: [subject.make()])
    waits = ours.syncs - without.syncs
    assert waits <= 0.05, f"it waits for the device {waits:g} times a step (.item(), float(tensor), if tensor)"
    said = BUDGET.search(subject.readme or "")
    if said is None:
        return
    for _ in range(2):  # what was imported since may cost all steps a call
        if ours.calls - without.calls > int(said[1]) + 0.5:
            without, ours = _measure(subject, list), _measure(subject, lambda: [subject.make()])
    calls = ours.calls - without.calls
    assert calls <= int(said[1]) + 0.5, f"it makes {calls:g} Python calls a step; its README says {said[1]}"


def _measure(subject: Subject, plugins: Callable[[], list[Any]]) -> Budget:
    return calls_per_step(_steps(subject, plugins), FEW, MANY)


def _steps(subject: Subject, plugins: Callable[[], list[Any]]) -> Callable[[int], None]:
    """Return a function that trains for a number of steps, on the same data whatever the number."""

    def run(steps: int) -> None:
        options = {"max_steps": steps, "evaluate_every": None, "eval_when_finish": False, "log_every": "9999 steps"}
        subject.train(*plugins(), module=Steady(samples=8 * (MANY + 10)), **options)

    return run
