"""How the steps of a module are called: with a batch alone, or with how far training is, too."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

Parameters = list[inspect.Parameter]
STATUS = "status_dict"


def step_of(module: Any, name: str) -> tuple[str, Callable[[Any], Any]] | None:
    """Return the name and the call of a step of the module, or of `step`; None where it has neither.

    Raises:
        TypeError: it wants something else than a batch and `status_dict`.
    """
    name = name if hasattr(module, name) else "step"
    if not hasattr(module, name):
        return None
    step = getattr(module, name)
    parameters = parameters_of(module, name)
    asked = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    places = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_status = any(p.name == STATUS for p in parameters)
    if places[:1] != [STATUS] and not {*asked[1:]} - {STATUS}:
        if not takes_status:
            return name, step
        if places[1:2] == [STATUS]:
            return name, lambda batch: step(batch, module.status_dict)
        return name, lambda batch: step(batch, status_dict=module.status_dict)
    if len(asked) == 2 and not takes_status and "key" not in asked:
        return name, lambda batch: step(batch, module.status_dict)
    raise TypeError(
        f"{type(module).__name__}.{name}({', '.join(asked)}) must take batch, or batch and status_dict; "
        "validations by key are of a later ACCMT, whose Trainer also clips at 1.0 and resumes by itself unless told "
        "otherwise: give what you mean of these, and write (self, batch)"
    )


def parameters_of(module: Any, name: str) -> Parameters:
    """Return the parameters of a method; where it takes any, those of what it wraps or overrides, if that says more."""
    for parameters in (own := [*signatures(module, name)]):
        if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            return parameters
    return own[0]


def signatures(module: Any, name: str) -> Iterator[Parameters]:
    """Yield the parameters of a method, then of all that are called by this name below it."""
    yield [*inspect.signature(getattr(module, name)).parameters.values()]
    for kind in type(module).__mro__:
        for function in closed_over(vars(kind).get(name)):
            if function.__name__ == name:
                yield [*inspect.signature(function).parameters.values()][1:]


def closed_over(function: Any) -> Iterator[Any]:
    """Yield a function and those that it has closed over, as a decorator does, each once."""
    found = [function]
    for one in found:
        if not inspect.isfunction(one):
            continue
        yield one
        for cell in one.__closure__ or ():
            with contextlib.suppress(ValueError):  # a cell without a value
                if not any(cell.cell_contents is other for other in found):
                    found.append(cell.cell_contents)
