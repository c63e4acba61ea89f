"""What `nox -s quick` chooses; the sessions themselves are run by hand or by CI."""

import contextlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def noxfile():
    pytest.importorskip("nox", reason="no requirement of the session `bare`")
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.chdir(ROOT):
        yield module


def test_what_has_changed_is_tested(noxfile):
    assert noxfile.tests_of(["plugins/clip/README.md"]) == (
        ["plugins/clip/tests", *noxfile.ALWAYS],
        ["plugins/clip/README.md"],
    )
    assert noxfile.tests_of(["tests/test_parts.py", "tests/gone.py", "tests/test_gone.py"])[0] == [
        *sorted([*noxfile.ALWAYS, "tests/test_parts.py"])
    ]
    assert "tests/test_howto.py" in noxfile.tests_of(["docs/how-to/warm-up.md"])[0]
    assert "tests/test_recipes.py" in noxfile.tests_of(["examples/recipes/gan/run.yaml"])[0]
    assert set(noxfile.CORE) < set(noxfile.tests_of(["src/hookline/loop/logs.py"])[0])


def test_all_that_sessions_name_is_there(noxfile):
    assert [
        name for name in [*noxfile.CORE, *noxfile.ALWAYS, *noxfile.PROGRAMS.values()] if not (ROOT / name).exists()
    ] == []
