"""Small programs, run by Lightning's own trainer and by this one: events, counters, values and weights are the same."""

import math
import warnings
from dataclasses import dataclass

import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hookline_lightning
from hookline.testing import digest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.plugins,
    pytest.mark.filterwarnings("ignore"),  # its own, of many kinds
]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lightning", reason="the real package is in an environment of its own: nox -s lightning")
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import EarlyStopping

QUIET = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False, "log_every_n_steps": 3}
REAL = {**QUIET, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


# What is compared ---------------------------------------------------------------------

EVENTS = [
    "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad",
    "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end",
    "on_train_epoch_end", "on_train_end", "on_fit_end", "on_validation_start", "on_validation_epoch_start",
    "on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end",
]  # fmt: skip
OF_CALLBACKS = [*EVENTS, "on_sanity_check_start", "on_sanity_check_end"]
WITHIN = [event for event in EVENTS if event.startswith(("on_before", "on_after", "on_train_batch"))]


def note_of(trainer, module, event, rest):
    """Return what the trainer says of itself in a hook."""
    note = {
        "event": event, "numbers": [one for one in rest if isinstance(one, int)],
        "at": (trainer.current_epoch, trainer.global_step), "should_stop": trainer.should_stop,
        "stages": (trainer.training, trainer.validating, trainer.sanity_checking, trainer.testing, module.training),
        "state": [trainer.state.fn == "fit", trainer.state.stage == "train", trainer.state.stage == "sanity_check"],
        "intervals": (trainer.val_check_interval, trainer.check_val_every_n_epoch),
        "rates": [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups],
        "values": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "bar": dict(trainer.progress_bar_metrics), "logged": logged_of(trainer),
    }  # fmt: skip
    if event in WITHIN:
        gradients = [one.grad for one in module.parameters()]
        note["gradients"] = [None if one is None else one.abs().sum().item() for one in gradients]
        note["last"] = trainer.is_last_batch
    if event == "on_train_batch_end":
        note["outputs"] = {name: float(value) for name, value in rest[0].items()}
    return note


def logged_of(trainer):
    """Return what trackers see, without the loss that the run logs here by itself."""
    own = {"loss_epoch", "loss"} - trainer.callback_metrics.keys()
    return {name: value.item() for name, value in trainer.logged_metrics.items() if name not in own}


def noting(events, of_callback):
    """Return methods that note each event, then do what the class does in it."""

    def method(event):
        def hear(self, *arguments):
            trainer, module, *rest = arguments if of_callback else (self.trainer, self, *arguments)
            self.notes.append(note_of(trainer, module, event, rest))
            return None if of_callback else getattr(super(type(self), self), event, lambda *_: None)(*rest)

        return hear

    return {event: method(event) for event in events}


def run(kind, make, data, callbacks=(), **options):
    """Train by one of the trainers; return what there was to see."""
    torch.manual_seed(3)
    module = type(make.__name__, (make,), noting(EVENTS, of_callback=False))()
    callback = type("Noting", (pl.Callback,), noting(OF_CALLBACKS, of_callback=True))()
    module.notes, callback.notes = [], []
    callbacks = [callback, *(made() for made in callbacks)]
    ours = kind is hookline_lightning.Trainer
    trainer = kind(**{"max_epochs": 2, **(QUIET if ours else REAL), **options}, callbacks=callbacks)
    trainer.fit(module, *(given() for given in data))
    return {
        "callback": callback.notes, "module": module.notes, "mine": module.mine,
        "weights": digest(module.state_dict()),
        "stopped": [(one.stopped_epoch, one.wait_count) for one in callbacks if isinstance(one, EarlyStopping)],
        "values": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "logged": logged_of(trainer),
    }  # fmt: skip


def assert_same(theirs, ours, where=""):
    """Assert that all is alike, numbers but for rounding."""
    if isinstance(theirs, dict):
        assert sorted(theirs) == sorted(ours), where
        theirs, ours = ([one[key] for key in sorted(one)] for one in (theirs, ours))
    if isinstance(theirs, (list, tuple)):
        assert len(theirs) == len(ours), where
        for index, (one, other) in enumerate(zip(theirs, ours, strict=True)):
            assert_same(one, other, f"{where}/{index}")
    elif isinstance(theirs, float) and isinstance(ours, float):
        assert math.isclose(theirs, ours, rel_tol=1e-5, abs_tol=1e-6), f"{where}: {theirs} there, {ours} here"
    else:
        assert theirs == ours, f"{where}: {theirs} there, {ours} here"


def compare(make, data, **options):
    theirs, ours = (run(kind, make, data, **options) for kind in (pl.Trainer, hookline_lightning.Trainer))
    for who in ("callback", "module"):
        assert [(note["event"], note["numbers"]) for note in ours[who]] == [
            (note["event"], note["numbers"]) for note in theirs[who]
        ]
        for place, (expected, seen) in enumerate(zip(theirs[who], ours[who], strict=True)):
            for key in expected:
                assert_same(expected[key], seen[key], f"{who}, event {place}, {expected['event']}: {key}")
    for key in ("mine", "weights", "stopped", "values", "logged"):
        assert_same(theirs[key], ours[key], key)


def numbers(size=10, batch=4, **options):
    rows = torch.arange(8.0 * size).reshape(size, 8) / (8 * size)
    return lambda: DataLoader(TensorDataset(rows), batch, **options)


TRAIN, EVEN, LONG, VAL = numbers(), numbers(16), numbers(28), numbers(6, 3)

# Programs -----------------------------------------------------------------------------


class Line(pl.LightningModule):
    """A line that logs a value in each way."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 1)
        self.mine = []

    def loss(self, batch):
        return (self.net(batch[0]) - 1).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train", loss, prog_bar=True)
        self.log("both", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.loss(batch))

    def on_train_epoch_end(self):
        self.log("end", float(self.current_epoch))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}]


class Schedules(Line):
    """Moves two schedulers itself, and one of them every other batch."""

    def lr_scheduler_step(self, scheduler, metric):
        self.mine.append((self.global_step, self.current_epoch, metric))
        scheduler.step()

    def configure_optimizers(self):
        kinds, optimizer = torch.optim.lr_scheduler, torch.optim.SGD(self.parameters(), lr=0.1)
        steps = {"scheduler": kinds.StepLR(optimizer, 1, 0.9), "interval": "step", "frequency": 2}
        return [optimizer], [steps, {"scheduler": kinds.ExponentialLR(optimizer, 0.5)}]


class Plateau(Line):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **self.looks}}

    looks = {"monitor": "train"}


class PlateauOfSteps(Plateau):
    looks = {"monitor": "both_step", "interval": "step", "frequency": 2}


class PlateauOfTheEnd(Plateau):
    looks = {"monitor": "end"}


class Skips(Line):
    """Returns None for a batch in three, with a scheduler that moves all the same."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class StepsItself(Line):
    """Steps in automatic optimisation, and returns None: a step beside that of the trainer."""

    def training_step(self, batch, batch_idx):
        optimizer, loss = self.optimizers(), self.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        self.log("train", loss)


class LeavesGradients(Line):
    """Steps in automatic optimisation, leaves its gradients, and returns a loss."""

    def training_step(self, batch, batch_idx):
        self.loss(batch).backward()
        self.optimizers().step()
        return super().training_step(batch, batch_idx)


class OwnStep(Line):
    """Steps several times on one batch, each with a forward and a backward, and sets the rate behind it."""

    times = 1

    def training_step(self, batch, batch_idx):
        self.mine.append(f"step {batch_idx}")
        return super().training_step(batch, batch_idx)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        self.mine.append((epoch, batch_idx, self.global_step))
        for _ in range(self.times):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9

    configure_optimizers = Skips.configure_optimizers


class FourSteps(OwnStep):
    times = 4


class StepsEveryOther(Line):
    """Does without its optimizer for every other batch, and clips and goes backward itself."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.mine.append((gradient_clip_val, gradient_clip_algorithm == "value"))
        self.clip_gradients(optimizer)

    def backward(self, loss):
        self.mine.append("backward")
        loss.backward()


class KeepsGradients(Line):
    """Clears gradients before every other batch alone, and not before a validation."""

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        self.mine.append((epoch, batch_idx))
        if batch_idx % 2 == 0:
            optimizer.zero_grad()


class Lbfgs(Line):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Manual(Line):
    """Two networks in turn; the overrides are those that Lightning leaves alone in manual optimisation."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization, self.other = False, nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        for optimizer, net in zip(self.optimizers(), (self.net, self.other), strict=True):
            self.toggle_optimizer(optimizer)
            loss = (net(batch[0]) - 1).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            self.mine.append(self.global_step)
        self.log("train", loss)
        if self.trainer.is_last_batch:
            for scheduler in self.lr_schedulers():
                scheduler.step()

    def optimizer_step(self, *arguments):
        raise AssertionError

    optimizer_zero_grad = lr_scheduler_step = configure_gradient_clipping = optimizer_step

    def configure_optimizers(self):
        made = [torch.optim.Adam(part.parameters(), lr=0.1) for part in (self.net, self.other)]
        return made, [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in made]


class Accumulates(Manual):
    """Steps behind every third batch; a validation in between clears the gradients."""

    def training_step(self, batch, batch_idx):
        optimizer, loss = self.optimizers()[0], self.loss(batch)
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss)
        if batch_idx % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
        return {"loss": loss, "more": 1}

    def backward(self, loss, *arguments, **options):
        self.mine.append(sorted(options))
        loss.backward(*arguments, **options)


class AccumulatesOn(Accumulates):
    def on_validation_model_zero_grad(self):
        self.mine.append("kept")


class Metrics(Line):
    """Objects of torchmetrics of all kinds, read by hand where they are complete."""

    def __init__(self):
        super().__init__()
        mean = torchmetrics.MeanMetric
        self.val_mean, self.mean, self.mean_of_both, self.best = mean(), mean(), mean(), torchmetrics.MaxMetric()
        self.listed, self.named = nn.ModuleList([mean(), mean()]), nn.ModuleDict({"a": mean()})
        errors = {"mse": torchmetrics.MeanSquaredError(), "mae": torchmetrics.MeanAbsoluteError()}
        self.errors = torchmetrics.MetricCollection(errors, prefix="v_")

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.mean(loss)
        self.mean_of_both(loss)
        self.log("mean", self.mean)
        self.log("mean_of_both", self.mean_of_both, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_start(self):
        self.mine.append([one.update_count for one in (self.mean, self.mean_of_both, self.val_mean, self.best)])

    def on_train_epoch_end(self):
        self.mine.append([self.mean.compute().item(), self.mean_of_both.compute().item()])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        predicted = self.net(batch[0])
        loss = (predicted - 1).square().mean()
        self.val_mean(loss)
        self.listed[dataloader_idx](loss)
        self.named["a"].update(loss + 1)
        self.errors(predicted, torch.ones_like(predicted))
        self.log("val_mean", self.val_mean)
        self.log("listed", self.listed[dataloader_idx])
        self.log("a", self.named["a"], on_step=True, on_epoch=True)
        self.log_dict(self.errors)

    def on_validation_epoch_end(self):
        value = self.val_mean.compute()
        self.best(value)
        self.log("best", self.best.compute())
        self.log("best_object", self.best)
        self.mine.append(value.item())

    def on_validation_end(self):
        self.mine.append(self.val_mean.update_count)


class Values(Line):
    """Values of all reductions and weights, from all hooks within a batch and at the ends."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        for name, reduce in {"avg": "AVG", "most": max, "least": torch.min, "sum": "sum"}.items():
            self.log(name, loss, reduce_fx=reduce, on_epoch=True)
        self.log("hidden", loss, logger=False)
        self.log("shown", loss, logger=False, on_epoch=True, on_step=False, prog_bar=True)
        self.log("number", 3)
        self.log("weighted", loss, batch_size=batch_idx + 1, on_epoch=True)
        self.log("loss", loss * 2)
        self.log_dict({"one": loss, "other": torch.tensor([1])}, on_step=True, on_epoch=True, prog_bar=True)
        return {"loss": loss, "more": 1}

    def on_train_start(self):
        self.log("at_start", 1.5)

    def on_before_optimizer_step(self, optimizer):
        self.log("norm", self.net.weight.grad.norm(), on_epoch=True)

    def on_after_backward(self):
        self.log("behind_backward", 2.0)

    def on_train_batch_start(self, batch, batch_idx):
        self.log("before", batch[0].mean(), on_epoch=True)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("behind", batch[0].mean(), on_epoch=True)

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.loss(batch))
        self.log("both", self.loss(batch), on_step=True, on_epoch=True)
        self.log("again", self.loss(batch))

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        self.log("behind_val", batch[0].mean())

    def on_validation_epoch_end(self):
        self.log("of_epoch", self.trainer.callback_metrics["again"] * 2)
        self.log("again", 7.0)


@dataclass
class Sample:
    name: str
    rows: torch.Tensor


FORMS = {  # how a batch is made of its rows, and the rows found in it
    "mapping": (lambda rows: {"name": "x", "rows": rows}, lambda batch: batch["rows"]),
    "number first": (lambda rows: (torch.tensor(1.0), rows), lambda batch: batch[1]),
    "nested": (lambda rows: ({"k": [["a", None], (rows,)]},), lambda batch: batch[0]["k"][1][0]),
    "dataclass": (lambda rows: Sample("x", rows), lambda batch: batch.rows),
    "columns": (lambda rows: (rows.T.contiguous(),), lambda batch: batch[0].T),
    "list": (list, torch.stack),
    "two sizes": (lambda rows: [torch.zeros(3, 2), rows], lambda batch: batch[1]),
}


class Formed(Line):
    def training_step(self, batch, batch_idx):
        rows = self.rows_in(batch)
        self.log("train", rows.mean(), on_epoch=True)
        return self.net(rows).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.rows_in(batch).mean())


class Stops(Line):
    """Asks for the end in the middle of an epoch."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.trainer.should_stop = self.trainer.should_stop or (self.current_epoch, batch_idx) == (1, 0)


# The table ----------------------------------------------------------------------------

CLIP = {"gradient_clip_val": 0.2, "gradient_clip_algorithm": "value"}
TWO = {"accumulate_grad_batches": 2}
ENDLESS = {"max_epochs": -1}


@pytest.mark.parametrize(
    ("make", "data", "options"),
    [
        (Line, (TRAIN, VAL), {}),
        (Line, (TRAIN,), {}),
        (Line, (EVEN, VAL), TWO),
        (Line, (LONG, VAL), {**TWO, "val_check_interval": 4}),
        (Line, (TRAIN, VAL), {"num_sanity_val_steps": 0}),
        (Line, (TRAIN, VAL), {"max_steps": 4, "max_epochs": 5}),
        (Line, (TRAIN, VAL), {"val_check_interval": 2}),
        (Line, (LONG, VAL), {"val_check_interval": 0.4}),
        (Line, (LONG, VAL), {"val_check_interval": 0.4, "check_val_every_n_epoch": 2}),
        (Line, (LONG, VAL), {"val_check_interval": 5, "check_val_every_n_epoch": None}),
        (Line, (TRAIN, VAL), {"check_val_every_n_epoch": 2, "max_epochs": 3}),
        (Line, (LONG, LONG), {"limit_train_batches": 0.5, "limit_val_batches": 0.4, "val_check_interval": 0.5}),
        (Line, (LONG, LONG), {"limit_train_batches": 2, "limit_val_batches": 1}),
        (Line, (numbers(28, shuffle=True), LONG), {"overfit_batches": 0.3}),
        (Line, (LONG, VAL), {"overfit_batches": 1}),
        (Stops, (TRAIN, VAL), {"max_epochs": 5}),
        (Schedules, (TRAIN, VAL), {}),
        (Schedules, (EVEN, VAL), TWO),
        (Plateau, (TRAIN, VAL), {"max_epochs": 4}),
        (PlateauOfSteps, (TRAIN, VAL), {}),
        (PlateauOfTheEnd, (TRAIN, VAL), {"max_epochs": 4}),
        (LeavesGradients, (TRAIN, VAL), {}),
        (OwnStep, (TRAIN, VAL), {}),
        (OwnStep, (EVEN,), {**TWO, **CLIP}),
        (FourSteps, (TRAIN, VAL), {}),
        (StepsEveryOther, (EVEN,), CLIP),
        (KeepsGradients, (EVEN,), {}),
        (KeepsGradients, (numbers(32), VAL), TWO),
        (Lbfgs, (TRAIN, VAL), {}),
        (Manual, (TRAIN, VAL), {}),
        (Manual, (TRAIN, VAL), {"max_steps": 7, **ENDLESS}),
        (Accumulates, (TRAIN, VAL), {"max_steps": 2, **ENDLESS}),
        (Accumulates, (TRAIN, VAL), {"val_check_interval": 2}),
        (AccumulatesOn, (TRAIN, VAL), {"val_check_interval": 2}),
        (Metrics, (TRAIN, VAL), {}),
        (Values, (TRAIN, VAL), {}),
        (Values, (EVEN, VAL), TWO),
    ],
    ids=lambda given: given.__name__ if isinstance(given, type) else str(given) if isinstance(given, dict) else "",
)
def test_events_counters_values_and_weights_are_those_of_lightnings_own_trainer(make, data, options):
    compare(make, data, **options)


@pytest.mark.parametrize("make", [Skips, StepsItself])
def test_a_step_without_a_loss_is_that_of_lightnings_own_trainer(make, monkeypatch):
    monkeypatch.setattr(f"{__name__}.WITHIN", [])  # gradients are zero here, and None there
    compare(make, (TRAIN, VAL))
    compare(make, (EVEN,), **TWO)
    compare(make, (TRAIN,), gradient_clip_val=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_means_weigh_batches_of_all_forms_as_lightning_does(form):
    collate, found = FORMS[form]
    data = numbers(collate_fn=lambda samples: collate(torch.stack([row for (row,) in samples])))
    compare(type("Formed", (Formed,), {"rows_in": staticmethod(found)}), (data, data))


@pytest.mark.parametrize("metric", ["val", "train", "both", "both_epoch", "end"])
@pytest.mark.parametrize(
    "intervals",
    [
        {}, {"val_check_interval": 2}, {"val_check_interval": 1 / 3}, {"check_val_every_n_epoch": 2},
        {"val_check_interval": 5, "check_val_every_n_epoch": None},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("at_epoch_end", [None, True])
def test_early_stopping_looks_when_and_at_what_it_does_there(metric, intervals, at_epoch_end):
    def stopping():
        return EarlyStopping(metric, patience=1, min_delta=0.5, check_on_train_epoch_end=at_epoch_end)

    def tried(kind):
        try:
            run(kind, Line, (TRAIN, VAL), [stopping], max_epochs=8, **intervals)
        except RuntimeError as error:
            return str(error)
        return ""

    refused = tried(pl.Trainer)  # where the value is not there yet
    if refused:
        assert tried(hookline_lightning.Trainer) == refused
    else:
        compare(Line, (TRAIN, VAL), callbacks=[stopping], max_epochs=8, **intervals)


class Loaders(Metrics):
    """Several loaders: the names have their numbers; one object for all of them covers those before, too."""

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.mine.append(sorted(self.trainer.callback_metrics) if not self.trainer.sanity_checking else None)


def test_values_of_several_loaders_are_those_of_lightnings_own_trainer():
    data = (TRAIN, lambda: [VAL(), TRAIN()])
    theirs, ours = (run(kind, Loaders, data) for kind in (pl.Trainer, hookline_lightning.Trainer))
    for key in ("mine", "weights", "values", "logged"):
        assert_same(theirs[key], ours[key], key)
    assert [(note["event"], note["numbers"]) for note in ours["module"]] == [
        (note["event"], note["numbers"]) for note in theirs["module"]
    ]
