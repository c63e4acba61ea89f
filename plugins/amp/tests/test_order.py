"""fp16, clipping and accumulation give the same bits in every listing order: the hook decides, not the list."""

import itertools

import pytest
import torch

from hookline import ModuleInterface, Trainer
from hookline_amp import Amp

clip = pytest.importorskip("hookline_clip")
accumulate = pytest.importorskip("hookline_accumulate")

WINDOW = 3
SCALER = {"init_scale": 2.0**20, "growth_interval": 2}
MAKERS = {
    "amp": lambda: Amp("fp16", **SCALER),
    "clip": lambda: clip.Clip(0.25),
    "accumulate": lambda: accumulate.Accumulate(steps=WINDOW),
}


class Regression(ModuleInterface):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        self.batches = [(x, x.sum(1, keepdim=True)) for x in torch.randn(20, 5, 4)]

    def train_step(self, global_step, batch, device):
        inputs, references = batch
        return torch.nn.functional.mse_loss(self.net(inputs).float(), references)

    def get_train_dataloader(self, sampler, batch_size):
        return self.batches

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


@pytest.fixture(scope="module")
def by_hand():
    """Return weights, scale and skipped steps of a loop without a framework."""
    module = Regression()
    (optimizer,), (scheduler,) = module.get_optimizers_schedulers(None, 2)
    scaler, skipped = torch.amp.GradScaler("cpu", **SCALER), 0
    for _ in range(2):
        for begin in range(0, len(module.batches), WINDOW):
            window = module.batches[begin : begin + WINDOW]
            for batch in window:
                with torch.autocast("cpu", torch.float16):
                    loss = module.train_step(0, batch, "cpu")
                scaler.scale(loss / len(window)).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.25)
            scaler.step(optimizer)
            scale = scaler.get_scale()
            scaler.update()
            if scaler.get_scale() < scale:
                skipped += 1
            else:
                scheduler.step()
            optimizer.zero_grad()
    return module.state_dict(), scaler.get_scale(), skipped


@pytest.mark.parametrize("order", [*itertools.permutations(MAKERS)], ids=" ".join)
def test_order_does_not_matter(order, by_hand):
    weights, scale, skipped = by_hand
    assert 0 < skipped < 14
    module = Regression()
    plugins = {name: MAKERS[name]() for name in order}
    trainer = Trainer(module, plugins=plugins, device="cpu", epochs=2, train_batch_size=WINDOW)
    trainer.train()
    for name, expected in weights.items():
        assert torch.equal(module.state_dict()[name], expected), name
    assert plugins["amp"].get_state()["scale"] == scale
    assert (trainer.counters.global_step, trainer.counters.skipped_steps) == (14, skipped)
    assert trainer.schedulers[0].scheduler.last_epoch == 14 - skipped
