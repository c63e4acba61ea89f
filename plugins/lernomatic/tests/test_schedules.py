"""Schedules and the finder of learning rates: what they give is recomputed by arithmetic and by a plain loop."""

import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hookline import CallbackInterface, hookimpl
from hookline.testing import digest
from hookline_lernomatic import LernomaticModel, LogFinder, Trainer
from hookline_lernomatic.param import lr_common
from hookline_lernomatic.train import schedule

pytestmark = pytest.mark.plugins  # the trainer names those of the house


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def points(number=40, seed=1):
    inputs = torch.randn(number, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, (inputs.sum(dim=1) > 0).long())


class Small(LernomaticModel):
    def __init__(self):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
        self.import_path = self.module_import_path = "small"
        self.model_name, self.module_name = "Small", "Sequential"


def make(kind=Trainer, **given):
    options = {"num_epochs": 2, "batch_size": 8, "learning_rate": 0.02, "save_every": 0}
    return kind(Small(), **{"train_dataset": points(), "val_dataset": points(20, 2)} | options | given)


# Schedules --------------------------------------------------------------------------------

LIMITS = {"lr_min": 0.1, "lr_max": 0.9, "stepsize": 4}
exp = math.exp


numbers = {0: 0.8, 2: 0.3, 5: 0.2}
factors = {0: 0.8, 2: 0.5, 5: 0.1}


@pytest.mark.parametrize(
    ("made", "at", "values"),
    [
        (schedule.StepScheduler(lr_decay=0.5, lr_decay_every=4, **LIMITS), [0, 3, 4, 40], [0.9, 0.9, 0.45, 0.1]),
        (schedule.LinearDecayScheduler(num_iters=4, **LIMITS), [0, 2, 4, 9], [0.9, 0.5, 0.1, 0.1]),
        (schedule.LogDecayScheduler(num_iter=4, **LIMITS), [0, 2, 4, 9], [0.9, 0.3, 0.1, 0.1]),
        (schedule.ExponentialDecayScheduler(k=0.5, **LIMITS), [0, 2, 40], [0.9, 0.9 * exp(-1), 0.9 * exp(-20)]),
        (schedule.WarmRestartScheduler(step_per_epoch=2, **LIMITS), [0, 8, 16, 24], [0.9, 0.5, 0.9, 0.5]),
        (schedule.TriangularScheduler(**LIMITS), [0, 2, 4, 6, 8], [0.1, 0.5, 0.9, 0.5, 0.1]),
        (schedule.TriangularScheduler(start_iter=10, **LIMITS), [0, 10, 12, 14], [0.1, 0.1, 0.5, 0.9]),
        (schedule.InvTriangularScheduler(**LIMITS), [0, 2, 4, 6, 8], [0.9, 0.5, 0.1, 0.5, 0.9]),
        (schedule.Triangular2Scheduler(**LIMITS), [4, 8, 12, 20], [0.9, 0.1, 0.5, 0.3]),
        (schedule.TriangularExpScheduler(k=0.5, **LIMITS), [0, 2, 4], [0.1, 0.5 * exp(-1), 0.9 * exp(-2)]),
        (schedule.Triangular2ExpScheduler(k=0.5, **LIMITS), [4, 12], [0.9 * exp(-2), 0.5 * exp(-6)]),
        (schedule.EpochSetScheduler(numbers, lr_value=True), [0, 1, 2, 4, 9], [0.8, 0.8, 0.3, 0.3, 0.2]),
        (schedule.EpochSetScheduler(factors, lr_value=False), [0, 1, 2, 4, 9], [0.8, 0.8, 0.4, 0.4, 0.04]),
        (schedule.DecayWhenEpoch(num_epochs=2, lr_decay=0.5, **LIMITS), [0, 1, 2, 4, 20], [0.9, 0.9, 0.45, 0.225, 0.1]),
        (schedule.DecayToEpoch(2, 4, initial_lr=0.8), [0, 2, 3, 4, 6, 9], [0.8, 0.8, 0.6, 0.4, 0, 0]),
        (schedule.DecayWhenAcc(initial_lr=0.8, lr_decay=0.5), [0.5, 0.6, 0.58, 0.5, 0.7], [0.8, 0.8, 0.8, 0.4, 0.4]),
    ],
    ids=lambda value: repr(value) if isinstance(value, schedule.LRScheduler) else "",
)  # fmt: skip
def test_schedules(made, at, values):
    assert [made.get_lr(one) for one in at] == pytest.approx(values)


def test_a_triangle_that_is_lower_while_the_accuracy_has_fallen():
    made = schedule.TriangularDecayWhenAcc(lr_decay=0.5, acc_thresh=0.1, **LIMITS)
    assert [made.get_lr(4, accuracy) for accuracy in (0.5, 0.46, 0.44, 0.6)] == pytest.approx([0.9, 0.9, 0.45, 0.9])


class Rates(CallbackInterface):
    def __init__(self):
        self.rates = []

    @hookimpl
    def on_begin_optimizer_step(self, trainer):
        group = trainer.optimizers[0].param_groups[0]
        self.rates.append((group["lr"], group.get("momentum", group.get("betas", [None])[0])))


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_rate_and_momentum_follow_their_schedules_from_the_first_step(optimizer):
    rates = Rates()
    triangle, inverse = schedule.TriangularScheduler(**LIMITS), schedule.InvTriangularScheduler(**LIMITS)
    given = {"lr_scheduler": triangle, "mtm_scheduler": inverse, "optim_function": optimizer, "num_epochs": 1}
    make(plugins={"rates": rates}, **given).train()
    for made, values in zip((triangle, inverse), zip(*rates.rates, strict=True), strict=True):
        assert values == pytest.approx([made.get_lr(number) for number in range(5)])


class Wave(schedule.LRScheduler):
    """A schedule of the user's, that keeps its values as LERNOMATIC's do."""

    def get_lr(self, cur_iter):
        rate = 0.1 + 0.01 * cur_iter
        self._update_lr_history(rate)
        return rate


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (Wave(lr_history_size=8), [0.1 + 0.01 * number for number in range(10)]),
        (schedule.EpochSetScheduler({0: 0.1, 1: 0.5}, lr_value=False, lr_history_size=8), [0.1] * 5 + [0.05] * 5),
        (schedule.DecayToEpoch(0, 2, initial_lr=0.4, lr_history_size=8), [0.4] * 5 + [0.2] * 5),
        (schedule.DecayWhenAcc(initial_lr=0.01, lr_history_size=8), [0.01] * 10),
    ],
    ids=repr,
)
def test_each_step_has_the_rate_of_its_own_iteration_or_epoch(made, expected):
    rates = Rates()
    make(plugins={"rates": rates}, lr_scheduler=made).train()
    assert [rate for rate, _ in rates.rates] == pytest.approx(expected)
    assert made.lr_history.tolist() == pytest.approx(expected[:8])


def test_an_accuracy_that_falls_counts_once():
    class Falls(Trainer):
        def val_epoch(self):
            self.acc_history[self.acc_iter] = [0.9, 0.5, 0.5, 0.88][self.acc_iter]
            self.acc_iter += 1

    rates = Rates()
    scheduler = schedule.DecayWhenAcc(initial_lr=0.8, lr_decay=0.5)
    make(Falls, plugins={"rates": rates}, lr_scheduler=scheduler, num_epochs=4).train()
    assert [rate for rate, _ in rates.rates[::5]] == pytest.approx([0.8, 0.8, 0.4, 0.2])


def test_an_epoch_of_the_users_own_applies_schedules_itself(caplog):
    class New(Trainer):
        def train_epoch(self):
            for batch in self.train_loader:
                self.optimizer.zero_grad()
                self.batch_loss(batch)[0].backward()
                self.optimizer.step()
                self.loss_iter += 1

    ours = make(New, lr_scheduler=schedule.TriangularScheduler(**LIMITS))
    ours.train()
    assert ours.get_learning_rate() == 0.02
    assert caplog.text.count("lr_scheduler had no effect on this epoch: New.train_epoch is to call apply_lr") == 1
    ours.apply_lr_schedule()
    assert ours.get_learning_rate() == pytest.approx(0.5)  # of iteration 10


def test_a_history_of_rates_is_drawn(axes):
    made = schedule.TriangularScheduler(lr_history_size=3, **LIMITS)
    with pytest.raises(ValueError, match="TriangularScheduler has kept no values: give lr_history_size="):
        made.plot_history(axes)
    for number in range(5):
        made.get_lr(number)
    made.plot_history(axes)
    assert axes.drawn["plot"][1].tolist() == pytest.approx([0.1, 0.3, 0.5])
    assert schedule.TriangularScheduler(lr_history_size=3, no_lr_history=True).lr_history is None


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("TriangularScheduler", {"lr_min": 2, "lr_max": 1}, "lr_min=2 and lr_max=1 must be at least 0, and in order"),
        ("TriangularScheduler", {"stepsize": 0}, "TriangularScheduler: stepsize=0 must be at least 1"),
        ("StepScheduler", {"lr_decay_every": 0}, "StepScheduler: lr_decay_every=0 must be at least 1"),
        ("StepScheduler", {"start_iter": 5}, "start_iter=5 has no effect; only a triangle begins late"),
        ("LogDecayScheduler", {"lr_min": 0}, "lr_min=0 cannot be reached by equal factors"),
        ("EpochSetScheduler", {"schedule": [0, 4, 2]}, "must be a dict of epochs and numbers"),
        ("EpochSetScheduler", {"schedule": {10: 0.2}}, "schedule must say the value of epoch 0"),
        ("EpochSetScheduler", {"schedule": {0: 0.2, 4.0: 0.1}}, "4.0 in schedule must be a whole number, an epoch"),
    ],
)
def test_schedules_that_cannot_be(kind, given, words):
    with pytest.raises(ValueError, match=words):
        getattr(schedule, kind)(**given)


def test_a_schedule_of_epochs_that_does_not_say_what_its_numbers_are_warns():
    with pytest.warns(UserWarning, match="multiplies by the numbers .*Say lr_value=True for values, or lr_value=False"):
        made = schedule.EpochSetScheduler({0: 0.8, 2: 0.5})
    assert (made.lr_value, made.get_lr(2)) == (False, 0.4)
    with pytest.raises(TypeError, match="unexpected keyword argument 'step_size'"):
        schedule.TriangularScheduler(step_size=4)


# The finder -------------------------------------------------------------------------------


@pytest.fixture
def axes():
    """Bring what stands for axes of matplotlib, and keeps what was drawn."""

    class Axes:
        def __init__(self):
            self.drawn = {}

        def __getattr__(self, name):
            return lambda *args, **given: self.drawn.__setitem__(name, args or given)

    return Axes()


def by_hand(steps, **limits):
    """Do what the finder does, as a plain loop: rates, smoothed losses and accuracies on the validation data."""
    low, high, beta = limits["lr_min"], limits["lr_max"], 0.9
    net, optimizer_of = Small().net, torch.optim.SGD
    optimizer, criterion = optimizer_of(net.parameters(), lr=1.0), nn.CrossEntropyLoss()
    rates, smooth, accuracies, mean = [], [], [], 0.0
    inputs, targets = points(20, 2).tensors
    batches = [*DataLoader(points(), 8)] * 2
    for number, (data, target) in enumerate(batches[: steps + 1]):
        rates.append(low * (high / low) ** (number / steps))
        optimizer.param_groups[0]["lr"] = rates[-1]
        loss = criterion(net(data), target)
        mean = beta * mean + (1 - beta) * loss.item()
        smooth.append(mean / (1 - beta ** (number + 1)))
        accuracies.append((net(inputs).argmax(dim=1) == targets).float().mean().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return rates, smooth, accuracies


def test_the_finder_tries_the_rates_of_a_loop_by_hand_and_leaves_no_trace():
    given = {"lr_min": 1e-3, "lr_max": 0.5}
    ours = make(optim_function="SGD", momentum=0.0, weight_decay=0.0, shuffle=False)
    parts = lambda: digest([ours.model.get_net_state_dict(), ours.optimizer.state_dict(), torch.get_rng_state()])  # noqa: E731
    before = parts()
    finder = LogFinder(ours, **given, beta=0.9, num_epochs=2)
    low, high = finder.find()
    assert parts() == before
    rates, smooth, accuracies = by_hand(5, **given)
    assert [10**at for at in finder.log_lr_history] == pytest.approx(rates)
    assert finder.smooth_loss_history == pytest.approx(smooth, rel=1e-5)
    assert finder.acc_history == pytest.approx(accuracies)
    best = max(range(6), key=lambda number: accuracies[number])
    assert (low, high) == pytest.approx(
        (rates[best] ** 2, rates[best])
    )  # the exponent of lr_min is twice that of lr_max
    finder.lr_select_method = "min_loss"
    lowest = min(range(6), key=lambda number: smooth[number])
    assert finder.get_lr_range() == pytest.approx((rates[lowest] ** 2, rates[lowest]))
    assert ours.model.net.training
    ours.train()
    untouched = make(optim_function="SGD", momentum=0.0, weight_decay=0.0, shuffle=False, checkpoint_name="untouched")
    untouched.train()
    assert digest(ours.model.get_net_state_dict()) == digest(untouched.model.get_net_state_dict())


def found(method, accuracies, **given):
    finder = LogFinder(None, lr_select_method=method, **given)
    finder.log_lr_history = [-5 + 0.5 * number for number in range(len(accuracies))]
    finder.acc_history = accuracies
    return [math.log10(rate) for rate in finder.get_lr_range()]


@pytest.mark.parametrize(
    ("method", "accuracies", "low", "high"),
    [
        ("thresh_acc", [0.1, 0.5, 0.85, 0.9, 0.8, 0.2], -4, -3),  # above 0.765: places 2 to 4
        ("laplace", [0.1, 0.1, 0.5, 0.1, 0.1, 0.1], -4, -4),  # 4 * 0.5 - 0.2 = 1.8 at place 2, the rest below 1.62
        ("sobel", [0.5, 0.5, 0.5, 0.1, 0.1, 0.1], -4, -3.5),  # 0.5 - 0.1 at places 2 and 3
    ],
)
def test_ranges_that_are_read_off_the_accuracies(method, accuracies, low, high, recwarn):
    assert found(method, accuracies, lr_trunc=1) == pytest.approx([low, high])
    assert [str(one.message)[:24] for one in recwarn] == ["LogFinder found no range"] * (low == high)
    recwarn.clear()


def test_what_a_finder_has_found_is_saved_loaded_and_drawn(axes, tmp_path):
    finder = LogFinder(make(), lr_min=1e-3, lr_max=0.5, expr_id="mine", lr_select_method="min_loss")
    with pytest.raises(ValueError, match=r"has tried no learning rate yet: call find\(\)"):
        finder.get_lr_range()
    with pytest.raises(ValueError, match="has nothing to draw"):
        finder.plot_lr_vs_acc(axes)
    finder.find()
    finder.save("finder.pth")
    again = lr_common.lr_finder_auto_load("finder.pth")
    assert again.get_params() == finder.get_params()
    assert again.get_lr_range() == finder.get_lr_range()
    again.plot_lr_vs_acc(axes, log=True)
    assert axes.drawn["plot"] == (finder.log_lr_history, finder.acc_history)
    again.plot_lr_vs_loss(axes)
    assert axes.drawn["plot"][1] == finder.smooth_loss_history
    assert axes.drawn["axvline"]["x"] == finder.get_lr_range()[1]
    (tmp_path / "theirs.pth").write_bytes(pickle.dumps(finder.get_params()))
    with pytest.raises(ValueError, match="theirs.pth was not written by save.* are pickles, which would run code"):
        again.load("theirs.pth")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lr_select_method": "kde"}, "lr_select_method='kde' must be one of max_acc, thresh_acc"),
        ({"lr_min": 2.0}, "lr_min=2.0 and lr_max=1.0 must be above 0, and in order"),
        ({"beta": 1.0}, "beta=1.0 must be from 0 to below 1"),
        ({"acc_test": False}, "acc_test=False measures no accuracies, and lr_select_method='max_acc' reads them"),
    ],
)
def test_searches_that_cannot_be(given, words):
    with pytest.raises(ValueError, match=words):
        LogFinder(make(), **given)


def test_arguments_of_a_finder_that_nobody_reads_or_knows():
    with pytest.warns(UserWarning, match="LogFinder: num_iter has no effect, here as in LERNOMATIC"):
        LogFinder(make(), num_iter=5000)
    with pytest.raises(TypeError, match="LogFinder has no argument 'num_epoch', did you mean 'num_epochs'"):
        LogFinder(make(), num_epoch=3)


def test_a_search_that_finds_nothing():
    left = make(optim_function="SGD", momentum=0.0)
    with pytest.raises(ValueError, match=r"the loss left after . iterations: begin lower than lr_min=1e\+06"):
        LogFinder(left, lr_min=1e6, lr_max=1e9, beta=0.1).find()
    with pytest.raises(ValueError, match="LogFinder measures accuracies on validation data, and the trainer has none"):
        LogFinder(make(val_dataset=None)).find()
    with pytest.raises(ValueError, match="LogFinder has no trainer to search with"):
        LogFinder(None).find()
    with pytest.warns(UserWarning, match="LogFinder found no range: 10 to the 0 is highest"):
        LogFinder(make(val_dataset=None), acc_test=False, lr_select_method="max_range").find()

    class Squares(Trainer):
        def batch_loss(self, batch):
            output = self.model.forward(batch[0])
            return output.square().mean(), output, output

    with pytest.raises(ValueError, match="needs outputs .samples, classes. and targets that are classes"):
        LogFinder(make(Squares)).find()
