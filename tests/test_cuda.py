"""What needs a CUDA device, and what needs two of them."""

import os

import pytest
import torch

from hookline import CallbackInterface, Stage, hookimpl
from hookline.testing import TinyModule, digest, run_ranks, tiny_trainer

DEVICES = torch.cuda.device_count()
pytestmark = [pytest.mark.plugins, pytest.mark.skipif(DEVICES < 1, reason="needs CUDA")]
two_devices = pytest.mark.skipif(DEVICES < 2, reason="needs two CUDA devices")


class Quiet(TinyModule):
    """Does not look at what it trains on, which would wait for the device."""

    def train_step(self, global_step, batch, device):
        inputs, targets, _ = batch
        return torch.nn.functional.mse_loss(self.net(inputs), targets)


class NoWaiting(CallbackInterface):
    """Makes an error of whatever waits for the device in steps 4 to 12."""

    @hookimpl
    def on_end_train_step(self, global_step):
        torch.cuda.set_sync_debug_mode("error" if 3 <= global_step < 12 else "default")

    @hookimpl
    def on_end_run(self):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "plugins",
    [
        {},
        {"clip": {"max_norm": 1.0}, "ema": {}, "finite": {}, "watchdog": {}, "checkpoint": {}},
        {"amp": {"precision": "bf16"}},
    ],
)
def test_a_step_never_waits_for_the_device(plugins, tmp_path):
    module = Quiet(samples=200)
    trainer = tiny_trainer({**plugins, "no_waiting": NoWaiting()}, module, device="cuda", runs_folder=str(tmp_path))
    trainer.train()
    assert trainer.global_step == 50


def train(folder, plugins, **options):
    trainer = tiny_trainer(plugins, device="cuda", runs_folder=str(folder), **options)
    trainer.train()
    return digest(trainer.module.state_dict()), str(trainer.run_dir)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_resumed_run_has_the_same_bits(precision, asynchronous, tmp_path):
    plugins = {"amp": {"precision": precision}, "checkpoint": {"every": "3 steps", "asynchronous": asynchronous}}
    whole, _ = train(tmp_path / "whole", plugins)
    _, folder = train(tmp_path / "cut", plugins, max_steps=9)
    resumed, _ = train(tmp_path / "cut", plugins, resume=folder)
    assert resumed == whole


def train_on_two(folder, plugins):
    trainer = tiny_trainer(plugins, TinyModule(samples=48), device="cuda", runs_folder=str(folder))
    trainer.train()
    metrics = trainer.validate()
    assert (trainer.device.index, trainer.stage) == (int(os.environ["RANK"]), Stage.VAL)
    weights = {name: value.cpu() for name, value in trainer.export_model().items()}
    return digest(weights), metrics


@two_devices
@pytest.mark.parametrize("plugins", [{"ddp": {}}, {"fsdp": {}}])
def test_two_devices_train_one_model_over_nccl(plugins, tmp_path):
    outcomes = run_ranks(train_on_two, 2, tmp_path, plugins)
    assert [outcome.code for outcome in outcomes] == [0, 0], "\n".join(outcome.output for outcome in outcomes)
    assert outcomes[0].value == outcomes[1].value


def train_with_batch_norm(plugins):
    module = TinyModule(samples=48, dropout=0.0)
    tiny_trainer(plugins, module, device="cuda", evaluate_every=None).train()
    return {name: value.cpu() for name, value in module.state_dict().items()}


@two_devices
def test_batch_norm_over_two_devices_is_that_of_one():
    alone = train_with_batch_norm({})
    outcomes = run_ranks(train_with_batch_norm, 2, {"ddp": {}, "sync_batchnorm": {}})
    assert [outcome.code for outcome in outcomes] == [0, 0], "\n".join(outcome.output for outcome in outcomes)
    for outcome in outcomes:
        assert list(outcome.value) == list(alone)
        torch.testing.assert_close(outcome.value, alone)
