"""The plugin manager: build, check, order, route, plan, blame.

pluggy keeps the table of who implements what and in which order. This module stands
around it: it refuses at registration what pluggy would let pass in silence, leads each hook
the shortest way (a hook that nobody plugged into is a plain Python call), and says
who was it when something was raised.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pluggy
from pluggy import HookCaller, HookImpl
from pluggy._callers import _multicall

from hookline import hookspecs
from hookline.installed import distribution_of, load, name_of, nearest
from hookline.interfaces import CallbackInterface, ModuleInterface, seed_call
from hookline.marks import PROJECT

CORE = "core"
MODULE = "module"
SEED = {  # the seed's events: how many arguments each is sure to give, and its collated outputs
    "on_begin_train_epoch": (2, None),
    "on_end_backward": (2, None),
    "on_end_train_step": (1, "train_step_collated_outputs"),
    "on_end_val_epoch": (1, "val_step_collated_outputs"),
    "on_end_train_epoch": (1, "train_step_collated_outputs"),
    "on_end_train": (1, None),
}
COLLECTING = {hook: outputs for hook, (_, outputs) in SEED.items() if outputs} | {
    "on_end_test_epoch": "test_step_collated_outputs"
}
LISTENING = ("on_log", "on_end_validation", "on_end_train_epoch", "on_boundary", "on_end_train", "save")
BRIDGES = ("_call_on_", "_spread_on_")  # methods of CallbackInterface
FAILURES_ALLOWED = 3  # of an observer in one hook, in a row, before it is switched off there

log = logging.getLogger(f"{PROJECT}.plugins")


# Build --------------------------------------------------------------------------------


def build(plugins: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    """Return plugin objects by name, in order, with what they require before them.

    Args:
        plugins: objects and names; or a mapping of name to an object, to a mapping of
            options, or to None for a plugin that is turned off.

    Raises:
        ValueError: two of one name, an unknown name, a circle of requirements.
        TypeError: something that is no plugin.
    """
    if isinstance(plugins, Mapping):
        named = {name: _build_one(name, given) for name, given in plugins.items() if given is not None}
        blocked = {name for name, given in plugins.items() if given is None}
    else:
        named, blocked = {}, set()
        for given in plugins:
            plugin = load(given)() if isinstance(given, str) else given
            if isinstance(plugin, type):
                raise TypeError(f"plugins=[{plugin.__name__}] is a class; give an object: {plugin.__name__}(…)")
            name = name_of(type(plugin))
            if name in named:
                raise ValueError(
                    f'two plugins are named {name!r}; name them yourself: plugins={{"{name}": …, "another_{name}": …}}'
                )
            named[name] = plugin
    ordered: dict[str, Any] = {}
    for name in list(named):
        _place(name, named, blocked, ordered, ())
    return ordered


def _build_one(name: str, given: Any) -> Any:
    if not isinstance(given, Mapping):
        if isinstance(given, type):
            raise TypeError(f"plugins[{name!r}] is the class {given.__name__}; give an object: {given.__name__}(…)")
        return given
    options = dict(given)
    plugin_class = load(options.pop("_plugin_", name))
    try:
        return plugin_class(**options)
    except TypeError as error:
        raise ValueError(f"plugins.{name}: {error}") from error


def _place(name: str, named: dict[str, Any], blocked: set[str], ordered: dict[str, Any], path: tuple[str, ...]) -> None:
    """Put a plugin into the order, what it requires just before it."""
    if name in path:
        raise ValueError(f"plugins require each other in a circle: {' -> '.join([*path, name])}")
    if name in ordered:
        return
    plugin = named[name] if name in named else load(name)()
    for required in getattr(plugin, "requires", ()):
        if required in blocked:
            raise ValueError(f"plugin {name!r} requires {required!r}, which is turned off")
        _place(required, named, blocked, ordered, (*path, name))
    ordered[name] = plugin


# Register and route -------------------------------------------------------------------


class PluginManager(pluggy.PluginManager):
    """pluggy's manager, strict at registration, with a second namespace of shortest ways."""

    def __init__(self) -> None:
        super().__init__(PROJECT)
        # A class, because Python finds an attribute of a class five times as fast as one of an instance.
        self.routes: Any = type("Routes", (), {})
        """What the loop calls: one attribute per hook, rebuilt whenever a plugin comes or goes."""
        self.rooms: dict[str, int] = {}
        """How many outputs of each collecting event somebody asks for; 0 if nobody does."""
        self.logging = self.asking = self.collecting = False
        """Whether anybody hears of logs; may ask for outputs or losses of training; for outputs besides the loss."""
        self.heard: dict[str, bool] = {}
        """Whether anybody but the core implements a hook."""
        self.cost: dict[str, float] = {}
        """Seconds spent in each observer."""
        self._lost: dict[tuple[str, str], int] = {}  # calls of observers by hook and plugin
        self._failing: dict[tuple[str, str], int] = {}  # how many failed in a row
        self._switched_off: dict[tuple[str, str], str] = {}  # and the error that was the last
        self._pending: dict[str, Any] = {}
        self._specs: dict[str, Any] = {}
        self.add_contract(hookspecs, CORE)

    def add_contract(self, specs: Any, name: str) -> None:
        """Add hook specifications, and with them how their verbs are done when nobody performs them."""
        if specs not in self._specs.values():
            self.add_hookspecs(specs)
            super().register(specs, name)
            self._specs[name] = specs
            self._route()

    def register(self, plugin: Any, name: str | None = None) -> str | None:
        """Register a plugin after refusing what pluggy would let pass in silence.

        Raises:
            TypeError: a class, an object without identity, or a method that could not be
                called as its author means; the message names plugin, method and cure.
            ValueError: a name or an object that is registered already, or a second that
                performs one verb.
        """
        name = name or name_of(type(plugin))
        self._check(plugin, name)
        registered = super().register(plugin, name)
        try:
            self._check_conflicts()
        except ValueError:
            super().unregister(plugin)
            raise
        self._route()
        if name in self._pending and hasattr(plugin, "update_state"):
            plugin.update_state(self._pending.pop(name))
        return registered

    def unregister(self, plugin: Any = None, name: str | None = None) -> Any:
        """Unregister a plugin; the loop no longer calls it from its next hook on."""
        unregistered = super().unregister(plugin, name)
        self._route()
        return unregistered

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        """Say which methods implement hooks: the marked ones, and overrides of the seed's events.

        Of an overridden event pluggy gets the bridge that spreads outputs, or the one
        that does without where the override has no room for them; of an untouched or a
        marked one it gets no bridge.
        """
        opts: Any = super().parse_hookimpl_opts(plugin, name)
        if not isinstance(plugin, CallbackInterface) or not name.startswith(BRIDGES):
            return opts
        bridged = opts["specname"]
        override = getattr(type(plugin), bridged)
        hidden = inspect.getattr_static(plugin, bridged) is None
        if hidden or override is getattr(CallbackInterface, bridged) or hasattr(override, f"{PROJECT}_impl"):
            return None
        spread = SEED[bridged][1] is not None and seed_call(override)[0] > 0
        return opts if name == f"{'_spread_' if spread else '_call_'}{bridged}" else None

    def _room(self, hook: str, outputs: str) -> int:
        rooms = [
            seed_call(getattr(type(impl.plugin), hook))[0]
            if impl.function.__name__.startswith("_spread_")
            else sys.maxsize
            for impl in self._plugged(hook)
            if outputs in impl.argnames
        ]
        return max(rooms, default=0)

    def stateful(self) -> Iterator[tuple[str, Any]]:
        """Give name and object of the plugins that may have a state, in order."""
        for name, plugin in self.listed():
            if hasattr(plugin, "get_state"):
                yield name, plugin

    def states(self) -> Iterator[tuple[str, Any, Any]]:
        """Give name, object and state of the plugins that have one now; an observer that fails to tell has none."""
        for name, plugin in self.stateful():
            if ("get_state", name) in self._switched_off:
                self._lose("get_state", name)
                continue
            try:
                state = plugin.get_state()
            except Exception as error:
                if not is_observer(plugin):
                    raise
                self._failed("get_state", name, error)
            else:
                self._failing.pop(("get_state", name), None)
                if state:
                    yield name, plugin, state

    def receive(self, states: Mapping[str, Any]) -> None:
        """Hand states to the plugins of these names; one that is not there yet gets its own when it comes."""
        plugins = dict(self.listed())
        for name, state in states.items():
            if name in plugins:
                plugins[name].update_state(state)
            else:
                self._pending[name] = state

    def listed(self) -> list[tuple[str, Any]]:
        """Return the plugins by name in the order in which they are called, without core and module."""
        return [pair for pair in reversed(self.list_name_plugin()) if pair[0] != MODULE and pair[0] not in self._specs]

    def tell_each(self, hook: str, **arguments: Any) -> list[BaseException]:
        """Tell an event to every plugin, each on its own; return what they raised, with blame."""
        errors: list[BaseException] = []
        for impl in reversed(self._plugged(hook)):
            try:
                impl.function(*map(arguments.__getitem__, (*impl.argnames, *impl.kwargnames)))
            except BaseException as error:  # Ctrl-C in one teardown must not cost the others theirs
                if is_observer(impl.plugin) and isinstance(error, Exception):
                    self._say(hook, impl.plugin_name, error)  # once in a run, so it is not switched off
                else:
                    error.add_note(self._note(hook, impl))
                    errors.append(error)
        return errors

    def report_failures(self) -> None:
        """Say how many calls of each observer were lost in this run, by hook."""
        for (hook, name), lost in self._lost.items():
            last = self._switched_off.get((hook, name))
            off = "" if last is None else f"; it is switched off there since {last}"
            log.warning("plugin %r lost %d call(s) of %s%s", name, lost, hook, off)
        self._lost.clear()

    # Routing

    def _plugged(self, hook: str) -> list[HookImpl]:
        return [impl for impl in self._caller(hook).get_hookimpls() if impl.plugin_name not in self._specs]

    def _caller(self, hook: str) -> HookCaller:
        return getattr(self.hook, hook)  # type: ignore[no-any-return]

    def _route(self) -> None:
        """Lead each hook the shortest way: one that nobody plugged into is a plain Python call."""
        for name, caller in vars(self.hook).items():
            plugged = self._plugged(name)
            setattr(self.routes, name, self._way(name, caller, plugged))
            self.heard[name] = bool(plugged)
        self.rooms = {hook: self._room(hook, outputs) for hook, outputs in COLLECTING.items()}
        self.logging = self.heard["on_log"]
        self.collecting = max(self.rooms["on_end_train_step"], self.rooms["on_end_train_epoch"]) > 1
        self.asking = any(self.heard[hook] for hook in LISTENING) or any(self.rooms.values())

    def _way(self, name: str, caller: HookCaller, plugged: list[HookImpl]) -> Callable[..., Any]:
        if caller.is_historic() or caller.spec is None:
            return caller
        if not plugged:  # a verb's body is how the core does it, an event's is empty
            return caller.spec.function
        if not caller.spec.opts.get("firstresult"):
            return self._tell(name, plugged, caller.spec.kwargdefaults)
        performed = any(not impl.wrapper for impl in plugged)
        # A performer that answers None must not fall through to the core's way of doing it.
        return _answer(name, self.subset_hook_caller(name, self._specs.values()) if performed else caller, plugged)

    def _tell(self, name: str, plugged: list[HookImpl], defaults: Mapping[str, Any]) -> Callable[..., None]:
        """Tell an event in pluggy's order: to those who matter, then to each observer, guarded and timed.

        Calls them itself: nothing is answered and nothing wraps, and it is three times as quick.
        """
        calls = [(impl, impl.function, (*impl.argnames, *impl.kwargnames)) for impl in reversed(plugged)]
        matter = [call for call in calls if not is_observer(call[0].plugin)]
        watching = [call for call in calls if is_observer(call[0].plugin)]
        watchers = [call for call in watching if (name, call[0].plugin_name) not in self._switched_off]
        off = [call[0].plugin_name for call in watching if call not in watchers]
        cost, clock, failing = self.cost, time.perf_counter, self._failing

        def tell(**arguments: Any) -> None:
            if defaults:
                arguments = {**defaults, **arguments}
            for impl, function, names in matter:  # noqa: B007 - `impl` is for `blame`
                function(*map(arguments.__getitem__, names))
            for impl, function, names in watchers:
                begin = clock()
                try:
                    function(*map(arguments.__getitem__, names))
                except Exception as error:
                    self._failed(name, impl.plugin_name, error)
                else:
                    if failing:
                        failing.pop((name, impl.plugin_name), None)
                cost[impl.plugin_name] = cost.get(impl.plugin_name, 0.0) + clock() - begin
            for plugin_name in off:
                self._lose(name, plugin_name)

        return tell

    def _failed(self, hook: str, name: str, error: Exception) -> None:
        """Switch an observer off in a hook in which it has failed some times in a row."""
        last = self._say(hook, name, error)
        count = self._failing[hook, name] = self._failing.get((hook, name), 0) + 1
        if count == FAILURES_ALLOWED:
            log.warning("plugin %r is switched off in %s after %d failures in a row: %s", name, hook, count, last)
            self._switched_off[hook, name] = last
            self._route()

    def _say(self, hook: str, name: str, error: Exception) -> str:
        """Say the first failure of an observer in a hook in this run, and count it; return what it was."""
        said = f"{type(error).__name__}: {error}"
        if (hook, name) not in self._lost:
            log.warning("plugin %r failed in %s, and the run goes on: %s", name, hook, said, exc_info=error)
        self._lose(hook, name)
        return said

    def _lose(self, hook: str, name: str) -> None:
        self._lost[hook, name] = self._lost.get((hook, name), 0) + 1

    # Checks

    def _check(self, plugin: Any, name: str) -> None:
        if isinstance(plugin, type):
            raise TypeError(f"plugin {name!r} is the class {plugin.__name__}; register an object: {plugin.__name__}(…)")
        if type(plugin).__hash__ is None:
            raise TypeError(
                f"plugin {name!r}: {type(plugin).__name__} compares by value, so two of them could not be told "
                "apart; declare it with @dataclass(eq=False)"
            )
        for other, registered in self.list_name_plugin():
            if registered is plugin:
                raise ValueError(f"plugin {name!r} is the very object that is registered as {other!r}; make another")
        if self.has_plugin(name):
            raise ValueError(f"a plugin named {name!r} is registered already; give this one another name")
        for attribute in dir(plugin):
            function = inspect.getattr_static(plugin, attribute, None)
            function = getattr(function, "__func__", function)
            if callable(function) and not attribute.startswith(("__", *BRIDGES)):
                self._check_method(plugin, name, attribute, function)

    def _check_method(self, plugin: Any, name: str, attribute: str, function: Any) -> None:
        where = f"plugin {name!r}: {attribute}()"
        marked = getattr(function, f"{PROJECT}_impl", None)
        hook = (marked or {}).get("specname") or attribute
        caller = getattr(self.hook, hook, None)
        specified = caller is not None and caller.has_spec()
        if marked is None:
            if isinstance(plugin, CallbackInterface):
                self._check_unmarked(plugin, where, attribute, specified)
            return
        if not specified:
            if marked["optionalhook"]:
                return
            raise TypeError(f"{where} is marked @hookimpl, but there is no hook {hook!r}{self._nearest(hook)}")
        assert caller is not None
        assert caller.spec is not None
        if marked["hookwrapper"]:
            raise TypeError(f"{where} is an old-style wrapper; write @hookimpl(wrapper=True) and return (yield)")
        if is_observer(plugin) and caller.spec.opts.get("firstresult"):
            raise TypeError(
                f"{where} implements a verb, but the plugin says observer = True; observers hear events only"
            )
        if marked["wrapper"] and not caller.spec.opts.get("firstresult"):
            raise TypeError(f"{where} wraps an event; only verbs may be wrapped: hear it, tryfirst or trylast")
        if marked["wrapper"] and not inspect.isgeneratorfunction(inspect.unwrap(function)):
            raise TypeError(f"{where} is a wrapper without a yield; write `result = yield` and return a result")
        offered = self._arguments(hook)
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
                raise TypeError(
                    f"{where} takes {parameter.name} by keyword only, and would never get it; remove the `*`"
                )
            if parameter.name not in offered:
                cure = "; or leave the mark away: an unmarked override is called by position" if hook in SEED else ""
                raise TypeError(
                    f"{where} asks for {parameter.name!r}{nearest(parameter.name, offered)}, which {hook} cannot "
                    f"give; it gives {', '.join(offered)}{cure}"
                )

    def _check_unmarked(self, plugin: Any, where: str, attribute: str, specified: bool) -> None:
        if attribute in SEED:
            override = getattr(type(plugin), attribute)
            sure, spread = SEED[attribute]
            signature = inspect.signature(override)
            try:  # how many outputs will be spread is known only when they come
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
            # Methods of a module are its own; but one that looks like a hook and would never be called is worth a word.
            if specified and (attribute.startswith("on_") or self._fits(attribute, getattr(type(plugin), attribute))):
                warnings.warn(
                    f"{where} has the name of a hook and is not marked @hookimpl: it will not be called", stacklevel=4
                )
            return
        if specified:
            raise TypeError(f"{where} has the name of a hook and would not be called; mark it @hookimpl, or rename it")
        raise TypeError(
            f"{where} looks like an event, but there is none of this name{self._nearest(attribute)}; correct the name, "
            "or one that does not begin with on_ is your own"
        )

    def _fits(self, hook: str, method: Any) -> bool:
        """Tell whether a method asks for nothing but arguments of a hook, and for some of them."""
        asked = list(inspect.signature(method).parameters)[1:]
        return bool(asked) and set(asked) <= set(self._arguments(hook))

    def _arguments(self, hook: str) -> list[str]:
        spec = self._caller(hook).spec
        assert spec is not None
        return [*spec.argnames, *spec.kwargnames]

    def _nearest(self, hook: str) -> str:
        return nearest(hook, vars(self.hook))

    def _check_conflicts(self) -> None:
        for hook in self._verbs():
            performers = self.performers(hook)
            if len(performers) > 1:
                one, other, *_ = reversed(performers)
                raise ValueError(
                    f"{one!r} and {other!r} both perform {hook!r}, which is done once; turn one of them off "
                    f"(`plugins.{other}: null`), or let it wrap the verb"
                )

    def performers(self, hook: str) -> list[str]:
        """Return who performs a verb besides the core, at most one where all is well."""
        return [impl.plugin_name for impl in self._plugged(hook) if not impl.wrapper]

    def _verbs(self) -> Iterator[str]:
        for name, caller in vars(self.hook).items():
            if caller.spec is not None and caller.spec.opts.get("firstresult"):
                yield name

    # Plan and blame

    def plan(self) -> list[dict[str, Any]]:
        """Return, for each hook in the loop's order, who wraps it and who does or hears it."""
        rows = []
        order = list(vars(hookspecs))
        names = sorted(vars(self.hook), key=lambda name: order.index(name) if name in order else len(order))
        verbs = set(self._verbs())
        for name in names:
            impls = list(reversed(self._plugged(name)))
            done_by = [impl.plugin_name for impl in impls if not impl.wrapper]
            if name in verbs and not done_by:
                done_by = [CORE]
            wrapped_by = [impl.plugin_name for impl in impls if impl.wrapper]
            kind = "verb" if name in verbs else "event"
            rows.append({"hook": name, "kind": kind, "wrapped_by": wrapped_by, "done_by": done_by})
        return rows

    def blame(self, error: BaseException) -> None:
        """Add a note to an exception: in which hook of which plugin of which distribution it was raised.

        Walks the traceback down to the innermost implementation: in a frame of `_tell` it stands
        at hand; where pluggy calls on, it is the one whose code the next frame runs. Costs
        nothing until something is raised.
        """
        blamed: tuple[str, HookImpl] | None = None
        traceback = error.__traceback__
        while traceback is not None:
            frame, below = traceback.tb_frame, traceback.tb_next
            if frame.f_code.co_qualname == "PluginManager._tell.<locals>.tell" and "impl" in frame.f_locals:
                blamed = frame.f_locals["name"], frame.f_locals["impl"]
            elif frame.f_code is _multicall.__code__ and below is not None:
                hook = frame.f_locals["hook_name"]
                for impl in frame.f_locals["hook_impls"]:
                    function = inspect.unwrap(impl.function)
                    if getattr(function, "__code__", None) is not below.tb_frame.f_code:
                        continue
                    if impl.plugin_name not in self._specs:
                        blamed = hook, impl
                    elif blamed is not None and blamed[0] == hook:  # it only passed through who wraps this
                        blamed = None
            traceback = below
        note = self._note(*blamed) if blamed is not None else None
        if note is not None and note not in getattr(error, "__notes__", ()):
            error.add_note(note)

    def _note(self, hook: str, impl: HookImpl) -> str:
        return f"raised in {hook} by plugin {impl.plugin_name!r} ({distribution_of(type(impl.plugin))})"


def is_observer(plugin: Any) -> bool:
    """Tell whether a plugin says that it only watches."""
    return getattr(plugin, "observer", False) is True


def options_of(plugin: Any) -> dict[str, Any]:
    """Return a plugin's configuration: its dataclass fields."""
    if not dataclasses.is_dataclass(plugin):
        return {}
    return {field.name: getattr(plugin, field.name) for field in dataclasses.fields(plugin) if field.init}


def _answer(name: str, call: Callable[..., Any], plugged: Sequence[HookImpl]) -> Callable[..., Any]:
    def answer(**arguments: Any) -> Any:
        answered = call(**arguments)
        if answered is None:
            chain = " around ".join(impl.plugin_name for impl in reversed(plugged))
            raise TypeError(
                f"the verb {name!r} got no answer from {chain}: an implementation forgot its `return`, or a "
                "wrapper its `return (yield)`"
            )
        return answered

    return answer
