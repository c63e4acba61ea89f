"""The trainer through its doors: limits, evaluations, stops, logs, batches of every kind, errors."""

import dataclasses
import math
import time
from collections import namedtuple
from dataclasses import dataclass

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from hookline import CallbackInterface, ModuleInterface, Stage, Trainer, hookimpl, hookspecs, kept_rng
from hookline.counters import Cursor
from hookline.data import sampler_class
from hookline.testing import ByClosure, Memory, TinyModule, digest, tiny_trainer


class Diary(CallbackInterface):
    """Writes down what it hears."""

    def __init__(self):
        self.told = []
        self.logged = []

    @hookimpl
    def on_end_train_step(self, global_step):
        self.told.append(f"step {global_step}")

    @hookimpl
    def on_end_validation(self, global_step):
        self.told.append(f"validation {global_step}")

    @hookimpl
    def on_end_train_epoch(self, trainer):
        self.told.append(f"epoch {trainer.epoch}")

    @hookimpl
    def on_boundary(self, global_step):
        self.told.append(f"boundary {global_step}")

    @hookimpl
    def on_end_train(self, global_step):
        self.told.append(f"end {global_step}")

    @hookimpl
    def on_log(self, metrics, global_step):
        self.logged.append((global_step, dict(metrics)))


def diary_of(module=None, **options):
    diary = Diary()
    trainer = tiny_trainer([diary], module or TinyModule(samples=16), **options)
    trainer.train()
    return diary.told


# The order of things ------------------------------------------------------------------


def test_the_order_of_an_epoch():
    assert diary_of() == [
        *("step 1", "boundary 1", "step 2", "validation 2", "epoch 0", "boundary 2"),
        *("step 3", "boundary 3", "step 4", "validation 4", "epoch 1", "boundary 4", "end 4"),
    ]


def test_evaluations_by_steps_and_at_the_ends_once_per_step():
    told = diary_of(evaluate_every="1 steps", eval_when_start=True, epochs=1)
    assert told == [
        "validation 0",
        "step 1",
        "validation 1",
        "boundary 1",
        "step 2",
        "validation 2",
        "epoch 0",
        "boundary 2",
        "end 2",
    ]


def test_an_evaluation_when_training_finishes():
    told = diary_of(evaluate_every="3 steps", epochs=2)
    assert [line for line in told if "validation" in line] == ["validation 3", "validation 4"]
    assert told[-2:] == ["boundary 4", "end 4"]
    assert not [x for x in diary_of(evaluate_every=None, eval_when_finish=False) if "validation" in x]
    assert [x for x in diary_of(evaluate_every=None) if "validation" in x] == ["validation 4"]


def test_evaluations_every_other_epoch():
    told = diary_of(evaluate_every="2 epochs", epochs=4)
    assert [line for line in told if "validation" in line] == ["validation 4", "validation 8"]


# Limits -------------------------------------------------------------------------------


def test_limits_of_epoch_and_run():
    trainer = tiny_trainer(max_train_steps_per_epoch=3, epochs=2)
    assert [trainer.train(), trainer.global_step, trainer.epoch, trainer.totals.steps] == [None, 6, 2, 6]
    trainer = tiny_trainer(max_steps=10, epochs=None)
    trainer.train()
    assert (trainer.global_step, trainer.epoch, trainer.totals.epochs, trainer.totals.steps) == (10, 1, 2, 10)
    assert trainer.status == "finished"


def test_a_limit_of_time():
    class Slow(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, global_step):
            if global_step == 3:
                time.sleep(1)

    trainer = tiny_trainer([Slow()], max_time="1 s", epochs=None)
    trainer.train()
    assert trainer.global_step == 3


def test_a_limit_of_validation_batches():
    indices = []

    class Watch(CallbackInterface):
        @hookimpl
        def on_begin_evaluation(self, totals):
            indices.append(totals)

        @hookimpl
        def on_end_val_step(self, index, key):
            indices.append(index)

    tiny_trainer([Watch()], max_val_steps_per_epoch=2, epochs=1).train()
    assert indices == [{"default": 2}, 0, 1]


def test_a_second_train_goes_on_where_the_first_ended():
    whole = tiny_trainer(epochs=4, module=TinyModule())
    whole.train()
    parts = tiny_trainer(epochs=4, module=TinyModule(), max_steps=9)
    parts.train()
    parts.options.max_steps = None
    parts.train()
    assert digest(parts.module.state_dict()) == digest(whole.module.state_dict())
    assert parts.module.seen == whole.module.seen


def test_nothing_left_to_train(caplog):
    trainer = tiny_trainer(epochs=1)
    trainer.train()
    before = digest(trainer.module.state_dict())
    trainer.train()
    assert digest(trainer.module.state_dict()) == before
    assert "nothing is left to train: the run is at step 7, epoch 1" in caplog.text


# Stopping -----------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "ends", "code"), [("stopped", True, 0), ("preempted", False, 143)])
def test_a_stop_comes_at_the_next_boundary(status, ends, code):
    class Stops(Diary):
        @hookimpl
        def on_end_backward(self, trainer, global_step):
            if global_step == 2:
                trainer.stop("had enough", status, exit_code=143)

        @hookimpl
        def on_end_run(self, status, reason):
            self.told.append((status, reason))

    stops = Stops()
    trainer = tiny_trainer({"stops": stops}, eval_when_finish=False)
    trainer.train()
    assert stops.told == [
        "step 1",
        "boundary 1",
        "step 2",
        "boundary 2",
        "step 3",
        "boundary 3",
        *(["end 3"] if ends else []),
        (status, "had enough"),
    ]
    assert trainer.position == 3
    assert (trainer.status, trainer.exit_code) == (status, code)


def test_a_stop_between_two_steps_comes_at_the_boundary_of_the_second_and_is_saved():
    saved = []

    class Stops(CallbackInterface):
        def on_begin_train_epoch(self, gs, epoch):
            if epoch == 1:
                self.trainer.stop("enough")

        @hookimpl
        def on_setup(self, trainer):
            self.trainer = trainer

        @hookimpl
        def save(self, trainer, reason):
            saved.append((trainer.global_step, reason))
            return True

    trainer = tiny_trainer([Stops()])
    trainer.train()
    assert (trainer.status, saved) == ("stopped", [(8, "enough")])


def test_a_run_that_is_over_by_itself_cannot_be_preempted():
    class Stops(Diary):
        @hookimpl
        def on_boundary(self, trainer, global_step):
            if global_step == 14:
                trainer.stop("SIGTERM", "preempted", exit_code=143)

    stops = Stops()
    trainer = tiny_trainer({"stops": stops})
    trainer.train()
    assert (trainer.status, trainer.exit_code, stops.told[-1]) == ("finished", 0, "end 14")


def test_saves_are_served_at_the_boundary_once_with_all_reasons():
    saved = []

    class Saves(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, trainer, global_step):
            if global_step == 2:
                trainer.save("one")
                trainer.save("two")
                trainer.save("one")

        @hookimpl
        def save(self, trainer, reason):
            saved.append((trainer.global_step, reason))
            return True

    tiny_trainer([Saves()], epochs=1).train()
    assert saved == [(2, "one, two"), (7, "end of training")]


# Evaluation ---------------------------------------------------------------------------


def test_the_validation_loss_is_the_mean_over_samples():
    class Module(TinyModule):
        def val_step(self, global_step, batch, device):
            return batch[0].float().mean()

        def get_val_dataloaders(self, sampler, batch_size):
            return [(torch.tensor([0, 0, 0]),), (torch.tensor([1]),)]

    trainer = tiny_trainer(module=Module(), epochs=1)
    trainer.train()
    assert trainer.metrics == {"val_loss": 0.25}
    assert trainer.best.valid_loss == 0.25


def test_several_loaders_by_key_and_all_together():
    class Module(TinyModule):
        def val_step(self, global_step, batch, device):
            self.log(seen=len(batch), reduce="sum")
            return batch.mean()

        def get_val_dataloaders(self, sampler, batch_size):
            return {"a": [torch.zeros(3)], "b": [torch.ones(1)]}

        def on_end_val_epoch(self, gs, loss, key):
            self.log(worst=loss.max())

    trainer = tiny_trainer(module=Module(), val_loss_metric_name="loss")
    assert trainer.validate() == {
        "loss": 0.25, "loss/a": 0.0, "loss/b": 1.0, "seen/a": 3.0, "seen/b": 1.0, "worst/a": 0.0, "worst/b": 1.0,
    }  # fmt: skip


def test_submodules_come_back_to_the_mode_they_were_in():
    class Module(TinyModule):
        @hookimpl
        def on_begin_train(self, trainer):
            self.net[1].eval()  # a frozen batch norm

    trainer = tiny_trainer(module=Module(), epochs=1)
    trainer.train()
    assert [trainer.module.training, trainer.module.net[1].training, trainer.module.net[3].training] == [
        True,
        False,
        True,
    ]
    assert torch.equal(trainer.module.net[1].running_mean, torch.zeros(16))


def test_a_validation_step_without_data_is_said(caplog):
    class Misspelt(TinyModule):
        get_val_dataloaders = ModuleInterface.get_val_dataloaders

        def get_val_dataloader(self, sampler, batch_size):
            return super().get_val_dataloaders(sampler, batch_size)

    assert tiny_trainer(module=Misspelt()).train() is None
    assert [record.message.partition(",")[0] for record in caplog.records] == [
        "Misspelt has val_step and no get_val_dataloaders (by this very name)"
    ]
    caplog.clear()
    tiny_trainer(module=Misspelt(), evaluate_every=None).train()
    assert not caplog.records


def test_gradients_are_off_and_the_stage_is_known_in_an_evaluation():
    class Module(TinyModule):
        def val_step(self, global_step, batch, device):
            assert not torch.is_grad_enabled()
            assert self.trainer.stage is Stage.VAL
            assert not self.net.training
            return super().val_step(global_step, batch, device)

    trainer = tiny_trainer(module=Module(), epochs=1)
    trainer.train()
    assert trainer.stage is Stage.TRAIN


def test_a_sanity_check_leaves_no_trace():
    class Watch(CallbackInterface):
        sane = 0

        @hookimpl
        def on_end_val_step(self, trainer):
            self.sane += trainer.sanity_checking

        @hookimpl
        def on_end_validation(self, trainer):
            assert not trainer.sanity_checking

    class Module(TinyModule):
        def val_step(self, global_step, batch, device):
            torch.rand(3)
            return super().val_step(global_step, batch, device)

    watch = Watch()
    checked = tiny_trainer([watch], module=Module(), sanity_val_steps=2)
    checked.train()
    plain = tiny_trainer(module=Module())
    plain.train()
    assert watch.sane == 2
    assert digest(checked.module.state_dict()) == digest(plain.module.state_dict())
    assert checked.counters.evaluations == plain.counters.evaluations == 2


def test_testing_and_predicting():
    class Module(TinyModule):
        predictions = ()

        @hookimpl
        def on_end_predict_step(self, outputs, index, key):
            self.predictions += ((outputs.shape, index, key),)

        @hookimpl
        def on_end_predict_epoch(self, key):
            self.predictions += (f"end of {key}",)

        @hookimpl
        def on_end_test_epoch(self, test_step_collated_outputs, key):
            self.tested = [tuple(o.shape) for o in test_step_collated_outputs], key

    trainer = tiny_trainer(module=Module(samples=12))
    metrics = trainer.test()
    assert list(metrics) == ["test_loss"]
    assert trainer.module.tested == ([(2,), (12, 1), (12, 1)], "default")
    assert trainer.predict() is None
    assert trainer.module.predictions == (((8, 1), 0, "default"), ((4, 1), 1, "default"), "end of default")


def test_predictions_that_nobody_takes():
    with pytest.warns(UserWarning, match="nobody hears on_end_predict_step, so the predictions will be dropped"):
        tiny_trainer().predict()


def test_a_stage_without_data():
    class Module(TinyModule):
        def get_test_dataloaders(self, sampler, batch_size):
            return None

    with pytest.raises(ValueError, match=r"Module has no data for this: get_test_dataloaders\(\) returned None"):
        tiny_trainer(module=Module()).test()


def test_validate_before_train_changes_nothing():
    first = tiny_trainer()
    first.validate()
    first.train()
    second = tiny_trainer()
    second.train()
    assert digest(first.module.state_dict()) == digest(second.module.state_dict())


# Logging ------------------------------------------------------------------------------


def logged_of(module, **options):
    diary = Diary()
    tiny_trainer([diary], module, **options).train()
    return diary.logged


def test_what_is_logged_when():
    class Module(TinyModule):
        def train_step(self, global_step, batch, device):
            self.log(step=global_step, prog=True)
            self.log(over="epoch", reduce="max", highest=torch.tensor(float(global_step)))
            return super().train_step(global_step, batch, device)

    module = Module(samples=32)
    logged = logged_of(module, epochs=1, log_every="2 steps")
    assert [(step, sorted(values)) for step, values in logged] == [
        (2, ["step", "train_loss"]),
        (4, ["step", "train_loss"]),
        (4, ["val_loss"]),
        (4, ["highest", "train_loss_epoch"]),
    ]
    assert [values["step"] for _, values in logged[:2]] == [1.5, 3.5]
    assert logged[-1][1]["highest"] == 4.0
    halves = (logged[0][1]["train_loss"] + logged[1][1]["train_loss"]) / 2
    assert logged[-1][1]["train_loss_epoch"] == pytest.approx(halves)


@dataclass(eq=False)
class Doubled(CallbackInterface):
    """Logs what the model logs twice as large."""

    @hookimpl(wrapper=True)
    def call_model(self, trainer):
        with trainer.logs.apart() as logged:
            outputs = yield
        for values, options in logged:
            trainer.log(**{name: 2 * value for name, value in values.items()}, **options)
        return outputs


def test_what_a_step_logs_can_be_logged_in_another_form():
    class Logging(TinyModule):
        def train_step(self, global_step, batch, device):
            self.log(step_twice=global_step, reduce="max")
            return super().train_step(global_step, batch, device)

    diary = Diary()
    tiny_trainer([diary, Doubled()], Logging(), log_every="1 steps", epochs=1, evaluate_every=None).train()
    told = [values["step_twice"] for _, values in diary.logged if "step_twice" in values]
    assert told == [2, 4, 6, 8, 10, 12, 14]


@dataclass(eq=False)
class Late(CallbackInterface):
    """Logs what a step logs when it has returned."""

    @hookimpl(wrapper=True)
    def call_model(self, trainer):
        with trainer.logs.later():
            return (yield)


def test_what_a_step_logs_can_be_logged_when_it_has_returned():
    class Logging(TinyModule):
        def train_step(self, global_step, batch, device):
            counted = torch.tensor(float(global_step))
            self.log(counted=counted, over="epoch")
            self.trainer.log(largest=counted, reduce="max", weighted_by=2.0)
            counted.zero_()  # logged is what the value was
            return super().train_step(global_step, batch, device)

    told = []
    for others in ([], [Late()]):
        diary = Diary()
        tiny_trainer([diary, *others], Logging(), log_every="1 steps", epochs=1).train()
        told.append(diary.logged)
    assert told[0] == told[1]
    assert [values["largest"] for _, values in told[1] if "largest" in values] == [1, 2, 3, 4, 5, 6, 7]


def test_what_a_step_logs_late_is_dropped_if_the_step_fails():
    class Failing(TinyModule):
        def train_step(self, global_step, batch, device):
            self.log(counted=1.0)
            raise RuntimeError("stop")

    trainer = tiny_trainer([Late()], Failing())
    with pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    trainer.log(after=1.0)  # at once again
    assert list(trainer.logs.get_state()["interval"]) == ["after"]


def test_what_is_left_of_the_interval_is_logged_at_the_end():
    assert [
        step
        for step, values in logged_of(TinyModule(samples=24), epochs=1, log_every="2 steps")
        if "train_loss" in values
    ] == [2, 3]


def test_the_losses_of_training_by_another_name():
    names = set().union(*(values for _, values in logged_of(TinyModule(), epochs=1, train_loss_metric_name="nll")))
    assert names == {"nll", "nll_epoch", "val_loss"}


def test_a_flush_is_one_copy_whatever_is_in_it(monkeypatch):
    class Module(TinyModule):
        def train_step(self, global_step, batch, device):
            loss = super().train_step(global_step, batch, device)
            for reduce in ("mean", "sum", "min", "max", "last"):
                self.log(reduce=reduce, **{reduce: loss[0]})
            return loss

    copies = []
    for name in ("tolist", "item", "__float__", "__bool__", "__int__"):
        copy = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda tensor, copy=copy: copies.append(tensor.dtype) or copy(tensor), raising=False
        )
    options = {"evaluate_every": None, "eval_when_finish": False, "epochs": 1}
    flushes = [values for _, values in logged_of(Module(), log_every="3 steps", **options)]
    copied = copies.count(torch.float64)  # ids of samples and the clock of the random states are none
    assert [len(values) for values in flushes] == [6, 6, 1, 6]
    assert copied == len(flushes) + 1  # and the loss of the epoch, for the best


def test_filter_log_changes_what_is_logged():
    class Filter(CallbackInterface):
        @hookimpl(wrapper=True)
        def filter_log(self):
            metrics = yield
            return {f"mine/{name}": value for name, value in metrics.items() if name == "val_loss"}

    diary = Diary()
    tiny_trainer({"diary": diary, "filter": Filter()}, epochs=1).train()
    assert [list(values) for _, values in diary.logged] == [["mine/val_loss"]]


def test_objects_are_handed_on():
    heard = []

    class Hears(CallbackInterface):
        @hookimpl
        def on_log_object(self, name, value, global_step):
            heard.append((name, value, global_step))

    trainer = tiny_trainer([Hears()])
    trainer.log_object("sample", "some text")
    assert heard == [("sample", "some text", 0)]


def test_what_cannot_be_logged():
    trainer = tiny_trainer()
    with pytest.raises(ValueError, match="over='run', reduce='mean'.*over is interval or epoch, reduce is mean, sum"):
        trainer.log(over="run", x=1)
    with pytest.raises(TypeError, match=r"log\(x=…\) takes one number"):
        trainer.log(x=torch.ones(3))


# Validations under way ----------------------------------------------------------------


class Validates(TinyModule):
    """Has validation batches of losses 1, 2, 3 …, of one sample each, in one loader or several."""

    def __init__(self, *batches):
        super().__init__(samples=16)
        self.batches = batches

    def val_step(self, global_step, batch, device):
        return batch.mean()

    def get_val_dataloaders(self, sampler, batch_size):
        loaders = {str(key): [torch.ones(1) * n for n in range(1, count + 1)] for key, count in enumerate(self.batches)}
        return loaders if len(loaders) > 1 else loaders["0"]


class Within(Diary):
    """Keeps what is told within validations apart."""

    def __init__(self):
        super().__init__()
        self.within = []

    @hookimpl
    def on_log(self, trainer, metrics, global_step):
        kept = self.logged if trainer.stage is Stage.TRAIN else self.within
        kept.append((global_step, dict(metrics)))


def within(module, *plugins, **options):
    diary = Within()
    options = {"epochs": 2, "log_every": "2 steps", "report_loss_after_eval": False, **options}
    trainer = tiny_trainer([diary, *plugins], module, **options)
    trainer.train()
    return diary, trainer


def test_the_mean_so_far_is_told_within_validations():
    diary, trainer = within(Validates(3))
    assert diary.within == [(2, {"val_loss_batch": 1.5}), (4, {"val_loss_batch": 1.0}), (6, {"val_loss_batch": 2.0})]
    assert trainer.counters.evaluation_batches == 6
    silent, _ = within(Validates(3), report_loss_after_eval=True)
    assert silent.within == []
    assert diary.logged == silent.logged


def test_of_several_loaders_each_has_its_own():
    diary, _ = within(Validates(3, 2), epochs=1, log_every="1 steps", val_loss_metric_name="loss")
    assert diary.within == [
        (1, {"loss_batch/0": 1.0}),
        (2, {"loss_batch/0": 1.5}),
        (3, {"loss_batch/0": 2.0}),
        (4, {"loss_batch/1": 1.0}),
        (5, {"loss_batch/1": 1.5}),
    ]


def test_neither_a_sanity_check_nor_an_evaluation_on_its_own_is_told_so():
    diary, trainer = within(Validates(3), epochs=1, sanity_val_steps=3)
    assert len(diary.within) == 1
    trainer.validate()
    trainer.test()
    assert [place for place, _ in diary.within] == [2, 2, 2]  # theirs come when they are over, by the step
    assert trainer.counters.evaluation_batches == 3


def test_the_loss_of_the_validation_has_the_same_bits():
    class Many(Validates):
        def val_step(self, global_step, batch, device):
            return super().val_step(global_step, batch, device).double().sqrt()

    told, after = (within(Many(200), log_every="1 steps", report_loss_after_eval=report)[1] for report in (False, True))
    assert told.metrics == after.metrics
    assert digest(told.module.state_dict()) == digest(after.module.state_dict())


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_number_of_the_batch_goes_on_after_a_resume(step):
    memory = Memory(every="1 steps")
    whole, _ = within(Validates(3), memory)
    rest, trainer = within(Validates(3), Memory(memory.states[step]))
    done = 3 * (step // 2)
    assert rest.within == [(batch, values) for batch, values in whole.within if batch > done]
    assert trainer.counters.evaluation_batches == 6


def test_the_number_of_batches_must_be_one_of_steps():
    with pytest.raises(ValueError, match=r"report_loss_after_eval=False: log_every='1 min' must then count steps"):
        tiny_trainer(report_loss_after_eval=False, log_every="1 min")


def test_nan_is_logged_and_is_never_the_best():
    class Module(TinyModule):
        def val_step(self, global_step, batch, device):
            return torch.tensor(math.nan if global_step > 2 else 1.0)

    trainer = tiny_trainer(module=Module(samples=16), epochs=2)
    trainer.train()
    assert math.isnan(trainer.metrics["val_loss"])
    assert trainer.best.valid_loss == 1.0


# Optimizers ---------------------------------------------------------------------------


def test_schedulers_move_by_step_epoch_and_validation():
    class Module(TinyModule):
        def get_optimizers_schedulers(self, steps, epochs):
            assert (steps, epochs) == (7, 2)
            optimizers = [torch.optim.SGD([p], lr=1.0) for p in self.net[0].parameters()]
            optimizers.append(torch.optim.SGD(self.net[4].parameters(), lr=1.0))
            half = torch.optim.lr_scheduler.StepLR
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizers[2], factor=0.1, patience=0)
            return optimizers, [half(optimizers[0], 1, 0.5), (half(optimizers[1], 1, 0.5), "epoch"), plateau]

        def val_step(self, global_step, batch, device):
            return torch.tensor(1.0)

    trainer = tiny_trainer(module=Module())
    trainer.train()
    rates = [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]
    assert rates == [0.5**14, 0.25, 0.1]


def test_a_refused_update_counts_and_leaves_weights_and_schedulers_alone():
    class Gate(CallbackInterface):
        @hookimpl(wrapper=True)
        def should_step(self, trainer):
            return (yield) and trainer.global_step != 2

        @hookimpl
        def on_end_optimizer_step(self, stepped):
            self.stepped = [*getattr(self, "stepped", []), stepped]

    class Told(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, stepped):
            self.stepped = [*getattr(self, "stepped", []), stepped]

    gate, told = Gate(), Told()
    trainer = tiny_trainer([gate, told], epochs=1)
    trainer.train()
    assert gate.stepped == told.stepped == [True, True, False, True, True, True, True]
    assert (trainer.global_step, trainer.counters.skipped_steps) == (7, 1)
    assert trainer.schedulers[0].scheduler.last_epoch == 6


def test_no_optimizer():
    class Module(TinyModule):
        def get_optimizers_schedulers(self, steps, epochs):
            return [], []

    with pytest.raises(ValueError, match=r"Module.get_optimizers_schedulers returned no optimizer"):
        tiny_trainer(module=Module()).train()


def test_what_a_performed_update_must_answer():
    class Module(TinyModule):
        @hookimpl
        def update(self, trainer, window):
            return trainer.hook.run_window(trainer=trainer, window=window)[0]

    with pytest.raises(
        TypeError, match=r"the verb 'update' must answer a list with one tuple per micro-batch.*a tuple of"
    ):
        tiny_trainer([Diary()], module=Module()).train()


def test_one_optimizer_instead_of_a_list():
    trainer = tiny_trainer(max_steps=1)
    trainer.train()
    with pytest.raises(TypeError, match=r"trainer.step takes a list of optimizers, not one Adam; write \[it\]"):
        trainer.step(trainer.optimizers[0])


def test_with_a_closure_the_gradients_are_complete_after_each_call_of_it():
    norms = []

    class Watch(CallbackInterface):
        @hookimpl
        def on_begin_optimizer_step(self, optimizers):
            norms.append(sum(p.grad.norm() for group in optimizers[0].param_groups for p in group["params"]).item())

    class Module(ByClosure, TinyModule):
        def get_optimizers_schedulers(self, steps, epochs):
            return [torch.optim.LBFGS(self.parameters(), max_iter=3)], []

    tiny_trainer([Watch()], module=Module(dropout=0.0), max_steps=1).train()
    assert len(norms) > 1
    assert all(norms)


@pytest.mark.parametrize("method", ["train_step", "predict_step", "get_train_dataloader", "get_val_dataloaders"])
def test_what_is_asked_by_keyword_must_bear_the_names(method):
    module_class = type("Mine", (TinyModule,), {method: lambda self, x: x})
    with pytest.raises(
        TypeError, match=rf"Mine.{method}\(\) is called by keyword and must take (global_step, batch|sampler)"
    ):
        Trainer(module_class())


# Data ---------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self, batches=5):
        self.batches = batches

    def __iter__(self):
        for index in range(self.batches):
            yield torch.full((4, 8), float(index)), torch.zeros(4, 1), torch.full((4,), index)


def test_a_data_set_without_a_length():
    class Module(TinyModule):
        def get_train_dataloader(self, sampler, batch_size):
            return DataLoader(Stream(), batch_size=None)

        def get_optimizers_schedulers(self, steps, epochs):
            assert steps is None
            return [torch.optim.SGD(self.parameters(), 0.1)], []

    trainer = tiny_trainer(module=Module(), evaluate_every=None, eval_when_finish=False)
    trainer.train()
    assert (trainer.global_step, trainer.totals.steps) == (10, None)
    limited = tiny_trainer(module=Module(), max_steps=7, epochs=None, evaluate_every=None, eval_when_finish=False)
    limited.train()
    assert limited.global_step == 7


def test_an_empty_training_loader():
    class Module(TinyModule):
        def get_train_dataloader(self, sampler, batch_size):
            return []

    with pytest.raises(
        ValueError,
        match=r"the training loader gave no batch: Module.get_train_dataloader\(\) was asked for batches of 8",
    ):
        tiny_trainer(module=Module()).train()


def test_an_empty_validation_loader():
    class Module(TinyModule):
        def get_val_dataloaders(self, sampler, batch_size):
            return []

    with pytest.warns(UserWarning, match="the val loader 'default' gave no batch, so nothing is known of it"):
        tiny_trainer(module=Module(), epochs=1).train()


def test_a_plugin_joins_training_loaders_and_one_by_key_is_that_one():
    class Chain(CallbackInterface):
        @hookimpl
        def join_loaders(self, loaders, sampler):
            assert all(isinstance(loader.sampler, sampler) for loader in loaders.values())
            return [batch for loader in loaders.values() for batch in loader]

    class Module(TinyModule):
        keys = ("a", "b")

        def get_train_dataloader(self, sampler, batch_size):
            return {key: super(Module, self).get_train_dataloader(sampler, batch_size) for key in self.keys}

    joined, one, plain = Module(), Module(), TinyModule()
    tiny_trainer([Chain()], joined, epochs=1).train()
    one.keys = ("a",)
    for module in (one, plain):
        tiny_trainer(module=module, epochs=1).train()
    assert joined.seen == plain.seen * 2
    assert one.seen == plain.seen


@pytest.mark.parametrize("given", [None, {"a": [], "b": []}])
def test_a_training_loader_must_be_one(given):
    class Module(TinyModule):
        def get_train_dataloader(self, sampler, batch_size):
            return given

    with pytest.raises(ValueError, match=r"Module.get_train_dataloader\(\) must return one loader; it returned"):
        tiny_trainer(module=Module()).train()


def test_loaders_are_asked_for_every_epoch_unless_kept():
    class Module(TinyModule):
        asked = ()

        def get_train_dataloader(self, sampler, batch_size):
            self.asked += (batch_size,)
            return super().get_train_dataloader(sampler, batch_size)

        def get_val_dataloaders(self, sampler, batch_size):
            return None

    anew, kept = tiny_trainer(module=Module(), epochs=3), tiny_trainer(module=Module(), epochs=3, keep_loaders=True)
    anew.train()
    kept.train()
    assert (anew.module.asked, kept.module.asked) == ((8, 8, 8), (8,))
    assert anew.module.seen == kept.module.seen


Batch = namedtuple("Batch", "inputs targets")


@dataclasses.dataclass
class Record:
    inputs: torch.Tensor
    targets: torch.Tensor


@pytest.mark.parametrize(
    "make", [lambda x, y: {"inputs": x, "targets": y}, lambda x, y: Batch(x, y), lambda x, y: Record(x, y)]
)
def test_batches_of_every_kind(make):
    class Module(TinyModule):
        def train_step(self, global_step, batch, device):
            get = batch.__getitem__ if isinstance(batch, dict) else lambda name: getattr(batch, name)
            return torch.nn.functional.mse_loss(self.net(get("inputs")), get("targets"))

        def get_train_dataloader(self, sampler, batch_size):
            return [make(self.inputs[:8], self.targets[:8])] * 3

    trainer = tiny_trainer(module=Module(), evaluate_every=None, eval_when_finish=False)
    trainer.train()
    assert (trainer.global_step, trainer.counters.samples) == (6, 48)


def test_a_batch_size_that_cannot_be_shared():
    @hookimpl
    def get_window_size(self):
        return 3

    plugins = {"three": type("Three", (CallbackInterface,), {"get_window_size": get_window_size})()}
    with pytest.raises(
        ValueError,
        match=r"train_batch_size=8 cannot be shared equally by 1 rank\(s\) × 3 micro-batch\(es\) = 3; it leaves 2",
    ):
        tiny_trainer(plugins).train()


# Options ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"epoch": 3},
            TypeError,
            "Trainer has no option 'epoch', did you mean 'epochs'\\?; it has epochs, train_batch",
        ),
        ({"evaluate_every": "sometimes"}, ValueError, "'sometimes' is not a cadence"),
        ({"evaluate_every": "eval"}, ValueError, "counts evaluations by themselves"),
        ({"max_time": "3 epochs"}, ValueError, "'3 epochs' is not a duration"),
        ({"train_batch_size": 0}, ValueError, "train_batch_size=0 must be at least 1"),
        ({"max_steps": -1}, ValueError, "max_steps=-1 must be at least 0"),
        ({"run_name": "../x"}, ValueError, "run_name='../x' must be a plain name"),
        ({"epochs": "3"}, TypeError, "epochs='3' must be a whole number or None, and is a str"),
        ({"epochs": 2.5}, TypeError, "epochs=2.5 must be a whole number or None, and is a float"),
        ({"epochs": True}, TypeError, "epochs=True must be a whole number or None, and is a bool"),
        ({"train_batch_size": None}, TypeError, "train_batch_size=None must be a whole number, and is a NoneType"),
        ({"eval_when_start": "no"}, TypeError, "eval_when_start='no' must be True or False, and is a str"),
        ({"eval_when_start": 0}, TypeError, "eval_when_start=0 must be True or False"),
        ({"seed": "a"}, TypeError, "seed='a' must be a whole number, and is a str"),
        ({"run_name": 3}, TypeError, "run_name=3 must be a text"),
        ({"resume": 3}, TypeError, "resume=3 must be a text or True or False"),
        ({"evaluate_every": 100}, ValueError, "evaluate_every=100: 100 is not a cadence; .*50 steps"),
        ({"log_every": None}, ValueError, "log_every=None: None is not a cadence"),
        ({"max_time": 60}, ValueError, "max_time=60: 60 is not a"),
        ({"device": "gpu"}, ValueError, "device='gpu' cannot be used: write auto, cpu, cuda, cuda:1 or mps"),
        ({"device": 0}, ValueError, "device='0' cannot be used"),
        ({"device": "xpu"}, ValueError, "device='xpu' cannot be used"),
        ({"device": "cuda:99"}, ValueError, r"device='cuda:99', and torch finds \d+ CUDA device\(s\) here"),
        ({"resume": "/nowhere"}, ValueError, "no plugin can restore a run: name one that performs `restore`"),
    ],
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        Trainer(TinyModule(), **options).train()


def test_options_in_the_types_of_other_libraries(tmp_path):
    given = {"epochs": numpy.int64(1), "device": torch.device("cpu"), "runs_folder": tmp_path, "evaluate_every": None}
    options = tiny_trainer(**given).options
    assert (options.epochs, options.device, options.runs_folder) == (1, "cpu", str(tmp_path))
    assert type(options.epochs) is int


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_asked_for_where_there_is_none():
    with pytest.raises(
        ValueError, match="device='cuda', and torch finds 0 CUDA .* write device=auto, which takes what"
    ):
        tiny_trainer(device="cuda")


def test_run_folders_are_numbered_and_never_shared(tmp_path):
    def run_dir(**options):
        return tiny_trainer(runs_folder=str(tmp_path / "runs"), run_name="mine", **options).run_dir

    assert not (tmp_path / "runs").exists()
    assert [run_dir().name for _ in range(2)] == ["mine-1", "mine-2"]
    (tmp_path / "runs" / "mine-10").mkdir()
    assert run_dir(resume=True).name == "mine-10"
    assert run_dir(resume=str(tmp_path / "runs" / "mine-2")).name == "mine-2"
    assert run_dir(resume=tmp_path / "runs" / "mine-2").name == "mine-2"
    checkpoint = tmp_path / "runs" / "mine-2" / "checkpoints" / "step-5"
    checkpoint.mkdir(parents=True)
    assert run_dir(resume=checkpoint).name == "mine-2"
    trainer = tiny_trainer(runs_folder=str(tmp_path / "runs"), run_name="other", resume=True)
    with trainer.session.at(Stage.VAL), pytest.raises(ValueError, match="there is no run 'other' in .*runs to resume"):
        _ = trainer.run_dir
    with pytest.raises(ValueError, match="resume='.*mine-7' is no folder of a run"):
        run_dir(resume=str(tmp_path / "runs" / "mine-7"))


def test_an_unplugged_run_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_trainer().train()
    assert list(tmp_path.iterdir()) == []


def test_portable_weights():
    trainer = tiny_trainer()
    assert trainer.export_model().keys() == trainer.module.state_dict().keys()


def test_small_values_of_all_ranks():
    trainer = tiny_trainer()
    assert trainer.hook.all_gather(trainer=trainer, value="x") == ["x"]
    assert trainer.hook.all_reduce(trainer=trainer, value=torch.ones(2), op="sum").tolist() == [1.0, 1.0]


# Several ranks ------------------------------------------------------------------------


class Ranks(CallbackInterface):
    """Plays rank 0 of two: the other has asked for what is given, and a vote finds it at a step."""

    def __init__(self, at, stop=(None, "stopped", 1), saves=(), synced=None):
        self.at, self.other, self.synced = at, (stop, list(saves)), synced or {}
        self.asked, self.saved, self.steps = [], [], 0

    @hookimpl
    def get_ranks(self):
        return 0, 0, 2

    @hookimpl
    def get_sampler(self, trainer, stage):
        return sampler_class(trainer.cursor if stage is Stage.TRAIN else Cursor(), stage is Stage.TRAIN, 0, 1)

    @hookimpl
    def all_gather(self, value):
        return [value, self.other if isinstance(value, tuple) else self.synced]

    @hookimpl
    def vote(self, trainer, asked, seconds):
        self.asked.append(asked)
        return trainer.global_step == self.at, 10.0 * trainer.global_step

    @hookimpl
    def save(self, trainer, reason):
        self.saved.append((trainer.global_step, reason))
        return True


def of_two(ranks, ask=None, at=2, **options):
    class Asks(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, trainer, global_step):
            if ask is not None and global_step == at:
                ask(trainer)

    trainer = tiny_trainer([ranks, Asks()], TinyModule(26), **({"epochs": 1, "evaluate_every": None} | options))
    trainer.train()
    return trainer


def test_a_stop_that_this_rank_asks_for_waits_for_the_vote():
    ranks = Ranks(at=5)
    trainer = of_two(ranks, lambda trainer: trainer.stop("enough", "preempted", 75))
    assert (trainer.global_step, trainer.status, trainer.stop_reason, trainer.exit_code) == (
        5,
        "preempted",
        "enough",
        75,
    )
    assert ranks.asked == [False, True, True, True, True]  # it goes on asking
    assert ranks.saved == [(5, "enough")]


def test_a_stop_that_another_rank_asks_for_ends_this_one_as_that_one():
    ranks = Ranks(at=4, stop=("received SIGTERM", "preempted", 143))
    trainer = of_two(ranks)
    assert (trainer.global_step, trainer.stop_reason, trainer.exit_code) == (4, "received SIGTERM", 143)
    assert not any(ranks.asked)


def test_of_two_stops_that_of_the_lower_rank_counts():
    trainer = of_two(Ranks(at=4, stop=("theirs", "preempted", 143)), lambda trainer: trainer.stop("ours"))
    assert (trainer.stop_reason, trainer.status, trainer.exit_code) == ("ours", "stopped", 0)


def test_a_stop_that_nobody_has_agreed_on_when_training_is_over():
    ranks = Ranks(at=99)
    trainer = of_two(ranks, lambda trainer: trainer.stop("too late", "preempted", 75))
    assert (trainer.global_step, trainer.status, trainer.exit_code) == (7, "finished", 0)
    assert ranks.saved == [(7, "end of training")]


def test_a_save_that_one_rank_alone_asks_for():
    ranks = Ranks(at=4, saves=["theirs", "both"])
    of_two(ranks, lambda trainer: (trainer.save("ours", alone=True), trainer.save("both", alone=True)))
    assert ranks.saved == [(4, "ours, both, theirs"), (7, "end of training")]
    assert ranks.asked == [False, True, True, True, False, False, False]
    ranks = Ranks(at=4)
    of_two(ranks, lambda trainer: trainer.save("all of us"))
    assert ranks.saved == [(2, "all of us"), (7, "end of training")]


def test_alone_nobody_is_asked():
    saved = []

    class Alone(Diary):
        @hookimpl(wrapper=True)
        def vote(self):
            raise AssertionError("there is nobody to vote with")
            yield

        @hookimpl
        def on_end_train_step(self, trainer, global_step):
            if global_step == 2:
                trainer.save("at once", alone=True)

        @hookimpl
        def save(self, trainer, reason):
            saved.append((trainer.global_step, reason))
            return True

    tiny_trainer([Alone()], epochs=1).train()
    assert saved[0] == (2, "at once")


def test_time_is_what_the_vote_says():
    trainer = of_two(Ranks(at=99), max_time="45 s")
    assert (trainer.global_step, trainer.counters.seconds) == (5, 50.0)


def test_values_that_only_another_rank_has_are_reduced_here_too():
    class Logs(Diary):
        @hookimpl
        def all_reduce(self, value, op):
            reduced.append((op, value.tolist()))
            return value

    reduced, logs = [], Logs()
    ranks = Ranks(at=99, synced={"x": "max", "here": "mean"})
    tiny_trainer([ranks, logs], epochs=1, evaluate_every=None, log_every="7 steps", max_steps=7).train()
    assert ("max", [-math.inf, 0.0]) in reduced
    assert logs.logged[0][1]["x"] == -math.inf
    assert math.isnan(logs.logged[0][1]["here"])  # 0 values of it: what the others have is not in this double
    assert list(logs.logged[0][1]) == sorted(logs.logged[0][1])  # the order in which all ranks reduce


def test_with_several_ranks_a_batch_counts_as_a_full_one():
    assert of_two(Ranks(at=99)).counters.samples == 7 * 8  # though the last is half a one
    alone = tiny_trainer(epochs=1)
    alone.train()
    assert alone.counters.samples == 50


# An epoch of the user's own ---------------------------------------------------------------


class OwnEpoch(TinyModule):
    """Takes its steps itself, and counts them."""

    @hookimpl
    def train_epoch(self, trainer, batches):
        (optimizer,) = trainer.optimizers
        for batch in batches:
            optimizer.zero_grad()
            self.train_step(trainer.global_step + 1, batch, trainer.device)[0].backward()
            optimizer.step()
            trainer.counters.global_step += 1
            trainer.position += 1
            if not trainer.settle(counted=True):
                return False
        return True


def test_who_counts_steps_himself_settles_each():
    class Stops(Diary):
        @hookimpl
        def on_boundary(self, trainer, global_step):
            self.told.append(f"boundary {global_step}")
            if global_step == 10:
                trainer.stop("enough")

    stops, memory = Stops(), Memory(every="4 steps")
    trainer = tiny_trainer([stops, memory], OwnEpoch())
    trainer.train()
    first = [f"boundary {step}" for step in range(1, 8)]
    assert stops.told == [
        *first,
        "validation 7",
        "epoch 0",
        "boundary 7",
        *(f"boundary {n}" for n in (8, 9, 10)),
        "end 10",
    ]
    assert (trainer.status, trainer.epoch, trainer.position) == ("stopped", 1, 3)
    assert sorted(memory.states) == [4, 8, 10]
    assert memory.states[10]["trainer"]["cursor"]["consumed"] == 24


class Again(CallbackInterface):
    """Takes a second pass over each window, in which a third one over its first batch is nested."""

    @hookimpl
    def run_window(self, trainer, window):
        with kept_rng():
            outputs = hookspecs.run_window(trainer=trainer, window=window)
        trainer.zero_grad()
        with trainer.idling():
            with trainer.idling(), kept_rng():
                hookspecs.call_model(trainer=trainer, batch=window[0], stage=Stage.TRAIN)
            assert trainer.idle
            hookspecs.run_window(trainer=trainer, window=window)
        assert not trainer.idle
        return outputs


class CountsAll(TinyModule):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def train_step(self, global_step, batch, device):
        self.count += len(batch[0])
        self.log(counted=self.count)
        self.trainer.log_object("counted", str(self.count))
        return super().train_step(global_step, batch, device)


class Shown(CallbackInterface):
    def __init__(self):
        self.objects = []

    @hookimpl
    def on_log_object(self, name, value, global_step):
        self.objects.append((name, value, global_step))


def test_a_pass_that_idles_counts_nowhere():
    ends = []
    for plugins in ([], [Again()]):
        memory, diary, shown = Memory(), Diary(), Shown()
        trainer = tiny_trainer([*plugins, memory, diary, shown], CountsAll(), log_every="1 steps")
        trainer.train()
        memory.state["trainer"]["counters"]["seconds"] = 0
        ends.append((digest(memory.state), trainer.module.seen, diary.logged, shown.objects))
    assert len(ends[0][3]) == 14
    assert ends[0] == ends[1]


def test_a_run_within_a_run_is_refused_and_the_one_under_way_ends_as_it_should():
    class Nested(CallbackInterface):
        @hookimpl
        def on_boundary(self, trainer):
            trainer.validate()

    trainer = tiny_trainer([Nested()])
    with pytest.raises(RuntimeError, match=r"a run of this trainer \(train\) is under way, .*trainer.evaluation.vali"):
        trainer.train()
    assert trainer.status == "failed"
    trainer.plugins.unregister(name="nested")
    trainer.validate()
    assert trainer.status == "finished"
