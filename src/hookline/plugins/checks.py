"""Mistakes that registration refuses, and that pluggy would accept silently."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pluggy
from pluggy import HookRelay

from hookline.installed import nearest
from hookline.interfaces import CallbackInterface, ModuleInterface
from hookline.marks import PROJECT
from hookline.plugins.observers import is_observer
from hookline.plugins.seed import BRIDGES, SEED


def check(manager: pluggy.PluginManager, plugin: Any, name: str) -> None:
    """Refuse a plugin whose hooks would not be called as its author means.

    Raises:
        TypeError: a class, an object without identity, or a wrong method; the message names plugin, method and cure.
        ValueError: a name or an object that is registered already.
    """
    if isinstance(plugin, type):
        raise TypeError(f"plugin {name!r} is the class {plugin.__name__}; register an object: {plugin.__name__}(…)")
    if type(plugin).__hash__ is None:
        raise TypeError(
            f"plugin {name!r}: {type(plugin).__name__} compares by value, so two of them could not be told "
            "apart; declare it with @dataclass(eq=False)"
        )
    for other, registered in manager.list_name_plugin():
        if registered is plugin:
            raise ValueError(f"plugin {name!r} is the very object that is registered as {other!r}; make another")
    if manager.has_plugin(name):
        raise ValueError(f"a plugin named {name!r} is registered already; give this one another name")
    for attribute in dir(plugin):
        function = inspect.getattr_static(plugin, attribute, None)
        function = getattr(function, "__func__", function)
        if callable(function) and not attribute.startswith(("__", *BRIDGES)):
            _check_method(manager.hook, plugin, name, attribute, function)


def _check_method(hooks: HookRelay, plugin: Any, name: str, attribute: str, function: Any) -> None:
    where = f"plugin {name!r}: {attribute}()"
    marked = getattr(function, f"{PROJECT}_impl", None)
    hook = (marked or {}).get("specname") or attribute
    caller = getattr(hooks, hook, None)
    specified = caller is not None and caller.has_spec()
    if marked is None:
        if isinstance(plugin, CallbackInterface):
            _check_unmarked(hooks, plugin, where, attribute, specified)
        return
    if not specified:
        if marked["optionalhook"]:
            return
        raise TypeError(f"{where} is marked @hookimpl, but there is no hook {hook!r}{nearest(hook, vars(hooks))}")
    assert caller is not None
    assert caller.spec is not None
    if marked["hookwrapper"]:
        raise TypeError(f"{where} is an old-style wrapper; write @hookimpl(wrapper=True) and return (yield)")
    if is_observer(plugin) and caller.spec.opts.get("firstresult"):
        raise TypeError(f"{where} implements a verb, but the plugin says observer = True; observers hear events only")
    if marked["wrapper"] and not caller.spec.opts.get("firstresult"):
        raise TypeError(f"{where} wraps an event; only verbs may be wrapped: hear it, tryfirst or trylast")
    if marked["wrapper"] and not inspect.isgeneratorfunction(inspect.unwrap(function)):
        raise TypeError(f"{where} is a wrapper without a yield; write `result = yield` and return a result")
    _check_arguments(_arguments(hooks, hook), where, hook, function)


def _check_arguments(offered: list[str], where: str, hook: str, function: Any) -> None:
    """Refuse parameters that the hook does not have."""
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.kind is parameter.VAR_POSITIONAL:
            cure = f"ask for {next((a for a in offered if 'outputs' in a), 'arguments')} by name"
            if hook in SEED:
                cure += ", or leave the mark away: an unmarked override gets them spread"
            raise TypeError(f"{where} takes *{parameter.name}, which {hook} cannot give; {cure}")
        if parameter.kind is parameter.VAR_KEYWORD:
            raise TypeError(
                f"{where} takes **{parameter.name}, which {hook} cannot give; name what you need of "
                f"{', '.join(offered)}"
            )
        if parameter.kind is parameter.KEYWORD_ONLY:
            raise TypeError(f"{where} takes {parameter.name} by keyword only, and would never get it; remove the `*`")
        if parameter.name not in offered:
            cure = "; or leave the mark away: an unmarked override is called by position" if hook in SEED else ""
            raise TypeError(
                f"{where} asks for {parameter.name!r}{nearest(parameter.name, offered)}, which {hook} cannot "
                f"give; it gives {', '.join(offered)}{cure}"
            )


def _check_unmarked(hooks: HookRelay, plugin: Any, where: str, attribute: str, specified: bool) -> None:
    if attribute in SEED:
        override = getattr(type(plugin), attribute)
        sure, spread = SEED[attribute]
        signature = inspect.signature(override)
        try:  # the number of outputs is known only at the call
            (signature.bind_partial if spread else signature.bind)(plugin, *range(sure))
        except TypeError as error:
            raise TypeError(
                f"{where} cannot be called as {attribute}{inspect.signature(getattr(CallbackInterface, attribute))}"
                f": {error}; it is called by position"
            ) from None
        return
    if not specified and not attribute.startswith("on_"):
        return
    if isinstance(plugin, ModuleInterface):
        # A module may have any methods, but one that looks like a hook and is never called deserves a warning.
        if specified and (attribute.startswith("on_") or _fits(hooks, attribute, getattr(plugin, attribute))):
            warnings.warn(
                f"{where} has the name of a hook and is not marked @hookimpl: it will not be called", stacklevel=4
            )
        return
    if specified:
        raise TypeError(f"{where} has the name of a hook and would not be called; mark it @hookimpl, or rename it")
    raise TypeError(
        f"{where} looks like an event, but there is none of this name{nearest(attribute, vars(hooks))}; correct the "
        "name, or one that does not begin with on_ is your own"
    )


def _fits(hooks: HookRelay, hook: str, method: Any) -> bool:
    """Tell whether all parameters of a method, at least one, are arguments of a hook."""
    asked = list(inspect.signature(method).parameters)
    return bool(asked) and set(asked) <= set(_arguments(hooks, hook))


def _arguments(hooks: HookRelay, hook: str) -> list[str]:
    spec = getattr(hooks, hook).spec
    assert spec is not None
    return [*spec.argnames, *spec.kwargnames]
