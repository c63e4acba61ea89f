"""The tables of READMEs that say which plugins a plugin works with, made by trainings with both in one process."""

import contextlib
import functools
import logging.handlers
import re
import warnings
from pathlib import Path

import pytest
import torch
from tests.test_pairs import changes_training, make

from hookline.installed import installed, load
from hookline.testing import TinyModule, digest, fake_cuda, tiny_trainer

pytestmark = pytest.mark.plugins
README = Path(__file__).parent.parent / "plugins"
BEGIN, END = "<!-- works with: begin -->\n", "<!-- works with: end -->"


class Quiet(TinyModule):
    """Does not look at what it trains on, and its optimizer can be captured."""

    train_step = TinyModule.val_step

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)], []


HOW = {  # where each plugin trains, a module, and the options of the run
    "cudagraph": (fake_cuda, Quiet, {"device": "cuda", "epochs": 3}),
    "optimizer_in_backward": (contextlib.nullcontext, TinyModule, {"epochs": 1}),
    "prefetch": (contextlib.nullcontext, TinyModule, {"epochs": 1}),
}
FALLS_BACK = re.compile("cudagraph: (train_step is not|no step was|nothing is) captured")


def outcome(where, module, options, names, folder):
    """Return the bits that a training ends with, or that it is refused, and whether a plugin has given way."""
    told = logging.handlers.BufferingHandler(10_000)
    logging.getLogger("hookline").addHandler(told)
    try:
        with where():
            plugins = {name: make(name) for name in names}
            trainer = tiny_trainer(plugins, module(samples=30), runs_folder=folder, **options)
            trainer.train()
            state = [trainer.module.state_dict(), [one.state_dict()["state"] for one in trainer.optimizers]]
            return digest(state), any(FALLS_BACK.match(record.getMessage()) for record in told.buffer)
    except (ValueError, RuntimeError, ImportError) as error:
        return f"refused: {error}", False
    finally:
        logging.getLogger("hookline").removeHandler(told)


def table(name, folder):
    """Return the rows of a plugin: by whether it trains the same bits with others, gives way, or is refused."""
    same, gives_way, refused = "the bits of a training without it", "the same, in Python", "refused, by name"
    rows = {same: [], gives_way: [], refused: []}
    trained = functools.partial(outcome, *HOW[name])
    for other in sorted(installed()):
        if other == name or not changes_training(other) or "distributed" in getattr(load(other), "requires", ()):
            continue
        alone, _ = trained([other], folder)
        if alone.startswith("refused"):
            continue  # it wants another module, or another device
        both, gave_way = trained([name, other], folder)
        assert both == trained([other, name], folder)[0] or both.startswith("refused"), other
        if both.startswith("refused"):
            assert name in both or "both perform" in both, both
            rows[refused].append(other)
        else:
            assert both == alone, other
            rows[gives_way if gave_way else same].append(other)
    lines = [f"| {what} | {', '.join(others)} |" for what, others in rows.items() if others]
    return "\n".join(["| a training with both has | plugins |", "|---|---|", *lines]) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", HOW)
def test_the_table_says_what_becomes_of_both(name, tmp_path):
    """To write it anew: put what this test has made in place of what the README has."""
    warnings.simplefilter("ignore")
    text = (README / name / "README.md").read_text()
    said = re.search(f"{BEGIN}(.*?){END}", text, re.DOTALL)[1]
    assert table(name, str(tmp_path)) == said.strip() + "\n"
