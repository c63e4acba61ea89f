"""The tables of READMEs that say which plugins a plugin works with are what trainings with both show."""

import pytest
from tests import works_with
from tests.budgets import readme_of


@pytest.mark.plugins
@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", works_with.SUBJECTS)
def test_the_table_says_what_becomes_of_both(name, tmp_path):
    (written,) = works_with.TABLE.findall(readme_of(name).read_text())
    assert works_with.table(name, tmp_path) == written, f"if that is meant: `{works_with.COMMAND} {name}`"
