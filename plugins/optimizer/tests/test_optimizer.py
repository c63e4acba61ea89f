"""The optimizer is the one that one would write by hand; schedule-free ones are used with the weights to use."""

import itertools
import logging
import re

import pytest
import torch

from hookline import CallbackInterface, ModuleInterface, hookimpl
from hookline.cli import main
from hookline.testing import (
    Memory,
    PlainModule,
    TinyModule,
    check_plugin,
    digest,
    hand_written_loop,
    on_ranks,
    tiny_trainer,
    train_tiny,
)
from hookline_optimizer import Optimizer

ADAMW = "torch.optim.AdamW"
FREE = "schedulefree.AdamWScheduleFree"


class Module(TinyModule):
    """Has no optimizer of its own."""

    get_optimizers_schedulers = ModuleInterface.get_optimizers_schedulers


class PlainOne(PlainModule):
    get_optimizers_schedulers = ModuleInterface.get_optimizers_schedulers


def by_hand(make, begin=lambda optimizer: None):
    """Return a module whose optimizer is made by a function of its parameters, and keeps it as `optimizer`."""

    class ByHand(TinyModule):
        def get_optimizers_schedulers(self, steps, epochs):
            self.optimizer = make(self.parameters())
            begin(self.optimizer)
            return [self.optimizer], []

    return ByHand()


def train(options, *others, module=None, **trainer_options):
    plugins = {"optimizer": Optimizer(**options), **{str(number): one for number, one in enumerate(others)}}
    trainer = tiny_trainer(plugins, module or Module(), **trainer_options)
    trainer.train()
    return trainer


def test_contract():
    check_plugin(Optimizer)
    check_plugin(Optimizer, _target_=ADAMW, lr=1e-2, replace=True, epochs=1)


# Making it ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "make"),
    [
        ({"_target_": ADAMW}, lambda weights: torch.optim.AdamW(weights, fused=True)),
        (
            {"_target_": ADAMW, "lr": 1e-2, "weight_decay": 0.3, "options": {"betas": [0.8, 0.9]}, "fused": False},
            lambda weights: torch.optim.AdamW(weights, 1e-2, (0.8, 0.9), weight_decay=0.3),
        ),
        (
            {"_target_": "torch.optim.SGD", "lr": 1e-2, "options": {"momentum": 0.9, "nesterov": True}},
            lambda weights: torch.optim.SGD(weights, 1e-2, 0.9, nesterov=True, fused=True),
        ),
        ({"_target_": "torch.optim.RMSprop", "lr": 1e-2}, lambda weights: torch.optim.RMSprop(weights, 1e-2)),
        (
            {"_target_": ADAMW, "options": {"foreach": True}},
            lambda weights: torch.optim.AdamW(weights, foreach=True),
        ),
    ],
)
def test_trains_what_the_optimizer_by_hand_trains(options, make):
    module = by_hand(make)
    hand_written_loop(module)
    trainer = train(options)
    assert digest(trainer.module.state_dict()) == digest(module.state_dict())
    assert digest(trainer.optimizers[0].state_dict()["state"]) == digest(module.optimizer.state_dict()["state"])


def test_fused_is_the_same_but_for_rounding():
    fused, plain = (train({"_target_": ADAMW, "fused": way}).module.state_dict() for way in (None, False))
    torch.testing.assert_close(dict(fused), dict(plain), rtol=1e-3, atol=1e-5)


def test_the_log_tells_how_it_steps(caplog):
    caplog.set_level(logging.INFO, "hookline")
    train({"_target_": ADAMW})
    train({"_target_": "torch.optim.RMSprop"})
    assert "AdamW steps fused" in caplog.text
    assert "RMSprop steps as torch chooses for the device" in caplog.text


def test_sparse_gradients_are_not_stepped_by_a_fused_one():
    class Sparse(Module):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Embedding(50, 1, sparse=True)

        def train_step(self, global_step, batch, device):
            loss, predictions = super().train_step(global_step, batch, device)
            return loss + self.shift(batch[2]).square().mean(), predictions

    trainer = train({"_target_": "torch.optim.SGD", "lr": 1e-2}, module=Sparse())
    assert trainer.global_step == 14


@pytest.mark.parametrize("target", [ADAMW, FREE])
def test_a_run_resumed_at_each_step_ends_with_the_same_bits(target):
    whole, options = Memory(every="1 steps"), {"epochs": 1, "evaluate_every": "2 steps"}
    trainer = train({"_target_": target}, whole, **options)
    for step in range(1, 7):
        resumed = train({"_target_": target}, Memory(whole.states[step]), **options)
        assert digest(resumed.module.state_dict()) == digest(trainer.module.state_dict()), step
        assert digest(resumed.export_model()) == digest(trainer.export_model()), step
        assert resumed.metrics == trainer.metrics


def test_takes_the_place_of_the_optimizers_of_the_module_if_asked():
    class Raises(TinyModule):
        def get_optimizers_schedulers(self, steps, epochs):
            raise AssertionError

    trainer = train({"_target_": ADAMW, "replace": True}, module=Raises())
    assert digest(trainer.module.state_dict()) == digest(train({"_target_": ADAMW}).module.state_dict())


def test_in_a_configuration(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_module.py").write_text(
        "from hookline import ModuleInterface\nfrom hookline.testing import TinyModule\n\n"
        "class Own(TinyModule):\n    get_optimizers_schedulers = ModuleInterface.get_optimizers_schedulers\n"
    )
    run = "module: {_target_: own_module.Own}\nplugins: {optimizer: {_target_: torch.optim.AdamW, lr: 3e-4}}\n"
    (tmp_path / "run.yaml").write_text(run)
    assert main(["fit", "run.yaml", "trainer.train_batch_size=8", "trainer.val_batch_size=8"]) == 0
    assert main(["fit", "run.yaml", "-p", "no:optimizer"]) == 2
    assert "Own has no get_optimizers_schedulers: write it, or name plugin optimizer" in capsys.readouterr().err


@pytest.mark.plugins
def test_the_order_of_the_list_changes_nothing():
    plugins = {
        "optimizer": {"_target_": ADAMW, "weight_decay": 0.1},
        "param_groups": {"groups": {"net.0.*": {"lr": 0.5}}},
        "lr_schedule": {"schedule": "linear"},
    }
    ends = set()
    for order in itertools.permutations(plugins):
        trainer = tiny_trainer({name: plugins[name] for name in order}, Module(), epochs=1)
        trainer.train()
        assert trainer.schedulers[0].scheduler.base_lrs == [0.5, 0.5, 1e-3, 1e-3], order
        ends.add(digest(trainer.module.state_dict()))
    assert len(ends) == 1


# Schedule-free ------------------------------------------------------------------------


def free(weights):
    import schedulefree

    return schedulefree.AdamWScheduleFree(weights, lr=0.01)


OPTIONS = {"_target_": FREE, "lr": 0.01}


def test_trains_and_exports_what_a_loop_by_hand_does():
    module = by_hand(free, lambda optimizer: optimizer.train())
    hand_written_loop(module)
    trained = digest(module.state_dict())
    module.optimizer.eval()
    trainer = train(OPTIONS)
    assert digest(trainer.module.state_dict()) == trained
    assert digest(trainer.export_model()) == digest(module.state_dict()) != trained
    other = TinyModule()
    other.load_state_dict(module.state_dict())
    assert trainer.metrics == tiny_trainer(module=other).validate()


def test_holds_for_the_optimizers_that_the_module_returns():
    trainer = train({}, module=by_hand(free))
    assert digest(trainer.export_model()) == digest(train(OPTIONS).export_model())


def test_evaluations_change_no_bit_of_the_training():
    often, never = (train(OPTIONS, evaluate_every=cadence) for cadence in ("1 steps", None))
    assert digest(often.module.state_dict()) == digest(never.module.state_dict())


def test_the_weights_to_train_with_come_back_when_an_evaluation_raises():
    class Raising(Module):
        def val_step(self, global_step, batch, device):
            raise ZeroDivisionError

    trainer = tiny_trainer([Optimizer(**OPTIONS)], Raising(), evaluate_every=None, eval_when_finish=False)
    trainer.train()
    trained = digest(trainer.module.state_dict())
    with pytest.raises(ZeroDivisionError):
        trainer.validate()
    assert digest(trainer.module.state_dict()) == trained
    assert trainer.optimizers[0].param_groups[0]["train_mode"]


def test_an_evaluation_on_its_own_takes_the_weights_to_use_from_the_state():
    memory = Memory()
    trainer = train(OPTIONS, memory)
    alone = tiny_trainer([Memory(memory.state), Optimizer(**OPTIONS)], Module())
    assert alone.validate() == trainer.metrics
    assert digest(alone.export_model()) == digest(trainer.export_model())


@pytest.mark.plugins
def test_model_saving_saves_the_weights_to_use(tmp_path):
    from safetensors.torch import load_file

    plugins = {"optimizer": OPTIONS, "model_saving": {"policy": "always"}}
    trainer = tiny_trainer(plugins, Module(), runs_folder=str(tmp_path))
    trainer.train()
    saved = load_file(trainer.run_dir / "models" / "always" / "model.safetensors")
    assert digest(saved) == digest(trainer.export_model()) != digest(trainer.module.state_dict())


@pytest.mark.plugins
def test_an_average_of_another_plugin_is_used_in_every_order_of_the_list():
    plugins, ends = {"optimizer": OPTIONS, "ema": {"decay": 0.5}, "accumulate": {"steps": 2}}, []
    for order in itertools.permutations(plugins):
        trainer = tiny_trainer({name: plugins[name] for name in order}, Module())
        trainer.train()
        ends.append((trainer.metrics, digest(trainer.export_model()), digest(trainer.module.state_dict())))
    assert all(end == ends[0] for end in ends)
    averaged = trainer.plugins.get_plugin("ema").get_state()["average"]
    assert torch.equal(trainer.export_model()["net.0.weight"], averaged["net.0.weight"])


def test_other_optimizers_cost_nothing():
    class Looks(CallbackInterface):
        @hookimpl
        def on_end_val_epoch(self, trainer):
            self.pointers = {weight.data_ptr() for weight in trainer.export_model().values()}

    looks = Looks()
    trainer = train({"_target_": ADAMW}, looks)
    assert looks.pointers == {weight.data_ptr() for weight in trainer.module.state_dict().values()}
    assert trainer.plugins.get_plugin("optimizer").get_state() == {}


# Several ranks ------------------------------------------------------------------------


@pytest.mark.plugins
@pytest.mark.parametrize("options", [{"_target_": ADAMW, "lr": 0.01}, OPTIONS], ids=lambda options: options["_target_"])
def test_ranks_that_share_the_model_train_what_one_trains(options):
    alone = train_tiny({"optimizer": options}, PlainOne)
    ranks = on_ranks(train_tiny, 2, {"fsdp": {}, "optimizer": options}, PlainOne)
    assert digest(ranks[0].weights) == digest(ranks[1].weights)
    torch.testing.assert_close(dict(ranks[0].weights), dict(alone.weights), rtol=1e-3, atol=1e-4)
    assert ranks[0].again == ranks[0].metrics == pytest.approx(alone.metrics, rel=1e-4)


# Errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.1}, "optimizer.lr needs optimizer._target_, such as torch.optim.AdamW"),
        (
            {"_target_": ADAMW, "options": {"lr": 1}},
            "optimizer.options.lr: write it beside options, or leave",
        ),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Optimizer(**options)


@pytest.mark.parametrize(
    ("options", "module", "message"),
    [
        ({"_target_": ADAMW}, TinyModule, "optimizer._target_=torch.optim.AdamW: TinyModule has get_optimizers"),
        ({"_target_": "torch.optim.AdamV"}, Module, "plugins.optimizer._target_: 'torch.optim.AdamV' cannot be"),
        ({"_target_": ADAMW, "options": {"beta": 1}}, Module, "plugins.optimizer.beta: unknown key, did you mean"),
        ({"_target_": ADAMW, "lr": -1.0}, Module, "plugins.optimizer: Invalid learning rate: -1.0"),
        ({"_target_": "builtins.dict"}, Module, "optimizer._target_=builtins.dict made a dict, no torch"),
    ],
)  # fmt: skip
def test_refuses_what_does_not_fit(options, module, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train(options, module=module())
