"""What `pytest` leaves out where no path is given, and where that is run."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def project(tmp_path):
    """Make a project with the configuration of this one, and one test of each kind."""
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "plugins").mkdir()
    (tmp_path / "tests" / "kills").mkdir(parents=True)
    (tmp_path / "tests" / "thorough.txt").write_text("# what takes long\ntests/kills\ntests/test_long.py\n")
    for name in ("test_short.py", "test_long.py", "kills/test_kill.py"):
        (tmp_path / "tests" / name).write_text("def test_it(): ...\n")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], {"tests/test_short.py"}),
        (["-n", "1", "--thorough"], {"tests/test_long.py", "tests/kills/test_kill.py"}),
        (["-n", "1", "tests"], {"tests/test_short.py", "tests/test_long.py", "tests/kills/test_kill.py"}),
    ],
)
def test_what_takes_long_runs_where_it_is_asked_for(project, given, expected):
    command = [sys.executable, "-m", "pytest", "-rp", "-p", "no:hookline.pytest_plugin", *given]
    said = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    ran = {line.split()[1].partition("::")[0] for line in said.stdout.splitlines() if line.startswith("PASSED ")}
    assert ran == expected


def test_all_that_is_left_out_is_there():
    from conftest import THOROUGH

    assert [place for place in THOROUGH if not (ROOT / place).exists()] == []
    assert "pytest -n auto --thorough" in (ROOT / ".ci" / "run").read_text()
