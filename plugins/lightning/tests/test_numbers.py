"""What programs for today's Lightning compute and see, by arithmetic; with the real package test_differential.py."""

import copy

import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import hookline
from hookline.testing import TinyModule, run_ranks
from hookline_lightning import Callback, Lightning, LightningDataModule, LightningModule, Trainer

pytestmark = pytest.mark.plugins  # its trainer names those of the house
QUIET = {"enable_progress_bar": False, "logger": False, "num_sanity_val_steps": 0, "enable_checkpointing": False}


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def ones(number=4, batch=1):
    """Give rows of two ones: the gradient of the sum of the outputs of `Plain` is one for each row and weight."""
    return DataLoader(TensorDataset(torch.ones(number, 2), torch.arange(float(number))), batch)


class Plain(LightningModule):
    """Two weights from zero on, whose loss is the sum of the outputs: a step of rate 1 takes the rows from each."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(self.net.weight)
        self.seen = []

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    @property
    def weight(self):
        return self.net.weight[0, 0].item()


def fit(module, *data, **options):
    trainer = Trainer(**{"max_epochs": 1, **QUIET, **options})
    trainer.fit(module, *(data or [ones()]))
    return trainer


def items(values):
    return {name: round(value.item(), 4) for name, value in values.items()}


# Steps ------------------------------------------------------------------------------------


def test_optimizer_step_is_left_alone_in_manual_optimisation():
    class Manual(Plain):
        automatic_optimization = False

        def training_step(self, batch):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.net(batch[0]).sum())
            optimizer.step()

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            raise AssertionError

    fit(module := Manual(), ones(3))
    assert module.weight == -3.0


@pytest.mark.parametrize(("clip", "weight"), [(None, -5.0), (0.5, -2.5)])
@pytest.mark.parametrize("window", [1, 2])
def test_a_step_of_the_modules_own_in_automatic_optimisation_counts_though_none_is_returned(clip, weight, window):
    class Steps(Plain):
        def training_step(self, batch):
            self.net(batch[0]).sum().backward()
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()

    trainer = fit(
        module := Steps(), ones(5), gradient_clip_val=clip, gradient_clip_algorithm="value",
        accumulate_grad_batches=window,
    )  # fmt: skip
    assert module.weight == weight
    assert trainer.core.counters.skipped_steps == -(-5 // window)


def test_a_step_of_the_modules_own_beside_a_scaler_is_refused():
    class Steps(Plain):
        def training_step(self, batch):
            self.net(batch[0]).sum().backward()
            self.optimizers().step()

    with pytest.raises(
        ValueError, match="in automatic optimisation, and the plugin amp, which does backward in a way of"
    ):
        fit(Steps(), precision="16-mixed", accelerator="cpu")


def test_a_short_last_window_weighs_less_as_in_lightning():
    fit(module := Plain(), ones(5), accumulate_grad_batches=2)
    assert module.weight == -2.5
    module = Plain()
    module.train_dataloader = lambda: ones(5)
    hookline.Trainer(module, {"lightning": {}, "accumulate": {"steps": 2}}, epochs=1).train()
    assert module.weight == -3.0  # the plugin's own way: a mean of each window


def test_gradients_that_training_step_leaves_do_not_join_those_of_its_loss():
    class Leaves(Plain):
        def training_step(self, batch):
            (100 * self.net(batch[0]).sum()).backward()
            return self.net(batch[0]).sum()

    fit(module := Leaves())
    assert module.weight == -4.0


class Closing(Plain):
    """Calls its closure, and steps, as often as it is told to."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    def training_step(self, batch, batch_idx):
        self.seen.append("step")
        return self.net(batch[0]).square().sum() + self.net(batch[0]).sum()

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        self.seen.append(f"optimizer {batch_idx}")
        for _ in range(self.times):
            optimizer.step(closure=optimizer_closure)

    def on_train_batch_start(self, batch, batch_idx):
        self.seen.append(f"start {batch_idx}")

    def on_before_optimizer_step(self, optimizer):
        self.seen.append("before")

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"}]


@pytest.mark.parametrize("times", [1, 3])
def test_each_step_of_an_optimizer_step_has_a_forward_of_its_own_and_the_schedule_moves_once(times):
    fit(module := Closing(times), ones(2))
    weight, rate = 0.0, 0.1
    for _ in range(2):
        for _ in range(times):
            weight -= rate * (2 * 2 * weight + 1)  # both weights are alike
        rate /= 2
    assert module.weight == pytest.approx(weight)
    once = ["step", "before"] * times
    assert module.seen == ["start 0", "optimizer 0", *once, "start 1", "optimizer 1", *once]


def test_an_optimizer_step_goes_through_the_scaler():
    class Warms(Plain):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer.step(closure=optimizer_closure)
            optimizer.param_groups[0]["lr"] = 0.5

    trainer = fit(module := Warms(), precision="16-mixed", accelerator="cpu")
    skipped = trainer.core.counters.skipped_steps  # by the scaler, which looks for its scale
    assert module.weight == (-2.5 if not skipped else -0.5 * (4 - skipped))


def test_a_closure_that_is_not_called_or_called_twice_in_a_window_is_an_error():
    with pytest.raises(ValueError, match=r"optimizer_step has not called its closure.*optimizer\.step\(closure=opt"):
        fit(Closing(0))
    with pytest.raises(ValueError, match="calls its closure again in a window of 2 micro-batches"):
        fit(Closing(2), accumulate_grad_batches=2)
    with pytest.raises(ValueError, match="optimizer_step of a module, or LBFGS, and the plugin sam, which does run_wi"):
        fit(Closing(1), plugins={"sam": {}})


def test_lbfgs_trains_in_automatic_optimisation_as_in_a_loop_by_hand():
    class Lbfgs(Closing):
        optimizer_step = LightningModule.__dict__.get("optimizer_step")

        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=3)

    fit(module := Lbfgs(1), ones(4, 2))
    by_hand = Lbfgs(1)
    optimizer = by_hand.configure_optimizers()
    for batch in ones(4, 2):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = by_hand.training_step(batch, 0)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert module.weight == by_hand.weight != 0


def test_an_average_in_on_before_zero_grad_lags_by_a_step_and_sees_its_gradients():
    class Averages(Plain):
        def on_before_zero_grad(self, optimizer):
            gradient = self.net.weight.grad
            self.seen.append((self.weight, None if gradient is None else gradient[0, 0].item()))

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.seen.append((outputs["loss"].item(), self.net.weight.grad[0, 0].item()))

    fit(module := Averages(), ones(2))
    assert module.seen == [(0.0, None), (0.0, 1.0), (-1.0, 1.0), (-2.0, 1.0)]


def test_optimizer_zero_grad_may_keep_gradients():
    class Keeps(Plain):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            if batch_idx % 2 == 0:
                optimizer.zero_grad()

    fit(module := Keeps())
    assert module.weight == -(1 + 2 + 1 + 2)


@pytest.mark.parametrize("keeps", [False, True])
def test_a_validation_clears_gradients_that_wait_unless_the_module_keeps_them(keeps):
    class Waits(Plain):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.net(batch[0]).sum())
            if batch_idx % 3 == 2:
                self.optimizers().step()

        def validation_step(self, batch, batch_idx):
            pass

        def on_validation_model_zero_grad(self):
            if not keeps:
                self.zero_grad()

    fit(module := Waits(), ones(3), ones(1), val_check_interval=2)
    assert module.weight == (-3.0 if keeps else -1.0)


@pytest.mark.parametrize(("every", "max_steps", "batches"), [(1, 5, 3), (3, 2, 6)])
def test_steps_of_manual_optimisation_are_counted_and_limited_by_optimizer(every, max_steps, batches):
    class Two(Plain):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.net(batch[0]).sum())
            if batch_idx % every == every - 1:
                for optimizer in self.optimizers() if every == 1 else self.optimizers()[:1]:
                    optimizer.step()
                    self.seen.append(self.global_step)

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=1.0) for _ in range(2)]

    trainer = fit(module := Two(), ones(6), max_steps=max_steps, max_epochs=-1)
    assert (trainer.core.global_step, trainer.core.status) == (batches, "finished")
    assert module.seen == [*range(1, max_steps + 1 + (every == 1))]


def test_manual_backward_hands_its_arguments_to_the_modules_backward():
    class Backs(Plain):
        automatic_optimization = False

        def training_step(self, batch):
            self.manual_backward(self.net(batch[0]).sum(), retain_graph=True)

        def backward(self, loss, **options):
            self.seen.append(options)

    fit(module := Backs(), ones(1))
    assert module.seen == [{"retain_graph": True}]


def test_clip_gradients_without_a_value_takes_that_of_the_trainer():
    class Clips(Plain):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.clip_gradients(optimizer)

    fit(module := Clips(), gradient_clip_val=0.25, gradient_clip_algorithm="value")
    assert module.weight == -1.0


# Where the run is -------------------------------------------------------------------------


def test_what_the_trainer_says_of_its_place_is_right_in_each_hook():
    class Says(Plain):
        def on_train_batch_start(self, batch, batch_idx):
            self.say("start", batch_idx)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.say("end", batch_idx)

        def lr_scheduler_step(self, scheduler, metric):
            self.say("schedule")
            scheduler.step()

        def say(self, *what):
            self.seen.append((*what, self.global_step, self.trainer.is_last_batch))

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "step"}]

    fit(module := Says(), accumulate_grad_batches=2)
    assert module.seen == [
        ("start", 0, 0, False), ("end", 0, 0, False),
        ("start", 1, 0, False), ("schedule", 1, False), ("end", 1, 1, False),
        ("start", 2, 1, False), ("end", 2, 1, False),
        ("start", 3, 1, True), ("schedule", 2, True), ("end", 3, 2, True),
    ]  # fmt: skip


def test_the_last_batch_of_a_stream_is_not_known():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from ones()

    class Asks(Plain):
        def training_step(self, batch, batch_idx):
            self.seen.append(self.trainer.is_last_batch)
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match=r"is_last_batch: the training loader does not tell .*limit_train_batches"):
        fit(Asks(), DataLoader(Stream(), None))
    fit(module := Asks(), DataLoader(Stream(), None), limit_train_batches=2)
    assert module.seen == [False, True]


@pytest.mark.parametrize(("frequency", "rates"), [(2, [1, 0.5]), (3, [1, 1]), (4, [1, 1])])
def test_a_frequency_of_steps_counts_batches(frequency, rates):
    class Rates(Plain):
        def on_before_optimizer_step(self, optimizer):
            self.seen.append(optimizer.param_groups[0]["lr"])

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": frequency}]

    fit(module := Rates(), accumulate_grad_batches=2)
    assert module.seen == rates


def test_a_rate_of_epochs_falls_before_the_validation_and_a_skipped_batch_moves_that_of_steps():
    class Falls(Plain):
        interval = "epoch"

        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.seen.append(self.optimizers().param_groups[0]["lr"])

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": self.interval}]

    class OfSteps(Falls):
        interval = "step"

    for make, rates in ((Falls, [0.5, 0.25]), (OfSteps, [0.0625, 0.0625**2])):
        fit(module := make(), ones(), ones(1), max_epochs=2)
        assert module.seen == rates


def test_an_evaluation_behind_training_is_at_its_end():
    class Tests(Plain):
        def test_step(self, batch, batch_idx):
            self.log("tested", 1.0)
            self.seen.append((self.current_epoch, self.global_step))

    trainer = fit(module := Tests(), ones(3), max_epochs=2)
    trainer.test(module, ones(1))
    assert module.seen == [(2, 6)]
    assert items(trainer.callback_metrics) == {"tested": 1.0}  # those of training are gone, as there


def test_training_starts_behind_the_sanity_check_which_a_run_that_goes_on_has_not():
    class Orders(Plain):
        def on_fit_start(self):
            self.seen.append("fit")

        def on_train_start(self):
            self.seen.append("start")

        def validation_step(self, batch, batch_idx):
            view = self.trainer
            self.seen.append((view.sanity_checking, view.validating, view.training, view.state.stage))

    check, validation = (True, False, False, "sanity_check"), (False, True, False, "validate")
    options = {"num_sanity_val_steps": 1, "enable_checkpointing": True}
    fit(module := Orders(), ones(), ones(1), **options)
    assert module.seen == ["fit", check, "start", validation]
    Trainer(max_epochs=2, **QUIET | options).fit(module := Orders(), ones(), ones(1), ckpt_path="last")
    assert module.seen == ["fit", "start", validation]


def test_an_epoch_that_is_cut_short_ends_and_is_validated_where_somebody_asks_for_the_end():
    class Cut(Plain):
        def training_step(self, batch, batch_idx):
            self.log("mean", batch[1].mean(), on_step=False, on_epoch=True)
            self.trainer.should_stop = batch_idx == self.stops
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.seen.append("validated")

        def on_train_epoch_end(self):
            self.seen.append(items(self.trainer.callback_metrics))

        def on_train_end(self):
            self.seen.append(self.current_epoch)

    for stops, more, validated in ((2, {}, ["validated"]), (9, {"max_steps": 3}, [])):
        module = Cut()
        module.stops = stops
        fit(module, ones(), ones(1), **more)
        assert module.seen == [*validated, {"mean": 1.0}, 1]  # of 0, 1 and 2


# When it validates ------------------------------------------------------------------------


class Validates(Plain):
    def validation_step(self, batch, batch_idx):
        self.log("val", 1.0)

    def on_validation_end(self):
        self.seen.append((self.current_epoch, self.trainer.core.global_step))


@pytest.mark.parametrize(
    ("given", "at"),
    [
        ({}, [7, 14]),
        ({"val_check_interval": 3}, [3, 6, 10, 13]),  # counted anew in each epoch
        ({"val_check_interval": 0.45}, [3, 6, 10, 13]),  # of 7 batches 3, as 3.15 is rounded down
        ({"val_check_interval": 0.1}, [*range(1, 15)]),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, [3, 6, 9, 12]),
        ({"val_check_interval": 10, "check_val_every_n_epoch": None}, [10]),
        ({"check_val_every_n_epoch": 2}, [14]),
        ({"val_check_interval": 3, "check_val_every_n_epoch": 2}, [10, 13]),
        ({"val_check_interval": 0.5, "limit_train_batches": 4}, [2, 4, 6, 8]),
        ({"limit_val_batches": 0, "val_check_interval": 3}, []),
    ],
)
def test_validation_comes_when_it_does_in_lightning(given, at):
    fit(module := Validates(), ones(7), ones(1), max_epochs=2, **given)
    assert [step for _, step in module.seen] == at


class Counts(Plain):
    def training_step(self, batch, batch_idx):
        self.seen.append(("train", *batch[1].tolist()))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.seen.append(("val", *batch[1].tolist()))


@pytest.mark.parametrize(
    ("given", "train", "val"),
    [
        ({"limit_train_batches": 0.5, "limit_val_batches": 0.7}, [0, 1, 2], [0, 1]),  # of 7 and 3 batches
        ({"limit_train_batches": 2, "limit_val_batches": 0.34}, [0, 1], [0]),
        ({"overfit_batches": 2}, [0, 1], [0, 1]),
        ({"overfit_batches": 0.5}, [0, 1, 2], [0]),
    ],
)
def test_parts_of_loaders_are_rounded_down_and_overfitting_leaves_validation_its_data(given, train, val):
    shuffled = DataLoader(ones(7).dataset, 1, shuffle="overfit_batches" in given)
    fit(module := Counts(), shuffled, DataLoader(TensorDataset(torch.ones(3, 2), torch.arange(3.0) + 10), 1), **given)
    assert module.seen == [*(("train", one) for one in train), *(("val", one + 10) for one in val)]


def test_a_part_of_a_loader_that_is_no_batch_is_refused():
    with pytest.raises(ValueError, match="limit_train_batches=0.1 of 4 batches is less than one; one is 0.25"):
        fit(Counts(), limit_train_batches=0.1)


class Early(Callback):
    """Stops at the second look, as Lightning's own does with a patience of 1 for a value that stays."""

    def setup(self, trainer, pl_module, stage):
        self.each = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1

    def on_train_epoch_end(self, trainer, pl_module):
        self.look(trainer, self.each)

    def on_validation_end(self, trainer, pl_module):
        self.look(trainer, not self.each)

    def look(self, trainer, mine):
        if mine:
            assert trainer.callback_metrics["val"] == 1.0
            trainer.should_stop = hasattr(self, "looked")
            self.looked = True


@pytest.mark.parametrize(
    ("given", "steps"),
    [({}, 14), ({"val_check_interval": 0.3}, 4), ({"val_check_interval": 3}, 6), ({"check_val_every_n_epoch": 2}, 28)],
)
def test_a_callback_that_stops_by_a_value_looks_when_there_is_one(given, steps):
    trainer = fit(Validates(), ones(7), ones(1), max_epochs=9, callbacks=[Early()], **given)
    assert trainer.core.global_step == steps


@pytest.mark.parametrize(
    ("cadence", "intervals"),
    [
        ("epoch", (1.0, 1)),
        ("2 epochs", (1.0, 2)),
        ("0.25 epoch", (0.25, 1)),
        ("5 batches", (5, None)),
        (None, (1.0, 1)),
    ],
)
def test_a_cadence_of_the_run_is_told_in_lightnings_words(cadence, intervals):
    heard = []

    class Hears(Callback):
        def setup(self, trainer, pl_module, stage):
            heard.append((trainer.val_check_interval, trainer.check_val_every_n_epoch))

    module = Validates()
    module.train_dataloader = ones
    plugins = {"lightning": {"callbacks": [Hears()]}}
    hookline.Trainer(module, plugins, epochs=1, evaluate_every=cadence, eval_when_finish=False).train()
    assert heard == [intervals]


def test_intervals_that_cannot_be():
    with pytest.raises(
        ValueError, match="val_check_interval=5 is more than the 4 training batches of an epoch, so there"
    ):
        fit(Validates(), ones(), ones(1), val_check_interval=5)
    with pytest.raises(ValueError, match="val_check_interval=0 must be at least 1; limit_val_batches=0 is for none"):
        Trainer(val_check_interval=0)
    with pytest.raises(ValueError, match="check_val_every_n_epoch=0 must be at least 1"):
        Lightning(val_check_interval=2, check_val_every_n_epoch=0)

    class Stream(IterableDataset):
        def __iter__(self):
            yield from ones()

    with pytest.raises(
        ValueError, match=r"val_check_interval=0.5 is a fraction, but the training loader does not know"
    ):
        fit(Validates(), DataLoader(Stream(), None), ones(1), val_check_interval=0.5)


# Values -----------------------------------------------------------------------------------


def test_a_value_of_a_step_is_known_at_once_and_one_of_an_epoch_at_its_end():
    class Logs(Plain):
        def training_step(self, batch, batch_idx):
            number = batch[1].mean()
            self.log("train", number)
            self.log("both", number, on_step=True, on_epoch=True, prog_bar=True)
            self.log("mean", number, on_step=False, on_epoch=True, logger=False)
            number += 100  # what was logged stays what it was
            self.seen.append(items(self.trainer.callback_metrics))
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self):
            self.seen.append(items(self.trainer.callback_metrics))
            self.log("end", 7.0)
            self.trainer.callback_metrics["own"] = torch.tensor(8.0)

    trainer = fit(module := Logs(), ones(3))
    steps = [{"train": float(n), "both": float(n), "both_step": float(n)} for n in range(3)]
    assert module.seen[:3] == steps
    ended = {"train": 2.0, "both": 1.0, "both_step": 2.0, "both_epoch": 1.0, "mean": 1.0}
    assert module.seen[3] == ended
    assert items(trainer.callback_metrics) == {**ended, "end": 7.0, "own": 8.0}
    logged = items(trainer.logged_metrics)
    assert {name for name in logged if "loss" not in name} == {"train", "both_step", "both_epoch", "end"}
    assert module.trainer.progress_bar_metrics == {"both_step": 2.0, "both_epoch": 1.0}


def test_values_of_a_validation_are_known_in_its_end_and_the_loss_of_training_is_none_of_them():
    class Logs(Plain):
        def validation_step(self, batch, batch_idx):
            self.log("loss", batch[1].mean())
            self.log("again", 1.0)

        def on_validation_epoch_end(self):
            self.seen.append(items(self.trainer.callback_metrics))
            self.log("again", 3.0)

        def on_train_epoch_end(self):
            self.seen.append(items(self.trainer.callback_metrics))

    fit(module := Logs(), ones(), ones(3), log_every_n_steps=1, num_sanity_val_steps=1)
    assert module.seen == [
        {"loss": 0.0, "again": 1.0},
        {"loss": 1.0, "again": 1.0},
        {"loss": 1.0, "again": 3.0},  # what is logged last under a name
    ]


class EarlyStopping(Callback):
    """Looks at a value of the module's own `on_train_epoch_end`, by the name of Lightning's own."""

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.seen.append(trainer.callback_metrics["end"].item())


def test_what_stops_by_a_value_hears_the_end_of_an_epoch_behind_the_module():
    class Ends(Plain):
        def on_train_epoch_end(self):
            self.log("end", float(self.current_epoch))

    fit(module := Ends(), max_epochs=2, callbacks=[EarlyStopping()])
    assert module.seen == [0.0, 1.0]


@pytest.mark.parametrize(
    ("batch", "weight"),
    [
        (lambda rows: {"name": "x", "rows": rows}, len),
        (lambda rows: (torch.tensor(3.0), rows), lambda _: 1),
        (lambda rows: ({"k": [["a", None], (rows,)]},), len),
        (lambda rows: (rows.T.contiguous(), rows), lambda _: 2),
        (list, lambda _: 2),
        (lambda rows: [torch.zeros(3), rows], lambda _: 3),
        (lambda rows: (rows.numpy(), "text"), len),  # nothing to guess by: the samples that the run counts
    ],
    ids=["mapping", "number first", "nested", "columns", "list of rows", "two sizes", "no tensor"],
)
def test_means_weigh_by_the_first_tensor_of_a_batch(batch, weight):
    numbers, found = iter(range(3)), []

    class Weighs(Plain):
        def training_step(self, batch, batch_idx):
            self.log("mean", float(next(numbers)), on_step=False, on_epoch=True)
            return self.net.weight.sum()

    def collate(samples):
        rows = torch.stack([row for row, _ in samples])
        found.append(weight(rows))
        return batch(rows)

    data = DataLoader(ones(5).dataset, 2, collate_fn=collate)
    trainer = fit(Weighs(), data)
    mean = sum(number * size for number, size in enumerate(found)) / sum(found)
    assert trainer.callback_metrics["mean"].item() == pytest.approx(mean)


def test_a_batch_whose_tensors_disagree_is_told_of(caplog):
    class Weighs(Plain):
        def training_step(self, batch, batch_idx):
            self.log("mean", 1.0, on_epoch=True)
            return self.net(batch[1]).sum()

    fit(Weighs(), DataLoader(ones(4).dataset, 2, collate_fn=lambda samples: [torch.zeros(3), torch.ones(2, 2)]))
    assert "take a batch (list) for 3 samples, the first dimension of the first tensor in it" in caplog.text


@pytest.mark.parametrize(
    ("reduce", "value"),
    [("AVG", 1.5), (torch.mean, 1.5), ("sum", 6.0), (max, 3.0), (torch.min, 0.0), ("median", None), (torch.std, None)],
    ids=lambda given: getattr(given, "__name__", str(given)),
)
def test_reductions_are_those_of_lightning(reduce, value):
    class Reduces(Plain):
        def training_step(self, batch, batch_idx):
            self.log("x", batch[1].mean(), on_step=False, on_epoch=True, reduce_fx=reduce)
            return super().training_step(batch, batch_idx)

    if value is None:
        with pytest.raises(ValueError, match="must be mean, sum, min or max"):
            fit(Reduces())
    else:
        assert fit(Reduces()).callback_metrics["x"] == value


def test_a_value_that_goes_nowhere_is_an_error():
    class Nowhere(Plain):
        def training_step(self, batch, batch_idx):
            self.log("x", self.value, on_step=self.on_step, on_epoch=False)

    for value, on_step, words in (
        (1.0, False, "on_epoch=False. logs nothing"),
        (torch.ones(2), True, "not a tensor of"),
    ):
        module = Nowhere()
        module.value, module.on_step = value, on_step
        with pytest.raises(ValueError, match=words):
            fit(module)


# Objects of torchmetrics ------------------------------------------------------------------


class Objects(Plain):
    """Means of numbers, logged as objects and read by hand where they are complete."""

    def __init__(self):
        super().__init__()
        self.of_steps, self.of_epochs, self.val = (torchmetrics.MeanMetric() for _ in range(3))
        self.best, self.listed = torchmetrics.MaxMetric(), nn.ModuleList([torchmetrics.SumMetric()])

    def training_step(self, batch, batch_idx):
        self.of_steps(batch[1])
        self.of_epochs.update(batch[1])
        self.log("of_steps", self.of_steps)
        self.log("of_epochs", self.of_epochs, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.val(batch[1])
        self.listed[0](batch[1])
        self.log_dict({"val": self.val, "listed": self.listed[0]})

    def on_validation_epoch_end(self):
        self.best(self.val.compute())
        self.log("best", self.best.compute())

    def on_train_epoch_end(self):
        self.seen.append([one.compute().item() for one in (self.of_steps, self.of_epochs)])


def test_objects_are_complete_where_the_module_reads_them_and_reset_behind_it():
    trainer = fit(module := Objects(), ones(), ones(3), max_epochs=2, val_check_interval=2)
    assert module.seen == [[1.5, 1.5]] * 2  # a validation within the epoch leaves those of training alone
    values = items(trainer.callback_metrics)
    assert values == {"of_steps": 3.0, "of_epochs": 1.5, "val": 1.0, "listed": 3.0, "best": 1.0}
    assert [one.update_count for one in (module.of_steps, module.of_epochs, module.val, module.listed[0])] == [0] * 4
    assert module.best.update_count == 4


def test_an_object_for_several_loaders_covers_those_before_and_says_so(caplog):
    class Several(Objects):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    trainer = fit(Several(), ones(), [ones(3), ones(1)])
    values = items(trainer.callback_metrics)
    assert (values["val/dataloader_idx_0"], values["val/dataloader_idx_1"]) == (1.0, 0.75)
    assert "self.log('val', MeanMetric(…)) logs one object for several loaders" in caplog.text


def test_an_object_that_is_no_attribute_of_the_module_is_refused():
    class Loose(Objects):
        def __init__(self):
            super().__init__()
            self.loose = [torchmetrics.MeanMetric()]

        def training_step(self, batch, batch_idx):
            self.loose[0](batch[1])
            self.log("x", self.loose[0])

    with pytest.raises(
        ValueError, match=r"self.log\('x', MeanMetric\(…\)\): this object .* is no attribute of the mod"
    ):
        fit(Loose())


def test_what_is_told_of_the_loader_is_so_only_where_there_are_several():
    class Told(Plain):
        def validation_step(self, batch, batch_idx, dataloader_idx=None):
            self.seen.append(dataloader_idx)

        def on_validation_batch_end(self, outputs, batch, *place):
            self.seen.append(place)

    fit(module := Told(), ones(), ones(1))
    assert module.seen == [None, (0,)]
    fit(module := Told(), ones(), [ones(1), ones(1)])
    assert module.seen == [0, (0, 0), 1, (0, 1)]


class OfRanks(Objects):
    """Values of ranks, some of which are reduced over them."""

    def training_step(self, batch, batch_idx):
        self.log("synced", batch[1].mean(), sync_dist=True)
        self.log("most", batch[1].mean(), sync_dist=True, reduce_fx="max", on_step=True)
        self.log("own", batch[1].mean())
        self.log("mean", batch[1].mean(), on_step=False, on_epoch=True, sync_dist=True)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self):
        self.seen.append({name: value.item() for name, value in self.trainer.callback_metrics.items()})


def train_on_ranks():
    torch.set_num_threads(1)
    trainer = fit(module := OfRanks(), ones(8), ones(4), val_check_interval=2, strategy="ddp")
    return module.seen[0], trainer.core.counters.evaluations


@pytest.mark.xdist_group("ranks")
def test_values_of_ranks_are_reduced_where_callbacks_decide_by_them():
    first, second = run_ranks(train_on_ranks, 2)
    assert [first.code, second.code] == [0, 0], first.output
    (seen, evaluations), (other, _) = first.value, second.value
    assert evaluations == 2
    assert (seen["own"], other["own"]) == (6.0, 7.0)  # of the last step: each has its own
    expected = {"synced": 6.5, "most": 7.0, "mean": 3.5, "of_epochs": 3.5, "val": 1.5, "best": 1.5}
    for values in (seen, other):
        assert {name: values[name] for name in expected} == expected


# Modules of the run's own -----------------------------------------------------------------


class Heard(Callback):
    def on_train_start(self, trainer, pl_module):
        raise AssertionError


class Given(LightningDataModule):
    pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"callbacks": [Heard()]},
            r"lightning.callbacks \(Heard\): TinyModule is no module of today's Lightning, so noth",
        ),
        (
            {"callbacks": [type("ModelCheckpoint", (Callback,), {})()]},
            "ModelCheckpoint is the plugin checkpoint with keep_best and monitor, or model_saving here",
        ),
        (
            {"datamodule": Given()},
            "lightning.datamodule: TinyModule is no module .*: loaders are methods of the module",
        ),
        ({"val_check_interval": 0.5}, "lightning.val_check_interval: TinyModule .*: say trainer.evaluate_every"),
    ],
)
def test_what_a_module_of_the_runs_own_would_not_hear_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        hookline.Trainer(TinyModule(8), {"lightning": copy.copy(options)}, epochs=1)


def test_a_module_of_the_runs_own_trains_beside_the_plugin():
    hookline.Trainer(TinyModule(8), {"lightning": {}}, epochs=1, train_batch_size=4).train()
    with pytest.raises(ValueError, match="lightning.datamodule: TinyModule is no module of today's Lightning"):
        fit(TinyModule(8))
