"""The recipes: each program trains to the bits of its plain loop, by its own configuration."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hookline import CallbackInterface, hookimpl, set_seed
from hookline.config import build_trainer, load_config
from hookline.data import mix

pytestmark = pytest.mark.plugins

ROOT = Path(__file__).parent.parent
PAGES = {page.stem: page for page in (ROOT / "docs" / "recipes").glob("*.md") if page.stem not in ("index", "short")}
CONFIGURATIONS = {name: f"recipes/{name}/run.yaml" for name in PAGES} | {"characters": "chars.yaml"}


@dataclass(eq=False)
class Losses(CallbackInterface):
    def __post_init__(self):
        self.of_steps = []

    def on_end_train_step(self, global_step, loss):
        self.of_steps.append(loss.item())


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Be in a folder that is thrown away: programs write where they are."""
    monkeypatch.chdir(tmp_path)


def order(epoch, samples):
    """Return the order in which a run of seed 0 takes the samples of an epoch."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(mix(0, epoch)))


def configured(configuration, *overrides):
    return load_config(ROOT / "examples" / configuration, list(overrides), ["no:progress"])


def fit(configuration, *overrides):
    """Train as `hookline fit` does; return the trainer, a module as it was before, and the losses of the steps.

    What is drawn from here on is what training drew.
    """
    config = configured(configuration, *overrides)
    before, trainer, losses = build_trainer(config).module, build_trainer(config), Losses()
    trainer.plugins.register(losses)
    trainer.train()
    set_seed(mix(0, 0))
    return trainer, before, losses.of_steps


def lines(names):
    """Return how many lines of files are not empty."""
    return sum(1 for name in names for line in (ROOT / name).read_text().splitlines() if line.strip())


def assert_same_bits(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_images():
    from examples.recipes.images import plain

    trainer, before, losses = fit("recipes/images/run.yaml", "trainer.epochs=2", "module.width=4")
    by_hand, accuracies = plain.train(before.net, epochs=2, order=order)
    assert losses == by_hand
    assert_same_bits(trainer.module.net, before.net)
    assert trainer.metrics["val_accuracy"] == pytest.approx(accuracies[-1])


def test_characters():
    from examples.recipes.characters import plain

    sizes = {"context": 16, "width": 16, "heads": 2, "blocks": 1}
    short = ["trainer.epochs=2", "trainer.max_train_steps_per_epoch=20", "trainer.max_val_steps_per_epoch=3"]
    trainer, before, losses = fit("chars.yaml", *short, *(f"module.{name}={size}" for name, size in sizes.items()))
    net = plain.Writer(**sizes)
    net.load_state_dict(before.state_dict())
    set_seed(mix(0, 0))
    by_hand, val_losses = plain.train(net, context=16, epochs=2, steps=20, val_batches=3, order=order)
    assert losses == by_hand
    assert_same_bits(trainer.module, net)
    assert trainer.metrics["val_loss"] == pytest.approx(val_losses[-1])


def test_words():
    from examples.recipes.words import plain

    short = ["trainer.epochs=2", "trainer.max_train_steps_per_epoch=20", "module.width=16", "module.words=300"]
    trainer, before, losses = fit("recipes/words/run.yaml", *short)
    by_hand, val_losses = plain.train(before.net, words=300, width=16, epochs=2, steps=20)
    assert losses == by_hand
    assert_same_bits(trainer.module.net, before.net)
    assert trainer.metrics["val_loss"] == pytest.approx(val_losses[-1])


def test_gan():
    from examples.recipes.gan import plain

    trainer, before, losses = fit("recipes/gan/run.yaml", "trainer.epochs=2", "module.width=8")
    by_hand = plain.train(before.generator, before.discriminator, epochs=2, order=order)
    assert losses == [of_generator for _, of_generator in by_hand]
    assert_same_bits(trainer.module.generator, before.generator)
    assert_same_bits(trainer.module.discriminator, before.discriminator)


def test_byol():
    from examples.recipes.byol import plain

    trainer, before, losses = fit("recipes/byol/run.yaml", "trainer.epochs=2", "module.width=4")
    teacher, by_hand, accuracies = plain.train(before.student, before.predictor, epochs=2, order=order)
    assert losses == by_hand
    for name, network in (("student", before.student), ("predictor", before.predictor), ("teacher", teacher)):
        assert_same_bits(getattr(trainer.module, name), network)
    assert trainer.metrics["val_accuracy"] == pytest.approx(accuracies[-1])


def test_diffusion():
    from examples.recipes.diffusion import model, plain

    short = ["trainer.epochs=2", "trainer.evaluate_every=1 epochs", "module.width=8", "plugins.sample=null"]
    trainer, before, losses = fit("recipes/diffusion/run.yaml", *short)
    averaged, by_hand, val_losses = plain.train(before.net, epochs=2, every=1, order=order)
    assert losses == by_hand
    assert_same_bits(trainer.module.net, before.net)
    exported = trainer.export_model()
    assert all(torch.equal(exported[f"net.{name}"], weight) for name, weight in averaged.state_dict().items())
    assert (trainer.metrics["val_loss"], trainer.metrics["val_loss_ema"]) == pytest.approx(val_losses[-1])
    assert model.draw(averaged, 2).shape == (2, 1, 8, 8)


def test_ratings():
    from examples.recipes.ratings import plain

    trainer, before, losses = fit("recipes/ratings/run.yaml", "module.learning_rate=0.05")
    by_hand, val_losses = plain.train(before.net, learning_rate=0.05, order=order)
    assert trainer.status == "stopped"
    assert losses == by_hand
    assert_same_bits(trainer.module.net, before.net)
    assert trainer.best.valid_loss == pytest.approx(min(val_losses))


def test_fine_tuning():
    pytest.importorskip("transformers")
    from examples.recipes.fine_tuning import plain

    trainer, before, losses = fit(
        "recipes/fine_tuning/run.yaml", "trainer.epochs=2", "trainer.max_train_steps_per_epoch=10"
    )
    by_hand, accuracies = plain.train(before.model, epochs=2, steps=10, order=order)
    assert losses == by_hand
    assert_same_bits(trainer.module.model, before.model)
    assert trainer.metrics["val_accuracy"] == pytest.approx(accuracies[-1])


def test_ppo():
    pytest.importorskip("gymnasium")
    from examples.recipes.ppo import plain

    short = ["trainer.epochs=2", "trainer.evaluate_every=null", "trainer.train_batch_size=30"]
    small = {"envs": 4, "length": 25, "passes": 2}
    trainer, before, losses = fit("recipes/ppo/run.yaml", *short, *(f"module.{name}={n}" for name, n in small.items()))
    by_hand, lengths = plain.train(before.policy, before.value, epochs=2, batch_size=30, every=2, **small)
    assert losses == by_hand
    assert_same_bits(trainer.module.policy, before.policy)
    assert_same_bits(trainer.module.value, before.value)
    assert trainer.metrics["val_return"] == pytest.approx(lengths[-1])


# All of them --------------------------------------------------------------------------

SMALL = {  # so that an epoch has no more steps than a resume in the middle of one needs
    "words": ["module.width=16", "module.words=300", "trainer.max_train_steps_per_epoch=6"],
    "characters": ["module.width=16", "trainer.max_train_steps_per_epoch=6", "trainer.max_val_steps_per_epoch=1"],
    "diffusion": ["module.width=8", "plugins.sample=null"],
    "ppo": ["module.envs=4", "module.length=25", "trainer.train_batch_size=30"],
}
NEEDS_EVALUATIONS = {  # of which such a short run has none
    "images": {"checkpoint.keep_best": "0", "checkpoint.monitor": "val_loss"},
    "ratings": {"early_stop": "null", "best": "null"},
}
QUICK = {"words", "byol", "ppo"}  # what they carry from step to step is of their own making


@dataclass(eq=False)
class Cut(CallbackInterface):
    """End a run as a signal does, in the middle of what it does."""

    def on_end_train_step(self, global_step):
        if global_step == 8:
            self.trainer.stop("cut", status="preempted")

    @hookimpl
    def on_setup(self, trainer):
        self.trainer = trainer


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in sorted(PAGES)]
)
def test_a_recipe_that_was_cut_ends_with_the_same_bits(name):
    overrides = [*SMALL.get(name, ()), "trainer.epochs=2", "trainer.max_steps=10", "trainer.evaluate_every=null"]
    if name in NEEDS_EVALUATIONS:
        overrides += [f"plugins.{plugin}={options}" for plugin, options in NEEDS_EVALUATIONS[name].items()]
    whole, cut = (build_trainer(configured(CONFIGURATIONS[name], *overrides, f"trainer.run_name={n}")) for n in "wc")
    whole.train()
    cut.plugins.register(Cut())
    cut.train()
    resumed = build_trainer(configured(CONFIGURATIONS[name], *overrides, "trainer.run_name=c", "trainer.resume=true"))
    resumed.train()
    assert (whole.global_step, cut.global_step, resumed.global_step) == (10, 8, 10)
    assert_same_bits(resumed.module, whole.module)


REACHED = {  # what the pages say that a whole run reaches
    "images": ("val_accuracy", 0.95),
    "byol": ("val_accuracy", 0.86),
    "fine_tuning": ("val_accuracy", 0.85),
    "ppo": ("val_return", 195),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REACHED)
def test_a_whole_run_reaches_what_its_page_says(name):
    trainer = build_trainer(configured(CONFIGURATIONS[name]))
    trainer.train()
    metric, least = REACHED[name]
    assert trainer.metrics[metric] >= least


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_a_page_counts_the_lines_of_the_files_that_it_shows(page):
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r'^--8<-- "(.+)"$', text, re.M)
    ours = [name for name in shown if Path(name).name not in ("plain.py", "model.py", "data.py")]
    counted = re.search(r"ha(?:ve|s) (\d+) lines, `plain.py` has (\d+)", text)
    plain = [name for name in shown if name.endswith("plain.py")]
    assert (int(counted[1]), int(counted[2])) == (lines(ours), lines(plain))


def test_every_program_has_a_page_and_every_page_is_in_the_list():
    assert {folder.name for folder in (ROOT / "examples" / "recipes").iterdir() if folder.is_dir()} - {
        "__pycache__"
    } == set(PAGES)
    index = (ROOT / "docs" / "recipes" / "index.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"\[([^\]]+)\]\((\w+)\.md\)", index))
    assert {name: title for title, name in shown.items() if name != "short"} == {
        name: page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for name, page in PAGES.items()
    }
