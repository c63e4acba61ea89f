"""A plugin on a CUDA device."""

from __future__ import annotations

from hookline.interfaces import CallbackInterface
from hookline.marks import hookimpl
from hookline.testing.checks.conduct import predict
from hookline.testing.checks.subject import Subject, check
from hookline.testing.fake_cuda import FakeCuda, fake_cuda
from hookline.testing.tiny import TinyModule

FIRST, LAST = 2, 4
"""The steps after which it is watched, and no more: the steps between are ordinary, nothing is logged or saved."""


class Quiet(TinyModule):
    """Does not look at what it trains on, which would wait for the device."""

    train_step = TinyModule.val_step


class Watching(CallbackInterface):
    """Watches the device in ordinary steps."""

    def __init__(self, device: FakeCuda) -> None:
        self.device = device

    @hookimpl
    def on_end_train_step(self, global_step: int) -> None:
        self.device.watching = FIRST <= global_step < LAST


@check("runs on a CUDA device, where an ordinary step neither waits for it nor copies from it", quick=False)
def check_device(subject: Subject) -> None:
    """Train on a device that is not there, evaluate, predict and export; look at what waits in ordinary steps."""
    few = {"epochs": 1, "val_batch_size": 40, "log_every": "1 epoch"}
    with fake_cuda() as device:
        plugins = [Watching(device), subject.make()]
        trainer = subject.train(*plugins, module=Quiet(samples=40), device="cuda", **few)
        predict(trainer)
        trainer.export_model()
    waits = "; ".join(dict.fromkeys(map(str, device.waits)))
    assert not waits, f"an ordinary step waits for the device: {waits}"
