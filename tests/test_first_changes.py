"""The first changes that docs/architecture.md describes: each diff is applied to a copy of the repository and tried."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
DIFFS = dict(re.findall(r"^### Add an? (\w+).*?^```diff\n(.*?)^```", PAGE, re.M | re.S))
COPIED = ("src", "plugins", "tests", "docs", "examples", "benchmarks")
LEFT = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")

HEARS = """
from hookline import CallbackInterface, hookimpl
from hookline.testing import tiny_trainer

class Hears(CallbackInterface):
    windows = []

    @hookimpl
    def on_begin_window(self, trainer, window):
        self.windows.append((trainer.global_step, len(window)))

trainer = tiny_trainer([Hears()], epochs=1)
trainer.train()
assert Hears.windows == [(step, 1) for step in range(trainer.global_step)], Hears.windows
"""
LOGS = """
from hookline import CallbackInterface, hookimpl
from hookline.testing import tiny_trainer

class Logs(CallbackInterface):
    @hookimpl
    def on_log(self, global_step):
        steps.append(global_step)

for first in (False, True):
    steps = []
    tiny_trainer([Logs()], max_steps=6, epochs=None, evaluate_every=None, eval_when_finish=False, log_every="5 steps",
                 log_first_step=first).train()
    assert (1 in steps) == first, steps
"""


@pytest.fixture
def copy(tmp_path):
    """Return a copy of the repository, and functions that change it and run something in it."""
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=LEFT)
    for path in ROOT.glob("*.*"):
        if path.is_file():
            shutil.copy(path, tmp_path)
    return Copy(tmp_path)


class Copy:
    def __init__(self, folder):
        self.folder = folder

    def change(self, what):
        command = ["git", "apply", "-"]
        done = subprocess.run(command, cwd=self.folder, input=DIFFS[what], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def python(self, *arguments):
        paths = [str(self.folder / "src"), *map(str, self.folder.glob("plugins/*/src"))]
        environment = {**os.environ, "PYTHONPATH": ":".join(paths)}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def test(self, *arguments):
        self.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *arguments)


@pytest.mark.plugins  # with which a test of the documentation trains
def test_an_event(copy):
    copy.change("event")
    copy.python("-c", HEARS)
    (copy.folder / "docs" / "hooks.md").write_text(copy.python("-m", "hookline.cli.hooks"))
    (copy.folder / "tests" / "hook_api.txt").write_text(copy.python("-m", "hookline", "hooks"))
    copy.test("tests/test_architecture.py", "tests/test_docs.py", "-k", "hook_api or the_loop_has or the_reference")


def test_an_option(copy):
    copy.change("option")
    copy.python("-c", LOGS)
    copy.test("tests/test_docs.py", "-k", "every_option_of_the_trainer")


@pytest.mark.plugins
def test_a_plugin(copy):
    copy.python("-m", "hookline", "new", "plugin", "lucky", "--folder", "plugins")
    copy.change("plugin")
    copy.test("tests/test_architecture.py", "-k", "lucky or known_by_one_build")
    copy.test("tests/test_docs.py", "-k", "every_plugin_has_a_page")


def test_a_command(copy):
    copy.change("command")
    assert "epochs=None\n" in copy.python("-m", "hookline", "options")
    assert "options" in copy.python("-m", "hookline", "--help")
    copy.test("tests/test_architecture.py", "-k", "the_core_is_this")
