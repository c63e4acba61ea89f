"""The names of LERNOMATIC around the loop: attributes, getters and setters, files, and what is refused by name."""

import importlib
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from hookline import CallbackInterface, hookimpl
from hookline.testing import digest
from hookline.testing.faults import PRELOADED, at_hook, kill, run
from hookline_lernomatic import Inferrer, LernomaticModel, Trainer, allow_import
from hookline_lernomatic.model import common
from hookline_lernomatic.models import common as same
from hookline_lernomatic.train import schedule

PRELOADED += ["hookline_lernomatic"]
pytestmark = pytest.mark.plugins  # the trainer names those of the house


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "_allowed", set(common._allowed))


def points(number=40, seed=1):
    inputs = torch.randn(number, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, (inputs.sum(dim=1) > 0).long())


class Small(same.LernomaticModel):
    def __init__(self, width=16, seed=0):
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 2))
        self.import_path = self.module_import_path = __name__
        self.model_name, self.module_name = "Small", "Sequential"


class Two(LernomaticModel):
    """Two networks, of which only what the guide needs is overridden."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

    def get_model_parameters(self):
        return [*self.body.parameters(), *self.head.parameters()]

    def get_params(self):
        return {"model_state_dict": {"body": self.body.state_dict(), "head": self.head.state_dict()}}

    def set_params(self, params):
        self.body.load_state_dict(params["model_state_dict"]["body"])
        self.head.load_state_dict(params["model_state_dict"]["head"])

    def forward(self, X):
        return self.head(self.body(X).relu())


OPTIONS = {"num_epochs": 2, "batch_size": 8, "learning_rate": 0.02}


def make(kind=Trainer, model=None, **given):
    return kind(model or Small(), **{"train_dataset": points(), "val_dataset": points(20, 2)} | OPTIONS | given)


# Attributes, getters and setters --------------------------------------------------------------------


def test_parameters_of_a_trainer():
    ours = make(optim_function="SGD", momentum=0.9, test_batch_size=4, test_dataset=points(20, 3))
    params = ours.get_trainer_params()
    assert params == {
        "num_epochs": 2, "learning_rate": 0.02, "momentum": 0.9, "weight_decay": 1e-5, "cur_epoch": 0,
        "loss_function": "CrossEntropyLoss", "optim_function": "SGD", "iter_per_epoch": 5, "save_every": -1,
        "print_every": 10, "batch_size": 8, "val_batch_size": 8, "shuffle": True,
    }  # fmt: skip
    assert (ours.test_loader.batch_size, ours.val_loader.batch_size) == (4, 8)
    ours.set_trainer_params(params | {"batch_size": 4, "cur_epoch": 1, "shuffle": False})
    assert (ours.train_loader.batch_size, len(ours.train_loader), ours.cur_epoch) == (4, 10, 1)
    assert (ours.get_num_epochs(), ours.get_cur_epoch()) == (2, 1)
    assert repr(ours) == "Trainer"
    assert "\t [batch_size] : 4\n" in str(ours)
    assert ours.get_model() is ours.model
    assert digest(ours.get_model_params()) == digest(ours.model.net.state_dict())
    assert Trainer().get_model_params() is None


def test_rates_momentum_and_schedules():
    ours = make(optim_function="SGD", momentum=0.9)
    ours.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    ours.set_learning_rate(0.5)
    assert [group["lr"] for group in ours.optimizer.param_groups] == [0.5, 0.02]
    ours.set_learning_rate(0.4, param_zero=False)
    assert [group["lr"] for group in ours.optimizer.param_groups] == [0.4, 0.4]
    assert (ours.get_learning_rate(), ours.get_momentum()) == (0.4, 0.9)
    ours.set_momentum(0.3)
    assert ours.get_momentum() == 0.3
    adam = make()
    adam.set_momentum(0.3)
    assert (adam.get_momentum(), adam.optimizer.param_groups[0]["betas"]) == (0.3, (0.3, 0.999))
    with pytest.warns(UserWarning, match="momentum=0.9 has no effect: Adam has none"):
        make(momentum=0.9)
    made = schedule.TriangularScheduler()
    ours.set_lr_scheduler(made)
    ours.set_mtm_scheduler(made)
    assert (ours.get_lr_scheduler(), ours.get_mtm_scheduler()) == (made, made)


def test_data_that_are_set_later_are_those_that_are_trained_on():
    ours = Trainer(Small(), num_epochs=1, batch_size=8)
    with pytest.raises(ValueError, match="Trainer has no data to train on: give train_dataset"):
        ours.train()
    with pytest.raises(ValueError, match="Trainer has no data to validate on: give val_dataset"):
        ours.val_epoch()
    with pytest.raises(ValueError, match="Trainer has no data to test on: give test_dataset"):
        ours.test()
    ours.set_train_dataset(points())
    ours.set_val_dataset(points(20, 2))
    ours.set_test_dataset(points(20, 2))
    ours.train()
    assert (ours.loss_iter, ours.val_loss_iter, ours.acc_iter) == (5, 3, 1)
    assert ours.test()["test_acc"] == ours.get_cur_acc()
    ours.set_batch_size(4)
    ours.set_num_epochs(2)
    ours.train()
    assert (ours.loss_iter, ours.core.counters.samples) == (15, 80)
    assert ours.get_cur_epoch_loss().tolist() == ours.get_loss_history()[5:].tolist()
    assert ours.get_cur_epoch_val_loss().tolist() == ours.get_val_loss_history()[3:].tolist()
    assert ours.get_cur_val_loss() == ours.get_val_loss_history()[-1].item()


def test_getters_of_a_model_and_the_base_that_is_initialized():
    class New(LernomaticModel):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.net = nn.Linear(2, 2)
            self.import_path, self.module_import_path, self.model_name, self.module_name = (
                "a",
                "torch.nn",
                "New",
                "Linear",
            )

    model = New()
    names = (model.get_model_name(), model.get_model_path(), model.get_module_name(), model.get_module_import_path())
    assert names == ("New", "a", "Linear", "torch.nn")
    assert (model.get_num_layers(), repr(model)) == (2, "New")
    trainer = Trainer(model)
    trainer.freeze_to(1)
    assert [parameter.requires_grad for parameter in model.get_model_parameters()] == [False, True]
    trainer.unfreeze_to(1)
    model.freeze_all()
    assert not any(parameter.requires_grad for parameter in model.get_model_parameters())
    with pytest.warns(UserWarning, match="LernomaticModel takes no arguments; depth has no effect"):
        New(depth=3)
    with pytest.raises(ValueError, match="this trainer has no `model`"):
        Trainer().freeze_to(1)


class Writer:
    """What stands for a `SummaryWriter`."""

    def __init__(self):
        self.written = []

    def add_scalar(self, name, value, step):
        self.written.append((name, value, step))


def test_a_writer_gets_losses_and_accuracies():
    writer = Writer()
    ours = make(print_every=2)
    ours.set_tb_writer(writer)
    ours.train()
    losses, accuracies = ours.get_loss_history().tolist(), ours.get_acc_history().tolist()
    means = [value for name, value, _ in writer.written if name == "val_loss"]
    assert [(name, step) for name, _, step in writer.written] == [
        ("train_loss", 2), ("train_loss", 4), ("val_loss", 0), ("val_acc", 0),
        ("train_loss", 7), ("train_loss", 9), ("val_loss", 1), ("val_acc", 1),
    ]  # fmt: skip
    assert [value for name, value, _ in writer.written if name == "train_loss"] == [losses[at] for at in (2, 4, 7, 9)]
    assert [value for name, value, _ in writer.written if name == "val_acc"] == accuracies
    weights = torch.tensor([8.0, 8.0, 4.0]) / 20
    assert means == pytest.approx([(part * weights).sum().item() for part in ours.get_val_loss_history().view(2, 3)])


# Where a training begins ----------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("start_epoch",), ("cur_epoch",), ("start_epoch", "cur_epoch")])
def test_a_first_epoch_that_was_set_is_where_training_begins(names):
    ours = make(num_epochs=3, save_every=1)
    for name in names:
        setattr(ours, name, 2)
    ours.train()
    assert (ours.loss_iter, ours.acc_iter, ours.start_epoch, ours.cur_epoch) == (5, 1, 2, 3)
    setattr(ours, names[0], 1)  # once more from there
    ours.train()
    assert (ours.loss_iter, len(ours.get_loss_history()), ours.cur_epoch) == (15, 15, 3)
    ours.train()  # nothing is left
    assert (ours.loss_iter, ours.cur_epoch) == (15, 3)


def from_epoch(start, name, *faults, resume=False):
    given = {f"fault{number}": fault for number, fault in enumerate(faults)}
    rates = schedule.EpochSetScheduler({0: 0.1, 1: 0.01, 2: 0.05}, lr_value=True)
    ours = make(num_epochs=3, checkpoint_name=name, save_every=2, plugins=given, resume=resume, lr_scheduler=rates)
    ours.start_epoch = start
    ours.train()
    return digest(ours.get_model_params()), ours.get_history()["loss_history"].tolist(), ours.cur_epoch


def from_epoch_until_killed():
    from_epoch(1, "cut", at_hook("on_end_backward", kill, nth=8))


def test_a_training_that_began_later_goes_on_after_a_kill():
    assert run(from_epoch_until_killed).code == -signal.SIGKILL
    assert from_epoch(1, "cut", resume=True) == from_epoch(1, "whole")
    with pytest.raises(ValueError, match="the run that goes on had start_epoch=1, and now it is 0: set start_epoch"):
        from_epoch(0, "cut", resume=True)


def test_epochs_are_raised_by_the_attribute_alone():
    ours, whole = make(), make(num_epochs=4, checkpoint_name="whole")
    ours.train()
    ours.num_epochs = 4
    ours.train()
    whole.train()
    assert ours.get_loss_history().tolist() == whole.get_loss_history().tolist()
    assert ours.get_acc_history().tolist() == whole.get_acc_history().tolist()


# Files ------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_what_that_of_the_original_holds_and_one_of_it_is_loaded():
    ours = make(weight_decay=0.5, print_every=7)
    ours.train()
    kept = torch.load("checkpoint/ck_epoch_2_iter_10.pkl", weights_only=True)
    assert {"model", "optim", "trainer_params"} <= kept.keys()
    assert kept["optim"].keys() == {"state", "param_groups"}
    assert kept["trainer_params"] == ours.get_trainer_params()
    theirs = {name: kept[name] for name in ("model", "optim", "trainer_params")}  # of LERNOMATIC: without a history
    torch.save(theirs, "theirs.pkl")
    again = make(model=Small(seed=1), num_epochs=9)
    again.load_checkpoint("theirs.pkl")
    assert again.get_trainer_params() == ours.get_trainer_params()
    assert digest(again.get_model_params()) == digest(ours.get_model_params())
    assert digest(again.optimizer.state_dict()) == digest(ours.optimizer.state_dict())
    again.set_num_epochs(3)
    again.train()
    assert (again.cur_epoch, again.loss_iter) == (3, 5)


def test_names_of_files_are_as_they_were_given_and_that_of_the_run_is_a_plain_one():
    make(num_epochs=1, checkpoint_name="resnet_[max_acc]").train()
    names = {path.name for path in Path("checkpoint").iterdir()}
    assert names == {"resnet__max_acc_-1", "resnet_[max_acc]_epoch_1_iter_5.pkl", "resnet_[max_acc]_history.pkl"}
    make(num_epochs=1, checkpoint_name=None, save_every=0, save_hist=False, checkpoint_dir="none").train()
    assert [path.name for path in Path("none").iterdir()] == ["ck-1"]


def test_a_model_of_several_networks_is_saved_and_loaded_by_what_it_overrides():
    ours = make(model=Two())
    ours.train()
    assert set(dict(ours.core.module.named_parameters())) == {
        f"nets.model.{net}.{part}" for net in ("body", "head") for part in ("weight", "bias")
    }
    ours.save_checkpoint("two.pkl")
    again = make(model=Two(seed=1))
    again.load_checkpoint("two.pkl")
    assert digest(again.model.get_params()) == digest(ours.model.get_params())
    again.model.freeze()
    assert not any(parameter.requires_grad for parameter in again.model.get_model_parameters())
    torch.save({"trainer_params": {}, "optim": {}, "encoder": {}}, "other.pkl")
    with pytest.raises(ValueError, match="other.pkl has no model; it has trainer_params, optim, encoder"):
        again.load_checkpoint("other.pkl")
    torch.save({"trainer_params": {}, "optim": {"optim_g": {}}, "model": Two().get_params()}, "other.pkl")
    with pytest.raises(ValueError, match="other.pkl has no state of the optimizer 'optimizer'; it has optim_g"):
        again.load_checkpoint("other.pkl")


def test_models_that_are_put_in_the_place_of_trained_ones_are_trained():
    ours = make()
    ours.train()
    old, ours.model = ours.model, Small(seed=1)
    ours._init_optimizer()
    before = digest(old.get_net_state_dict()), digest(ours.get_model_params())
    ours.set_num_epochs(3)
    ours.train()
    assert digest(old.get_net_state_dict()) == before[0]
    assert digest(ours.get_model_params()) != before[1]
    assert (ours.cur_epoch, ours.loss_iter) == (3, 15)


class Wraps(CallbackInterface):
    """Puts other networks in the place of those that there are, as a compiler may."""

    @hookimpl
    def convert_model(self, model):
        parts = model.nets["model"]
        if isinstance(parts, nn.ModuleDict):
            for name in ("head", "more_0"):
                if name in parts:
                    parts[name] = nn.Sequential(parts[name])
        else:
            model.nets["model"] = nn.Sequential(parts)
        return model


def test_networks_in_a_list_that_a_plugin_has_replaced_are_those_of_the_model():
    model = Two()
    model.more = [model.head]
    del model.head
    model.forward = lambda X: model.more[0](model.body(X).relu())
    model.get_model_parameters = lambda: [*model.body.parameters(), *model.more[0].parameters()]
    before = model.more[0]
    make(model=model, plugins={"wraps": Wraps()}, save_every=0).train()
    assert model.more[0][0] is before


@pytest.mark.parametrize(("kind", "name"), [(Small, "net"), (Two, "head")])
def test_networks_that_a_plugin_has_replaced_are_those_of_the_model(kind, name):
    model = kind()
    before = getattr(model, name)
    ours = make(model=model, plugins={"wraps": Wraps()}, save_every=0)
    ours.train()
    assert getattr(model, name)[0] is before
    core, _ = ours.core, ours.set_num_epochs(3)
    ours.train()
    assert (ours.core, ours.cur_epoch) == (core, 3)


MODULE = """
from torch import nn

from hookline_lernomatic.models import common


class Sized(common.LernomaticModel):
    def __init__(self, size):
        self.net = nn.Linear(size, 1)

    def get_model_args(self):
        return {"in_features": 3, "out_features": 1}


class Two(common.LernomaticModel):
    def __init__(self, name="two"):
        self.a, self.b, self.name = nn.Linear(1, 1), nn.Linear(1, 1), name

    def get_net_state_dict(self):
        return {"a": self.a.state_dict(), "b": self.b.state_dict()}

    def set_net_state_dict(self, sd):
        self.a.load_state_dict(sd["a"])
        self.b.load_state_dict(sd["b"])
"""


@pytest.mark.parametrize(("name", "args"), [("Sized", (3,)), ("Two", ())])
def test_a_model_of_a_checkpoint_is_made_with_its_init_where_that_needs_nothing(name, args, monkeypatch, tmp_path):
    (tmp_path / "sized.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    allow_import("sized")
    allow_import("torch")
    made = getattr(importlib.import_module("sized"), name)(*args)
    monkeypatch.delitem(sys.modules, "sized")
    made.import_path, made.model_name = "sized.py", name
    made.module_import_path, made.module_name = "torch.nn", "Linear"
    torch.save({"model": made.get_params()}, "model.pkl")
    inferrer = Inferrer()
    inferrer.load_model("model.pkl")
    assert digest(inferrer.model.get_net_state_dict()) == digest(made.get_net_state_dict())
    assert getattr(inferrer.model, "name", "two") == "two"


class Pictures(Inferrer):
    """An inferrer of two models, as LERNOMATIC's own has them."""

    def __init__(self, q_net, p_net, **kwargs):
        self.q_net, self.p_net = q_net, p_net
        super().__init__(None, **kwargs)

    def _send_to_device(self):
        self.q_net.send_to(self.device)
        self.p_net.send_to(self.device)


def test_an_inferrer_of_several_models_and_one_of_another_name():
    inferrer = Pictures(Small(), Small(), device_id=-1)
    assert (inferrer.get_model(), inferrer.device, repr(inferrer)) == (None, torch.device("cpu"), "Pictures")
    model = Small()
    model.import_path, model.module_import_path, model.model_name = "hookline_lernomatic", "torch.nn", "LernomaticModel"
    model.module_name, model.net = "Identity", nn.Identity()
    torch.save({"generator": model.get_params()}, "some.pkl")
    allow_import("torch")
    one = Inferrer()
    one.load_model("some.pkl", model_key="generator")
    assert one.forward(torch.ones(2)).tolist() == [1, 1]
    assert one.get_model().get_model_name() == "LernomaticModel"
    loaded = LernomaticModel()
    loaded.load_checkpoint("some.pkl", model_key="generator")
    assert isinstance(loaded.get_net(), nn.Identity)


def test_histories_of_a_subclass_are_in_the_state_of_the_run():
    numpy = pytest.importorskip("numpy")

    class New(Trainer):
        def _init_history(self):
            super()._init_history()
            self.d_loss_history = numpy.zeros(10)

    ours = make(New)
    ours.d_loss_history[3] = 7
    ours.save_history("history.pkl")
    again = make(New)
    again.d_loss_history = numpy.zeros(20)
    again.load_history("history.pkl")
    assert again.d_loss_history.tolist() == [0, 0, 0, 7, *[0] * 16]
    assert isinstance(again.d_loss_history, numpy.ndarray)


# What is refused, or has no effect and says so --------------------------------------------------------


def test_what_cannot_be_says_what_to_write_instead():
    class New(Trainer):
        def __init__(self, model, **kwargs):
            """Leave out what the base does, as the guide's example."""

    for method in ("train", "train_epoch", "val_epoch", "test"):
        with pytest.raises(RuntimeError, match=r"New.__init__ has to call super\(\).__init__\(model, \*\*kwargs\)"):
            getattr(New(Small()), method)()
    with pytest.raises(ValueError, match=r"device_map=\{'a': 0\} has no effect in LERNOMATIC: give device_id="):
        make(device_map={"a": 0})
    with pytest.raises(ValueError, match="Two has no network at `net` .networks: body, head.*get_net_state_dict"):
        Two().get_net_state_dict()
    empty = make()
    del empty.model.net
    with pytest.raises(ValueError, match="Small, the `model` of a trainer, has no network"):
        empty.train()

    class Hidden(Two):
        def __init__(self):
            super().__init__()
            self.more = (nn.Linear(2, 2),)

        def get_model_parameters(self):
            return [*super().get_model_parameters(), *self.more[0].parameters()]

    with pytest.raises(
        ValueError, match="2 parameters of Trainer.optimizer are in no torch.nn.Module that is an attribute of model"
    ):
        make(model=Hidden()).train()
    unnamed = Small()
    del unnamed.model_name
    with pytest.raises(AttributeError, match="'Small' object has no attribute 'model_name'"):
        make(model=unnamed).train()
    with pytest.raises(ValueError, match="Trainer has no `model`: with several models, train_epoch and val_epoch"):
        Trainer().batch_loss((1, 2))


class Twice(Trainer):
    def train_epoch(self):
        super().train_epoch()
        super().train_epoch()


class OwnTrain(Trainer):
    def train(self):
        self.train_epoch()


def test_passes_over_the_data_that_cannot_be():
    with pytest.raises(RuntimeError, match="Twice.train_epoch has gone through them already: write the other pass"):
        make(Twice).train()
    with pytest.raises(ValueError, match=r"a train\(\) of one's own goes on by load_checkpoint\(file\)"):
        make(OwnTrain, resume=True).train()


class Replaces(Trainer):
    """Makes another optimizer in the second epoch."""

    before = True

    def train_epoch(self):
        if self.cur_epoch == 1 and self.before:
            self.optimizer = torch.optim.SGD(self.model.get_model_parameters(), lr=0.1)
        super().train_epoch()
        if self.cur_epoch == 1 and not self.before:
            self.model = Small()


@pytest.mark.parametrize("before", [True, False])
def test_optimizers_and_models_that_are_replaced_within_a_training_are_refused(before):
    ours = make(Replaces)
    ours.before = before
    with pytest.raises(RuntimeError, match="Replaces has got other models or optimizers within a training"):
        ours.train()
    assert ours.loss_iter == (5 if before else 10)


class Rests(Trainer):
    """Steps the second of its optimizers."""

    def _init_optimizer(self):
        self.first = torch.optim.SGD(self.model.get_model_parameters(), lr=0.1)
        super()._init_optimizer()

    def train_epoch(self):
        for batch in self.train_loader:
            self.batch_loss(batch)[0].backward()
            self.optimizer.step()


def test_an_epoch_without_a_step_of_the_first_optimizer_says_so(caplog):
    ours = make(Rests)
    ours.train()
    assert caplog.text.count("Rests.train_epoch made no step of first, the first of its optimizers") == 1
    assert (ours.core.global_step, ours.core.counters.batches, ours.core.counters.samples) == (0, 10, 80)
    listed = make()
    listed.optims = [listed.optimizer]
    listed.optimizer = None
    with pytest.raises(ValueError, match="Trainer has no optimizer: have _init_optimizer set some torch.optim.Opt"):
        listed.train()


def test_a_seed_of_the_script_that_is_not_that_of_the_training_says_so(caplog):
    torch.manual_seed(42)
    orders = []
    for seed in (None, 0, 42):
        model = Small()
        torch.manual_seed(42)
        caplog.clear()
        ours = make(model=model, seed=seed, num_epochs=1)
        ours.train()
        assert ("torch.manual_seed(42) does not reach the order of samples" in caplog.text) is (seed is None)
        orders.append(ours.get_loss_history().tolist())
    assert orders[0] == orders[1] != orders[2]


class Stops(CallbackInterface):
    """Stops in the second epoch."""

    @hookimpl
    def on_boundary(self, trainer):
        if trainer.global_step == 7:
            trainer.stop("enough")


def test_a_train_of_the_users_own_does_not_train_on_behind_a_stop():
    class New(Trainer):
        def train(self):
            for _ in range(self.num_epochs):
                self.train_epoch()

    ours = make(New, num_epochs=4, plugins={"stops": Stops()})
    with pytest.raises(
        RuntimeError, match=r"this training was stopped \(enough\): a train\(\) of one's own ends where"
    ):
        ours.train()
    assert ours.loss_iter == 7


def test_arguments_without_an_effect_say_so(caplog):
    make(val_dataset=None, stop_when_acc=0.9, save_best=True, early_stop={"num_epochs": 1, "improv": 0.1}).train()
    for name in ("stop_when_acc=0.9", "save_best=True", "early_stop="):
        assert f"{name}" in caplog.text
    assert caplog.text.count("has no effect: there are no data to validate on") == 3
    caplog.clear()

    class Squares(Trainer):
        def batch_loss(self, batch):
            output = self.model.forward(batch[0])
            return output.square().mean(), output, output

    make(Squares, stop_when_acc=0.9).train()
    assert "stop_when_acc has no effect: the validation gives no accuracy" in caplog.text
