"""The plugin manager: register, check, order, route, plan, blame.

pluggy keeps the table of implementations and their order. This module adds three things: it refuses mistakes that
pluggy would accept silently, it makes each hook as fast as possible (a hook without an implementation is a plain
Python call), and it names the plugin that raised an exception.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pluggy
from pluggy import HookCaller, HookImpl

from hookline import hookspecs
from hookline.installed import name_of
from hookline.interfaces import CallbackInterface, seed_call
from hookline.marks import PROJECT
from hookline.masking import redact_error
from hookline.plugins.blame import blame
from hookline.plugins.checks import check
from hookline.plugins.observers import Failures, is_observer
from hookline.plugins.routes import answered, tell_all
from hookline.plugins.seed import BRIDGES, COLLECTING, SEED
from hookline.plugins.straight import straight

CORE = "core"
MODULE = "module"
STEP = ("update", "run_window", "forward_backward", "step_optimizers")
LISTENING = ("on_log", "on_end_validation", "on_end_train_epoch", "on_boundary", "on_end_train", "save")


class PluginManager(pluggy.PluginManager):
    """pluggy's manager with strict registration and a second namespace of fast calls."""

    def __init__(self) -> None:
        super().__init__(PROJECT)
        # A class, because Python looks up a class attribute five times faster than one of an instance.
        self.routes: Any = type("Routes", (), {})
        """The calls of the loop: one attribute per hook, rebuilt when a plugin joins or leaves."""
        self.rooms: dict[str, int] = {}
        """The most outputs that an implementation of each collecting event takes; 0 if none takes any."""
        self.logging = self.asking = self.collecting = False
        """Whether a plugin implements `on_log`; may use outputs or losses of training; outputs besides the loss."""
        self.heard: dict[str, bool] = {}
        """Whether a plugin or the module implements a hook, apart from the core."""
        self.cost: dict[str, float] = {}
        """Seconds spent in each observer."""
        self._failures = Failures()
        self._pending: dict[str, Any] = {}
        self._specs: dict[str, Any] = {}
        self._wrap: Callable[[str, HookImpl], Callable[..., Any]] | None = None
        self._wrapped: set[HookImpl] = set()
        self._straight = False
        self.add_contract(hookspecs, CORE)

    def add_contract(self, specs: Any, name: str) -> None:
        """Add hook specifications, with the bodies of their verbs as defaults."""
        if specs not in self._specs.values():
            self.add_hookspecs(specs)
            with warnings.catch_warnings():  # the core goes on with a deprecated verb
                warnings.simplefilter("ignore", DeprecationWarning)
                super().register(specs, name)
            self._specs[name] = specs
            self._route()

    def register(self, plugin: Any, name: str | None = None) -> str | None:
        """Register a plugin; refuse mistakes that pluggy would accept silently.

        Raises:
            TypeError: a class, an object without identity, or a method that could not be called as its author means;
                the message names plugin, method and cure.
            ValueError: a name or an object that is registered already, or a second performer of one verb.
        """
        name = name or name_of(type(plugin))
        check(self, plugin, name)
        try:
            registered = super().register(plugin, name)  # which tells it on_setup, if the trainer exists
            self._check_conflicts()
        except BaseException as error:
            self.blame(error)
            super().unregister(plugin)
            raise
        self._route()
        if name in self._pending and hasattr(plugin, "update_state"):
            self._ask(plugin, name, "update_state", self._pending.pop(name))
        return registered

    def register_all(self, plugins: Mapping[str, Any]) -> None:
        """Register plugins by name, with the hooks that they define; the first is called first."""
        for name, plugin in plugins.items():
            if getattr(plugin, "hookspecs", None) is not None:
                self.add_contract(plugin.hookspecs, f"{name}.hookspecs")
        for name, plugin in reversed(list(plugins.items())):
            self.register(plugin, name)

    def unregister(self, plugin: Any = None, name: str | None = None) -> Any:
        """Unregister a plugin; from the next hook on the loop no longer calls it."""
        unregistered = super().unregister(plugin, name)
        self._route()
        return unregistered

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        """Return the options of a method that implements a hook: a marked one, or an override of a seed event.

        For an overridden seed event pluggy gets a bridge: the one that passes outputs, or the one without if the
        override takes none. An event that is not overridden, or is marked, gets no bridge.
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
        """Yield name and object of the plugins that may have a state, in order."""
        for name, plugin in self.listed():
            if hasattr(plugin, "get_state"):
                yield name, plugin

    def states(self) -> Iterator[tuple[str, Any, Any]]:
        """Yield name, object and state of the plugins that have one now; a failing observer has none."""
        for name, plugin in self.stateful():
            if ("get_state", name) in self._failures.switched_off:
                self._failures.lose("get_state", name)
            elif state := self._ask(plugin, name, "get_state"):
                yield name, plugin, state

    def _ask(self, plugin: Any, name: str, method: str, *given: Any) -> Any:
        """Call a method that is no hook; a failing observer answers None."""
        try:
            answer = getattr(plugin, method)(*given)
        except BaseException as error:
            if not is_observer(plugin) or not isinstance(error, Exception):
                self.blame(error)
                raise
            self._failures.take(method, name, error)  # no hook, so no route changes
            return None
        self._failures.in_a_row.pop((method, name), None)
        return answer

    def receive(self, states: Mapping[str, Any]) -> None:
        """Pass states to the plugins of these names; a plugin that registers later gets its state then."""
        plugins = {name: plugin for name, plugin in self.listed() if hasattr(plugin, "update_state")}
        for name, state in states.items():
            if name in plugins:
                self._ask(plugins[name], name, "update_state", state)
            else:
                self._pending[name] = state

    def listed(self) -> list[tuple[str, Any]]:
        """Return the plugins by name in the order of their calls, without core and module."""
        return [pair for pair in reversed(self.list_name_plugin()) if pair[0] != MODULE and pair[0] not in self._specs]

    def tell_each(self, hook: str, **arguments: Any) -> list[BaseException]:
        """Call an event for every plugin separately; return the exceptions, each with blame."""
        errors: list[BaseException] = []
        for impl in reversed(self._plugged(hook)):
            try:
                impl.function(*map(arguments.__getitem__, (*impl.argnames, *impl.kwargnames)))
            except BaseException as error:  # Ctrl-C in one teardown must not skip the others
                if is_observer(impl.plugin) and isinstance(error, Exception):
                    self._failures.say(hook, impl.plugin_name, error)  # once per run, so never switched off
                else:
                    self.blame(error)
                    errors.append(error)
        return errors

    def report_failures(self) -> None:
        """Log how many calls of each observer were lost in this run, by hook."""
        self._failures.report()

    def wrap_calls(self, wrap: Callable[[str, HookImpl], Callable[..., Any]]) -> None:
        """Call what `wrap(hook, implementation)` returns instead of each implementation, for a tool that measures.

        It is asked once for each, those of the core and of plugins that join later included. pluggy's `implementation`
        has `plugin_name`, `function`, and whether it is a `wrapper`, whose function returns a generator.
        """
        self._wrap = wrap
        self._route()

    def straighten(self) -> None:
        """Make the core's way of a step straight: what nobody plugs into costs no call in it.

        Who joins within a step is called from the next one on, by the hooks of a step that had nobody.
        """
        self._straight = True
        self._route()

    # Routing

    def _plugged(self, hook: str) -> list[HookImpl]:
        return [impl for impl in self._caller(hook).get_hookimpls() if impl.plugin_name not in self._specs]

    def _caller(self, hook: str) -> HookCaller:
        return getattr(self.hook, hook)  # type: ignore[no-any-return]

    def _route(self) -> None:
        """Make the fastest call for each hook; without an implementation it is a plain Python call."""
        plugged = {name: self._plugged(name) for name in vars(self.hook)}
        self.heard = {name: bool(impls) for name, impls in plugged.items()}
        plain = frozenset(name for name, impls in plugged.items() if not impls)
        for name in STEP if self._straight else ():
            (own,) = (impl for impl in self._caller(name).get_hookimpls() if impl.plugin_name == CORE)
            if own not in self._wrapped:  # a tool that measures sees each call
                made = getattr(hookspecs, name) if self._wrap else straight(hookspecs, name, plain)
                own.function = made  # type: ignore[misc]  # pluggy calls it by this
        for name, caller in vars(self.hook).items():
            for impl in set(caller.get_hookimpls()) - self._wrapped if self._wrap else ():
                impl.function = self._wrap(name, impl)  # type: ignore[misc]
                self._wrapped.add(impl)
            setattr(self.routes, name, self._way(name, caller, plugged[name]))
        self.rooms = {hook: self._room(hook, outputs) for hook, outputs in COLLECTING.items()}
        self.logging = self.heard["on_log"]
        self.collecting = max(self.rooms["on_end_train_step"], self.rooms["on_end_train_epoch"]) > 1
        self.asking = any(self.heard[hook] for hook in LISTENING) or any(self.rooms.values())

    def _way(self, name: str, caller: HookCaller, plugged: list[HookImpl]) -> Callable[..., Any]:
        if caller.is_historic() or caller.spec is None:
            return caller
        if not plugged:  # the body of a verb is the core's way, that of an event is empty
            return next((impl.function for impl in caller.get_hookimpls()), caller.spec.function)
        if not caller.spec.opts.get("firstresult"):
            defaults = caller.spec.kwargdefaults
            return tell_all(name, plugged, defaults, self._failures, self.cost, self._route, self.blame)
        performed = any(not impl.wrapper for impl in plugged)
        # A performer that returns None must not fall through to the core's way.
        return answered(name, plugged if performed else caller.get_hookimpls(), plugged, self.blame)

    def _check_conflicts(self) -> None:
        for hook in self._verbs():
            performers = {impl.plugin_name: impl for impl in reversed(self._plugged(hook)) if not impl.wrapper}
            if len(performers) > 1:
                own = performers.pop(MODULE, None)
                one, *others = performers
                off = one
                if others:
                    off, other = others[0], repr(others[0])
                elif own is not None:
                    other = f"the module ({type(own.plugin).__name__}.{own.function.__name__})"
                raise ValueError(
                    f"{one!r} and {other} both perform {hook!r}, which is done once; turn one of them off "
                    f"(`plugins.{off}: null`), or let it wrap the verb"
                )

    def performers(self, hook: str) -> list[str]:
        """Return the plugins that perform a verb; at most one in a valid configuration."""
        return [impl.plugin_name for impl in self._plugged(hook) if not impl.wrapper]

    def _verbs(self) -> Iterator[str]:
        for name, caller in vars(self.hook).items():
            if caller.spec is not None and caller.spec.opts.get("firstresult"):
                yield name

    # Plan and blame

    def plan(self) -> list[dict[str, Any]]:
        """Return, for each hook in the loop's order, which plugins wrap it and which perform or implement it."""
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
        """Add a note to an exception: the hook or method, the plugin, its distribution and the line; redact secrets."""
        redact_error(error)
        blame(error, self._specs, {id(plugin): (name, plugin) for name, plugin in self.listed()})
