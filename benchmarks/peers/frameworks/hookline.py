"""hookline's Trainer; for the features, its standard plugins."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.work import Work
from torch import Tensor, nn

from hookline import CallbackInterface, ModuleInterface, Trainer, hookimpl


class Module(ModuleInterface):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work, self.model = work, work.model()

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        inputs, targets = batch
        logits = self.model(inputs)
        loss = self.work.loss(logits, targets)
        return (loss, logits, targets) if self.work.features else loss

    def val_step(self, global_step: int, batch: Any, device: Any) -> Tensor:
        inputs, targets = batch
        return self.work.loss(self.model(inputs), targets)

    def get_train_dataloader(self, sampler: type, batch_size: int) -> Any:
        return self.work.loader(sampler)

    def get_val_dataloaders(self, sampler: type, batch_size: int) -> Any:
        return self.work.loader() if self.work.name == "validate" else None

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int | None, epochs: int) -> Any:
        return [self.work.optimizer(self.parameters())], []


class Callback(CallbackInterface):
    @hookimpl
    def on_end_train_step(self, global_step: int) -> None: ...


def _features() -> dict[str, Any]:
    from torchmetrics.classification import MulticlassAccuracy

    metrics = {"train": {"accuracy": MulticlassAccuracy(10, average="micro")}}
    return {"progress": {}, "jsonl": {}, "clip": {"max_norm": 1.0}, "checkpoint": {}, "metrics": metrics}


def train(work: Work) -> nn.Module:
    module = Module(work)
    plugins: dict[str, Any] = {f"callback-{number}": Callback() for number in range(work.callbacks)}
    if work.accumulate > 1:
        plugins["accumulate"] = {"steps": work.accumulate}
    if work.features:
        plugins |= _features()
    if work.ranks > 1:
        plugins["ddp"] = {}
    folder = "runs" if work.ranks > 1 else str(work.folder)  # ranks share one
    batch_size = 32 * work.accumulate * work.ranks
    Trainer(module, plugins, train_batch_size=batch_size, device="cpu", runs_folder=folder).train()
    return module.model


def validate(work: Work) -> float:
    return Trainer(Module(work), val_batch_size=32, device="cpu", runs_folder=str(work.folder)).validate()["val_loss"]
