"""The conformance kit: named checks of everything that a plugin must keep.

- `subject`: what is checked, and what a check is; `probes`: plugins that train beside it.
- `definition`, `states`, `conduct`, `world`, `devices`, `costs`, `several`: the checks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from hookline.installed import nearest
from hookline.testing.checks import conduct, costs, definition, devices, several, states, world
from hookline.testing.checks.subject import Check, Subject

__all__ = ["CHECKS", "Check", "Subject", "as_subject", "check_plugin", "run_check"]

CHECKS: dict[str, Check] = {
    one.name: one
    for home in (definition, states, conduct, world, devices, costs, several)
    for one in vars(home).values()
    if isinstance(one, Check)
}
"""All checks by name."""


def check_plugin(
    plugin_class: type,
    make: Callable[[], Any] | None = None,
    *,
    checks: Collection[str] | None = None,
    skip: Mapping[str, str] | None = None,
    expect: Mapping[str, str] | None = None,
    beside: Sequence[Callable[[], Any]] = (),
    readme: str | None = None,
    **options: Any,
) -> None:
    """Assert that a plugin keeps the contract, by named checks.

    `CHECKS` has them by name, each with what it demands. `pytest --hookline-plugin NAME` does all of them on an
    installed plugin.

    Args:
        plugin_class: the class.
        make: makes one object, if the options do not suffice; importable by its name for the check `ranks`.
        checks: names of the checks to do; without it the quick ones, about 5 seconds.
        skip: checks that do not apply, each with the reason.
        expect: checks that the plugin is known to fail, each with the reason; one that it keeps is an error.
        beside: make the plugins whose order with this one must change no bit.
        readme: the text of its README, whose table of options and budget are held against the plugin.
        options: fields of the plugin, and options of the trainer.

    Raises:
        AssertionError: the plugin fails a check; the message names each and says what it fails.
        ValueError: no check of such a name.
    """
    subject = as_subject(plugin_class, make, options, beside, readme)
    skip, expect = dict(skip or {}), dict(expect or {})
    chosen = [name for name, one in CHECKS.items() if one.quick] if checks is None else list(checks)
    for name in (*chosen, *skip, *expect):
        if name not in CHECKS:
            raise ValueError(f"no check is named {name!r}{nearest(name, CHECKS)}; there are {', '.join(CHECKS)}")
    failed: dict[str, Exception] = {}
    for name in chosen:
        if name not in skip and (error := run_check(name, subject, name in expect)) is not None:
            failed[name] = error
    if failed:
        said = "".join(f"\n- {name}: {_text(error)}" for name, error in failed.items())
        about = f"{plugin_class.__name__} fails {len(failed)} of {len(chosen)} checks of a plugin"
        raise AssertionError(f"{about}:{said}") from next(iter(failed.values()))


def run_check(name: str, subject: Subject, expected: bool = False) -> Exception | None:
    """Do one check; return what it raised, and nothing if that was expected."""
    try:
        CHECKS[name](subject)
    except Exception as error:
        return None if expected else error
    return AssertionError("it is expected to fail, and does not: remove it from `expect`") if expected else None


def as_subject(
    plugin_class: type,
    make: Callable[[], Any] | None,
    options: Mapping[str, Any],
    beside: Sequence[Callable[[], Any]] = (),
    readme: str | None = None,
) -> Subject:
    """Return what is checked, with options told apart: of the plugin, and of the trainer."""
    fields = {one.name for one in dataclasses.fields(plugin_class)} if dataclasses.is_dataclass(plugin_class) else set()
    own = {name: value for name, value in options.items() if name in fields}
    rest = {name: value for name, value in options.items() if name not in fields}
    return Subject(plugin_class, make or _Make(plugin_class, own), own, rest, beside, readme)


@dataclasses.dataclass(frozen=True)
class _Make:
    """Makes objects of one class; another process can get it."""

    plugin_class: type
    options: Mapping[str, Any]

    def __call__(self) -> Any:
        return self.plugin_class(**self.options)


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
