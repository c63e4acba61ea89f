"""The conformance kit: each broken plugin is caught by the check that is meant for it, and its names and messages."""

import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from tests.broken_plugins import BROKEN, Counts, ForgetsState, GrowsGradients

from hookline.testing import CHECKS, check_plugin

HANGS = {"ReducesAlone", "StateTalks"}


def marked(name):
    slow = name in HANGS or BROKEN[name]._caught_by in ("cost", "ranks", "other_device")
    return pytest.param(BROKEN[name], marks=[pytest.mark.slow] * slow, id=name)


@pytest.fixture
def what_they_leave(tmp_path, monkeypatch):
    """Put back what broken plugins leave behind."""
    monkeypatch.chdir(tmp_path)
    precision, handler, handlers = (
        torch.get_float32_matmul_precision(),
        signal.getsignal(signal.SIGUSR1),
        logging.root.handlers[:],
    )
    with mock.patch.dict(os.environ):
        yield
    torch.set_float32_matmul_precision(precision)
    signal.signal(signal.SIGUSR1, handler)
    logging.root.handlers[:] = handlers


@pytest.mark.usefixtures("what_they_leave")
@pytest.mark.parametrize("plugin_class", [marked(name) for name in BROKEN])
def test_a_broken_plugin_is_caught_by_the_check_that_is_meant_for_it(plugin_class):
    with pytest.raises(AssertionError, match=f"^{plugin_class.__name__} fails 1 of 1 checks of a plugin:\n- "):
        check_plugin(plugin_class, checks=[plugin_class._caught_by], **plugin_class._how)


def test_there_is_a_broken_plugin_for_every_check_but_that_of_imports():
    assert {one._caught_by for one in BROKEN.values()} == CHECKS.keys() - {"imports"}
    assert len(BROKEN) > 60


def test_a_right_plugin_is_caught_by_none():
    check_plugin(Counts, checks=sorted(CHECKS.keys() - {"cost", "ranks", "other_device"}))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("from hookline.loop.training import Training", "imports hookline.loop.training.Training, which hookline does"),
        ("import hookline_clip", "imports hookline_clip, which is of another plugin: use a hook instead"),
    ],
)
def test_imports_of_what_is_not_promised_are_caught(tmp_path, monkeypatch, line, said):
    name = f"private_{line.split()[0]}"
    (tmp_path / f"{name}.py").write_text(
        "from dataclasses import dataclass\nfrom hookline import CallbackInterface\n"
        f"def later():\n    {line}\n\n@dataclass(eq=False)\nclass Private(CallbackInterface):\n    'Import.'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AssertionError, match=re.escape(said)):
        check_plugin(__import__(name).Private, checks=["imports"])


def test_all_that_fail_are_told_and_what_is_skipped_or_expected_is_not():
    said = "ForgetsState fails 2 of 3 checks of a plugin:\n- state: a resumed run begins with another state: count"
    with pytest.raises(AssertionError, match=said):
        check_plugin(ForgetsState, checks=["contract", "state", "resume"])
    check_plugin(ForgetsState, checks=["state", "resume"], skip={"state": "a test"}, expect={"resume": "a test"})
    with pytest.raises(AssertionError, match="- contract: it is expected to fail, and does not: remove it from `exp"):
        check_plugin(ForgetsState, checks=["contract"], expect={"contract": "a test"})
    for given in ({"checks": ["stat"]}, {"skip": {"stat": ""}}, {"expect": {"stat": ""}}):
        with pytest.raises(ValueError, match=r"no check is named 'stat', did you mean 'state'\?; there are con"):
            check_plugin(ForgetsState, **given)


def test_the_order_beside_plugins_that_commute_with_it_is_right():
    check_plugin(GrowsGradients, checks=["order"])


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["-k", "contract or state"], 0, "2 passed, 14 deselected"),
        (["-k", "state", "--hookline-options", "{max_norm: -1}"], 1, "clip.max_norm=-1"),
        (["-k", "state", "--hookline-skip", "state=for a test"], 0, "1 skipped"),
        (["-k", "state", "--hookline-expect", "state=for a test"], 1, "[XPASS(strict)] for a test"),
        (["--hookline-skip", "stat=x"], 2, "--hookline-skip: no check is named 'stat', did you mean 'state'?"),
        (["--hookline-expect", "state"], 2, "--hookline-expect=state: say why"),
    ],
)
@pytest.mark.plugins
def test_an_installed_plugin_is_checked_without_a_test_file(tmp_path, words, code, said):
    command = ["-m", "pytest", "-p", "hookline.pytest_plugin", "-p", "no:cacheprovider", "--hookline-plugin", "clip"]
    done = subprocess.run(
        [sys.executable, *command, *words], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100
    )
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stdout
    assert not [*tmp_path.iterdir()]


def test_the_guide_lists_the_checks():
    guide = (Path(__file__).parent.parent / "docs" / "writing-a-plugin.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (yes|) \|$", guide, re.M)
    assert rows == [(name, one.about, "yes" if one.quick else "") for name, one in CHECKS.items()]
