"""What stands in the place of a compiled method: it says where the compiler failed, and is not copied."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

COMPILER = ("torch._dynamo", "torch._functorch", "torch._inductor")


class Compiled:
    """A method of a module, compiled; a copy of the module has what it was before."""

    def __init__(self, method: Callable[..., Any], compiled: Callable[..., Any], advice: str) -> None:
        functools.update_wrapper(self, method, updated=())
        self.method, self.compiled, self.advice = method, compiled, advice

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.compiled(*args, **kwargs)
        except Exception as error:
            if type(error).__module__.startswith(COMPILER) or "torch.compile with fullgraph" in str(error):
                error.add_note(
                    f"compile: {self.advice}; or change what the message says; `compile.fullgraph: false` runs in "
                    "Python what cannot be compiled, and `compile.backend: aot_eager` shows whether it is inductor"
                )
            raise

    def __reduce__(self) -> Any:
        return same, (self.method,)


def same(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return what is given."""
    return method


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function, or that of the class of another object that is called like one."""
    return str(getattr(function, "__qualname__", type(function).__name__))


def own_function(method: Callable[..., Any], code: Any = None) -> Callable[..., Any]:
    """Return a function that calls a method, with a code object given or of its own.

    torch counts recompilations by code object, and names it where it compiles no further: without this, a model's
    Sequentials and checkpointed blocks would share one, and all but the first few be left uncompiled; blocks that are
    alike do share, so that they are compiled once.
    """

    def step(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    step.__code__ = code if code is not None else step.__code__.replace(co_name=name_of(method))
    return step
