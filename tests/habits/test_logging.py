"""What is logged is what it was when it was logged, and belongs to where that was; what is followed is named."""

import math

import numpy
import pytest
import torch
from tests.habits.common import Keep, Regression, train, two
from torch.utils.data import DataLoader

from hookline import CallbackInterface, hookimpl


class Line(Regression):
    """A regression on 40 samples of three numbers, with a validation."""

    def train_step(self, global_step, batch, device):
        return (self.net(batch[0]) - batch[1]).square().mean()

    val_step = train_step

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.data, batch_size, sampler=sampler(self.data))

    get_val_dataloaders = get_train_dataloader

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), lr=0.05)], []


OPTIONS = {"train_batch_size": 10, "val_batch_size": 10}

# As it was ----------------------------------------------------------------------------


class Changing(Line):
    """Logs and returns a parameter, a counter and a running average, which change in place."""

    def __init__(self):
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.tensor(0.0))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("average", torch.zeros(3))
        self.was, self.collected, self.of_val = [], [], []

    def train_step(self, global_step, batch, device):
        self.count += 1
        self.average.mul_(0.5).add_(0.5 * global_step)
        self.was.append([self.temperature.item(), self.count.item(), self.average[1].item()])
        self.log(temperature=self.temperature, count=self.count, average=self.average[1])
        self.log(least=self.temperature, reduce="min")
        self.log(last=self.temperature, reduce="last")
        loss = super().train_step(global_step, batch, device) * 0 - self.temperature
        return loss, self.temperature, self.count, self.average[None]

    def val_step(self, global_step, batch, device):
        self.count += 1
        self.log(val_count=self.count, val_greatest=self.count, reduce="max")
        return super().train_step(global_step, batch, device), self.count

    def on_end_val_epoch(self, global_step, losses, counts, key="default"):
        self.of_val = counts.tolist()

    def on_end_train_epoch(self, global_step, losses, *outputs):
        self.collected = [output.tolist() for output in outputs]

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), lr=1.0)], []


@pytest.mark.plugins
@pytest.mark.parametrize("window", [1, 2])
def test_what_changes_in_place_is_logged_and_collected_as_it_was(window):
    keep, module = Keep(), Changing()
    plugins = {"keep": keep} | ({"accumulate": {"steps": window}} if window > 1 else {})
    trainer = train(module, plugins, **OPTIONS | {"train_batch_size": 10 * window})
    temperatures, counts, averages = map(list, zip(*module.was, strict=True))
    for name, values in (("temperature", temperatures), ("count", counts), ("average", averages)):
        assert keep.get(name)[-1][1] == pytest.approx(sum(values) / 4), name
    assert keep.get("least")[-1][1] == min(temperatures)
    assert keep.get("last")[-1][1] == temperatures[-1] != module.temperature.item()
    assert module.collected[:2] == [temperatures, counts]
    assert [row[1] for row in module.collected[2]] == averages
    assert module.of_val == [5, 6, 7, 8]
    assert (trainer.metrics["val_count"], trainer.metrics["val_greatest"]) == (8, 8)


# Where it was -------------------------------------------------------------------------


class AtEnds(Line):
    """Logs where things end."""

    def on_end_train_epoch(self, global_step):
        self.log(f1=float(self.trainer.epoch), over="epoch")
        self.log(f1_interval=float(self.trainer.epoch))

    @hookimpl
    def on_end_validation(self, metrics):
        self.log(gap=metrics["val_loss"] + 1)

    def on_end_train(self, global_step):
        self.log(final=1.0)


@pytest.mark.parametrize("log_every", ["1 steps", "3 steps", "50 steps"])
def test_what_is_logged_at_an_end_belongs_to_it(log_every):
    keep = Keep()
    trainer = train(AtEnds(), [keep], epochs=4, log_every=log_every, **OPTIONS)
    by_hand = [(4, 0.0), (8, 1.0), (12, 2.0), (16, 3.0)]
    assert keep.get("f1") == keep.get("f1_interval") == by_hand
    assert keep.get("gap") == [(step, loss + 1) for step, loss in keep.get("val_loss")]
    assert len(keep.get("gap")) == 4
    assert trainer.metrics["gap"] == trainer.metrics["val_loss"] + 1
    assert keep.get("final") == [(16, 1.0)]


def test_what_is_logged_at_the_end_of_a_validation_can_be_followed():
    class Follows(AtEnds):
        def get_optimizers_schedulers(self, steps_per_epoch, epochs):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.0)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return [optimizer], [(plateau, "validation", "gap")]

    trainer = train(Follows(), **OPTIONS, epochs=2, sanity_val_steps=1)
    assert trainer.schedulers[0].scheduler.best == trainer.metrics["gap"]


# val_loss -----------------------------------------------------------------------------


class Returns(Line):
    """Returns its loss in some form."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def val_step(self, global_step, batch, device):
        return self.form(self, super().val_step(global_step, batch, device))

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.0)
        return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)]


VAL = {
    "a scalar": lambda module, loss: loss,
    "one element": lambda module, loss: loss.reshape(1),
    "one by one": lambda module, loss: (loss.reshape(1, 1), loss),
    "a float": lambda module, loss: loss.item(),
    "an array": lambda module, loss: loss.numpy(),
    "a scalar of numpy": lambda module, loss: numpy.float64(loss.item()),
    "logged": lambda module, loss: module.log(val_loss=loss),
    "logged and returned": lambda module, loss: (module.log(val_loss=loss), loss)[1],
}


@pytest.mark.parametrize("form", VAL)
def test_val_loss_in_any_form(form):
    trainer = train(Returns(VAL[form]), **OPTIONS)
    module = Line()
    hand = module.train_step(0, module.data.tensors, "cpu").item()
    assert trainer.metrics["val_loss"] == pytest.approx(hand, abs=1e-6)
    assert trainer.best.valid_loss == trainer.metrics["val_loss"] == trainer.schedulers[0].scheduler.best


def test_a_loss_logged_under_the_trainers_name_is_the_one_that_counts():
    class Twice(Line):
        def train_step(self, global_step, batch, device):
            loss = super().train_step(global_step, batch, device)
            self.log(train_loss=float(global_step))
            return loss

        def val_step(self, global_step, batch, device):
            self.log(val_loss=7.0)
            return super().train_step(global_step, batch, device)

    keep = Keep()
    trainer = train(Twice(), [keep], log_every="2 steps", **OPTIONS)
    assert keep.get("train_loss") == [(2, 1.5), (4, 3.5)]
    assert keep.get("val_loss") == [(4, 7.0)]
    assert (trainer.metrics["val_loss"], trainer.best.valid_loss) == (7, 7)


# Names that are taken -----------------------------------------------------------------


def module_that_logs(stage, **values):
    class Logs(Line):
        def log_in(self, now, batch):
            if now == stage:
                self.log(**values)
            return (self.net(batch[0]) - batch[1]).square().mean()

        def train_step(self, global_step, batch, device):
            return self.log_in("train", batch)

        def val_step(self, global_step, batch, device):
            return self.log_in("val", batch)

    return Logs()


@pytest.mark.parametrize(
    ("stage", "name", "said"),
    [
        ("train", "train_loss", "self.log(train_loss=…) in train takes the place of the mean that the loop logs"),
        ("val", "val_loss", "self.log(val_loss=…) in val takes the place of the mean that the loop logs"),
        (
            "train",
            "val_loss",
            "self.log(val_loss=…) in train is the loop's name for a loss of val: both are in one cur",
        ),
        ("val", "train_loss_epoch", "in val is the loop's name for a loss of train: both are in one curve"),
        ("train", "epoch", "self.log(epoch=…): records have the run's own counter of this name"),
        ("val", "seconds", "self.log(seconds=…): records have the run's own counter of this name"),
        ("train", "accuracy", ""),
    ],
)
def test_a_name_that_is_taken_is_said_once(stage, name, said, caplog):
    train(module_that_logs(stage, **{name: 1.0}), [Keep()], log_every="2 steps", epochs=2, **OPTIONS)
    assert [said in record.message for record in caplog.records] == [True] * bool(said)


@pytest.mark.parametrize("hook", ["on_end_val_epoch", "on_end_train_step"])
def test_a_name_that_a_plugin_logs_too_is_said_once(hook, caplog):
    @hookimpl
    def logs(self, trainer):
        trainer.log(accuracy=0.5)

    plugin = type("Logs", (CallbackInterface,), {hook: logs})()
    train(module_that_logs("val", accuracy=1.0), [Keep(), plugin], epochs=2, **OPTIONS)
    assert [record.message.partition(",")[0] for record in caplog.records] == [
        "accuracy is logged by the module and by a plugin (or by trainer.log)"
    ]
    caplog.clear()
    train(module_that_logs("val", score=1.0), [Keep(), plugin], epochs=2, **OPTIONS)
    assert not caplog.records


# Values that are not finite -----------------------------------------------------------


def told_not_finite(caplog):
    return [record.message.partition(" (said")[0].partition(",")[0] for record in caplog.records]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_said_once(bad, caplog):
    class Bad(Line):
        def train_step(self, global_step, batch, device):
            self.log(score=bad if global_step == 6 else 1.0)
            return super().train_step(global_step, batch, device) * (bad if global_step >= 3 else 1.0)

        def val_step(self, global_step, batch, device):
            return torch.ones(())

    trainer = train(Bad(), [Keep()], log_every="1 steps", epochs=2, **OPTIONS)
    assert trainer.status == "finished"
    assert told_not_finite(caplog) == [
        f"train_loss is {bad} at step 3", "train_loss_epoch is nan at step 4", f"score is {bad} at step 6",
    ]  # fmt: skip


def test_a_validation_and_a_run_without_loggers_say_it_too(caplog):
    class Spoilt(Line):
        def train_step(self, global_step, batch, device):
            return super().train_step(global_step, batch, device) * math.nan

    train(Spoilt(), epochs=2, **OPTIONS)
    assert told_not_finite(caplog)[0] == "val_loss is nan at step 4"
    caplog.clear()
    train(Spoilt(), evaluate_every=None, eval_when_finish=False, **OPTIONS)
    assert told_not_finite(caplog) == ["2 parameter(s) are not finite after training"]
    caplog.clear()
    train(Line(), **OPTIONS)
    assert not caplog.records


@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.parametrize("form", [lambda module, loss: None, lambda module, loss: {}, lambda module, loss: ("a", loss)])
def test_a_val_loss_that_never_comes_ends_the_run(form, sanity):
    with pytest.raises((ValueError, TypeError), match="the evaluation has no metric 'val_loss'|returned a dict"):
        train(Returns(form), **OPTIONS, sanity_val_steps=sanity)


# Plateaus -----------------------------------------------------------------------------


class Accuracy(Line):
    """A validation whose accuracy is 0.1, then 0.2 for ever, while its loss falls."""

    def __init__(self, *metric, mode="max", when="validation"):
        super().__init__()
        self.given, self.mode, self.when = metric, mode, when

    def val_step(self, global_step, batch, device):
        self.log(val_accuracy=[0.1, 0.2][min(self.trainer.epoch, 1)])
        return super().train_step(global_step, batch, device)

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, self.mode, 0.5, patience=0)
        return [optimizer], [(plateau, self.when, *self.given) if self.given else plateau]


@pytest.mark.parametrize("when", ["validation", "epoch"])
def test_a_plateau_follows_the_metric_that_is_named(when):
    trainer = train(Accuracy("val_accuracy", when=when), epochs=4, **OPTIONS)
    assert trainer.schedulers[0].scheduler.best == pytest.approx(0.2)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05 / 4


def test_a_plateau_that_cannot_be_meant_is_refused():
    with pytest.raises(
        ValueError, match="ReduceLROnPlateau\\(mode=\"max\"\\) would follow 'val_loss', which is best wh"
    ):
        train(Accuracy(), **OPTIONS)
    with pytest.raises(ValueError, match="ReduceLROnPlateau: the evaluation has no metric 'val_acc'; it has val_acc"):
        train(Accuracy("val_acc"), **OPTIONS)
    with pytest.raises(ValueError, match='follows a metric of an evaluation, so it moves after each "validation" or'):
        train(Accuracy("val_accuracy", when="step"), **OPTIONS)


def test_a_plateau_that_never_moves_is_said(caplog):
    train(Accuracy(mode="min"), evaluate_every=None, eval_when_finish=False, **OPTIONS)
    assert "ReduceLROnPlateau has never moved: it follows an evaluation, and there was none" in caplog.text


# Several loaders ----------------------------------------------------------------------


def test_several_validation_sets_have_values_of_their_own():
    class Two(Line):
        def get_val_dataloaders(self, sampler, batch_size):
            ones, twos = torch.full((10,), 1.0), torch.full((30,), 2.0)
            return {"one": DataLoader(ones, batch_size), "two": DataLoader(twos, batch_size)}

        def val_step(self, global_step, batch, device):
            self.log(double=batch.mean() * 2)
            return batch.mean()

    trainer = train(Two(), train_batch_size=10, val_batch_size=4, keep_loaders=True, epochs=2)
    assert trainer.metrics == {
        "val_loss": 1.75, "val_loss/one": 1.0, "val_loss/two": 2.0, "double/one": 2.0, "double/two": 4.0,
    }  # fmt: skip


# Ranks --------------------------------------------------------------------------------


class Ranked(CallbackInterface):
    """Keeps the loss of each step of this rank."""

    def __init__(self):
        self.losses = []

    def on_end_train_step(self, global_step, losses):
        self.losses += losses.reshape(-1).tolist()


def intervals():
    """Train on one of two ranks; return what was logged, and the losses of this rank."""
    torch.set_num_threads(1)
    keep, ranked = Keep(), Ranked()
    trainer = train(AtEnds(), {"ddp": {}, "keep": keep, "ranked": ranked}, log_every="2 steps", epochs=2, **OPTIONS)
    names = ("train_loss", "train_loss_epoch", "gap", "f1", "final")
    return {name: keep.get(name) for name in names}, ranked.losses, trainer.metrics


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_an_interval_is_of_all_ranks():
    (logged, mine, metrics), (of_other, others, of_others) = two(intervals)
    assert metrics == of_others
    means = [(a + b) / 2 for a, b in zip(mine, others, strict=True)]
    pairs = [(step, (means[step - 2] + means[step - 1]) / 2) for step in (2, 4, 6, 8)]
    for rank in (logged, of_other):
        for (step, value), (at, hand) in zip(rank["train_loss"], pairs, strict=True):
            assert (step, value) == (at, pytest.approx(hand, abs=1e-6))
        assert rank["train_loss_epoch"][0][1] == pytest.approx(sum(means[:4]) / 4, abs=1e-6)
        assert rank["f1"] == [(4, 0.0), (8, 1.0)]
        assert rank["final"] == [(8, 1.0)]
        assert rank["gap"][-1] == (8, metrics["val_loss"] + 1)
    assert not math.isclose(means[0], mine[0])
