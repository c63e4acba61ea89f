"""Random states and modes are the user's: what a run draws does not leak, and what is evaluated changes no training."""

import random
from types import SimpleNamespace

import numpy
import pytest
import torch
from tests.habits.common import train, two
from torch.utils.data import DataLoader, TensorDataset, random_split

from hookline import ModuleInterface, hookimpl, kept_rng
from hookline.testing import digest


class Line(ModuleInterface):
    """A regression with dropout, on 40 samples of three numbers."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(40, 3, generator=generator)
        self.data = TensorDataset(inputs, inputs.sum(1, keepdim=True), torch.arange(40))
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = torch.nn.Linear(3, 1)
        self.drop = torch.nn.Dropout(0.3)

    def train_step(self, global_step, batch, device):
        return (self.net(self.drop(batch[0])) - batch[1]).square().mean()

    val_step = train_step

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.data, batch_size, sampler=sampler(self.data))

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), lr=0.05)], []


def draws():
    """Draw from everything that a user may draw from."""
    return random.random(), torch.rand(()).item(), float(numpy.random.rand())


# What a run draws ---------------------------------------------------------------------


@pytest.mark.parametrize("door", ["train", "validate"])
def test_an_outer_random_search_draws_as_it_does_without_runs(door):
    def search(between):
        random.seed(3), torch.manual_seed(3), numpy.random.seed(3)
        found = []
        for _ in range(4):
            found.append(draws())
            between()
        return found

    class Both(Line):
        get_val_dataloaders = Line.get_train_dataloader

    def run():
        if door == "train":
            train(Both(), train_batch_size=10)
        else:
            train(Both(), max_steps=1, train_batch_size=40).validate()

    found = search(run)
    assert found == search(lambda: None)
    assert len(set(found)) == 4


def test_a_run_is_the_same_whatever_was_drawn_before():
    found = []
    for seed in (1, 2):
        random.seed(seed), torch.manual_seed(seed), numpy.random.seed(seed)
        found.append(digest(train(Line(), train_batch_size=10, epochs=2).module.state_dict()))
    assert found[0] == found[1]
    assert digest(train(Line(), train_batch_size=10, epochs=2, seed=1).module.state_dict()) != found[0]


# What is evaluated --------------------------------------------------------------------


class Evaluated(Line):
    """A validation that draws wherever one may."""

    def __init__(self, habit):
        super().__init__()
        self.habit = habit

    def get_val_dataloaders(self, sampler, batch_size):
        if self.habit == "nothing":
            return None
        if self.habit == "a drawing loader":
            draws()
        shuffled = {"shuffle": True} if self.habit == "a shuffled loader" else {"sampler": sampler(self.data)}
        return DataLoader(self.data, batch_size, **shuffled)

    def val_step(self, global_step, batch, device):
        if self.habit == "a drawing step":
            draws()
        if self.habit == "training mode":  # Monte Carlo dropout
            self.drop.train()
        return super().val_step(global_step, batch, device)

    @hookimpl
    def on_end_validation(self):
        if self.habit == "a drawing end":
            draws()


HABITS = ("a step", "a drawing step", "a shuffled loader", "a drawing loader", "a drawing end", "training mode")


@pytest.mark.parametrize("habit", HABITS)
def test_training_is_the_same_whatever_is_evaluated_and_how_often(habit):
    options = {"train_batch_size": 10, "val_batch_size": 10, "epochs": 3}
    alone = digest(train(Evaluated("nothing"), **options).module.state_dict())
    for cadence in (
        {},
        {"evaluate_every": "1 steps"},
        {"evaluate_every": "2 epochs", "eval_when_start": True},
        {"evaluate_every": None, "eval_when_finish": False, "sanity_val_steps": 2},
    ):
        assert digest(train(Evaluated(habit), **options, **cadence).module.state_dict()) == alone, cadence


# Modes --------------------------------------------------------------------------------


class Frozen(Line):
    """A backbone that the user has put into eval mode."""

    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5))
        self.backbone.requires_grad_(False).eval()
        self.modes = []

    def train_step(self, global_step, batch, device):
        self.modes.append((self.drop.training, self.backbone[1].training))
        return (self.net(self.drop(self.backbone(batch[0]))) - batch[1]).square().mean()

    def val_step(self, global_step, batch, device):
        assert not self.drop.training
        return (self.net(self.backbone(batch[0])) - batch[1]).square().mean()

    get_val_dataloaders = Line.get_train_dataloader


def test_a_frozen_batch_norm_stays_as_it_is(caplog):
    module = Frozen()
    before = digest(module.backbone.state_dict())
    train(module, train_batch_size=10, val_batch_size=10, epochs=3, evaluate_every="1 steps", sanity_val_steps=1)
    assert digest(module.backbone.state_dict()) == before
    assert module.modes == [(True, False)] * 12
    assert "in eval mode" not in caplog.text  # it has no weights to train


def test_a_mode_that_is_changed_in_training_stays_changed():
    class Later(Frozen):
        def on_begin_train_epoch(self, global_step, epoch):
            self.backbone.train(epoch == 1)

    module = Later()
    train(module, train_batch_size=20, val_batch_size=10, epochs=3, evaluate_every="1 steps")
    assert module.modes == [(True, False)] * 2 + [(True, True)] * 2 + [(True, False)] * 2


def test_a_whole_module_in_eval_mode_is_warned_of(caplog):
    module = Frozen()
    module.eval()
    train(module, train_batch_size=10, epochs=1)
    assert set(module.modes) == {(False, False)}
    (said,) = [record.getMessage() for record in caplog.records if "in eval mode" in record.getMessage()]
    assert "with weights to train" in said
    assert "call .train() on them before training" in said


# Splits -------------------------------------------------------------------------------


class Split(Line):
    """Splits its data at random where a loader is asked for: once, or in each of them."""

    def __init__(self, once, how="torch"):
        super().__init__()
        self.once, self.how, self.kept = once, how, None
        self.trained, self.validated, self.noise = [], [], []

    def parts(self):
        if self.kept is None or not self.once:
            if self.how == "torch":
                self.kept = random_split(self.data, [32, 8])
            else:
                order = random.sample(range(40), 40) if self.how == "python" else numpy.random.permutation(40).tolist()
                self.kept = [torch.utils.data.Subset(self.data, part) for part in (order[:32], order[32:])]
        return self.kept

    def get_train_dataloader(self, sampler, batch_size):
        data = self.parts()[0]
        return DataLoader(data, batch_size, sampler=sampler(data))

    def get_val_dataloaders(self, sampler, batch_size):
        data = self.parts()[1]
        return DataLoader(data, batch_size, sampler=sampler(data))

    def train_step(self, global_step, batch, device):
        self.trained += batch[2].tolist()
        self.noise += draws()
        return super().train_step(global_step, batch, device)

    def val_step(self, global_step, batch, device):
        self.validated += batch[2].tolist()
        return super().train_step(global_step, batch, device)


SPLITS = [(once, how) for once in (True, False) for how in ("torch", "python", "numpy")]


def split(once, how, plugins=()):
    """Train three epochs on a split; return what was trained and validated on, and what was drawn."""
    module = Split(once, how)
    train(module, plugins, train_batch_size=8, val_batch_size=4, epochs=3)
    return module.trained, module.validated, module.noise


@pytest.mark.parametrize(("once", "how"), SPLITS)
def test_a_split_where_loaders_are_made_is_one_split(once, how):
    trained, validated, _ = split(once, how)
    assert len(trained) == 96
    assert sorted(set(trained) | set(validated)) == [*range(40)]
    assert not set(trained) & set(validated)


def splits():
    torch.set_num_threads(1)
    return [split(once, how, {"ddp": {}}) for once, how in SPLITS]


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_ranks_share_a_split_and_draw_for_themselves(subtests):
    for of_ranks, (once, how) in zip(zip(*two(splits), strict=True), SPLITS, strict=True):
        with subtests.test(once=once, how=how):
            trained = of_ranks[0][0] + of_ranks[1][0]
            validated = of_ranks[0][1] + of_ranks[1][1]
            assert len(trained) == 96
            assert len(validated) == 24
            assert (len(set(trained)), len(set(validated))) == (32, 8)
            assert not set(of_ranks[0][2]) & set(of_ranks[1][2])  # what is drawn while training is each rank's own
            assert not set(trained) & set(validated)


def test_a_loader_that_draws_each_epoch_is_told_that_it_is_one_draw(caplog):
    class Fresh(Line):
        def get_train_dataloader(self, sampler, batch_size):
            part = torch.utils.data.Subset(self.data, torch.randperm(40)[:20].tolist())
            return DataLoader(part, batch_size, sampler=sampler(part))

    train(Fresh(), train_batch_size=10, epochs=3)
    said = [record.getMessage() for record in caplog.records if "draws at random" in record.getMessage()]
    assert len(said) == 1
    assert "For another draw each epoch use a generator that is seeded by self.trainer.epoch" in said[0]


class Gauss(Line):
    """Draws pairs of numbers of Python's, of which the generator keeps the second, in training and in loading."""

    def __init__(self, loading):
        super().__init__()
        self.loading, self.drawn, self.loaded = loading, [], []

    def batches(self):
        for batch in [(torch.ones(2, 3), torch.ones(2, 1))] * 4:
            self.loaded += [random.gauss(0, 1) for _ in range(self.loading)]
            yield batch

    def get_train_dataloader(self, sampler, batch_size):
        return self.batches()

    def train_step(self, global_step, batch, device):
        self.drawn.append(random.gauss(0, 1))
        return self.net(batch[0]).sum()


def test_what_loading_draws_of_pairs_changes_nothing_of_what_training_draws():
    drawn = {}
    for loading in range(3):
        module = Gauss(loading)
        train(module)
        drawn[loading] = module.drawn
        assert len({*module.loaded}) == 4 * loading  # each batch has a seed of its own
    assert len({*drawn[0]}) == 4
    assert drawn[0] == drawn[1] == drawn[2]


def test_the_random_numbers_of_an_apple_gpu_are_kept_too(monkeypatch):
    """There is one, and the functions of older versions of torch take no device."""
    drawn = [torch.tensor([3])]
    functions = SimpleNamespace(get_rng_state=lambda: drawn[-1], set_rng_state=drawn.append)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch, "get_device_module", lambda kind: functions)
    with kept_rng():
        drawn.append(torch.tensor([4]))
    assert [state.item() for state in drawn] == [3, 4, 3]
