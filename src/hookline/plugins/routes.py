"""Routes: the fastest call of each hook. A hook without an implementation is a plain Python call."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pluggy import HookImpl
from pluggy._callers import _raise_wrapfail

from hookline.plugins.observers import Failures, is_observer


def tell_all(
    hook: str,
    plugged: Sequence[HookImpl],
    defaults: Mapping[str, Any],
    failures: Failures,
    cost: dict[str, float],
    reroute: Callable[[], None],
    blame: Callable[[BaseException], None],
) -> Callable[..., None]:
    """Return a function that calls an event in pluggy's order: plugins first, then observers, guarded and timed.

    It calls the implementations itself: an event has no result and no wrappers, and this is three times as fast.
    """
    calls = [(impl, impl.function, (*impl.argnames, *impl.kwargnames)) for impl in reversed(plugged)]
    matter = [call for call in calls if not is_observer(call[0].plugin)]
    watching = [call for call in calls if is_observer(call[0].plugin)]
    watchers = [call for call in watching if (hook, call[0].plugin_name) not in failures.switched_off]
    off = [call[0].plugin_name for call in watching if call not in watchers]
    clock, failing = time.perf_counter, failures.in_a_row

    def tell(**arguments: Any) -> None:
        if defaults:
            arguments = {**defaults, **arguments}
        try:
            for impl, function, names in matter:  # noqa: B007 - `blame` reads `hook` and `impl`
                function(*map(arguments.__getitem__, names))
        except BaseException as error:
            blame(error)
            raise
        for impl, function, names in watchers:
            begin = clock()
            try:
                function(*map(arguments.__getitem__, names))
            except Exception as error:
                if failures.take(hook, impl.plugin_name, error):
                    reroute()
            else:
                if failing:
                    failing.pop((hook, impl.plugin_name), None)
            cost[impl.plugin_name] = cost.get(impl.plugin_name, 0.0) + clock() - begin
        for plugin_name in off:
            failures.lose(hook, plugin_name)

    return tell


TELL = (tell_all.__qualname__ + ".<locals>.tell", "PluginManager.tell_each")
"""The qualified names of the functions that call events, by which `blame` finds their frames."""


def answered(
    hook_name: str, hook_impls: Sequence[HookImpl], plugged: Sequence[HookImpl], blame: Callable[[BaseException], None]
) -> Callable[..., Any]:
    """Return a call of a verb that does what pluggy's would, and raises if the result is None.

    It calls the implementations itself, which saves the calls of pluggy's own. Its arguments are complete, since
    whoever calls a verb gives all of them.
    """

    def answer(**arguments: Any) -> Any:
        given: Any = None
        error: BaseException | None = None
        wrappers: list[Any] = []
        try:
            for impl in reversed(hook_impls):
                given = impl.function(*map(arguments.__getitem__, (*impl.argnames, *impl.kwargnames)))
                if impl.wrapper:
                    if next(given, given) is given:
                        _raise_wrapfail(given, "did not yield")
                    wrappers.append(given)
                elif given is not None:
                    break
        except BaseException as raised:
            error = raised
        while wrappers:
            wrapper = wrappers.pop()
            try:
                wrapper.send(given) if error is None else wrapper.throw(error)
                wrapper.close()
            except StopIteration as end:
                given, error = end.value, None
            except BaseException as raised:
                if not _is_pythons(raised, error):
                    error = raised
            else:
                _raise_wrapfail(wrapper, "has second yield")
        if error is not None:
            blame(error)
            raise error
        if given is None:
            raise TypeError(_unanswered(hook_name, plugged))
        return given

    return answer


ANSWER = answered.__qualname__ + ".<locals>.answer"
"""The qualified name of the functions that call verbs; their variables that `blame` reads are named as pluggy's."""


def _is_pythons(raised: BaseException, error: BaseException | None) -> bool:
    """Tell whether an exception is what Python makes of a `StopIteration` that a wrapper lets through."""
    return isinstance(error, StopIteration) and isinstance(raised, RuntimeError) and raised.__cause__ is error


def _unanswered(hook: str, plugged: Sequence[HookImpl]) -> str:
    chain = " around ".join(impl.plugin_name for impl in reversed(plugged))
    return (
        f"the verb {hook!r} got no answer from {chain}: an implementation forgot its `return`, or a wrapper its "
        "`return (yield)`"
    )
