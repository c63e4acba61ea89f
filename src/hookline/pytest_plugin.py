"""`pytest --hookline-plugin NAME`: every check of the conformance kit on an installed plugin, without a test file."""

from __future__ import annotations

from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "testing" / "checks" / "of_installed.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the kit."""
    group = parser.getgroup("hookline", "conformance of hookline plugins")
    group.addoption(
        "--hookline-plugin", action="append", default=[], metavar="NAME", help="do all checks on this installed plugin"
    )
    group.addoption("--hookline-options", default="", metavar="YAML", help="its options, such as '{steps: 2}'")
    for word, meaning in (("skip", "does not apply"), ("expect", "is known to fail")):
        group.addoption(
            f"--hookline-{word}",
            action="append",
            default=[],
            metavar="CHECK=REASON",
            help=f"a check that {meaning}, and why",
        )


def pytest_configure(config: pytest.Config) -> None:
    """Collect the checks; what `testpaths` names is left out, and what the command line names is not."""
    if config.getoption("hookline_plugin"):
        named = config.args if config.args_source is config.ArgsSource.ARGS else []
        config.args = [*named, str(CHECKS)]
