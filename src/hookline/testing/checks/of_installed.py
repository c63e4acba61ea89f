"""The tests that `pytest --hookline-plugin NAME` collects."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import yaml

from hookline.installed import installed, load, nearest
from hookline.testing.checks import CHECKS, as_subject
from hookline.testing.other_device import why_not


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of each check of each plugin."""
    reasons = {word: _reasons(metafunc.config, word) for word in ("skip", "expect")}
    names = metafunc.config.getoption("hookline_plugin")
    each = [pytest.param(plugin, name, marks=_marks(name, reasons)) for plugin in names for name in CHECKS]
    metafunc.parametrize(("plugin", "check"), each)


def test_plugin(plugin: str, check: str, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """Do one check, in a folder of its own."""
    if check == "other_device" and (reason := why_not()) is not None:
        pytest.skip(reason)
    options = yaml.safe_load(pytestconfig.getoption("hookline_options")) or {}
    CHECKS[check](as_subject(load(plugin), None, options, readme=_readme(plugin)))


def _readme(plugin: str) -> str | None:
    dist = installed()[plugin].dist if plugin in installed() else None
    return None if dist is None else metadata.metadata(dist.name).get_payload()  # type: ignore[attr-defined]


def _reasons(config: pytest.Config, word: str) -> dict[str, str]:
    said = dict(text.partition("=")[::2] for text in config.getoption(f"hookline_{word}"))
    for name, reason in said.items():
        if name not in CHECKS:
            known = ", ".join(CHECKS)
            raise pytest.UsageError(
                f"--hookline-{word}: no check is named {name!r}{nearest(name, CHECKS)}; there are {known}"
            )
        if not reason:
            raise pytest.UsageError(f"--hookline-{word}={name}: say why, --hookline-{word}='{name}=the reason'")
    return said


def _marks(name: str, reasons: dict[str, dict[str, str]]) -> list[pytest.MarkDecorator]:
    marks = [pytest.mark.skip(reason=reasons["skip"][name])] if name in reasons["skip"] else []
    if name in reasons["expect"]:
        marks.append(pytest.mark.xfail(reason=reasons["expect"][name], strict=True))
    return marks
