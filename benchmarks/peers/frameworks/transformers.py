"""The Trainer of transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from benchmarks.peers.work import Work
from torch import nn

WITHOUT = {"ranks": "not tried: its loaders are given to it here"}


class Named:
    """Gives the batches by name, as this Trainer wants them."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.dataset = loader, range(32 * len(loader))

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        return ({"inputs": inputs, "labels": targets} for inputs, targets in self.loader)


class Callback(transformers.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None: ...


class Trainer(transformers.Trainer):
    def __init__(self, work: Work) -> None:
        self.work = work
        model = work.model()
        optimizer = work.optimizer(model.parameters())
        options: dict[str, Any] = {"max_grad_norm": 0.0, "disable_tqdm": True, "logging_strategy": "no"}
        if work.features:
            from torchmetrics.classification import MulticlassAccuracy

            self.accuracy = MulticlassAccuracy(10, average="micro")
            options = {"max_grad_norm": 1.0, "logging_steps": 50, "save_strategy": "epoch"}
        else:
            options["save_strategy"] = "no"
        arguments = transformers.TrainingArguments(
            output_dir=str(work.folder), num_train_epochs=1, use_cpu=True, report_to="none",
            gradient_accumulation_steps=work.accumulate, lr_scheduler_type="constant", **options,
        )  # fmt: skip
        callbacks: list[Any] = [Callback() for _ in range(work.callbacks)]
        super().__init__(model=model, args=arguments, optimizers=(optimizer, None), callbacks=callbacks)

    def get_train_dataloader(self) -> Any:
        return Named(self.work.loader())

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits = model(inputs["inputs"])
        if self.work.features:
            self.accuracy.update(logits.detach(), inputs["labels"])
        loss = self.work.loss(logits, inputs["labels"])
        return (loss, logits) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        with torch.no_grad():
            return self.compute_loss(model, inputs), None, None


def train(work: Work) -> nn.Module:
    trainer = Trainer(work)
    trainer.train()
    return trainer.model


def validate(work: Work) -> float:
    found = Trainer(work).evaluation_loop(Named(work.loader()), "evaluation", prediction_loss_only=True)
    return float(found.metrics["eval_loss"])
