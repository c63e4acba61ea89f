"""Lightning's Trainer."""

from __future__ import annotations

from typing import Any

import lightning
from benchmarks.peers.work import Work
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


class Module(lightning.LightningModule):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work, self.model = work, work.model()
        if work.features:
            self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        logits = self.model(inputs)
        loss = self.work.loss(logits, targets)
        if self.work.features:
            self.accuracy(logits, targets)
            self.log("train_loss", loss)
            self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        self.log("val_loss", self.work.loss(self.model(inputs), targets), batch_size=len(targets))

    def configure_optimizers(self) -> Any:
        return self.work.optimizer(self.parameters())


class Batches:
    """Gives the batches of a list, which Lightning would take for several loaders."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


class Callback(lightning.Callback):
    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None: ...


def _trainer(work: Work) -> lightning.Trainer:
    options: dict[str, Any] = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "callbacks": [Callback() for _ in range(work.callbacks)],
    }  # fmt: skip
    if work.features:
        options = {
            "logger": CSVLogger(work.folder), "callbacks": [ModelCheckpoint(work.folder)], "gradient_clip_val": 1.0,
            "enable_model_summary": False,
        }  # fmt: skip
    if work.ranks > 1:
        options["strategy"] = "ddp"
    return lightning.Trainer(
        accelerator="cpu", devices=work.ranks, max_epochs=1, accumulate_grad_batches=work.accumulate, **options
    )


def _loader(work: Work) -> Any:
    loader = work.loader()
    return Batches(loader) if isinstance(loader, list) else loader


def train(work: Work) -> nn.Module:
    module = Module(work)
    _trainer(work).fit(module, _loader(work))
    return module.model


def validate(work: Work) -> float:
    return float(_trainer(work).validate(Module(work), _loader(work), verbose=False)[0]["val_loss"])
