"""The tables of READMEs that say which plugins a plugin works with, made by trainings with both in one process."""

import re
import warnings
from pathlib import Path

import pytest
from tests.test_pairs import changes_training, make

from hookline.installed import installed, load
from hookline.testing import TinyModule, digest, tiny_trainer

pytestmark = pytest.mark.plugins
README = Path(__file__).parent.parent / "plugins"
PLUGINS = ("optimizer_in_backward", "prefetch")
BEGIN, END = "<!-- works with: begin -->\n", "<!-- works with: end -->"


def outcome(names, folder):
    """Return the bits that a training ends with, or that it is refused."""
    try:
        trainer = tiny_trainer(
            {name: make(name) for name in names}, TinyModule(samples=30), epochs=1, runs_folder=folder
        )
        trainer.train()
    except (ValueError, RuntimeError, ImportError) as error:
        return f"refused: {error}"
    return digest([trainer.module.state_dict(), [one.state_dict()["state"] for one in trainer.optimizers]])


def table(name, folder):
    """Return the rows of a plugin: those that it trains the same bits with, and those with which it is refused."""
    rows = {"the bits of a training without it": [], "refused, by name": []}
    for other in sorted(installed()):
        if other == name or not changes_training(other) or "distributed" in getattr(load(other), "requires", ()):
            continue
        alone = outcome([other], folder)
        if alone.startswith("refused"):
            continue  # it wants another module
        both = outcome([name, other], folder)
        assert both == outcome([other, name], folder) or both.startswith("refused"), other
        if both.startswith("refused"):
            assert name in both or "both perform" in both, both
            rows["refused, by name"].append(other)
        else:
            assert both == alone, other
            rows["the bits of a training without it"].append(other)
    lines = [f"| {what} | {', '.join(others)} |" for what, others in rows.items() if others]
    return "\n".join(["| a training with both has | plugins |", "|---|---|", *lines]) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", PLUGINS)
def test_the_table_says_what_becomes_of_both(name, tmp_path):
    """To write it anew: put what this test has made in place of what the README has."""
    warnings.simplefilter("ignore")
    text = (README / name / "README.md").read_text()
    said = re.search(f"{BEGIN}(.*?){END}", text, re.DOTALL)[1]
    assert table(name, str(tmp_path)) == said.strip() + "\n"
