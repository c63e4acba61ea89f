"""What an ordinary step costs, counted function by function, and the numbers that are written down.

    python -m tests.budgets [NAME …]    # counts anew; writes tests/budgets.json and the lines in READMEs

An ordinary step is what most steps are: what comes at a cadence, or when a clock says so, is no part of it.
"""

import collections
import functools
import gc
import json
import re
import sys
import tempfile
from pathlib import Path

import torch
import torch._dynamo  # once imported, which any test may do, it is called in each step of an optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from hookline import CallbackInterface, hookimpl
from hookline.installed import installed, load
from hookline.loop.training import Training
from hookline.testing import tiny_trainer
from hookline.testing.checks.costs import Steady

ROOT = Path(__file__).parent.parent
WRITTEN = Path(__file__).with_suffix(".json")
LOOP = "the loop"
"""The name of what the loop itself costs, beyond the one by hand."""
torch.compile(lambda: None, backend="eager")()  # from then on torch wraps parts of optimizers, whoever compiles first
VERSIONS = {"python": f"{sys.version_info.major}.{sys.version_info.minor}", "torch": torch.__version__.split("+")[0]}
COMMAND = "python -m tests.budgets"
BUDGET = re.compile(r"(?<=Budget: )\d+(?= Python calls a step)")
WARM, COUNTED = 8, 16
STEPS = WARM + COUNTED + 1


class Waits(TorchDispatchMode):
    """Counts in each step the values that are waited for, and the collectives."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.steps[-1]["syncs"] += func.name() == "aten::_local_scalar_dense"
        self.steps[-1]["collectives"] += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


class Asked(CallbackInterface):
    """Counts in each step the collectives that are asked for: one process has no others."""

    def __init__(self, steps):
        self.steps = steps

    @hookimpl(wrapper=True)
    def all_reduce(self):
        self.steps[-1]["collectives"] += 1
        return (yield)

    @hookimpl(wrapper=True)
    def all_gather(self):
        self.steps[-1]["collectives"] += 1
        return (yield)


def in_steps(run, steps, begin, functions):
    """Do a run, with a new count at each call of `begin`; count the calls of functions if they are asked for."""

    def profile(frame, happening, argument):
        if happening == "call":
            if frame.f_code is begin.__code__:
                steps.append(collections.Counter())
            if functions:
                steps[-1][f"{frame.f_globals.get('__name__')}:{frame.f_code.co_qualname}"] += 1

    gc.disable()  # else finalizers of earlier objects would count
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()


def ordinary(steps):
    """Return the count that most steps have in common."""
    counts = collections.Counter(json.dumps(step, sort_keys=True) for step in steps[WARM + 1 : WARM + 1 + COUNTED])
    (common, times), *_ = counts.most_common(1)
    different = differences(*map(json.loads, [*counts, common][:2]))
    assert times > COUNTED // 2, f"steps cost differently, so none is ordinary:{different}"
    return collections.Counter(json.loads(common))


def functions_per_step(run, begin=Training.take_step):
    """Return how often an ordinary step calls each Python function.

    Args:
        run: makes at least `STEPS` steps.
        begin: the function with which each step begins.
    """
    steps = [collections.Counter()]
    in_steps(run, steps, begin, functions=True)
    return ordinary(steps)


def waits_per_step(run, begin=Training.take_step):
    """Return the syncs and collectives of an ordinary step; `run` takes what shall train beside its plugins."""
    steps = [collections.Counter()]
    with Waits(steps):
        in_steps(lambda: run(Asked(steps)), steps, begin, functions=False)
    return ordinary(steps)


def beyond(functions, others):
    """Return how much more often functions are called than in another count."""
    names = sorted({*functions, *others})
    return {name: functions[name] - others[name] for name in names if functions[name] != others[name]}


def cost(run, other, begin=Training.take_step):
    """Return what a step of one run costs beyond a step of another, as it is written down."""
    run()  # what it imports may cost both a call
    torch._dynamo.reset()  # what others have compiled is asked first
    functions = beyond(*(functions_per_step(each, begin) for each in (run, other)))
    waits = beyond(*(waits_per_step(each, begin) for each in (run, other)))
    totals = {"calls": sum(functions.values()), "syncs": 0, "collectives": 0}
    return {**totals, **waits, "functions": functions}


def of_plugin(name, options):
    """Return what a plugin costs beyond the step without it."""
    plugin_class = load(name)

    def run(*beside, plugged=True):
        with tempfile.TemporaryDirectory(prefix="hookline-budget-") as folder:
            plugins = {name: plugin_class(**options)} if plugged else {}
            plugins |= {f"beside_{number}": plugin for number, plugin in enumerate(beside)}
            quiet = {"evaluate_every": None, "eval_when_finish": False, "log_every": "9999 steps"}
            tiny_trainer(plugins, Steady(8 * 60), max_steps=STEPS, runs_folder=folder, **quiet).train()

    return cost(run, functools.partial(run, plugged=False))


def differences(was, now):
    """Return, for a message, what is called more or less often than it was."""
    names = sorted({*was, *now}, key=lambda name: (-abs(now.get(name, 0) - was.get(name, 0)), name))
    rows = [(now.get(name, 0) - was.get(name, 0), name, was.get(name, 0), now.get(name, 0)) for name in names]
    return "".join(f"\n  {more:+} {name} ({before} before, {after} now)" for more, name, before, after in rows if more)


def compare(name, now):
    """Hold a cost against what is written down.

    Raises:
        AssertionError: it is another one; the message says which functions are called more or less often.
    """
    was = json.loads(WRITTEN.read_text())["costs"].get(name, {"functions": {}})
    totals = [{key: value for key, value in one.items() if key != "functions"} for one in (was, now)]
    assert was == now, (
        f"a step of {name} costs {totals[1]}, and {totals[0]} is written down: "
        f"{differences(was['functions'], now['functions'])}\nif that is meant: `{COMMAND} {name!r}`"
    )


def readme_of(name):
    """Return the README of an installed plugin."""
    folder = installed()[name].dist.name.removeprefix("hookline-").replace("-", "_")
    return ROOT / "plugins" / folder / "README.md"


def write(costs):
    """Write costs down, in the file and in READMEs."""
    kept = json.loads(WRITTEN.read_text())["costs"] if WRITTEN.exists() else {}
    text = {"versions": VERSIONS, "costs": dict(sorted({**kept, **costs}.items()))}
    WRITTEN.write_text(json.dumps(text, indent=1) + "\n")
    for name in costs.keys() - {LOOP}:
        readme = readme_of(name)
        readme.write_text(BUDGET.sub(str(costs[name]["calls"]), readme.read_text()))


def main(names):
    """Count, compare and write."""
    from tests.test_budgets import OPTIONS, of_the_loop

    costs = {}
    for name in names or [LOOP, *sorted(installed())]:
        costs[name] = of_the_loop() if name == LOOP else of_plugin(name, OPTIONS.get(name, {}))
        print(name, *(f"{count} {key}" for key, count in costs[name].items() if key != "functions"), sep="  ")
    write(costs)


if __name__ == "__main__":
    from tests import budgets  # whose functions have this name where the tests count them too

    budgets.main(sys.argv[1:])
