"""A plugin of a stranger, outside the workspace: its wheel is built, installed and trained with from YAML."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LOOKAHEAD = Path(__file__).parent.parent / "examples" / "third_party" / "lookahead"
RUN = """
module: {_target_: hookline.testing.TinyModule}
trainer: {epochs: 2, train_batch_size: 8, device: cpu}
plugins:
  lookahead: {every: 2, alpha: 0.25}
required_plugins: [hookline-lookahead>=0.1]
"""


def run(folder, *command, path=()):
    path = os.pathsep.join([*map(str, path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the wheel from a copy of the folder, as its author would, and install it into a folder of its own."""
    work = tmp_path_factory.mktemp("third_party")
    source = shutil.copytree(LOOKAHEAD, work / "lookahead")
    quiet = ("--quiet", "--no-deps", "--disable-pip-version-check", "--no-cache-dir")
    run(work, "pip", "wheel", *quiet, "--no-build-isolation", "--wheel-dir", work / "dist", source)
    (wheel,) = (work / "dist").iterdir()
    assert wheel.name == "hookline_lookahead-0.1.0-py3-none-any.whl"
    run(work, "pip", "install", *quiet, "--target", work / "site", wheel)
    shutil.rmtree(source)
    return work / "site"


def test_it_is_in_no_list_of_this_repository():
    root = LOOKAHEAD.parent.parent.parent
    for name in ("requirements.txt", "requirements-dev.txt", "pyproject.toml", "noxfile.py"):
        assert "lookahead" not in (root / name).read_text()


@pytest.mark.timeout(300)
def test_its_wheel_is_found_by_name_trains_and_resumes_from_yaml(site, tmp_path):
    (tmp_path / "run.yaml").write_text(RUN)
    listed = json.loads(run(tmp_path, "hookline", "plugins", "lookahead", "--verify", "--json", path=[site]))
    assert (listed[0]["distribution"], listed[0]["well"]) == ("hookline-lookahead", True)
    assert "as installed" in listed[0]["files"]
    shown = json.loads(run(tmp_path, "hookline", "plugins", "lookahead", "--json", path=[site]))
    assert [(one["option"], one["type"], one["default"]) for one in shown["options"]] == [
        ("every", "int", "5"),
        ("alpha", "float", "0.5"),
    ]
    assert all(one["does"] for one in shown["options"])
    assert "train finished at step 14" in run(tmp_path, "hookline", "fit", "run.yaml", path=[site])
    done = subprocess.run(
        [sys.executable, "-m", "hookline", "fit", "run.yaml"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "required_plugins: not installed; `pip install 'hookline-lookahead>=0.1'`" in done.stderr


@pytest.mark.timeout(300)
def test_the_kit_checks_it_where_it_is_installed(site, tmp_path):
    quick = "contract or configuration or documentation or imports or state or observer"
    run(tmp_path, "pytest", "-q", "--hookline-plugin", "lookahead", "-k", quick, "-p", "no:cacheprovider", path=[site])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_its_own_tests_pass_where_it_is_installed(site, tmp_path):
    shutil.copytree(LOOKAHEAD / "tests", tmp_path / "tests")
    shutil.copy(LOOKAHEAD / "README.md", tmp_path)
    run(tmp_path, "pytest", "-q", "-p", "no:cacheprovider", "tests", path=[site])
