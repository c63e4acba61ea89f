"""Which models are saved, what stands on the disk, who can load it, and what a failure leaves."""

from __future__ import annotations

import ctypes
import json
import logging
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, load_model

from hookline import CallbackInterface, ModuleInterface, Stage, Trainer, hookimpl, sharded
from hookline.testing import Memory, TinyModule, check_plugin, digest, tiny_trainer
from hookline_model_saving import ModelSaving

nan, inf = float("nan"), float("inf")


class Scripted(ModuleInterface):
    """One step an epoch; its weight is the number of the step, its losses and its score are those given."""

    def __init__(self, valid=(), train=(), score=(), validates=True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.valid, self.train_losses, self.score, self.validates = valid, train, score, validates

    def train_step(self, global_step, batch, device):
        loss = -self.weight  # SGD adds 1 to it
        return loss + (self.train_losses[global_step - 1] - loss.item()) if self.train_losses else loss

    def val_step(self, global_step, batch, device):
        if self.score:
            self.log(val_iou=self.score[global_step - 1])
        return torch.tensor(float(self.valid[global_step - 1]) if self.valid else 1.0)

    def get_train_dataloader(self, sampler, batch_size):
        return sharded([torch.zeros(1)])

    def get_val_dataloaders(self, sampler, batch_size):
        return sharded([torch.zeros(1)]) if self.validates else None

    def get_optimizers_schedulers(self, steps, epochs):
        return [torch.optim.SGD([self.weight], 1.0)], []


class Hearer(CallbackInterface):
    """Keeps the step at which each model was complete on the disk, by policy."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {}

    @hookimpl
    def on_checkpoint(self, path, kind):
        assert kind == "model"
        about = json.loads((path / "model.json").read_text())
        assert load_file(path / "model.safetensors")["weight"].item() == about["step"]
        self.steps.setdefault(path.name, []).append(about["step"])


def trained(folder: Path, module: ModuleInterface, *plugins: Any, epochs: int = 4, **options: Any) -> Trainer:
    trainer = Trainer(module, list(plugins), epochs=epochs, runs_folder=str(folder), device="cpu", **options)
    trainer.train()
    return trainer


def steps(folder: Path, module: ModuleInterface, *plugins: Any, **options: Any) -> dict[str, list[int]]:
    """Return the steps whose models were saved by policy, each checked to hold the weights of its step."""
    hearer = Hearer()
    trained(folder, module, *plugins, hearer, **options)
    return hearer.steps


def at(folder: Path, policy: str = "best_valid_loss") -> Path:
    return folder / "run-1" / "models" / policy


def about(folder: Path, policy: str = "best_valid_loss") -> dict[str, Any]:
    return json.loads((at(folder, policy) / "model.json").read_text())


# When ---------------------------------------------------------------------------------


def test_contract(tmp_path):
    check_plugin(ModelSaving, runs_folder=str(tmp_path))
    check_plugin(ModelSaving, policy=["best_train_loss", "always"], runs_folder=str(tmp_path))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("best_valid_loss", [1, 3]),
        ("best_train_loss", [1, 2, 4]),
        ("best_val_iou", [1, 4]),
        ("best_val_loss", [1, 3]),
        ("always", [1, 2, 3, 4]),
    ],
)
def test_each_policy(tmp_path, policy, expected):
    module = Scripted(valid=[3, 4, 2, 2], train=[9, 8, 8, 7], score=[0.5, 0.4, 0.5, 0.6])
    assert steps(tmp_path, module, ModelSaving(policy)) == {policy: expected}
    assert about(tmp_path, policy)["step"] == expected[-1]


def test_several_at_once(tmp_path):
    module = Scripted(valid=[3, 4, 2, 2], train=[9, 8, 8, 7], score=[0.5, 0.4, 0.5, 0.6])
    saved = steps(tmp_path, module, ModelSaving(["best_valid_loss", "best_train_loss", "best_val_iou", "always"]))
    assert saved == {
        "best_valid_loss": [1, 3],
        "best_train_loss": [1, 2, 4],
        "best_val_iou": [1, 4],
        "always": [1, 2, 3, 4],
    }
    assert sorted(path.name for path in at(tmp_path).parent.iterdir()) == sorted(saved)
    found = about(tmp_path, "best_val_iou")
    assert found | {"hookline": ""} == {
        "format": "hookline-model/1",
        "policy": "best_val_iou",
        "step": 4,
        "epoch": 4,
        "metric": "val_iou",
        "value": pytest.approx(0.6),
        "tied": {},
        "hookline": "",
    }
    assert (about(tmp_path, "always")["metric"], about(tmp_path, "always")["value"]) == (None, None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mode": "min"}, [1, 2]),
        ({"mode": {"best_val_iou": "min"}}, [1, 2]),
        ({"mode": "max"}, [1, 4]),
        ({"above": 0.5}, [4]),
        ({"above": 0.5, "below": 0.6}, []),
        ({"mode": "min", "below": 0.5}, [2]),
        ({"mode": "min", "below": {"best_val_iou": 0.25}}, []),
    ],
)
def test_modes_and_limits(tmp_path, options, expected):
    module = Scripted(score=[0.5, 0.25, 0.5, 0.75])
    assert steps(tmp_path, module, ModelSaving("best_val_iou", **options)).get("best_val_iou", []) == expected


def test_the_best_value_is_kept_in_mind_where_it_is_not_saved(tmp_path):
    assert steps(tmp_path, Scripted(valid=[1, 3, 2, 0.5]), ModelSaving(above=1.5)) == {}
    assert steps(tmp_path, Scripted(valid=[4, 3, 2, 1]), ModelSaving(below=3)) == {"best_valid_loss": [3, 4]}


def test_what_is_not_finite_is_never_best(tmp_path):
    module = Scripted(valid=[nan, -inf, 3, nan], train=[nan, 2, nan, 1], score=[inf, nan, 1, nan])
    policies = ["best_valid_loss", "best_train_loss", "best_val_iou"]
    assert steps(tmp_path, module, ModelSaving(policies)) == {
        "best_valid_loss": [3],
        "best_train_loss": [2, 4],
        "best_val_iou": [3],
    }


def test_the_evaluation_before_the_first_step_counts_for_nothing(tmp_path):
    module = Scripted(valid=[3, 2, 4, -9])  # the last is that of step 0
    saved = steps(tmp_path, module, ModelSaving(), epochs=3, eval_when_start=True)
    assert saved == {"best_valid_loss": [1, 2]}


def test_an_evaluation_in_mid_epoch_saves_what_was_evaluated(tmp_path):
    class Checks(CallbackInterface):
        def __init__(self):
            self.evaluated, self.saved = {}, {}

        @hookimpl
        def on_end_validation(self, trainer):
            self.evaluated[trainer.global_step] = digest(trainer.export_model())

        @hookimpl
        def on_checkpoint(self, trainer, path):
            self.saved[trainer.global_step] = digest(load_file(path / "model.safetensors"))

    checks = Checks()
    tiny_trainer([ModelSaving("always"), checks], evaluate_every="3 steps", runs_folder=str(tmp_path)).train()
    assert list(checks.saved) == [3, 6, 9, 12, 14]
    assert checks.saved == checks.evaluated


def test_off_hears_nothing_and_leaves_nothing(tmp_path):
    trainer = tiny_trainer([ModelSaving(None)], runs_folder=str(tmp_path))
    trainer.train()
    assert not any(trainer.plugins.heard.values())
    assert not list(tmp_path.iterdir())


def test_what_wraps_export_model_is_saved(tmp_path):
    class Doubled(CallbackInterface):
        @hookimpl(wrapper=True)
        def export_model(self):
            return {name: tensor * 2 for name, tensor in (yield).items()}

    trained(tmp_path, Scripted(valid=[1]), ModelSaving(), Doubled(), epochs=1)
    assert load_file(at(tmp_path) / "model.safetensors")["weight"].item() == 2


def test_only_rank_0_writes_and_all_are_asked_for_the_weights(tmp_path):
    class Second(CallbackInterface):
        asked = 0

        @hookimpl
        def get_ranks(self):
            return 1, 1, 2

        @hookimpl(wrapper=True)
        def export_model(self):
            self.asked += 1
            return (yield)

    second, plugin = Second(), ModelSaving()
    assert steps(tmp_path, Scripted(valid=[3, 2]), plugin, second, epochs=2, train_batch_size=2) == {}
    assert second.asked == 2
    assert plugin.get_state()["saved"] == {"best_valid_loss": 2}
    assert not list(tmp_path.iterdir())


# What is said -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "module", "options", "said"),
    [
        ("best_valid_loss", {"validates": False}, {}, "there was no evaluation after a step; give the module get_val"),
        ("always", {"validates": False}, {}, "there was no evaluation after a step"),
        ("best_valid_loss", {"valid": [nan] * 4}, {}, "no evaluation after a step gave a finite val_loss"),
        ("best_val_iou", {"score": [nan] * 4}, {}, "no evaluation after a step gave a finite val_iou"),
        ("best_train_loss", {"train": [nan] * 4}, {}, "no epoch came to its end with a finite training loss"),
        ("best_valid_loss", {"valid": [4, 3, 2, 3]}, {"below": 2}, "the best value was 2, and it had to be below 2"),
    ],
)
def test_a_warning_where_nothing_was_saved(tmp_path, caplog, policy, module, options, said):
    with caplog.at_level(logging.WARNING, "hookline"):
        trained(tmp_path, Scripted(**module), ModelSaving(policy, **options))
    (message,) = [text for text in caplog.messages if text.startswith("model_saving.")]
    assert message.startswith(f"model_saving.policy={policy!r} has saved no model: {said}")


def test_no_warning_where_something_was_saved(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hookline"):
        trained(tmp_path, Scripted(valid=[4, 3, 2, 3]), ModelSaving(below=2.5))
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "best"}, "model_saving.policy='best': 'best' is no policy; there are \"best_valid_loss\""),
        ({"policy": ["always", 3]}, "3 is no policy; there are"),
        ({"policy": []}, "model_saving.policy=[] names nothing; write null"),
        ({"policy": ["always", "always"]}, "would be saved in one folder"),
        ({"policy": ["best_a/b", "best_a_b"]}, "'best_a_b' and 'best_a/b' would be saved in one folder"),
        ({"policy": "best_x", "mode": "up"}, "model_saving.mode='up': 'up' for best_x must be \"min\" or \"max\""),
        (
            {"mode": "max"},
            "model_saving.mode='max' is for no policy; among the policies of this run it can be for none",
        ),
        ({"policy": "best_x", "mode": {"best_y": "max"}}, "is for 'best_y'; among the policies of this run it can be"),
        ({"policy": "always", "below": 1.0}, "model_saving.below=1.0 is for no policy"),
        ({"below": "low"}, "model_saving.below='low': 'low' is no finite number"),
        ({"above": nan}, "model_saving.above=nan: nan is no finite number"),
        ({"above": 2, "below": 1}, "model_saving: no value of 'best_valid_loss' is above 2 and below 1"),
        ({"max_shard_size": "10"}, "model_saving.max_shard_size='10' is no size; write one like \"10GB\""),
        ({"max_shard_size": "0GB"}, "is no size"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelSaving(**options)


def test_options_of_a_configuration():
    given = OmegaConf.create({"policy": ["best_valid_loss", "best_x"], "below": {"best_x": 3}, "mode": "min"})
    merged = OmegaConf.merge(OmegaConf.structured(ModelSaving), given)
    plugin = ModelSaving(**OmegaConf.to_container(merged))
    assert plugin.policy == ["best_valid_loss", "best_x"]
    assert plugin.below == {"best_x": 3}


class Logs(Scripted):
    """Logs values by name, of each evaluation one, and has no loss."""

    def __init__(self, **values):
        super().__init__()
        self.values = values

    def val_step(self, global_step, batch, device):
        self.log(**{name: values[global_step - 1] for name, values in self.values.items()})


@pytest.mark.parametrize(
    ("name", "best"),
    [
        *((name, 2) for name in ("val_mse", "val_error", "val_perplexity", "val_wer", "val/rmse", "val_nll")),
        *((name, 3) for name in ("val_accuracy", "val_f1", "top5_acc", "val/mAP50")),
    ],
)
def test_the_best_is_what_the_name_says(tmp_path, name, best):
    trained(tmp_path, Logs(**{name: [2.0, 1.0, 3.0]}), ModelSaving(f"best_{name}"), epochs=3)
    assert about(tmp_path, re.sub(r"\W", "_", f"best_{name}"))["step"] == best


def test_a_metric_of_which_nobody_knows_asks_for_the_mode_before_any_step(tmp_path):
    module = Logs(val_score=[2.0, 1.0, 3.0])
    said = "model_saving.policy='best_val_score': nobody knows whether the smallest or the largest value of 'val_score'"
    with pytest.raises(ValueError, match=re.escape(said)):
        trained(tmp_path, module, ModelSaving("best_val_score"), epochs=3)
    assert module.weight.item() == 0
    assert steps(tmp_path, module, ModelSaving("best_val_score", mode="min"), epochs=3) == {"best_val_score": [1, 2]}


@pytest.mark.parametrize(
    ("policy", "has"),
    [("best_valid_loss", "'val_loss'; it has val_iou"), ("best_acc", "'acc'; it has val_iou")],
)
def test_what_no_evaluation_has_ends_the_run_when_its_state_is_saved(tmp_path, policy, has):
    module, memory = Logs(**{has.split("has ")[1]: [1.0, 2.0, 3.0]}), Memory()
    said = (
        f"model_saving.policy={policy!r}: the evaluation has no metric {has} (what a training step logs is not among it"
        "). Correct the name, or log this value in every evaluation; step 2 is saved, to go on with"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        trained(tmp_path, module, ModelSaving([policy, "best_train_loss"]), memory, evaluate_every="2 epochs")
    assert (module.weight.item(), memory.state["module"]["weight"].item()) == (2, 2)


@pytest.mark.parametrize("options", [{"sanity_val_steps": 1}, {"eval_when_start": True}])
def test_what_no_evaluation_has_ends_the_run_before_any_step_where_that_is_known(tmp_path, options):
    class Before(Scripted):
        def val_step(self, global_step, batch, device):
            return torch.tensor(1.0)

    with pytest.raises(ValueError, match="the evaluation has no metric 'val_acc'; it has val_loss"):
        trained(tmp_path, module := Before(), ModelSaving("best_val_acc"), **options)
    assert module.weight.item() == 0
    trained(tmp_path / "right", Before(), ModelSaving("best_val_loss"), **options)
    assert about(tmp_path / "right", "best_val_loss")["step"] == 1


class Prefixed(Scripted):
    """Logs a metric with the prefix that the plugin metrics gives, and from the third evaluation one without."""

    logged = 0

    def val_step(self, global_step, batch, device):
        self.logged += 1
        self.log(val_acc=[0.2, 0.9, 0.4][self.logged - 1], **({"acc": 5.0} if self.logged > 2 else {}))
        return torch.tensor(1.0)


def test_a_metric_may_be_named_without_its_val(tmp_path):
    assert steps(tmp_path, Prefixed(), ModelSaving("best_acc"), epochs=3) == {"best_acc": [1, 2]}
    assert about(tmp_path, "best_acc")["metric"] == "val_acc"
    trained(tmp_path / "sanity", Prefixed(), ModelSaving("best_acc"), epochs=1, sanity_val_steps=1)


class Differs(CallbackInterface):
    @hookimpl(wrapper=True)
    def get_mode(self, metric):
        known = yield
        return "min" if metric == "val_acc" else known


def test_two_names_that_say_different_things_ask_for_the_mode(tmp_path):
    said = "model_saving.policy='best_acc': the best is the max of 'acc' and min of 'val_acc', and the policy may"
    with pytest.raises(ValueError, match=said):
        trained(tmp_path, Prefixed(), ModelSaving("best_acc"), Differs())


# Resume -------------------------------------------------------------------------------


def test_a_resumed_run_knows_its_best(tmp_path):
    losses = {"valid": [3, 1, 2, 0.5], "train": [3, 1, 2, 0.5], "score": [3, 4, 3, 5]}
    policies = ["best_valid_loss", "best_train_loss", "best_val_iou"]
    memory = Memory()
    trained(tmp_path, Scripted(**losses), ModelSaving(policies), memory, epochs=2)
    assert about(tmp_path)["step"] == 2
    run = str(tmp_path / "run-1")
    resumed = Memory(memory.state)
    assert steps(tmp_path, Scripted(**losses), ModelSaving(policies), resumed, epochs=3, resume=run) == {}
    assert [about(tmp_path, policy)["step"] for policy in policies] == [2, 2, 2]
    saved = steps(tmp_path, Scripted(**losses), ModelSaving(policies), Memory(resumed.state), epochs=4, resume=run)
    assert saved == {policy: [4] for policy in policies}


def test_a_policy_that_joins_a_resumed_run(tmp_path):
    losses = {"valid": [3, 1, 2, 4], "train": [3, 1, 2, 0.5]}
    memory = Memory()
    trained(tmp_path, Scripted(**losses), ModelSaving("always"), memory, epochs=2)
    joined = [ModelSaving(["best_valid_loss", "best_train_loss"]), Memory(memory.state)]
    saved = steps(tmp_path, Scripted(**losses), *joined, epochs=4, resume=str(tmp_path / "run-1"))
    assert saved == {"best_valid_loss": [3], "best_train_loss": [4]}  # the trainer knows the best training loss


class RollsBack(CallbackInterface):
    """Goes back from step 2 to step 1, once."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.done = memory, False

    @hookimpl
    def on_boundary(self, trainer, global_step):
        if global_step == 2 and not self.done:
            self.done = True
            trainer.hook.set_run_state(trainer=trainer, state=self.memory.states[1], stage=Stage.TRAIN)


def test_what_is_rolled_back_is_not_saved(tmp_path):
    memory = Memory(every="1 step")
    plugins = [RollsBack(memory), memory, ModelSaving()]
    assert steps(tmp_path, Scripted(valid=[3, 2, 1]), *plugins, epochs=3) == {"best_valid_loss": [1, 2, 3]}


# On disk ------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
def test_plain_torch_loads_it(tmp_path, safe):
    trainer = tiny_trainer([ModelSaving("always", safe_serialization=safe)], runs_folder=str(tmp_path))
    trainer.train()
    folder, module = at(tmp_path, "always"), TinyModule()
    if safe:
        module.load_state_dict(load_file(folder / "model.safetensors"))
    else:
        module.load_state_dict(torch.load(folder / "pytorch_model.pt", weights_only=True))
    assert digest(module.state_dict()) == digest(trainer.module.state_dict())
    name = "model.safetensors" if safe else "pytorch_model.pt"
    assert sorted(path.name for path in folder.iterdir()) == sorted([name, "model.json"])
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / "model.json").stat().st_mode}


class Tied(Scripted):
    """Two layers with one weight, and one that is a part of a larger tensor, transposed."""

    def __init__(self, tie=True) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        if tie:
            self.second.weight = self.first.weight
        whole = torch.arange(60.0).reshape(10, 6)
        self.register_buffer("part", whole[:3].t() if tie else torch.zeros(6, 3))
        self.register_buffer("other", whole[2:5] if tie else torch.zeros(3, 6))
        self.register_buffer("flat", self.first.weight.detach().reshape(-1) if tie else torch.zeros(36))
        self.register_buffer("empty", torch.zeros(0))


@pytest.mark.parametrize("shard_size", ["10GB", "150B"])
def test_tied_weights_are_stored_once(tmp_path, shard_size):
    trained(tmp_path, module := Tied(), ModelSaving(max_shard_size=shard_size), epochs=1)
    files = sorted(at(tmp_path).glob("*.safetensors"))
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert about(tmp_path)["tied"] == {"second.weight": "first.weight"}
    assert "second.weight" not in weights
    assert all(tensor.is_contiguous() for tensor in weights.values())
    for file in files:
        with safe_open(file, "pt") as opened:
            named = {"second.weight": "first.weight"} if "first.weight" in load_file(file) else {}
            assert opened.metadata() == named | {"format": "pt"}
    weights |= {name: weights[first] for name, first in about(tmp_path)["tied"].items()}
    for tie in (True, False):  # into a module that is tied, and into one that is not
        other = Tied(tie)
        other.load_state_dict(weights)
        assert digest(other.state_dict()) == digest(module.state_dict())


class Pair(Scripted):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.second.weight = self.first.weight


def test_safetensors_own_load_model_knows_what_is_tied(tmp_path):
    trained(tmp_path, module := Pair(), ModelSaving(), epochs=1)
    other = Pair()
    load_model(other, at(tmp_path) / "model.safetensors")
    assert other.second.weight is other.first.weight
    assert digest(other.state_dict()) == digest(module.state_dict())


def test_a_pt_file_keeps_what_is_tied_and_no_more_than_the_weights(tmp_path):
    trained(tmp_path, module := Tied(), ModelSaving(safe_serialization=False), epochs=1)
    weights = torch.load(at(tmp_path) / "pytorch_model.pt", weights_only=True)
    assert weights["first.weight"].data_ptr() == weights["second.weight"].data_ptr()
    assert weights["part"].untyped_storage().nbytes() == weights["part"].nbytes
    assert {name: tensor.tolist() for name, tensor in weights.items()} == {
        name: tensor.tolist() for name, tensor in module.state_dict().items()
    }


def test_shards_and_their_index(tmp_path):
    plugin = ModelSaving("always", max_shard_size="400B")
    trainer = tiny_trainer([plugin], epochs=1, runs_folder=str(tmp_path))
    trainer.train()
    folder = at(tmp_path, "always")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    state = trainer.module.state_dict()
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert list(index["weight_map"]) == list(state)
    for file in files:
        shard = load_file(folder / file)
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= 400
        assert all(index["weight_map"][name] == file for name in shard)
    assert {"model.json", "model.safetensors.index.json", *files} == {path.name for path in folder.iterdir()}
    loaded = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert digest({name: loaded[name] for name in state}) == digest(dict(state))


def test_shards_of_pt(tmp_path):
    trained(tmp_path, module := Tied(), ModelSaving(safe_serialization=False, max_shard_size="150B"), epochs=1)
    index = json.loads((at(tmp_path) / "pytorch_model.pt.index.json").read_text())
    files = sorted(path.name for path in at(tmp_path).glob("*.pt"))
    assert files == [f"pytorch_model-{number:05d}-of-{len(files):05d}.pt" for number in range(1, len(files) + 1)]
    assert len(files) > 2
    parts = {file: torch.load(at(tmp_path) / file, weights_only=True) for file in files}
    assert index["weight_map"] == {name: file for file, part in parts.items() for name in part}
    other = Tied()
    other.load_state_dict({name: tensor for part in parts.values() for name, tensor in part.items()})
    assert digest(other.state_dict()) == digest(module.state_dict())
    tied = parts[index["weight_map"]["second.weight"]]
    assert tied["first.weight"].data_ptr() == tied["second.weight"].data_ptr()


def test_another_number_of_shards_leaves_none_of_the_old(tmp_path):
    memory = Memory()
    sharded = ModelSaving("always", max_shard_size="400B")
    tiny_trainer([sharded, memory], epochs=1, runs_folder=str(tmp_path)).train()
    again = [ModelSaving("always"), Memory(memory.state)]
    tiny_trainer(again, runs_folder=str(tmp_path), resume=str(tmp_path / "run-1")).train()
    assert sorted(path.name for path in at(tmp_path, "always").iterdir()) == ["model.json", "model.safetensors"]


def test_what_cannot_be_saved(tmp_path):
    module = Scripted()
    module.register_buffer("wide", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(TypeError, match="'wide' is torch.complex128, which safetensors does not have; set model_sav"):
        trained(tmp_path, module, ModelSaving(), epochs=1)
    trained(tmp_path, module, ModelSaving(safe_serialization=False), epochs=1)

    class Extra(Scripted):
        def get_extra_state(self):
            return {"text": "x"}

    with pytest.raises(TypeError, match="'_extra_state' of the model's weights is a dict; a model is saved as dense"):
        trained(tmp_path, Extra(), ModelSaving(), epochs=1)


# Failures and kills -------------------------------------------------------------------


class FullDisk(CallbackInterface):
    """Lets no file grow above 20 kB from an evaluation on."""

    def __init__(self, step: int) -> None:
        self.step, self.before = step, resource.getrlimit(resource.RLIMIT_FSIZE)

    @hookimpl
    def on_end_validation(self, global_step):
        if global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, self.before[1]))

    @hookimpl
    def on_end_run(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("safe", [True, False])
def test_a_write_that_fails_in_the_middle_leaves_the_old_model(tmp_path, safe):
    module = Scripted()
    module.register_buffer("large", torch.ones(100_000))
    plugin = ModelSaving("always", safe_serialization=safe)
    with pytest.raises(Exception, match="(?i)file too large|write") as raised:
        trained(tmp_path, module, plugin, FullDisk(3))
    assert any("what was saved there before is still there" in note for note in raised.value.__notes__)
    folder = at(tmp_path, "always")
    assert about(tmp_path, "always")["step"] == 2
    if safe:
        weights = load_file(folder / "model.safetensors")
    else:
        weights = torch.load(folder / "pytorch_model.pt", weights_only=True)
    assert weights["weight"].item() == 2
    assert [path.name for path in folder.parent.iterdir()] == ["always"]


SAVES = """
import sys
from pathlib import Path
import torch
from hookline.files import replacing
from hookline_model_saving.weights import write_safetensors

for number in range(10**9):
    with replacing(Path(sys.argv[1])) as folder:
        folder.mkdir()
        write_safetensors(folder, {"a": torch.full((2000,), float(number)), "b": torch.tensor(float(number))}, {}, 10)
    print(number, flush=True)
"""


@pytest.mark.parametrize("after", [1, 7])
def test_a_kill_at_any_moment_leaves_a_whole_model(tmp_path, after):
    process = subprocess.Popen([sys.executable, "-c", SAVES, str(tmp_path / "best")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(after):
        process.stdout.readline()
    process.kill()  # in the middle of the next save
    process.communicate()
    files = sorted((tmp_path / "best").glob("*.safetensors"))
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert weights["a"].tolist() == [weights["b"].item()] * 2000
    assert weights["b"] >= after - 1


def test_what_a_kill_has_left_is_cleared_or_put_back(tmp_path):
    memory = Memory()
    trained(tmp_path, Scripted(valid=[2, 1, 3]), ModelSaving(), memory, epochs=2)
    at(tmp_path).rename(at(tmp_path).with_name(".old-best_valid_loss"))
    (at(tmp_path).with_name(".new-best_valid_loss-0123abcd")).mkdir()
    resumed = [ModelSaving(), Memory(memory.state)]
    trained(tmp_path, Scripted(valid=[2, 1, 3]), *resumed, epochs=3, resume=str(tmp_path / "run-1"))
    assert about(tmp_path)["step"] == 2
    assert [path.name for path in at(tmp_path).parent.iterdir()] == ["best_valid_loss"]


def test_a_system_that_cannot_exchange_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # a C library without renameat2
    assert steps(tmp_path, Scripted(valid=[3, 2, 1, 2]), ModelSaving()) == {"best_valid_loss": [1, 2, 3]}
    assert [path.name for path in at(tmp_path).parent.iterdir()] == ["best_valid_loss"]
