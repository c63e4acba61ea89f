"""Which plugins a plugin works with: the tables of READMEs, made by trainings with both.

python -m tests.works_with [NAME …]    # trains anew; writes the tables into the READMEs
"""

import re
import sys
import tempfile
import warnings

import torch
from tests.budgets import readme_of
from tests.test_pairs import Module, changes_training, made, trained

from hookline.installed import installed, load
from hookline.testing import on_ranks

COMMAND = "python -m tests.works_with"
SUBJECTS = {  # the plugins with a table: their options, and on how many ranks they train
    "compile": ({"scope": "window", "backend": "eager"}, 2),
    "optimizer_in_backward": ({}, 1),
    "prefetch": ({}, 1),
}
SAME, REFUSED = "the bits of a training without it", "refused, by name"
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
    options, ranks = SUBJECTS[name]
    found = {}
    for other in sorted(set(installed()) - {name}):
        if not changes_training(other) or (ranks == 1 and "distributed" in getattr(load(other), "requires", ())):
            continue
        alone = trained(made([other]), folder, Stepping, ranks)
        if isinstance(alone, str):
            continue  # it wants another module
        orders = [name, other], [other, name]
        both, turned = (trained(made(order, **{name: options}), folder, Stepping, ranks) for order in orders)
        torch._dynamo.reset()
        assert both == turned, (other, both, turned)
        if isinstance(both, str):
            assert name in both or "refused together" in both, (other, both)
        else:
            assert both == alone, (other, both, alone)
        found[other] = REFUSED if isinstance(both, str) else SAME
    return found


def table(name, folder):
    """Return the table of a plugin: those that it trains the same bits with, and those with which it is refused."""
    one, *rest = on_ranks(outcomes, SUBJECTS[name][1], name, str(folder), timeout=900)
    assert all(other == one for other in rest), (one, rest)
    rows = {what: ", ".join(other for other, found in one.items() if found == what) for what in (SAME, REFUSED)}
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
