"""Which plugins a plugin works with: the tables of READMEs, made by trainings with both.

python -m tests.works_with [NAME …]    # trains anew; writes the tables into the READMEs
"""

import contextlib
import logging.handlers
import re
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from tests.budgets import readme_of
from tests.test_pairs import Module, changes_training, made, trained

from hookline.installed import installed, load
from hookline.testing import fake_cuda, on_ranks

COMMAND = "python -m tests.works_with"


@dataclass
class Subject:
    """How a plugin with a table trains."""

    options: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    where: Any = contextlib.nullcontext
    run: dict[str, Any] = field(default_factory=dict)
    gives_way: str = ""
    """What it says where it leaves all to Python, a pattern; "" if it never does."""


SUBJECTS = {
    "compile": Subject({"scope": "window", "backend": "eager"}, ranks=2),
    "cudagraph": Subject(
        where=fake_cuda,
        run={"device": "cuda", "epochs": 3},
        gives_way="cudagraph: (train_step is not|no step was|nothing is) captured",
    ),
    "optimizer_in_backward": Subject(),
    "prefetch": Subject(),
}
SAME, IN_PYTHON, REFUSED = "the bits of a training without it", "the same, without its work", "refused, by name"
TABLE = re.compile("(?<=<!-- works with: begin -->\n).*?(?=<!-- works with: end -->)", re.DOTALL)


class Stepping(Module):
    """Nothing in its step stays Python, and its rates are powers of two: a compiled window then has the same bits."""

    def train_step(self, global_step, batch, device):
        predictions = self.net(batch[0])
        loss = torch.nn.functional.mse_loss(predictions, batch[1])
        self.log(error=(predictions - batch[1]).abs().mean())
        return loss, predictions

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        optimizer = torch.optim.SGD(self.parameters(), lr=2**-6, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)]


def outcomes(name, folder):
    """Return what becomes of trainings with a plugin and another one on this rank, by the name of the other.

    Raises:
        AssertionError: it has other bits than without the plugin, or than in another order; or a refusal names it not.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    subject, found = SUBJECTS[name], {}
    for other in sorted(set(installed()) - {name}):
        if not changes_training(other) or (
            subject.ranks == 1 and "distributed" in getattr(load(other), "requires", ())
        ):
            continue
        alone, _ = outcome(subject, made([other]), folder)
        if isinstance(alone, str):
            continue  # it wants another module, or another device
        orders = [name, other], [other, name]
        (both, said), (turned, _) = (
            outcome(subject, made(order, **{name: subject.options}), folder) for order in orders
        )
        torch._dynamo.reset()
        assert both == turned, (other, both, turned)
        if isinstance(both, str):
            assert name in both or "refused together" in both, (other, both)
        else:
            assert both == alone, (other, both, alone)
        gave_way = subject.gives_way and re.search(subject.gives_way, said)
        found[other] = REFUSED if isinstance(both, str) else IN_PYTHON if gave_way else SAME
    return found


def outcome(subject, plugins, folder):
    """Return the bits that a training ends with, or why it is refused, and what it has said, a line each."""
    told = logging.handlers.BufferingHandler(10_000)
    logging.getLogger("hookline").addHandler(told)
    try:
        with subject.where():
            bits = trained(plugins, folder, Stepping, subject.ranks, **subject.run)
    finally:
        logging.getLogger("hookline").removeHandler(told)
    return bits, "\n".join(record.getMessage() for record in told.buffer)


def table(name, folder):
    """Return the table of a plugin: those that it trains the same bits with, and those with which it is refused."""
    one, *rest = on_ranks(outcomes, SUBJECTS[name].ranks, name, str(folder), timeout=900)
    assert all(other == one for other in rest), (one, rest)
    rows = {
        what: ", ".join(other for other, found in one.items() if found == what) for what in (SAME, IN_PYTHON, REFUSED)
    }
    lines = [f"| {what} | {others} |" for what, others in rows.items() if others]
    return "\n".join(["| a training with both has | plugins |", "|---|---|", *lines]) + "\n"


def main(names):
    """Make the tables, and write them."""
    for name in names or SUBJECTS:
        with tempfile.TemporaryDirectory(prefix="hookline-works-with-") as folder:
            made_anew, readme = table(name, folder), readme_of(name)
        readme.write_text(TABLE.sub(lambda _, new=made_anew: new, readme.read_text()))
        print(name, made_anew, sep="\n")


if __name__ == "__main__":
    from tests import works_with  # whose functions have a name that other processes can import

    works_with.main(sys.argv[1:])
