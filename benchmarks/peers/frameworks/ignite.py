"""PyTorch-Ignite's engines."""

from __future__ import annotations

import json

import torch
from benchmarks.peers.work import Work
from ignite.engine import Engine, Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver
from ignite.handlers.tqdm_logger import ProgressBar
from ignite.metrics import Accuracy, Loss, RunningAverage
from torch import nn

WITHOUT = {"ranks": "not tried: its loaders are given to it here"}


def train(work: Work) -> nn.Module:
    model = work.model()
    optimizer = work.optimizer(model.parameters())
    if work.features:
        _with_features(work, model, optimizer).run(work.loader(), max_epochs=1)
        return model
    engine = create_supervised_trainer(
        model, optimizer, work.loss, device="cpu", gradient_accumulation_steps=work.accumulate
    )
    for _ in range(work.callbacks):
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: None)
    engine.run(work.loader(), max_epochs=1)
    return model


def _with_features(work: Work, model: nn.Module, optimizer: torch.optim.Optimizer) -> Engine:
    def step(engine: Engine, batch: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        inputs, targets = batch
        optimizer.zero_grad()
        logits = model(inputs)
        loss = work.loss(logits, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return {"loss": loss.detach(), "y_pred": logits.detach(), "y": targets}

    engine = Engine(step)
    RunningAverage(output_transform=lambda output: output["loss"]).attach(engine, "train_loss")
    Accuracy(output_transform=lambda output: (output["y_pred"], output["y"])).attach(engine, "accuracy")
    ProgressBar().attach(engine)
    saver = Checkpoint({"model": model, "optimizer": optimizer}, DiskSaver(work.folder, require_empty=False))
    engine.add_event_handler(Events.EPOCH_COMPLETED, saver)

    @engine.on(Events.ITERATION_COMPLETED(every=50))
    def log(engine: Engine) -> None:
        with open(work.folder / "log.jsonl", "a") as lines:
            values = {"step": engine.state.iteration, "train_loss": float(engine.state.metrics["train_loss"])}
            lines.write(json.dumps(values) + "\n")

    return engine


def validate(work: Work) -> float:
    evaluator = create_supervised_evaluator(work.model(), {"loss": Loss(work.loss)}, device="cpu")
    return float(evaluator.run(work.loader()).metrics["loss"])
