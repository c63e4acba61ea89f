"""A plugin on devices that are not there: CUDA's, and one of another type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from hookline.interfaces import CallbackInterface
from hookline.marks import hookimpl
from hookline.testing.checks.conduct import predict
from hookline.testing.checks.subject import Subject, check
from hookline.testing.digest import digest
from hookline.testing.fake_cuda import FakeCuda, fake_cuda
from hookline.testing.faults import run
from hookline.testing.other_device import library, other_device
from hookline.testing.tiny import TinyModule, tiny_trainer

FIRST, LAST = 2, 4
"""The steps after which it is watched, and no more: the steps between are ordinary, nothing is logged or saved."""
FEW = {"epochs": 1, "val_batch_size": 40, "log_every": "1 epoch"}


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
    with fake_cuda() as device:
        plugins = [Watching(device), subject.make()]
        trainer = subject.train(*plugins, module=Quiet(samples=40), device="cuda", **FEW)
        predict(trainer)
        trainer.export_model()
    waits = "; ".join(dict.fromkeys(map(str, device.waits)))
    assert not waits, f"an ordinary step waits for the device: {waits}"


@check("trains, evaluates and predicts the numbers of the CPU on a device that is neither CPU nor CUDA", quick=False)
def check_other_device(subject: Subject) -> None:
    """Train on the CPU and on the other device, in a process of its own: torch keeps that device for good."""
    library()  # compiled here, where nobody counts the seconds
    outcome = run(_on_both, subject.make, dict(subject.options))
    assert outcome.code == 0, f"it fails on a device that is neither CPU nor CUDA:\n{outcome.output[-1500:]}"
    here, there = outcome.value
    differing = [name for name in here if here[name] != there[name]]
    assert not differing, f"on a device that is neither CPU nor CUDA it gives other {', '.join(differing)}"


def _on_both(make: Callable[[], Any], options: Mapping[str, Any]) -> list[dict[str, str]]:
    torch.set_num_threads(1)
    return [_trained(make, {**FEW, **options, "device": device}) for device in ("cpu", str(other_device()))]


def _trained(make: Callable[[], Any], options: Mapping[str, Any]) -> dict[str, str]:
    trainer = tiny_trainer([make()], Quiet(samples=40, dropout=0.0), **options)
    trainer.train()
    weights, metrics = digest(trainer.export_model()), digest(dict(trainer.metrics))
    return {"weights": weights, "metrics": metrics, "predictions": digest(trainer.predict(collect=True))}
