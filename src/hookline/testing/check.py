"""A check of a plugin's contract, as for a third-party package."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from hookline.config import merge_schema
from hookline.installed import name_of
from hookline.interfaces import CallbackInterface
from hookline.plugins import PluginManager, is_observer, options_of
from hookline.testing.digest import digest
from hookline.testing.tiny import TinyModule, tiny_trainer


def check_plugin(plugin_class: type, make: Callable[[], Any] | None = None, **options: Any) -> None:
    """Assert that a plugin keeps the contract, and train a tiny module with it.

    Checks that it is a dataclass with identity whose fields OmegaConf understands, that its hooks can be called, that
    it can be unregistered, that its state is plain and can be loaded, and that training with an observer gives the
    same bits.

    Args:
        plugin_class: the class.
        make: makes one object, if the options do not suffice.
        options: its fields without defaults, and options of the trainer.
    """
    name = plugin_class.__name__
    assert issubclass(plugin_class, CallbackInterface), f"{name} must subclass CallbackInterface"
    assert dataclasses.is_dataclass(plugin_class), f"{name} must be a dataclass: its fields are its options"
    assert (plugin_class.__doc__ or "").strip(), f"{name} must say in its docstring what it does"
    fields = {field.name for field in dataclasses.fields(plugin_class) if field.init}
    own = {key: value for key, value in options.items() if key in fields}
    make = make or (lambda: plugin_class(**own))
    merge_schema(f"plugins.{name_of(plugin_class)}", plugin_class, {})

    plugin = make()
    manager = PluginManager()
    if getattr(plugin, "hookspecs", None) is not None:
        manager.add_contract(plugin.hookspecs, f"{name}.hookspecs")
    manager.register(plugin, name)
    manager.unregister(plugin)
    assert not any(manager.heard.values()), f"{name} is heard after it was unregistered"

    trainer_options = {key: value for key, value in options.items() if key not in fields}
    trainer = tiny_trainer(plugins=[plugin], **trainer_options)
    trainer.train()
    state = plugin.get_state()
    assert isinstance(state, dict), f"{name}.get_state() must return a dict"
    twin = make()
    if state:
        twin.update_state(state)
    assert options_of(twin).keys() == options_of(plugin).keys()
    if is_observer(plugin):
        alone = tiny_trainer(module=TinyModule(), **trainer_options)
        alone.train()
        same = digest(trainer.module.state_dict()) == digest(alone.module.state_dict())
        assert same, f"{name} says that it only watches, and changes what is trained"
