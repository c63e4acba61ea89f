"""The table in docs/reliability.md and the tests are one and the same list of faults."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| ((?:[A-Z]\d+(?:, )?)+) \|", re.M)
TEST = re.compile(r"^def test_([a-z]\d+)_", re.M)


def test_every_row_has_a_test_of_its_name_and_every_such_test_a_row():
    named = ROW.findall((ROOT / "docs/reliability.md").read_text())
    rows = {word for words in named for word in words.split(", ")}
    files = [*ROOT.glob("tests/faults/test_*.py"), *ROOT.glob("plugins/*/tests/test_*.py")]
    tests = {name.upper() for path in files for name in TEST.findall(path.read_text())}
    assert len(rows) > 60
    assert rows <= tests, rows - tests
    assert tests <= rows, tests - rows
